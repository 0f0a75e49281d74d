"""Whether two ways of calling a block can be told apart by their arguments, and by which sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from ...fx.literals import same_literal
from ..contract import ConstantInput, Dimension, Input, InputSpec, IntegerInput, TensorInput
from .contract import input_sizes, size_range

_Argument = tuple[Any, tuple[Input, ...]]  # its structure and its leaves
_Symbols = Mapping[str, Any]  # the value of each symbol, by its name


def may_overlap(one: InputSpec, other: InputSpec) -> bool:
    """Whether there may be a call that two contracts hold for; their guards are not asked."""
    if set(one.names) != set(other.names):
        return False
    ours, theirs = (
        dict(zip(spec.names, zip(spec.structures, spec.leaves, strict=True), strict=True))
        for spec in (one, other)
    )
    return all(_arguments_may_be_equal(ours[name], theirs[name]) for name in ours)


def _arguments_may_be_equal(one: _Argument, other: _Argument) -> bool:
    (structure, leaves), (another, others) = one, other
    if structure == another:
        return all(map(_inputs_may_be_equal, leaves, others))
    whole = [found for tree, held in (one, other) if tree.is_leaf() for found in held]
    constants = [leaf.value for leaf in whole if isinstance(leaf, ConstantInput)]
    plain = (bool, int, float, str, type(None))
    return any(not isinstance(value, plain) for value in constants)  # it may be a container


def _inputs_may_be_equal(one: Input, other: Input) -> bool:
    if isinstance(one, TensorInput) and isinstance(other, TensorInput):
        same_rank = len(one.dims) == len(other.dims)
        same_dtype = one.takes(other.dtype) or other.takes(one.dtype)
        return same_rank and same_dtype and all(map(_sizes_may_be_equal, one.dims, other.dims))
    if isinstance(one, ConstantInput) and isinstance(other, ConstantInput):
        return same_literal(one.value, other.value)
    if isinstance(one, IntegerInput) and isinstance(other, IntegerInput):
        return _sizes_may_be_equal(one.dim, other.dim)
    constant = next((leaf.value for leaf in (one, other) if isinstance(leaf, ConstantInput)), None)
    plain = isinstance(constant, (str, float, type(None)))
    tensor = isinstance(one, TensorInput) or isinstance(other, TensorInput)
    return not plain and not (tensor and isinstance(constant, int))


def _sizes_may_be_equal(one: int | Dimension, other: int | Dimension) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, Dimension) and isinstance(other, Dimension):
        (low, high), (least, most) = size_range(one), size_range(other)
        return not ((high is not None and high < least) or (most is not None and most < low))
    size, dim = (one, other) if isinstance(one, int) else (other, one)
    return isinstance(dim, Dimension) and isinstance(size, int) and dim.solve(size) is not None


def symbols_of_both(one: fx.Graph, other: fx.Graph) -> tuple[_Symbols, _Symbols] | None:
    """Return values of two graphs' symbols with which their inputs have the same sizes.

    The values are numbers, or expressions in further symbols, which stand for any size. None if
    the values cannot be told.
    """
    sizes = [_expressions(graph, name) for graph, name in ((one, "one"), (other, "other"))]
    if None in sizes or len(sizes[0] or ()) != len(sizes[1] or ()):
        return None
    values: dict[Any, Any] = {}
    for left, right in zip(*(found or () for found in sizes), strict=True):
        difference: Any = sympy.expand((left - right).subs(values))
        if difference == 0:
            continue
        solved = [s for s in difference.free_symbols if difference.coeff(s) in (1, -1)]
        if not solved or difference.has(sympy.Function):
            return None
        symbol = min(solved, key=str)
        value = symbol - difference / difference.coeff(symbol)
        if symbol in value.free_symbols:
            return None
        values = {s: v.subs(symbol, value) for s, v in values.items()} | {symbol: value}
    named = [_renamed(graph, name) for graph, name in ((one, "one"), (other, "other"))]
    ours, theirs = ({s: v.subs(values) for s, v in of_one.items()} for of_one in named)
    return ours, theirs


def _renamed(graph: fx.Graph, name: str) -> dict[str, Any]:
    """Return a symbol of its own for each symbol in a graph's inputs: two graphs share none."""
    symbolic = (size for size in input_sizes(graph) if isinstance(size, torch.SymInt))
    symbols = (symbol for size in symbolic for symbol in size.node.expr.free_symbols)
    return {str(symbol): sympy.Symbol(f"{name}_{symbol}", integer=True) for symbol in symbols}


def _expressions(graph: fx.Graph, name: str) -> list[Any] | None:
    """Return the sizes of a graph's inputs in its renamed symbols, or None if one is unknown."""
    renamed = _renamed(graph, name)
    found: list[Any] = []
    for size in input_sizes(graph):
        if isinstance(size, torch.SymInt):
            expression: Any = size.node.expr
            found.append(expression.subs({s: renamed[str(s)] for s in expression.free_symbols}))
        elif isinstance(size, int):
            found.append(sympy.Integer(size))
        else:
            return None
    return found
