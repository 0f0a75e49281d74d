"""PEFT's layout of an adapter: its keys, shapes and configuration.

PEFT can represent plain LoRA and DoRA on a layer (`target_modules`), and plain LoRA on a bare
parameter of a module (`target_parameters`), which may be a stack; in both cases the module's own
forward must read the weight. In PEFT's layout, a pair that starts from the weight (PiSSA, OLoRA)
becomes a plain pair of twice the rank, and the parts of a packed weight become one block-diagonal
pair. For other adapters, `why_not` says why PEFT would compute a different result.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..fx.calls import call_site, module_classes, named_argument
from ..module import CapturedModule
from ..module.adapted_weight import factors
from ..module.fsdp import has_fsdp
from ..module.skeleton import skeleton
from ..passes import Remove
from ..plan import Entry, Plan
from ..reads.readers import Reader
from ..reads.sites import find_sites

ROOT = "base_model.model."

# The layer class that PEFT wraps, by kind of op. PEFT treats its subclasses in the same way, but a
# subclass may have another forward.
LAYERS = {
    "linear": "torch.nn.modules.linear.Linear",
    "addmm": "transformers.pytorch_utils.Conv1D",
    "embedding": "torch.nn.modules.sparse.Embedding",
    "conv1d": "torch.nn.modules.conv.Conv1d",
    "conv2d": "torch.nn.modules.conv.Conv2d",
    "conv3d": "torch.nn.modules.conv.Conv3d",
}
VARIANTS = ((), ("from_weight",), ("dora",), ("from_weight", "dora"))
# Its fused kernel in eval mode reads the weights without calling the forwards of their modules.
FUSED_LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"

Tensors = Mapping[str, torch.Tensor]
Group = tuple[Entry, ...]  # the entries of one weight: a single one, or one per adapted part


def groups_of(plan: Iterable[Entry]) -> list[Group]:
    """Group entries by the weight that they adapt."""
    found: dict[tuple[str, ...], list[Entry]] = {}
    for entry in plan:
        found.setdefault(entry.names, []).append(entry)
    return [tuple(entries) for entries in found.values()]


def is_bare(entry: Entry) -> bool:
    """Whether PEFT targets the weight as a bare parameter, not as the weight of a layer."""
    return (
        entry.op not in LAYERS or not entry.parameter.endswith(".weight") or (entry.layout.stacked)
    )


def has_embedding_keys(entry: Entry) -> bool:
    """Whether PEFT adapts the weight as that of an nn.Embedding."""
    return entry.op == "embedding" and not is_bare(entry)


def owner_of(entry: Entry) -> str:
    """Return the path of the module that holds the weight."""
    return entry.parameter.rpartition(".")[0]


# ---- limits of PEFT ------------------------------------------------------------------------------


def why_not(module: CapturedModule, plan: Plan) -> str | None:
    """Return why PEFT would compute another result from this adapter, or None if it would not."""
    base = Remove(restore=False)(skeleton(module) if has_fsdp(module) else module)
    readers: dict[str, list[Reader]] = {}
    for site in find_sites(base):
        for name in site.names:
            readers.setdefault(name, []).extend(site.readers)
    if len({"dora" in entry.variants for entry in plan}) > 1:
        return "DoRA only at some sites"
    paths = Counter(id(held) for _, held in base.named_modules(remove_duplicate=False))
    for group in groups_of(plan):
        entry = group[0]
        found = {id(r): r for name in entry.names for r in readers.get(name, ())}
        shared = paths[id(base.get_submodule(owner_of(entry)))] > 1
        why = _why_not_these(group) or _why_not_read(entry, list(found.values()), shared)
        if why:
            return f"'{entry.site}': {why}"
    return _why_not_together(base, plan)


def _why_not_these(group: Group) -> str | None:
    """Return why PEFT has no equal of the entries of one weight, or None."""
    entry = group[0]
    if any(e.variants not in VARIANTS for e in group):
        return f"variant {', '.join(entry.variants)}"
    if entry.part and len({(e.scaling, e.variants) for e in group}) > 1:
        return "parts that are scaled or start differently"
    if "dora" in entry.variants and (entry.part or is_bare(entry)):
        return "DoRA of a part" if entry.part else "DoRA of a bare parameter"
    if entry.part and entry.layout.roles not in ("oi", "io"):
        return "parts of a weight that is not a matrix"
    return None


def _why_not_read(entry: Entry, readers: Sequence[Reader], shared: bool) -> str | None:
    """Return why PEFT would not adapt all reads of a weight, or None.

    Args:
        entry: an entry of the weight.
        readers: all reads of the weight.
        shared: whether its module has several paths.
    """
    owner = owner_of(entry)
    if not owner:
        return "a parameter of the model itself"
    if shared:
        return "one module under several names"
    for reader in readers:
        below = is_bare(entry) and reader.call_site.startswith(f"{owner}.")
        if reader.call_site != owner and not below:
            return f"{reader.describe()} outside of the forward of '{owner}'"
    if any(r.op is None for r in readers):
        return f"read by {next(r.kind for r in readers if r.op is None)}"
    why = _why_not_parameter if is_bare(entry) else _why_not_layer
    return next(filter(None, (why(entry, reader) for reader in readers)), None)


def _why_not_layer(entry: Entry, reader: Reader) -> str | None:
    """Return why PEFT's wrapper of a layer would compute another result at this read, or None."""
    classes = module_classes(reader.node)
    if reader.through or not classes or classes[-1] != LAYERS[entry.op]:
        return f"read by {classes[-1] if classes else 'a module of unknown class'}"
    if FUSED_LAYER in classes:
        return "in a torch.nn.TransformerEncoderLayer, whose fused kernel may bypass its layers"
    if entry.layout.kernel(entry.shape):
        padded = [n for n in reader.node.all_input_nodes if n.op != "get_attr"]
        dilation = named_argument(reader.node, "dilation") or [1]
        if named_argument(reader.node, "groups") not in (None, 1):
            return "a grouped convolution"
        if any(n != 1 for n in dilation) or any(call_site(n) == owner_of(entry) for n in padded):
            return "a convolution with dilation, or with padding by another op"
    return None


def _why_not_parameter(entry: Entry, reader: Reader) -> str | None:
    """Return why PEFT's wrapper of a bare parameter would compute a different result, or None."""
    if entry.layout.roles not in ("oi", "io", "eoi", "eio"):
        return f"a parameter laid out as {entry.layout.roles}"
    if entry.dropout:
        return "lora_dropout on a bare parameter"
    if entry.layout.roles == "eio" and entry.shape[1] == entry.shape[2]:
        return "a stack of square matrices (in, out), which PEFT may take for (out, in)"
    return None


def _why_not_together(module: CapturedModule, plan: Plan) -> str | None:
    """Return why one configuration of PEFT cannot target exactly these weights, or None."""
    bare = {e.parameter: owner_of(e) for e in plan if is_bare(e)}
    layers = {owner_of(e) for e in plan if not is_bare(e)}
    if both := layers & set(bare.values()):
        return f"'{both.pop()}' targeted both as a layer and by a parameter"
    for name, _ in module.named_parameters(remove_duplicate=False):
        if name not in bare and any(end in bare for end in _name_suffixes(name)):
            return f"a parameter whose name is the end of '{name}', which PEFT would adapt too"
    return None


def _name_suffixes(name: str) -> Iterator[str]:
    """Yield the shorter suffixes of a dotted name: "b.c" and "c" for "a.b.c"."""
    while "." in name:
        name = name.partition(".")[2]
        yield name


# ---- keys ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrappers:
    """The modules that PEFT wraps: once for a layer, or in nested wrappers, one per bare parameter.

    Attributes:
        targets: the names of the adapted parameters of each module, in the module's order, by the
            module's path.
    """

    targets: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, module: CapturedModule, plan: Iterable[Entry]) -> Wrappers:
        found: dict[str, list[str]] = {}
        for entry in plan:
            names = found.setdefault(owner_of(entry), [])
            names += [] if entry.parameter in names else [entry.parameter]
        order = {
            name: number
            for number, (name, _) in enumerate(module.named_parameters(remove_duplicate=False))
        }
        return cls({o: tuple(sorted(n, key=lambda x: order.get(x, 0))) for o, n in found.items()})

    def inside(self, name: str) -> str:
        """Return the key of a tensor of the base model: each wrapper adds a `base_layer` to it."""
        owner, _, last = name.rpartition(".")
        return f"{self._path(owner, len(self.targets.get(owner, ())))}.{last}".removeprefix(".")

    def site(self, entry: Entry) -> str:
        """Return the key of a weight's wrapper: the first parameter's is the innermost."""
        owner = owner_of(entry)
        around = self.targets[owner]
        return self._path(owner, len(around) - 1 - around.index(entry.parameter))

    def _path(self, module: str, depth: int) -> str:
        """Return the key of a module, inside `depth` of its own wrappers."""
        parts: list[str] = []
        walked = ""
        for part in module.split(".") if module else []:
            if walked:
                parts += ["base_layer"] * len(self.targets.get(walked, ()))
            walked = f"{walked}.{part}".removeprefix(".")
            parts.append(part)
        return ".".join([*parts, *["base_layer"] * depth])


# ---- tensors ------------------------------------------------------------------------------------


def encoded(group: Group, values: Tensors) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors for the entries of one weight, by the ends of their keys."""
    entry = group[0]
    pairs = [factors(e, values) for e in group]
    a, b = pairs[0]
    if entry.part is not None:  # the parts' pairs become one, with a block-diagonal B
        a = torch.cat([down for down, _ in pairs])  # (sum of ranks, in)
        b = a.new_zeros(entry.shape[entry.layout.part_dim], a.shape[0])
        for e, (start, stop), (_, up) in zip(group, _ranks(group), pairs, strict=True):
            assert e.rows is not None
            b[e.rows[0] : e.rows[1], start:stop] = up
    if is_bare(entry):
        a, b = _as_parameter(entry, a, b)
    found = dict(zip(_key_suffixes(entry), (a, b), strict=True))
    if "dora" in entry.variants:
        magnitude = values[entry.name_of("lora_magnitude_vector")]
        kernel = [1] * len(entry.layout.kernel(entry.shape))
        found["lora_magnitude_vector"] = magnitude.reshape([1, -1, *kernel] if kernel else [-1])
    return found


def decoded(group: Group, stored: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of a weight's entries by name: the inverse of `encoded`."""
    first = group[0]
    a, b = (stored[end] for end in _key_suffixes(first))
    if is_bare(first):
        a, b = _from_parameter(first, a, b)
    found: dict[str, torch.Tensor] = {}
    dim_a, dim_b = first.layout.rank_dims
    for entry, (start, stop) in zip(group, _ranks(group), strict=True):
        down, up = a.narrow(dim_a, start, stop - start), b.narrow(dim_b, start, stop - start)
        if entry.rows is not None:
            up = up[entry.rows[0] : entry.rows[1]]
        found |= {
            entry.name_a: down.narrow(dim_a, 0, entry.r),
            entry.name_b: up.narrow(dim_b, 0, entry.r),
        }
        if "from_weight" in entry.variants:
            found[entry.name_of("lora_start_A")] = down.narrow(dim_a, entry.r, entry.r)
            found[entry.name_of("lora_start_B")] = up.narrow(dim_b, entry.r, entry.r)
    if "dora" in first.variants:
        found[first.name_of("lora_magnitude_vector")] = stored["lora_magnitude_vector"].flatten()
    return found


def shapes_of(group: Group) -> dict[str, tuple[int, ...]]:
    """Return the shapes of PEFT's tensors for one weight, by the ends of their keys."""
    empty = {
        name: torch.empty(shape, device="meta")
        for entry in group
        for name, shape in entry.tensors.items()
    }
    return {end: tuple(tensor.shape) for end, tensor in encoded(group, empty).items()}


def rank(group: Group) -> int:
    """Return the rank of PEFT's pair for one weight."""
    return _ranks(group)[-1][1]


def _ranks(group: Group) -> list[tuple[int, int]]:
    """Return the (start, stop) of each entry in the rank dimension of PEFT's pair."""
    found: list[tuple[int, int]] = []
    end = 0
    for entry in group:
        size = entry.r * (2 if "from_weight" in entry.variants else 1)
        found.append((end, end + size))
        end += size
    return found


def _key_suffixes(entry: Entry) -> tuple[str, str]:
    """Return the suffixes of PEFT's keys for A and B."""
    if has_embedding_keys(entry):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"


def _as_parameter(
    entry: Entry, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in PEFT's shapes for a bare parameter.

    For a stack these are (e, r, in) → (e·r, in) and (e, out, r) → (out, r·e): the index in the
    stack varies slowest in A and fastest in B. PEFT takes every bare weight as (out, in), so for a
    weight stored as (in, out), A and B are transposed and exchanged.
    """
    if entry.layout.in_first:
        a, b = b.mT, a.mT
    if not entry.layout.stacked:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _from_parameter(
    entry: Entry, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in fxlora's shapes: the inverse of `_as_parameter`."""
    if entry.layout.stacked:
        count = entry.shape[0]
        a = a.unflatten(0, (count, -1))
        b = b.unflatten(1, (-1, count)).permute(2, 0, 1)
    return (b.mT, a.mT) if entry.layout.in_first else (a, b)


# ---- configuration ------------------------------------------------------------------------------


def configuration(module: CapturedModule, plan: Plan) -> dict[str, Any]:
    """Return the configuration under which PEFT reads the same adapter."""
    groups = groups_of(plan)
    # PEFT has one use_rslora for all sites. If they differ, it is off and alpha gives the scaling.
    rslora = bool(plan) and all(_is_rslora(entry) for entry in plan)
    ranks = {_target(g[0]): rank(g) for g in groups}
    alphas = {
        _target(g[0]): _whole(g[0].scaling * (math.sqrt(rank(g)) if rslora else rank(g)))
        for g in groups
    }
    r, alpha = (_commonest(ranks.values()), _commonest(alphas.values())) if plan else (8, 8)
    layers = [_target(g[0]) for g in groups if not is_bare(g[0])]
    bare = [_target(g[0]) for g in groups if is_bare(g[0])]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        **plan.descriptions,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max((entry.dropout for entry in plan), default=0.0) if not bare else 0.0,
        "target_modules": _modules(module, layers) if layers or not bare else None,
        "target_parameters": bare or None,
        "rank_pattern": {_exactly(site): n for site, n in ranks.items() if n != r},
        "alpha_pattern": {_exactly(site): n for site, n in alphas.items() if n != alpha},
        "modules_to_save": list(plan.modules_to_save) or None,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": any("dora" in entry.variants for entry in plan),
        # PEFT sets this by itself for a Conv1D, and refuses it together with target_parameters.
        "fan_in_fan_out": not bare and any(entry.op == "addmm" for entry in plan),
        "init_lora_weights": True,
    }


def _target(entry: Entry) -> str:
    """Return the name by which PEFT targets a weight: the parameter's, or the layer's path."""
    return entry.parameter if is_bare(entry) else owner_of(entry)


def _is_rslora(entry: Entry) -> bool:
    """Whether the scaling is that of rsLoRA, alpha/√r (for r = 1, the two are equal)."""
    return entry.r > 1 and math.isclose(entry.scaling, entry.alpha / math.sqrt(entry.r))


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float:
    """Return an alpha without the rounding of alpha / r * r, as an integer if it is whole."""
    near = round(float(value), 9)
    return int(near) if near.is_integer() else near


def _modules(module: CapturedModule, sites: list[str]) -> list[str] | str:
    """Return `target_modules` that match only these sites.

    PEFT matches each name in a list also as the end of a longer path, but a single regular
    expression only as a whole. So the list of names is used unless a name is such an end.
    """
    held = {*module.state_dict(), *dict(module.named_parameters(remove_duplicate=False))}
    own = held - module.adapter_parameters()  # PEFT's model does not have the adapters' modules
    paths = {name[:end] for name in own for end, letter in enumerate(name) if letter == "."}
    wanted = set(sites)
    if any(end in wanted for path in paths for end in _name_suffixes(path)):
        return "|".join(re.escape(site) for site in sites)
    return sites


def _exactly(site: str) -> str:
    """Return a pattern for one site: PEFT would match the bare name as the end of a path, too."""
    return f"^{re.escape(site)}"
