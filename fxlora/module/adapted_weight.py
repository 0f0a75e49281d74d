"""The adapted weight of a plan entry as a formula: W0 + s·BA with the entry's variants.

The functions call only aten overloads, so they accept both tensors and torch.fx proxies. With
proxies they emit the nodes that compute the same result, and mark the nodes after which a cast is
needed if the adapter is held in another dtype than its weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..lora.dtypes import correctly_rounded
from ..lora.variants import VARIANTS
from ..plan import Entry, scales_outputs
from .casts import mark

aten = torch.ops.aten

Values = Mapping[str, Any]  # an entry's tensors, or proxies for them, by name

# Entries of a weight that a fold sums at a time, in float64.
_CPU_BLOCK = 2**19  # for each thread: few enough to stay in its cache
_LARGE_BLOCK = 2**24  # on other devices, where a kernel launch costs more


def factors(entry: Entry, values: Values) -> tuple[Any, Any]:
    """Return the effective factors (…, r, in) and (…, out, r): A and B as the variants extend them.

    Inits that start from the weight (PiSSA, OLoRA) have effective factors of rank 2r.
    """
    a, b = values[entry.name_a], values[entry.name_b]
    for variant, held in entry.variant_tensors.items():
        a, b = VARIANTS[variant].factors(entry.layout, a, b, *(values[name] for name in held))
    return to_weights(entry, a), to_weights(entry, b)


def to_weights(entry: Entry, value: Any) -> Any:
    """Mark a node in the adapter's dtype as one whose users need the weight's dtype."""
    return mark(value, entry.name_a, entry.parameter)


def rank(entry: Entry) -> int:
    """Return the rank of the effective factors (2r for PiSSA and OLoRA)."""
    a, _ = factors(entry, {n: torch.empty(s, device="meta") for n, s in entry.tensors.items()})
    return a.shape[entry.layout.rank_dims[0]]


def adapted_weight(entry: Entry, weight: Any, values: Values) -> Any:
    """Return W0 + s·BA with the variants applied, in the shape of W0.

    For a part of a packed weight, only the part's slice changes.
    """
    if entry.rows is None:
        return _adapted(entry, weight, values)
    dim, (start, stop) = entry.layout.part_dim, entry.rows
    part = aten.slice.Tensor(weight, dim, start, stop)
    return aten.slice_scatter.default(weight, _adapted(entry, part, values), dim, start, stop)


def output_gains(entry: Entry, weight: Any, values: Values) -> list[Any]:
    """Return the factors (…, out) by which variants scale the outputs, one per scaling variant."""
    matrix = sum_matrix(entry, weight, values)
    gains: list[Any] = []
    for variant, held in entry.variant_tensors.items():
        if gain := VARIANTS[variant].gain:
            gains.append(gain(_constant(entry, matrix), *(values[name] for name in held)))
    return gains


def sum_matrix(entry: Entry, weight: Any, values: Values) -> Any:
    """Return V = W0 + s·BA as (…, d0, d1).

    Args:
        weight: W0, or the slice of it that the entry adapts.
    """
    a, b = factors(entry, values)
    matrix = entry.layout.matrix(weight, entry.adapted_shape)
    # (…, d0, d1) + s · (…, d0, r) @ (…, r, d1) -> (…, d0, d1)
    return entry.layout.add_pair(matrix, a, b, entry.scaling, entry.adapted_shape)


def _constant(entry: Entry, matrix: Any) -> Any:
    """Return V as (…, out, in), detached: variants treat it as a constant for gradients.

    In the graph it is in the adapter's dtype, if that is wider than the weight's.
    """
    constant = entry.layout.outputs_first(aten.detach.default(matrix), entry.adapted_shape)
    return mark(constant, entry.parameter, entry.name_a, widens=True)


def _adapted(entry: Entry, weight: Any, values: Values) -> Any:
    """Return the adapted weight, or the adapted slice, in the shape of `weight`."""
    matrix = sum_matrix(entry, weight, values)
    for variant, held in entry.variant_tensors.items():
        if gain := VARIANTS[variant].gain:
            found = gain(_constant(entry, matrix), *(values[name] for name in held))
            factor = entry.layout.broadcast_over_matrix(found, entry.adapted_shape)
            matrix = to_weights(entry, aten.mul.Tensor(matrix, factor))
    return entry.layout.unmatrix(matrix, entry.adapted_shape)


# ---- values -------------------------------------------------------------------------------------


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


Observer = Callable[[torch.Tensor, torch.Tensor], object]


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


def folded_weight(
    entries: Sequence[Entry],
    weight: torch.Tensor,
    values: Values,
    into: torch.Tensor | None = None,
    first: int = 0,
    observe: Observer | None = None,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Return the weight with its entries applied: summed in float64, and rounded once.

    Args:
        entries: the entries of this weight, in the order in which they apply.
        weight: W0, or rows of it (see `folds_by_rows`).
        values: the entries' tensors, in any floating dtypes.
        into: the tensor to write to, which may be `weight`, and whose dtype is rounded to; by
            default a new one, as `weight` is.
        first: the first row of W0 that `weight` has.
        observe: called for each block with W0 and the sum in float64.
        scratch: memory for one call at a time.
    """
    if weight.is_meta:
        return torch.empty_like(weight)
    if is_traceable_wrapper_subclass(weight):  # DTensor has no views as integers
        whole_weight: Any = weight.to(torch.float64)
        for entry in entries:
            wide = {name: values[name].to(torch.float64) for name in entry.tensors}
            whole_weight = adapted_weight(entry, whole_weight, wide)
        return whole_weight.to(weight.dtype) if into is None else into.copy_(whole_weight)
    device = weight.device if _has_float64(weight.device) else torch.device("cpu")
    wide = {name: values[name].to(device, torch.float64) for e in entries for name in e.tensors}
    folded = torch.empty_like(weight) if into is None else into  # or channels_last, as W0 is
    found = _block_dim(entries)
    dim = 0 if found is None else found
    size = weight.shape[dim]
    blocks = [(0, size)] if found is None else list(_blocks(entries, weight, dim, first))
    scratch = scratch or Scratch()
    for start, stop in blocks:
        before = weight.narrow(dim, start, stop - start)
        block = scratch.take(before, torch.float64, device).copy_(before)
        for entry in entries:
            if found is None:
                block = adapted_weight(entry, block, wide)
            else:
                block = _with_block(entry, block, dim, first + start, wide)
        if observe is not None:
            observe(before, block)
        place = folded.narrow(dim, start, stop - start)
        if device == folded.device:
            single = scratch.take(before, torch.float32, device)
            correctly_rounded(block, folded.dtype, place, single)
        else:
            place.copy_(correctly_rounded(block, folded.dtype))
    return folded


def folds_by_rows(entries: Sequence[Entry]) -> bool:
    """Whether rows of the weight, in its first dimension, can be folded without the others."""
    return _block_dim(entries) == 0


def _block_dim(entries: Sequence[Entry]) -> int | None:
    """Return the dimension to cut: the first, which is fastest, unless entries adapt parts.

    None if a variant's scales depend on all of W0; if they depend on one output each, the
    dimension of the outputs.
    """
    gains = [VARIANTS[v] for e in entries for v in e.variants if VARIANTS[v].gain]
    if not all(gain.by_output for gain in gains):
        return None
    parts = any(entry.rows for entry in entries)
    cut = all(entry.layout.factor_dims(0) != (None, None) for entry in entries)
    return 0 if cut and not parts and not gains else entries[0].layout.part_dim


def _blocks(
    entries: Sequence[Entry], weight: torch.Tensor, dim: int, first: int
) -> Iterator[tuple[int, int]]:
    """Yield ranges (start, stop) of a dimension, each inside or outside of an entry's part."""
    size = weight.shape[dim]
    on_cpu = weight.device.type == "cpu"
    entries_of_block = _CPU_BLOCK * torch.get_num_threads() if on_cpu else _LARGE_BLOCK
    step = max(1, entries_of_block // (weight.numel() // size))
    parts = {row - first for entry in entries for row in entry.rows or ()}
    edges = {0, size, *(row for row in parts if 0 < row < size)}
    for low, high in itertools.pairwise(sorted(edges)):
        for start in range(low, high, step):
            yield start, min(start + step, high)


def _with_block(
    entry: Entry, block: torch.Tensor, dim: int, start: int, values: Values
) -> torch.Tensor:
    """Return a block of W0, which begins at `start`, with s·BA if the entry covers it."""
    layout, shape = entry.layout, tuple(block.shape)
    first, last = entry.rows or (0, start + 1)
    if not first <= start < last:
        return block
    a, b = factors(entry, values)
    if dim == layout.part_dim:
        # B is (…, out, r, …), and out may be several dimensions of the weight, flattened
        each = layout.features(shape)[1] // shape[dim]
        outputs = ((start - first) * each, layout.features(shape)[1])
        b = b.narrow(layout.rank_dims[1] - 1, *outputs)
        matrix = layout.add_pair_in_place(layout.matrix(block, shape), a, b, entry.scaling, shape)
        for variant, held in entry.variant_tensors.items():
            if gain := VARIANTS[variant].gain:
                adapted = layout.outputs_first(matrix, shape)
                found = gain(adapted, *(values[name].narrow(-1, *outputs) for name in held))
                matrix = matrix.mul_(layout.broadcast_over_matrix(found, shape))
    else:
        of_a, of_b = layout.factor_dims(dim)
        a = a if of_a is None else a.narrow(of_a, start, shape[dim])
        b = b if of_b is None else b.narrow(of_b, start, shape[dim])
        matrix = layout.add_pair_in_place(layout.matrix(block, shape), a, b, entry.scaling, shape)
    return layout.unmatrix(matrix, shape)


def _has_float64(device: torch.device) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS has no float64
        return False
    return True
