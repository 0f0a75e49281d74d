"""The input contract of a block: the assumptions of its graph about the arguments of a call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from .contract import (
    Dimension,
    Guard,
    Input,
    InputSpec,
    IntegerInput,
    TensorInput,
)


def dimension_of(size: Any) -> int | Dimension:
    """Return a size for a contract: an integer, linear in one symbol, or a symbol of its own."""
    if not isinstance(size, torch.SymInt):
        return int(size) if isinstance(size, int) else Dimension(str(size))
    expression: Any = size.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if len(symbols) == 1 and expression.is_polynomial(*symbols):
        polynomial = sympy.Poly(expression, *symbols)
        if polynomial.degree() == 1:
            scale, offset = (int(c) for c in polynomial.all_coeffs())
            return Dimension(str(symbols[0]), scale, offset, *_bounds(size, symbols[0]))
    return Dimension(str(expression), 1, 0, *_bounds(size, expression))


def _bounds(size: torch.SymInt, expression: Any) -> tuple[int, int | None]:
    """Return the bounds of an expression in a size's symbols.

    A lower bound of 2 or less is torch.export's own assumption about a dynamic size. It is dropped,
    and `within` then takes the bounds from the whole model's contract.
    """
    environment: Any = size.node.shape_env
    ranges = {symbol: environment.var_to_range.get(symbol) for symbol in expression.free_symbols}
    if None in ranges.values():
        return 0, None
    lifted = {s: ValueRanges(0, r.upper) if r.lower <= 2 else r for s, r in ranges.items()}
    try:
        limits: Any = bound_sympy(expression, lifted)
        lower, upper = limits.lower, limits.upper
        low = max(0, int(lower)) if lower.is_finite else 0
        return low, int(upper) if upper.is_finite and upper < sys.maxsize - 1 else None
    except (ArithmeticError, TypeError, ValueError):  # such as a division by a size of 0
        return 0, None


def contract_of_both(one: InputSpec, other: InputSpec) -> InputSpec | None:
    """Return a contract that two calls with the same graph satisfy, or None if there is none."""
    if one == other:
        return one
    groups = [
        tuple(_input_of_both(*pair) for pair in zip(*groups, strict=True))
        for groups in zip(one.leaves, other.leaves, strict=True)
    ]
    leaves = tuple(tuple(leaf for leaf in group if leaf is not None) for group in groups)
    if any(len(group) != len(kept) for group, kept in zip(groups, leaves, strict=True)):
        return None
    return replace(one, leaves=leaves)


def _input_of_both(one: Input, other: Input) -> Input | None:
    if isinstance(one, TensorInput) and isinstance(other, TensorInput):
        pairs = list(zip(one.dims, other.dims, strict=False))
        dims = tuple(d for pair in pairs if (d := _dimension_of_both(*pair)) is not None)
        same_state = (one.order, one.gradient) == (other.order, other.gradient)
        if not len(dims) == len(one.dims) == len(other.dims) or not same_state:
            return None
        return replace(one, dims=dims, dtype=one.dtype if one.dtype == other.dtype else None)
    if isinstance(one, IntegerInput) and isinstance(other, IntegerInput):
        dim = _dimension_of_both(one.dim, other.dim)
        return IntegerInput(one.name, dim) if isinstance(dim, Dimension) else None
    return one if one == other else None


def _dimension_of_both(one: int | Dimension, other: int | Dimension) -> int | Dimension | None:
    """Return a dimension that covers the sizes of both, or None for two different static sizes."""
    if one == other:
        return one
    if isinstance(one, int) and isinstance(other, int):
        return None
    (low, high), (least, most) = size_range(one), size_range(other)
    highest = None if high is None or most is None else max(high, most)
    return Dimension(f"{_name_of(one)}|{_name_of(other)}", min=min(low, least), max=highest)


def size_range(dim: int | Dimension) -> tuple[int, int | None]:
    """Return the least size of a dimension, and the greatest, or None if that has no bound."""
    if isinstance(dim, int):
        return dim, dim
    if dim.scale < 0:
        return 0, None
    return dim.at(dim.min), None if dim.max is None else dim.at(dim.max)


def _name_of(dim: int | Dimension) -> str:
    return str(dim) if isinstance(dim, int) else f"{dim.scale}*{dim.symbol}+{dim.offset}"


def within(spec: InputSpec, whole: InputSpec | None) -> InputSpec:
    """Return the contract of a call, with the bounds and guards that the whole model has."""
    if whole is None:
        return spec
    known = {dim.symbol: dim for _, _, dim in _dimensions(whole)}

    def bounded(dim: int | Dimension) -> int | Dimension:
        if isinstance(dim, int) or dim.symbol not in known:
            return dim
        return replace(dim, min=known[dim.symbol].min, max=known[dim.symbol].max)

    def changed(leaf: Input) -> Input:
        if isinstance(leaf, TensorInput):
            return replace(leaf, dims=tuple(map(bounded, leaf.dims)))
        if isinstance(leaf, IntegerInput) and isinstance(dim := bounded(leaf.dim), Dimension):
            return replace(leaf, dim=dim)
        return leaf

    leaves = tuple(tuple(map(changed, group)) for group in spec.leaves)
    places: _Places = {}
    for leaf, axis, dim in sorted(_dimensions(spec), key=lambda found: found[1] is None):
        places.setdefault(dim.symbol, (leaf, axis, dim))  # tensors before integers
    guards = (*_guards(whole, places), *_integers(spec, places))
    return replace(spec, leaves=leaves, guards=guards)


_Places = dict[str, tuple[int, int | None, Dimension]]  # where a call has each symbol


def _dimensions(spec: InputSpec) -> Iterator[tuple[int, int | None, Dimension]]:
    """Yield the index of a leaf, the axis of a tensor, and the dimension, for each dynamic one."""
    for number, leaf in enumerate(leaf for group in spec.leaves for leaf in group):
        if isinstance(leaf, TensorInput):
            found = enumerate(leaf.dims)
            yield from ((number, axis, dim) for axis, dim in found if isinstance(dim, Dimension))
        elif isinstance(leaf, IntegerInput):
            yield number, None, leaf.dim


class _Shaped(NamedTuple):
    """A stand-in for a tensor input of the whole model, of which only the shape is known."""

    shape: tuple[Any, ...]


class _Unknown:
    """A stand-in for a size that no argument of a call has: nothing can be computed with it."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        raise TypeError("the size is not known")


_UNKNOWN = _Unknown()


def _guards(whole: InputSpec, places: _Places) -> Iterator[Guard]:
    """Yield the guards of the whole model that the sizes of a call's arguments decide."""
    leaves = [leaf for group in whole.leaves for leaf in group]
    for guard in whole.guards:
        try:
            guard.holds(_stand_ins(leaves, dict.fromkeys(places, 2)))
        except (TypeError, AttributeError, ArithmeticError):  # it needs a size that no argument has
            continue
        yield replace(guard, holds=functools.partial(_holds, guard, leaves, places))


def _integers(spec: InputSpec, places: _Places) -> Iterator[Guard]:
    """Yield a guard for each integer that must fit a tensor's size: the graph may read either."""
    names = [leaf.name for group in spec.leaves for leaf in group]
    for number, axis, dim in _dimensions(spec):
        if axis is None and places[dim.symbol][0] != number:
            text = f"{names[number]} fits the sizes of {names[places[dim.symbol][0]]}"
            yield Guard(text, functools.partial(_fits, number, dim, places[dim.symbol]))


def _fits(
    number: int, dim: Dimension, place: tuple[int, int | None, Dimension], given: Sequence[Any]
) -> Any:
    return (given[number] - dim.offset) // dim.scale == _value_at(place, given)


def _value_at(place: tuple[int, int | None, Dimension], given: Sequence[Any]) -> Any:
    """Return the value of a symbol that a call's argument gives."""
    index, axis, dim = place
    size = given[index] if axis is None else given[index].shape[axis]
    return (size - dim.offset) // dim.scale


def _holds(guard: Guard, leaves: Sequence[Input], places: _Places, given: Sequence[Any]) -> Any:
    values = {symbol: _value_at(place, given) for symbol, place in places.items()}
    return guard.holds(_stand_ins(leaves, values))


def _stand_ins(leaves: Sequence[Input], values: Mapping[str, Any]) -> list[Any]:
    """Return stand-ins for the whole model's inputs."""

    def size_of(dim: int | Dimension) -> Any:
        if isinstance(dim, int):
            return dim
        return dim.at(values[dim.symbol]) if dim.symbol in values else _UNKNOWN

    made: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, TensorInput):
            made.append(_Shaped(tuple(size_of(dim) for dim in leaf.dims)))
        else:
            made.append(size_of(leaf.dim) if isinstance(leaf, IntegerInput) else None)
    return made


def under_autocast(spec: InputSpec) -> InputSpec:
    """Return the contract for a call under autocast, which determines the dtypes of floats."""

    def changed(leaf: Input) -> Input:
        return replace(leaf, any_float=True) if isinstance(leaf, TensorInput) else leaf

    return replace(spec, leaves=tuple(tuple(map(changed, group)) for group in spec.leaves))
