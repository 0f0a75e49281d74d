"""PEFT's pairs of A and B: the weight that each is for, and the layout of that weight.

PEFT's file does not say of which class a layer is. The shapes of A, B and the weight do, except for
square matrices, which may be stored (out, in) or (in, out).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ...errors import AdapterError
from ...lora.layout import Layout
from ...plan import Entry
from ...tables import some
from ..folder import Folder
from ..keys import CONFIG
from ..peft import ROOT, Wrappers, owner_of
from .base import Checkpoint
from .model import Skeleton
from .prefix import Prefix
from .settings import Settings

ENDS = (
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    "lora_magnitude_vector",
)
EMBEDDING = ("embedding", "io")
LAYERS = {  # by the weight's number of dimensions
    2: (("linear", "oi"), ("addmm", "io")),
    3: (("conv1d", "oik"),),
    4: (("conv2d", "oikk"),),
    5: (("conv3d", "oikkk"),),
}
# PEFT takes a bare matrix for (out, in), and a stack too, unless its module says `is_transposed`.
PARAMETERS = {2: (("parameter", "oi"),), 3: (("parameter", "eoi"), ("transposed", "eio"))}


# ---- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """The tensors of all pairs in a file.

    Attributes:
        owners: for each module, the tensors of its pairs, by the ends of their keys; the outermost
            of PEFT's nested wrappers first.
    """

    owners: Mapping[str, tuple[Mapping[str, torch.Tensor], ...]]
    _found: dict[tuple[str, Prefix], list[tuple[Entry, ...]]] = field(
        default_factory=dict[tuple[str, Prefix], list[tuple[Entry, ...]]], compare=False, repr=False
    )

    @classmethod
    def of(cls, content: Folder) -> tuple[Pairs, list[str]]:
        """Return the pairs in a file, and the keys of its other tensors."""
        found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
        others: list[str] = []
        for key, tensor in content.tensors.items():
            end = next((e for e in ENDS if key.endswith(f".{e}")), None)
            if end is None or not key.startswith(ROOT):
                others.append(key)
                continue
            parts = key[len(ROOT) : -len(end)].rstrip(".").split(".")
            around = len(list(itertools.takewhile("base_layer".__eq__, reversed(parts))))
            owner = ".".join(part for part in parts if part != "base_layer")
            found.setdefault(owner, {}).setdefault(around, {})[end] = tensor
        for owner, pairs in found.items():
            if sorted(pairs) != list(range(len(pairs))):
                raise AdapterError(f"{content.path} lacks the outer pairs of '{owner}'.")
        ordered = {o: tuple(pairs[d] for d in sorted(pairs)) for o, pairs in found.items()}
        return cls(ordered), others

    def misfit(self, settings: Settings, base: Checkpoint, prefix: Prefix) -> str | None:
        """Say which pair has no weight in the checkpoint."""
        children = _children(base)
        for owner in self.owners:
            if not self._fitting(owner, settings, base, children, prefix):
                held = children.get(prefix(owner), ())
                shapes = [f"{n} {base.tensors[n].shape}" for n in held] or ["nothing"]
                pairs = [
                    f"{end} {tuple(t.shape)}" for p in self.owners[owner] for end, t in p.items()
                ]
                return (
                    f"no weight for '{owner}' with {some(pairs)} (of the ranks that {CONFIG} "
                    f"gives): '{prefix(owner)}' has {some(shapes)}"
                )
        return None

    def entries(
        self, settings: Settings, base: Checkpoint, prefix: Prefix, model: Skeleton | None
    ) -> Iterator[tuple[Entry, dict[str, torch.Tensor]]]:
        """Yield each weight's entry, and its tensors by name.

        Raises:
            AdapterError: the weight or its layout is ambiguous.
        """
        children = _children(base)
        for owner, pairs in self.owners.items():
            fitting = self._fitting(owner, settings, base, children, prefix)
            if len(fitting) > 1 and model is not None:
                fitting = _by_model(fitting, owner, model)
            elif len(fitting) > 1:
                fitting = _by_bias(fitting, owner, settings, base, prefix)
            if len(fitting) != 1:
                said = some(
                    dict.fromkeys(f"{e.parameter} as {e.layout.roles}" for o in fitting for e in o)
                )
                raise AdapterError(
                    f"the pair of '{owner}' fits in several ways ({said}; o: outputs, i: inputs, "
                    "e: experts). Pass the model of the checkpoint (--model module:callable, "
                    "model=…), or fold with the model itself: fxlora fold MODEL --adapter …"
                )
            for entry, pair in zip(fitting[0], pairs, strict=True):
                yield entry, _decoded(entry, pair)

    def _fitting(
        self,
        owner: str,
        settings: Settings,
        base: Checkpoint,
        children: Mapping[str, list[str]],
        prefix: Prefix,
    ) -> list[tuple[Entry, ...]]:
        """Return the ways in which a module's pairs fit weights of it: an entry for each pair."""
        if (owner, prefix) in self._found:
            return self._found[owner, prefix]
        pairs = self.owners[owner]
        held = {n: f"{owner}.{n.rpartition('.')[2]}" for n in children.get(prefix(owner), ())}
        names = [name for n, name in held.items() if prefix(name) == n]
        bare = [name for name in names if settings.targets(name)]
        layer = f"{owner}.weight"
        chosen = [(name, PARAMETERS) for name in bare]
        if layer in names and layer not in bare and len(pairs) == 1:
            chosen.append((layer, LAYERS))
        found: list[tuple[Entry, ...]] = []
        for order in itertools.permutations(chosen, len(pairs)):
            each = [
                list(
                    _entries(owner, name, tables, pair, settings, base.tensors[prefix(name)].shape)
                )
                for (name, tables), pair in zip(order, pairs, strict=True)
            ]
            found += itertools.product(*each)
        self._found[owner, prefix] = found
        return found


def _children(base: Checkpoint) -> dict[str, list[str]]:
    """Return the checkpoint's tensors by the module that holds them."""
    found: dict[str, list[str]] = {}
    for name in base.tensors:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def _entries(
    owner: str,
    parameter: str,
    tables: Mapping[int, tuple[tuple[str, str], ...]],
    pair: Mapping[str, torch.Tensor],
    settings: Settings,
    shape: tuple[int, ...],
) -> Iterator[Entry]:
    """Yield the entries of a weight whose tensors have a pair's keys and shapes."""
    shapes = {end: tuple(tensor.shape) for end, tensor in pair.items()}
    embedding = "lora_embedding_A" in pair
    ways = tables.get(len(shape), ())
    if embedding:
        ways = (EMBEDDING,) if tables is LAYERS and len(shape) == 2 else ()
    target = owner if tables is LAYERS else parameter
    rank, alpha = settings.rank(target), settings.alpha(target)
    if all(rank > size for tensor_shape in shapes.values() for size in tensor_shape):
        return  # also: a rank too large to compute with
    for op, roles in ways:
        entry = Entry(
            site=target,
            parameter=parameter,
            names=(parameter,),
            op=op,
            shape=shape,
            layout=Layout(roles),
            form="weight",
            reason="",
            r=rank,
            alpha=alpha,
            scaling=settings.config.scaling(rank, alpha),
            dropout=0.0,
            init=True,
            adapter="default",
            rule=1,
            variants=("dora",) if "lora_magnitude_vector" in pair else (),
        )
        if settings.config.use_dora == ("dora" in entry.variants) and _shapes(entry) == shapes:
            yield entry


def _shapes(entry: Entry) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of PEFT's tensors for a weight, by the ends of their keys."""
    if entry.op != "transposed":
        return _wrapper(entry).shapes((entry,))
    (size_e, size_i, size_o), r = entry.shape, entry.r
    return {"lora_A.weight": (size_e * r, size_i), "lora_B.weight": (size_o, r * size_e)}


def _wrapper(entry: Entry) -> Wrappers:
    return Wrappers.over((entry,), {owner_of(entry): (entry.parameter,)})


def _decoded(entry: Entry, pair: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an entry by name: A (…, r, in) and B (…, out, r)."""
    if entry.op != "transposed":
        return _wrapper(entry).decoded((entry,), pair)
    a, b = pair["lora_A.weight"], pair["lora_B.weight"]
    experts = entry.shape[0]
    return {
        entry.name_a: a.unflatten(0, (experts, -1)),
        entry.name_b: b.unflatten(1, (-1, experts)).permute(2, 0, 1),
    }


# ---- ambiguous layouts --------------------------------------------------------------------------


def _by_model(
    fitting: list[tuple[Entry, ...]], owner: str, model: Skeleton
) -> list[tuple[Entry, ...]]:
    """Return the ways that are those of a model's module."""
    order = model.order(owner)
    # PEFT wraps a module's parameters in its order, the first one innermost.
    fitting = [f for f in fitting if _in_order([order.index(e.parameter) for e in reversed(f)])]
    transposed = model.transposed(owner)
    out_of = {"addmm"} if not transposed else {"linear"}
    # Older versions of PEFT took every stack for (in, out): without `is_transposed`, both may be.
    if model.transposes_stacks(owner):
        stacks = [f for f in fitting if all(e.op == "transposed" or len(e.shape) < 3 for e in f)]
        fitting = stacks or fitting
    return [f for f in fitting if not any(e.op in out_of for e in f)]


def _in_order(numbers: list[int]) -> bool:
    return numbers == sorted(numbers)


def _by_bias(
    fitting: list[tuple[Entry, ...]],
    owner: str,
    settings: Settings,
    base: Checkpoint,
    prefix: Prefix,
) -> list[tuple[Entry, ...]]:
    """Return the ways in which a square matrix of a layer is stored, as biases tell.

    PEFT takes no layers for (in, out) but those of Hugging Face's Conv1D, which has a bias always.
    With one, it is as the checkpoint's other matrices with biases, if all are alike and PEFT's
    configuration agrees.
    """
    if {e.op for ways in fitting for e in ways} != {"linear", "addmm"}:
        return fitting
    if f"{prefix(owner)}.bias" not in base.tensors:
        return [ways for ways in fitting if ways[0].op == "linear"]
    stored = {
        "addmm" if size == weight.shape[1] else "linear"
        for name, weight in base.tensors.items()
        if name.endswith(".weight") and len(weight.shape) == 2 and len(set(weight.shape)) == 2
        if (bias := base.tensors.get(f"{name.removesuffix('weight')}bias")) is not None
        if len(bias.shape) == 1 and (size := math.prod(bias.shape)) in weight.shape
    }
    if stored == {"addmm" if settings.transposed else "linear"}:
        return [ways for ways in fitting if ways[0].op in stored]
    return fitting
