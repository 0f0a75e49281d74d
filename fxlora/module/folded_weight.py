"""The folded weight: W0 + s·BA with the entry's variants, in float64, rounded once.

It is summed in blocks, so that no more than a few megabytes are held besides W0 and the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..lora.dtypes import correctly_rounded
from ..lora.layout import Shape
from ..lora.variants import VARIANTS
from ..plan import Entry, scales_outputs
from .adapted_weight import Values, adapted_weight, factors, rank

# Entries of a weight that are summed at a time, in float64.
_CPU_BLOCK = 2**19  # for each thread: few enough to stay in its cache
_LARGE_BLOCK = 2**24  # on other devices, where a kernel launch costs more


@dataclass(frozen=True)
class Box:
    """A block of a tensor: a range in each dimension.

    Attributes:
        first: the first index in each dimension.
        shape: the numbers of indices.
    """

    first: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the block of a tensor, as a view."""
        for dim, (first, size) in enumerate(zip(self.first, self.shape, strict=True)):
            tensor = tensor.narrow(dim, first, size)
        return tensor

    def split(self, dims: Sequence[int], limit: int) -> Iterator[Box]:
        """Yield parts of at most `limit` entries, cut in the first of some dimensions.

        A part with one index there, and still more entries, is cut in the next dimension.
        """
        size = math.prod(self.shape)
        if size <= limit or not dims:
            yield self
            return
        dim, *others = dims
        step = max(1, limit // (size // self.shape[dim]))
        for first in range(0, self.shape[dim], step):
            stop = min(first + step, self.shape[dim])
            yield from self._range(dim, first, stop).split(others, limit)

    def cut_at(self, dim: int, indices: Sequence[int]) -> list[Box]:
        """Return the parts before, between and after indices of the tensor, in a dimension."""
        size = self.shape[dim]
        inside = {at for index in indices if 0 < (at := index - self.first[dim]) < size}
        edges = sorted({0, size, *inside})
        return [self._range(dim, *pair) for pair in itertools.pairwise(edges)] or [self]

    def _range(self, dim: int, start: int, stop: int) -> Box:
        first, shape = list(self.first), list(self.shape)
        first[dim], shape[dim] = first[dim] + start, stop - start
        return Box(tuple(first), tuple(shape))


Observer = Callable[[torch.Tensor, torch.Tensor, Box], object]


class Scratch:
    """Memory for blocks, which is used again: fresh memory costs as much as a sum."""

    def __init__(self) -> None:
        self.held: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return contiguous memory in the shape of a tensor, without values."""
        held = self.held.get((dtype, device))
        if held is None or held.numel() < like.numel():
            held = torch.empty(like.numel(), dtype=dtype, device=device)
            self.held[dtype, device] = held
        return held[: like.numel()].view(like.shape)


def is_bounded(entries: Sequence[Entry], weight: torch.Tensor, values: Values) -> bool:
    """Whether the folded weight is known to be finite from the largest entries of W0, A and B."""
    if any(map(scales_outputs, entries)) or weight.is_meta:
        return False
    bound = _largest(weight)
    for entry in entries:
        a, b = factors(entry, values)
        bound += abs(entry.scaling) * rank(entry) * _largest(a) * _largest(b)
    return bound < torch.finfo(weight.dtype).max


def _largest(tensor: torch.Tensor) -> float:
    return max(abs(float(bound)) for bound in tensor.aminmax())


def folded_weight(
    entries: Sequence[Entry],
    weight: torch.Tensor,
    values: Values,
    into: torch.Tensor | None = None,
    first: Sequence[int] = (),
    observe: Observer | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Return the weight with its entries applied: summed in float64, and rounded once.

    Args:
        entries: the entries of this weight, in the order in which they apply.
        weight: W0, or a block of it that is cut in its `cut_dims`.
        values: the entries' tensors, in any floating dtypes.
        into: the tensor to write to, which may be `weight`, and whose dtype is rounded to; by
            default a new one, as `weight` is.
        first: the first index of W0, in each dimension, that `weight` has; by default 0.
        observe: called for each block with W0, the sum in float64, and the block's place in
            `weight`.
        scratch: memory for one call at a time.
    """
    if weight.is_meta:
        return torch.empty_like(weight)
    if is_traceable_wrapper_subclass(weight):  # DTensor has no views as integers
        whole = weight.to(torch.float64)
        for entry in entries:
            wide = {name: values[name].to(torch.float64) for name in entry.tensors}
            whole = adapted_weight(entry, whole, wide)
        return whole.to(weight.dtype) if into is None else into.copy_(whole)
    device = weight.device if _has_float64(weight.device) else torch.device("cpu")
    folded = torch.empty_like(weight) if into is None else into  # or channels_last, as W0 is
    first = tuple(first) or (0,) * weight.dim()
    add = _added if cut_dims(entries) else _added_to_all
    wide = _Wide(values, device)
    scratch = scratch or Scratch()
    for box in _boxes(entries, weight, first):
        before = box.of(weight)
        block = scratch.take(before, torch.float64, device).copy_(before)
        start = [a + b for a, b in zip(first, box.first, strict=True)]
        for entry in entries:
            block = add(entry, block, start, wide)
        if observe is not None:
            observe(before, block, box)
        place = box.of(folded)
        if device == folded.device:
            single = scratch.take(before, torch.float32, device)
            correctly_rounded(block, folded.dtype, place, single)
        else:
            place.copy_(correctly_rounded(block, folded.dtype))
    return folded


# ---- blocks -------------------------------------------------------------------------------------


def cut_dims(entries: Sequence[Entry]) -> tuple[int, ...]:
    """Return the dimensions of the weight in which a block can be summed without the others.

    None if a variant's gain depends on all of W0; if on one output each, that of the outputs.
    """
    dims = set(range(len(entries[0].shape)))
    for entry in entries:
        gains = [VARIANTS[v] for v in entry.variants if VARIANTS[v].gain]
        if not all(gain.by_output for gain in gains):
            return ()
        dims &= {entry.layout.part_dim} if gains else set(entry.layout.cut_dims)
    if any(entry.rows and entry.layout.part_dim not in dims for entry in entries):
        return ()
    return tuple(sorted(dims))


def _boxes(entries: Sequence[Entry], weight: torch.Tensor, first: Sequence[int]) -> Iterator[Box]:
    """Yield the blocks of a weight, each inside or outside of an entry's part."""
    boxes, dims = [Box.whole(weight.shape)], cut_dims(entries)
    for entry in entries if dims else ():
        dim = entry.layout.part_dim
        edges = [row - first[dim] for row in entry.rows or ()]
        boxes = [part for box in boxes for part in box.cut_at(dim, edges)]
    on_cpu = weight.device.type == "cpu"
    limit = _CPU_BLOCK * torch.get_num_threads() if on_cpu else _LARGE_BLOCK
    for box in boxes:
        yield from box.split(dims, limit)


class _Wide:
    """An entry's tensors in float64: those parts that a block needs."""

    def __init__(self, values: Values, device: torch.device) -> None:
        self.values = values
        self.device = device
        self._parts: dict[str, tuple[object, torch.Tensor]] = {}
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def all(self, entry: Entry) -> dict[str, torch.Tensor]:
        return {name: self.values[name].to(self.device, torch.float64) for name in entry.tensors}

    def factors(self, entry: Entry) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the effective factors: as they are, unless a variant computes others."""
        if all(VARIANTS[variant].keeps_factors for variant in entry.variants):
            return self.values[entry.name_a], self.values[entry.name_b]
        if entry.name_a not in self._factors:
            self._factors[entry.name_a] = factors(entry, self.all(entry))
        return self._factors[entry.name_a]

    def part(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return a part of a tensor; the last one is kept, as the next block often has the same."""
        place = part.storage_offset(), part.shape, part.stride()
        if name not in self._parts or self._parts[name][0] != place:
            self._parts[name] = place, part.to(self.device, torch.float64)
        return self._parts[name][1]


def _added_to_all(
    entry: Entry, block: torch.Tensor, start: Sequence[int], wide: _Wide
) -> torch.Tensor:
    """Return all of W0, with s·BA and the variants."""
    return adapted_weight(entry, block, wide.all(entry))


def _added(entry: Entry, block: torch.Tensor, start: Sequence[int], wide: _Wide) -> torch.Tensor:
    """Return a block of W0, which begins at `start`, with s·BA if the entry covers it."""
    layout, shape, dim = entry.layout, tuple(block.shape), entry.layout.part_dim
    low, high = entry.rows or (0, entry.shape[dim])
    if not low <= start[dim] < high:
        return block
    start = [*start[:dim], start[dim] - low, *start[dim + 1 :]]
    a, b = layout.factors_of_block(*wide.factors(entry), start, shape)
    a, b = wide.part(entry.name_a, a), wide.part(entry.name_b, b)
    matrix = layout.add_pair_in_place(layout.matrix(block, shape), a, b, entry.scaling, shape)
    for variant, held in entry.variant_tensors.items():
        if gain := VARIANTS[variant].gain:
            adapted = layout.outputs_first(matrix, shape)
            outputs = layout.outputs_of_block(start, shape)
            more = (wide.part(n, wide.values[n].narrow(-1, *outputs)) for n in held)
            matrix = matrix.mul_(layout.broadcast_over_matrix(gain(adapted, *more), shape))
    return layout.unmatrix(matrix, shape)


def _has_float64(device: torch.device) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS has no float64
        return False
    return True
