"""Guards: conditions on the sizes of a call's arguments, as code that checks them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from .contract import Dimension, Guard


@dataclass(frozen=True)
class Size:
    """The leaf that gives a symbol's value: a dimension of a tensor, or an integer.

    Attributes:
        leaf: index of the leaf.
        axis: the tensor's dimension, or None for an integer.
        name: name of the leaf.
        dim: the size as `scale * symbol + offset`.
    """

    leaf: int
    axis: int | None
    name: str
    dim: Dimension

    def of(self, leaves: Any) -> Any:
        value = leaves[self.leaf]
        size = value if self.axis is None else value.shape[self.axis]
        size = size - self.dim.offset if self.dim.offset else size
        return size // self.dim.scale if self.dim.scale != 1 else size

    def text(self) -> str:
        size = self.name if self.axis is None else f"{self.name}.shape[{self.axis}]"
        size = f"({size} - {self.dim.offset})" if self.dim.offset else size
        return f"{size}/{self.dim.scale}" if self.dim.scale != 1 else size


def guard_of(condition: Any, sizes: Mapping[str, Size]) -> Guard:
    """Return the Guard for a condition on symbols.

    Args:
        condition: the condition, a sympy expression.
        sizes: the source of each symbol's value, by its name.
    """
    symbols = sorted(condition.free_symbols, key=str)
    return _guard(condition, tuple((symbol, sizes[str(symbol)]) for symbol in symbols))


@functools.lru_cache(maxsize=1024)
def _guard(condition: Any, sizes: tuple[tuple[Any, Size], ...]) -> Guard:
    """Return the Guard for a condition, as code over the leaves.

    The code is that of an fx graph, which torch.compile and a re-export can trace.
    """
    graph = fx.Graph()
    leaves = fx.Proxy(graph.placeholder("leaves"))
    values = {symbol: size.of(leaves) for symbol, size in sizes}
    graph.output(sympy_interp(PythonReferenceAnalysis, values, condition).node)
    _replace_negations(graph)
    holds = fx.GraphModule(nn.Module(), graph, "Guard").forward
    names = {symbol: sympy.Symbol(size.text()) for symbol, size in sizes}
    text = PythonPrinter().doprint(condition.xreplace(names))
    return Guard(text, holds, _excludes_small(condition), condition)


def _replace_negations(graph: fx.Graph) -> None:
    """Write `a != b` for a negated `a == b`: torch.compile cannot trace torch.sym_not."""
    for node in graph.find_nodes(op="call_function", target=torch.sym_not):
        (given,) = node.all_input_nodes
        if given.target in _NEGATED:
            with graph.inserting_before(node):
                made = graph.call_function(_NEGATED[given.target], given.args)
            node.replace_all_uses_with(made)
            graph.erase_node(node)
    graph.eliminate_dead_code()


_NEGATED: dict[Any, Any] = {
    operator.eq: operator.ne,
    operator.ne: operator.eq,
    operator.lt: operator.ge,
    operator.ge: operator.lt,
    operator.le: operator.gt,
    operator.gt: operator.le,
}


def _excludes_small(condition: Any) -> bool:
    """Whether a condition is sure to hold where every symbol is at least 2."""
    larger = {symbol: ValueRanges(2, int_oo) for symbol in condition.free_symbols}
    return bound_sympy(condition, larger).lower is sympy.true
