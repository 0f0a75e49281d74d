"""PEFT's layout of an adapter: its keys and shapes.

PEFT can represent plain LoRA and DoRA on a layer (`target_modules`), and plain LoRA on a bare
parameter of a module (`target_parameters`), which may be a stack; in both cases the module's own
forward must read the weight. In PEFT's layout, a pair that starts from the weight (PiSSA, OLoRA)
becomes a plain pair of twice the rank, and the parts of a packed weight become one block-diagonal
pair. For other adapters, `limits.why_not` says why PEFT would compute a different result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..module import CapturedModule
from ..module.adapted_weight import factors
from ..plan import Entry

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


def is_transposed(module: CapturedModule, entry: Entry) -> bool | None:
    """Return the attribute by which a module tells PEFT that its stacks are (e, in, out).

    PEFT takes a stack of a module without it for (e, out, in). None if the capture did not see the
    attribute read: the module may have none.
    """
    found = module.known.read_values.get(f"{owner_of(entry)}.is_transposed")
    return found if isinstance(found, bool) else None


# ---- keys ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrappers:
    """The modules that PEFT wraps: once for a layer, or in nested wrappers, one per bare parameter.

    Attributes:
        targets: the names of the adapted parameters of each module, in the module's order, by the
            module's path.
        bare: the parameters that PEFT targets as parameters, not as weights of layers.
        transposed: the stacks whose module says that they are (e, in, out).
        lookups: the weights that PEFT wraps as those of embeddings.
    """

    targets: Mapping[str, tuple[str, ...]]
    bare: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    lookups: frozenset[str] = frozenset()

    @classmethod
    def of(cls, module: CapturedModule, plan: Iterable[Entry]) -> Wrappers:
        plan = tuple(plan)
        found: dict[str, list[str]] = {}
        for entry in plan:
            names = found.setdefault(owner_of(entry), [])
            names += [] if entry.parameter in names else [entry.parameter]
        order = {
            name: number
            for number, (name, _) in enumerate(module.named_parameters(remove_duplicate=False))
        }
        stacks = {e.parameter for e in plan if e.layout.stacked and is_transposed(module, e)}
        targets = {o: tuple(sorted(n, key=lambda x: order.get(x, 0))) for o, n in found.items()}
        return cls.over(plan, targets, stacks)

    @classmethod
    def over(
        cls,
        plan: Iterable[Entry],
        targets: Mapping[str, tuple[str, ...]],
        transposed: Iterable[str] = (),
    ) -> Wrappers:
        """Return the wrappers of a plan's weights, given what only the module tells."""
        plan = tuple(plan)
        bare = {e.parameter for e in plan if is_bare(e)}
        lookups = {e.parameter for e in plan if has_embedding_keys(e)}
        return cls(targets, frozenset(bare), frozenset(transposed), frozenset(lookups))

    def inside(self, name: str) -> str:
        """Return the key of a tensor of the base model: each wrapper adds a `base_layer` to it."""
        owner, _, last = name.rpartition(".")
        return f"{self._path(owner, len(self.targets.get(owner, ())))}.{last}".removeprefix(".")

    def site(self, entry: Entry) -> str:
        """Return the key of a weight's wrapper: the first parameter's is the innermost."""
        owner = owner_of(entry)
        around = self.targets[owner]
        return self._path(owner, len(around) - 1 - around.index(entry.parameter))

    def encoded(self, group: Group, values: Tensors) -> dict[str, torch.Tensor]:
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
        if entry.parameter in self.bare:
            a, b = _as_parameter(entry, a, b, self._turned(entry))
        elif self._turns_lookup(entry):
            a, b = b.mT, a.mT
        found = dict(zip(self._key_suffixes(entry), (a, b), strict=True))
        if "dora" in entry.variants:
            magnitude = values[entry.name_of("lora_magnitude_vector")]
            kernel = [1] * len(entry.layout.kernel(entry.shape))
            found["lora_magnitude_vector"] = magnitude.reshape([1, -1, *kernel] if kernel else [-1])
        return found

    def decoded(self, group: Group, stored: Tensors) -> dict[str, torch.Tensor]:
        """Return the tensors of a weight's entries by name: the inverse of `encoded`."""
        first = group[0]
        a, b = (stored[end] for end in self._key_suffixes(first))
        if first.parameter in self.bare:
            a, b = _from_parameter(first, a, b, self._turned(first))
        elif self._turns_lookup(first):
            a, b = b.mT, a.mT
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
            magnitude = stored["lora_magnitude_vector"].flatten()
            found[first.name_of("lora_magnitude_vector")] = magnitude
        return found

    def _turned(self, entry: Entry) -> bool:
        """Whether PEFT takes the dimensions of a bare weight in the other order than fxlora."""
        return entry.layout.in_first != (entry.parameter in self.transposed)

    def _turns_lookup(self, entry: Entry) -> bool:
        """Whether a weight that PEFT looks up is (out, in) here, as where the indices are fixed."""
        return entry.parameter in self.lookups and not entry.layout.in_first

    def _key_suffixes(self, entry: Entry) -> tuple[str, str]:
        """Return the suffixes of PEFT's keys for A and B."""
        if entry.parameter in self.lookups:
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"

    def shapes(self, group: Group) -> dict[str, tuple[int, ...]]:
        """Return the shapes of PEFT's tensors for one weight, by the ends of their keys."""
        empty = {
            name: torch.empty(shape, device="meta")
            for entry in group
            for name, shape in entry.tensors.items()
        }
        return {end: tuple(tensor.shape) for end, tensor in self.encoded(group, empty).items()}

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


def _as_parameter(
    entry: Entry, a: torch.Tensor, b: torch.Tensor, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in PEFT's shapes for a bare parameter.

    For a stack these are (e, r, in) → (e·r, in) and (e, out, r) → (out, r·e): the index in the
    stack varies slowest in A and fastest in B. If PEFT takes a weight stored as (in, out) for
    (out, in), or the reverse, A and B are transposed and exchanged (`turned`).
    """
    if turned:
        a, b = b.mT, a.mT
    if not entry.layout.stacked:
        return a, b
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _from_parameter(
    entry: Entry, a: torch.Tensor, b: torch.Tensor, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in fxlora's shapes: the inverse of `_as_parameter`."""
    if entry.layout.stacked:
        count = entry.shape[0]
        a = a.unflatten(0, (count, -1))
        b = b.unflatten(1, (-1, count)).permute(2, 0, 1)
    return (b.mT, a.mT) if turned else (a, b)
