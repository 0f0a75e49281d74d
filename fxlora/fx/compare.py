"""Compare graphs node by node: whether they are the same computation, and where they differ."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .literals import literal, same_literal
from .nested import nested_graph

_CONTIGUOUS = torch.ops.aten.contiguous.default
_SLICE = torch.ops.aten.slice.Tensor
_END = torch.iinfo(torch.int64).max


def alike(first: fx.GraphModule, second: fx.GraphModule) -> bool:
    """Whether two modules' graphs have equal nodes, ops, arguments and constants."""
    return alike_graphs(first.graph, second.graph)


def alike_graphs(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether two graphs, each with an owning module, are equal in the sense of `alike`."""
    same = difference(first, second) is None and _structures(first) == _structures(second)
    return same and _same_constants(first, second)


def _structures(graph: fx.Graph) -> Any:
    """Return the pytree structures of a graph's inputs and outputs, or None if it has none."""
    info: Any = getattr(graph._codegen, "pytree_info", None)
    return info and (info.in_spec, info.out_spec)


def difference(first: fx.Graph, second: fx.Graph) -> str | None:
    """Describe the first difference of two graphs, or return None. Node names do not count."""
    pair = first_difference(first, second)
    if pair and len(pair[0].graph.nodes) != len(pair[1].graph.nodes):
        return f"{len(pair[0].graph.nodes)} nodes against {len(pair[1].graph.nodes)}"
    return f"{pair[0].format_node()} against {pair[1].format_node()}" if pair else None


def first_difference(first: fx.Graph, second: fx.Graph) -> tuple[fx.Node, fx.Node] | None:
    """Return the first pair of nodes that differ, in these or in nested graphs, or None."""
    numbers: dict[fx.Node, int] = {}
    for index, (a, b) in enumerate(zip(first.nodes, second.nodes, strict=False)):
        numbers[a] = numbers[b] = index
        if inner := _nested_pair(a, b):
            if found := first_difference(inner[0].graph, inner[1].graph):
                return found
        elif _form(a, numbers) != _form(b, numbers):
            return a, b  # where one graph ends, the nodes differ: only one is an output
    return None


def _nested_pair(a: fx.Node, b: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Return the nested graphs that two nodes fetch, if both do; attribute names do not count."""
    first, second = (
        nested_graph(node, owner) if (owner := node.graph.owning_module) else None
        for node in (a, b)
    )
    return (first, second) if first and second else None


def same_graph_except_sizes(
    dynamic: fx.Graph,
    static: fx.Graph,
    symbols: Mapping[str, Any],
    others: Mapping[str, Any] | None = None,
) -> bool:
    """Whether two exported graphs have the same ops on the same inputs, and equal sizes.

    A size that the dynamic graph computes is a literal in the static one. The two must be equal
    once the values of the symbols are substituted. Where the static graph has a contiguous tensor,
    torch.export leaves out `contiguous()`, which does nothing there in the dynamic graph either.

    Args:
        symbols: the value of each symbol of the dynamic graph, by name: a number, or an expression.
        others: the value of each symbol of the other graph, if it is not static.
    """
    pairs = (dynamic, symbols), (static, others or {})
    ours, theirs = (
        [n for n in graph.nodes if not (_is_size(n) or _is_whole(n, known))]
        for graph, known in pairs
    )
    numbers: dict[fx.Node, int] = {}
    left = deque(ours)
    for index, b in enumerate(theirs):
        while left and left[0].target is _CONTIGUOUS and b.target is not _CONTIGUOUS:
            copied = left.popleft()
            numbers[copied] = numbers[_whole(copied.all_input_nodes[0], symbols)]
        if not left:
            return False
        a = left.popleft()
        numbers[a] = numbers[b] = index
        if inner := _nested_pair(a, b):
            if not same_graph_except_sizes(inner[0].graph, inner[1].graph, symbols, others):
                return False
        elif a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            return False
        first, second = _flat(a, numbers, symbols), _flat(b, numbers, others or {})
        if len(first) != len(second) or not all(map(same_literal, first, second)):
            return False
    return not left


def _is_size(node: fx.Node) -> bool:
    """Whether a call returns no tensor: it computes a size, or asserts something about one."""
    if node.op != "call_function" or _may_write(node.target):
        return False
    if "val" not in node.meta:  # inserted by a pass
        declared: Any = getattr(node.target, "_schema", None)
        return declared is not None and not any("Tensor" in str(r.type) for r in declared.returns)
    return not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta.get("val")))


def _may_write(target: Any) -> bool:
    """Whether an op may change its arguments: by its schema, or if it has none, as nested ones."""
    declared: Any = getattr(target, "_schema", None)
    if declared is None:
        return isinstance(target, torch._ops.OperatorBase)
    return declared.is_mutable


def _whole(node: fx.Node, symbols: Mapping[str, Any]) -> fx.Node:
    """Return the tensor that a node is the whole of."""
    while _is_whole(node, symbols):
        node = node.all_input_nodes[0]
    return node


def _is_whole(node: fx.Node, symbols: Mapping[str, Any]) -> bool:
    """Whether a node slices a whole dimension, as `x[:, 0]` does with its first, or none."""
    if node.target is torch.ops.aten.alias.default:
        return True
    return _is_slice(node) and _slice(node, symbols)[1:] == [0, _END, 1]


def _is_slice(node: fx.Node) -> bool:
    return node.target is _SLICE and not node.kwargs


def _slice(node: fx.Node, symbols: Mapping[str, Any]) -> list[Any]:
    """Return the dimension, start, end and step of a slice; an end at or after the last is _END."""
    given = [node.args[0], 0, None, None, 1]
    given[: len(node.args)] = node.args
    taken, dim, start, end, step = given
    if isinstance(end, fx.Node):
        end = _size(end, symbols)
    if end is not None and isinstance(taken, fx.Node) and _reaches(end, taken, dim, symbols):
        end = None
    return [dim, start or 0, _END if end is None else end, step]


def _reaches(end: Any, taken: fx.Node, dim: Any, symbols: Mapping[str, Any]) -> bool:
    """Whether an end of a slice is the size of the dimension that is sliced, or larger."""
    value = taken.meta.get("val")
    size = _known(value.shape[dim], symbols) if isinstance(value, torch.Tensor) else None
    if isinstance(end, int) and isinstance(size, int):
        return end >= size
    return size is not None and bool(end == size)


def _flat(node: fx.Node, numbers: dict[fx.Node, int], symbols: Mapping[str, Any]) -> list[Any]:
    """Return a node's arguments as a flat list, without whole slices and with computed sizes."""

    def number(value: fx.Node) -> Any:
        value = _whole(value, symbols)
        size = _size(value, symbols)  # an input that is a size is a literal in a static graph
        return _Number(numbers[value]) if size is value and value in numbers else size

    args: Any = node.args
    if _is_slice(node):
        args = (args[0], *_slice(node, symbols))
    return pytree.tree_leaves(fx.map_arg((args, dict(node.kwargs)), number))


@dataclass(frozen=True)
class _Number:
    """A node as an argument: its index among the nodes compared."""

    index: int


def _size(node: fx.Node, symbols: Mapping[str, Any]) -> Any:
    """Return a size for these values of the symbols, or the node itself if it is not known."""
    found = _known(node.meta.get("val"), symbols)
    return node if found is None else found


def _known(value: Any, symbols: Mapping[str, Any]) -> Any:
    """Return a size for these values of the symbols: a number or an expression, None if unknown."""
    if not isinstance(value, torch.SymInt):
        return value if isinstance(value, int) else None
    expression: Any = value.node.expr
    if any(str(symbol) not in symbols for symbol in expression.free_symbols):
        return None
    found: Any = expression.subs({s: symbols[str(s)] for s in expression.free_symbols})
    return int(found) if found.is_number else found


def _form(node: fx.Node, numbers: dict[fx.Node, int]) -> Any:
    """Return a node's op, target and arguments, with the index of each node among these."""

    target = None if node.op == "placeholder" else node.target
    return node.op, target, literal((node.args, dict(node.kwargs)), numbers.__getitem__)


def _same_constants(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether the `get_attr` nodes of two graphs, equal node for node, fetch equal tensors."""
    for one, other in zip(first.nodes, second.nodes, strict=True):
        if one.op != "get_attr":
            continue
        a, b = (_get(node.graph.owning_module, node.target) for node in (one, other))
        if a is b:
            continue
        if isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule):
            if not _same_constants(a.graph, b.graph):
                return False
        elif not equal_tensors(a, b):
            return False
    return True


def equal_tensors(a: object, b: object) -> bool:
    """Whether two values are tensors of one dtype and shape with the same entries, which are known.

    0.0 and -0.0 differ, as in `same_literal`.
    """
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    if a.dtype != b.dtype or a.is_meta or not torch.equal(a, b):
        return False
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b)]
    return torch.equal(*(torch.signbit(part) for part in parts))


def _get(module: nn.Module | None, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
