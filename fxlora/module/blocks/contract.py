"""The input contract of a block: the assumptions of its graph about the arguments of a call."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ...fx.calls import example_value
from ..contract import (
    ConstantInput,
    Dimension,
    Guard,
    Input,
    InputSpec,
    IntegerInput,
    TensorInput,
)
from ..retarget import MOVED
from ..size_guards import Size
from ..tensor_state import Gradient, Order
from .guards import Expressions, Ranges, guards_of_block
from .part import CallPart


def contract_of(part: CallPart, ordered: bool) -> InputSpec:
    """Return the contract of a call: names, structure, constants, shapes and dtypes.

    Args:
        part: the call's part of the whole graph.
        ordered: whether the contract asks for the order of tensors in memory.

    Raises:
        SubmoduleError: it asks for the order, which is not the same for every size.
    """
    call = part.call
    groups: list[tuple[Input, ...]] = []
    begin = 0
    for name, structure in zip(call.names, call.structures, strict=True):
        end = begin + structure.num_leaves
        indices = range(begin, end)
        named = [name] if len(indices) == 1 else [f"{name}[{i - begin}]" for i in indices]
        groups.append(
            tuple(_input(part, i, n, ordered) for i, n in zip(indices, named, strict=True))
        )
        begin = end
    return InputSpec(call.names, call.structures, tuple(groups), positional=call.by_position)


def _input(part: CallPart, index: int, name: str, ordered: bool) -> Input:
    constant = part.call.inputs.constants[index]
    if index not in part.call.inputs.computed:
        return ConstantInput(name, constant)
    node = part.given[index]
    value = example_value(node)
    if value is None:
        size = dimension_of(node.meta.get("val"))
        known = isinstance(size, Dimension)
        return IntegerInput(name, size if known else Dimension(f"size_{index}"))
    dtype = None if node.meta.get(MOVED) else value.dtype
    dims = tuple(map(dimension_of, value.shape))
    order = _order(part, value) if ordered else None
    return TensorInput(name, dims, dtype, order, _gradient(part, index))


def _gradient(part: CallPart, index: int) -> Gradient | None:
    """Return the gradient state that a tensor must have, or None if it does not matter."""
    known = part.call.gradients[index] if part.call.gradients else None
    computed = part.given[index].op == "call_function"
    return replace(known, computed=computed) if known else None


def _order(part: CallPart, value: torch.Tensor) -> Order:
    if order := Order.of(value, offset=True):
        return order
    raise part.refusal(
        "may read how a tensor lies in memory, where the order is not the same for every size"
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
    ranges = {str(s): environment.var_to_range.get(s) for s in expression.free_symbols}
    known = {name: r for name, r in ranges.items() if r is not None}
    lifted = {s: ValueRanges(0, r.upper) if r.lower <= 2 else r for s, r in known.items()}
    return _limits(expression, lifted)


def _limits(expression: Any, ranges: Ranges) -> tuple[int, int | None]:
    """Return the bounds of an expression, which has none where its symbols' are not known."""
    if expression is None or not {str(s) for s in expression.free_symbols} <= ranges.keys():
        return 0, None
    try:
        limits: Any = bound_sympy(expression, {s: ranges[str(s)] for s in expression.free_symbols})
        lower, upper = limits.lower, limits.upper
        low = max(0, int(lower)) if lower.is_finite else 0
        return low, int(upper) if upper.is_finite and upper < sys.maxsize - 1 else None
    except (ArithmeticError, TypeError, ValueError):  # such as a division by a size of 0
        return 0, None


def contract_of_both(one: InputSpec, other: InputSpec) -> InputSpec | None:
    """Return a contract that two calls with the same graph satisfy, or None if there is none."""
    if one == other:
        return one
    if one.guards != other.guards:
        return None
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


def input_sizes(graph: fx.Graph) -> Iterator[Any]:
    """Yield the sizes of a graph's inputs, and its inputs that are sizes."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        yield from value.shape if isinstance(value, torch.Tensor) else (value,)


def _expressions(graph: fx.Graph) -> Expressions:
    """Return the expressions of a graph's inputs that `dimension_of` names by a symbol."""
    sizes = (size for size in input_sizes(graph) if isinstance(size, torch.SymInt))
    made = {str(size.node.expr): size.node.expr for size in sizes}
    return {name: found for name, found in made.items() if not found.is_Symbol}


def within(spec: InputSpec, graph: fx.Graph, whole: InputSpec | None, path: str) -> InputSpec:
    """Return the contract of a call, with the bounds and guards that the whole model has.

    Args:
        spec: the contract of the call's graph.
        graph: that graph.
        whole: the contract of the whole model.
        path: path of the called block.
    """
    if whole is None:
        return spec
    known = {dim.symbol: dim for _, _, _, dim in _dimensions(whole)}
    ranges = {s: ValueRanges(d.min, int_oo if d.max is None else d.max) for s, d in known.items()}
    names = {dim.symbol for _, _, _, dim in _dimensions(spec)}
    expressions = {name: of for name, of in _expressions(graph).items() if name in names}

    def bounded(dim: int | Dimension) -> int | Dimension:
        if isinstance(dim, int):
            return dim
        if dim.symbol in known:
            return replace(dim, min=known[dim.symbol].min, max=known[dim.symbol].max)
        low, high = _limits(expressions.get(dim.symbol), ranges)
        return replace(dim, min=max(low, dim.min), max=high if dim.max is None else dim.max)

    def changed(leaf: Input) -> Input:
        if isinstance(leaf, TensorInput):
            return replace(leaf, dims=tuple(map(bounded, leaf.dims)))
        if isinstance(leaf, IntegerInput) and isinstance(dim := bounded(leaf.dim), Dimension):
            return replace(leaf, dim=dim)
        return leaf

    leaves = tuple(tuple(map(changed, group)) for group in spec.leaves)
    sizes: dict[str, Size] = {}
    for size in sorted(_dimensions(spec), key=lambda found: found[1] is None):
        sizes.setdefault(size[3].symbol, Size(*size))  # tensors before integers
    guards = guards_of_block(whole.guards, sizes, expressions, ranges, path)
    return replace(spec, leaves=leaves, guards=(*guards, *_integers(spec, sizes)))


def _dimensions(spec: InputSpec) -> Iterator[tuple[int, int | None, str, Dimension]]:
    """Yield the fields of a `Size` for each dynamic dimension."""
    for number, leaf in enumerate(leaf for group in spec.leaves for leaf in group):
        if isinstance(leaf, TensorInput):
            found = enumerate(leaf.dims)
            yield from ((number, a, leaf.name, d) for a, d in found if isinstance(d, Dimension))
        elif isinstance(leaf, IntegerInput):
            yield number, None, leaf.name, leaf.dim


def _integers(spec: InputSpec, sizes: Mapping[str, Size]) -> Iterator[Guard]:
    """Yield a guard for each integer that must fit a tensor's size: the graph may read either."""
    for size in itertools.starmap(Size, _dimensions(spec)):
        other = sizes[size.dim.symbol]
        if size.axis is None and other.leaf != size.leaf:
            text = f"{size.name} fits the sizes of {other.name}"
            yield Guard(text, functools.partial(_fits, size, other))


def _fits(size: Size, other: Size, given: Sequence[Any]) -> Any:
    return size.of(given) == other.of(given)


def under_autocast(spec: InputSpec) -> InputSpec:
    """Return the contract for a call under autocast, which determines the dtypes of floats."""

    def changed(leaf: Input) -> Input:
        return replace(leaf, any_float=True) if isinstance(leaf, TensorInput) else leaf

    return replace(spec, leaves=tuple(tuple(map(changed, group)) for group in spec.leaves))
