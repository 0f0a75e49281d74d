"""Find the adapted layers of a graph that one op can compute, and group those with one input."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..fx.calls import argument
from ..lora.ops import LOW_RANK_PRODUCT, times_matrix

MARK = "fxlora"  # key in the meta of an adapter's last node; the value is (name of A, form)

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """An adapted layer, as its nodes: y + B(s·A(x)), of which y = op(x, W, b) is the base.

    Attributes:
        name: the name of A.
        x, weight, bias: the operands of the op; no bias is None.
        in_first: whether the weight is (in, out).
        down, up: A (r, in) and B (out, r).
        scaling: s.
        base: the op.
        branch: the nodes of the branch, the last one first.
        output: the sum, which the model reads.
    """

    name: str
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    in_first: bool
    down: fx.Node
    up: fx.Node
    scaling: float
    base: fx.Node
    branch: tuple[fx.Node, ...]
    output: fx.Node

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes of its tensors other than x."""
        given = (self.weight, self.down, self.up, self.bias)
        return [node for node in given if node is not None]


class NotJoinable(Exception):
    """The reason why no op computes an adapter, as the predicate of a sentence."""


def layer_of(output: fx.Node) -> Layer:
    """Return the layer whose adapter ends at a node.

    Raises:
        NotJoinable: the nodes are not those of a product of x and a matrix with its branch.
    """
    name, form = output.meta[MARK]
    if form != "branch":
        raise NotJoinable("is on the weight, not a branch")
    base, product, *_ = output.args
    found = times_matrix(base.target) if isinstance(base, fx.Node) else None
    if found is None or not isinstance(base, fx.Node) or base.kwargs:
        raise NotJoinable("is not at a product of x and a matrix")
    at, row = found
    x, weight = argument(base, row.input), argument(base, at)
    up, scaled = _of(product, LOW_RANK_PRODUCT)
    scaling, hidden = _of(scaled, aten.mul.Tensor)
    down, given = _of(hidden, LOW_RANK_PRODUCT)
    if given is not x:
        raise NotJoinable("has dropout on its input")
    if _dims(weight) != 2 or not all(isinstance(node, fx.Node) for node in (x, down, up)):
        raise NotJoinable("is not at a product of x and a matrix")
    branch = (product, scaled, hidden)
    if any(len(node.users) > 1 for node in (base, *branch)):
        raise NotJoinable("is read by another node, too")
    bias = None if row.bias is None else argument(base, row.bias)
    return Layer(
        *(name, x, weight, bias, row.in_first, down, up, float(scaling)), base, branch, output
    )


def _of(node: Any, target: OpOverload) -> tuple[Any, Any]:
    """Return the second and the first argument of a call.

    Raises:
        NotJoinable: it is not a call of the target with these two.
    """
    if not (isinstance(node, fx.Node) and node.target == target and len(node.args) == 2):
        raise NotJoinable("has another form")
    return node.args[1], node.args[0]


def _dims(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None


# ---- groups -------------------------------------------------------------------------------------


@dataclass
class Groups:
    """The adapted layers of a graph, by groups that one op can compute.

    Attributes:
        groups: layers with one input, in graph order.
        others: for every other adapter, by the name of A, the reason.
    """

    groups: list[list[Layer]] = field(default_factory=list[list[Layer]])
    others: dict[str, str] = field(default_factory=dict[str, str])


def grouped(graph: fx.Graph) -> Groups:
    """Return the groups of adapted layers in a graph.

    A group is computed in the place of its first layer, so all that lies between must neither
    write to a tensor nor change a mode of torch.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    barriers = [number for node, number in order.items() if not _is_pure(node)]
    found = Groups()
    latest: dict[fx.Node, list[Layer]] = {}

    def may_join(layer: Layer, first: fx.Node) -> bool:
        begin, end = order[first], order[layer.output]
        clear = not any(begin < barrier < end for barrier in barriers)
        return clear and all(_movable(node, begin, order) for node in layer.operands)

    for layer in sorted(_layers(graph, found.others), key=lambda layer: order[layer.base]):
        group = latest.get(layer.x)
        if group and may_join(layer, group[0].base):
            group.append(layer)
        elif may_join(layer, layer.base):
            latest[layer.x] = [layer]
            found.groups.append(latest[layer.x])
        else:
            found.others[layer.name] = "has nodes between its own that may write to a tensor"
    return found


def _layers(graph: fx.Graph, others: dict[str, str]) -> Iterator[Layer]:
    for node in graph.nodes:
        if MARK in node.meta:
            try:
                yield layer_of(node)
            except NotJoinable as reason:
                others[node.meta[MARK][0]] = str(reason)


def _is_pure(node: fx.Node) -> bool:
    """Whether a node is known to write to no tensor, and to change no mode of torch."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    number = isinstance(node.meta.get("val"), int | float | torch.SymInt)
    return node.target is operator.getitem or number


def _movable(node: fx.Node, begin: int, order: dict[fx.Node, int]) -> bool:
    """Whether a node may be computed at a place in the graph, with the inputs that come later."""
    if order[node] < begin or node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op == "call_function" and all(_movable(n, begin, order) for n in inputs)
