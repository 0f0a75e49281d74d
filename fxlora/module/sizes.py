"""Calls like an example with other sizes, to try a file with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .contract import Dimension, InputSpec, TensorInput

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def resized(
    spec: InputSpec, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> Iterator[Arguments]:
    """Yield the call with its batch of another size, if the contract takes such a call.

    If there are several batch dimensions, each is changed alone, and then all together.
    """
    batches = spec.batches()
    for changed in [*({b} for b in batches), *([set(batches)] if len(batches) > 1 else [])]:
        yield from with_sizes(spec, args, kwargs, dict.fromkeys(changed, size))


def larger(spec: InputSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Arguments]:
    """Yield the call with larger sizes in all dynamic dimensions, if the contract takes it.

    Sizes that follow from each other may leave only some of them: one more, or twice as much.
    """
    symbols = spec.symbols(args, kwargs)
    tried = ({s: n + 1 for s, n in symbols.items()}, {s: 2 * n for s, n in symbols.items()})
    found = (call for sizes in tried for call in with_sizes(spec, args, kwargs, sizes))
    yield from itertools.islice(found, 1)


def with_sizes(
    spec: InputSpec, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[str, int]
) -> Iterator[Arguments]:
    """Yield the call with other values of some symbols, if the contract takes it.

    Tensors are cut, or repeated from their beginning: values stay like the example's.
    """
    changed: dict[int, torch.Tensor] = {}
    for leaf, value in spec.pairs(args, kwargs):
        if not isinstance(leaf, TensorInput):
            continue
        tensor = value
        for axis, dim in enumerate(leaf.dims):
            if isinstance(dim, Dimension) and dim.symbol in sizes:
                tensor = _with_size(tensor, axis, dim.at(sizes[dim.symbol]))
        if tensor is not value:
            changed[id(value)] = tensor
    if not changed:
        return

    def replaced(leaf: Any) -> Any:
        return changed.get(id(leaf), leaf)

    found = pytree.tree_map(replaced, (args, kwargs))
    if spec.holds_for(*found):
        yield found


def _with_size(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if tensor.shape[axis] == 0 or size < 0:
        return tensor
    times = -(-size // tensor.shape[axis])
    repeated = torch.cat([tensor] * times, axis) if times > 1 else tensor
    return repeated.narrow(axis, 0, size).clone()
