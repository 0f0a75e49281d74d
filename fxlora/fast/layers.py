"""Find the adapted layers of a graph that one op can compute, and group those with one input."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..fx.calls import argument
from ..fx.marks import ADAPTER
from ..lora.ops import LOW_RANK_PRODUCT, times_matrix
from ..lora.row import Op

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """An adapted layer, as its nodes: y + B(s·A(x)), of which y = op(x, W, b) is the base.

    A variant that scales the outputs by g adds more: y + z + (g - 1)(y - b + z), z = B(s·A(x)).
    Its operands are read from the nodes, because joining other layers may replace them.

    Attributes:
        name: the name of A.
        row: the row of the op.
        weight_at: the position of W among the op's arguments.
        base: the op.
        hidden, scaled, product: A(x), s·A(x) and B(s·A(x)).
        output: the sum, which the model reads.
        gain: g (out,), or None.
        scaling_nodes: the nodes between `product` and `output` that scale by g, the last one first.
    """

    name: str
    row: Op
    weight_at: int
    base: fx.Node
    hidden: fx.Node
    scaled: fx.Node
    product: fx.Node
    output: fx.Node
    gain: fx.Node | None = None
    scaling_nodes: tuple[fx.Node, ...] = ()

    @property
    def x(self) -> Any:
        return argument(self.base, self.row.input)

    @property
    def weight(self) -> Any:
        return argument(self.base, self.weight_at)

    @property
    def bias(self) -> Any:
        return None if self.row.bias is None else argument(self.base, self.row.bias)

    @property
    def down(self) -> Any:
        """A, (r, in)."""
        return self.hidden.args[1]

    @property
    def up(self) -> Any:
        """B, (out, r)."""
        return self.product.args[1]

    @property
    def scaling(self) -> Any:
        return self.scaled.args[1]

    @property
    def operands(self) -> list[Any]:
        """Its tensors other than x."""
        given = (self.weight, self.down, self.up, self.bias)
        return [value for value in given if value is not None]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Its own nodes, the last one first."""
        inner = (self.product, self.scaled, self.hidden, self.base)
        return self.output, *self.scaling_nodes, *inner


class NotJoinable(Exception):
    """The reason why no op computes an adapter, as the predicate of a sentence."""


def layer_of(output: fx.Node) -> Layer:
    """Return the layer whose adapter ends at a node.

    Raises:
        NotJoinable: the nodes are not those of a product of x and a matrix with its branch.
    """
    name, form = output.meta[ADAPTER]
    if form != "branch":
        raise NotJoinable("is on the weight, not a branch")
    if output.target != aten.add.Tensor or output.kwargs:
        raise NotJoinable("has another form")
    base, branch = output.args
    found = times_matrix(base.target) if isinstance(base, fx.Node) else None
    if found is None or not isinstance(base, fx.Node) or base.kwargs:
        raise NotJoinable("is not at a product of x and a matrix")
    bias = None if found[1].bias is None else argument(base, found[1].bias)
    gain, scaling_nodes, product = _unscaled(branch, base, bias)
    product = call_of(product, LOW_RANK_PRODUCT)
    scaled = call_of(product.args[0], aten.mul.Tensor)
    hidden = call_of(scaled.args[0], LOW_RANK_PRODUCT)
    inner = (base, hidden, scaled, product)
    layer = Layer(name, found[1], found[0], *inner, output, gain, scaling_nodes)
    if hidden.args[0] is not layer.x:
        raise NotJoinable("has dropout on its input")
    tensors = all(isinstance(value, fx.Node) for value in (layer.x, *layer.operands))
    if not tensors or _dims(layer.weight) != 2 or not isinstance(layer.scaling, int | float):
        raise NotJoinable("is not at a product of x and a matrix")
    own = set(layer.nodes)
    if layer.bias is not None and _dims(layer.bias) != 1:
        raise NotJoinable("adds a bias that is not known to be a vector")
    if any(not own.issuperset(node.users) for node in layer.nodes[1:]):
        raise NotJoinable("is read by another node, too")
    return layer


def _unscaled(
    branch: Any, base: fx.Node, bias: Any
) -> tuple[fx.Node | None, tuple[fx.Node, ...], Any]:
    """Return the gain that scales a layer's outputs, the nodes that do so, and z = B(s·A(x)).

    The nodes compute z + (g - 1)(y - b + z), from the base y and its bias b.
    """
    if not (isinstance(branch, fx.Node) and branch.target == aten.type_as.default):
        return None, (), branch
    total = call_of(branch.args[0], aten.add.Tensor)
    product, more = total.args
    more = call_of(more, aten.mul.Tensor)
    less, outputs = more.args[0], call_of(more.args[1], aten.add.Tensor)
    casts = [less] if isinstance(less, fx.Node) and less.target == aten.to.dtype else []
    less = call_of(casts[0].args[0] if casts else less, aten.sub.Tensor)
    gain, one = less.args
    unbiased = [] if bias is None else [call_of(outputs.args[0], aten.sub.Tensor)]
    as_said = outputs.args == (unbiased[0] if unbiased else base, product)
    if any(node.args != (base, bias) for node in unbiased) or not as_said or one != 1:
        raise NotJoinable("has another form")
    if not isinstance(gain, fx.Node):
        raise NotJoinable("has another form")
    return gain, (branch, total, more, *casts, less, outputs, *unbiased), product


def hidden_of(output: fx.Node) -> fx.Node | None:
    """Return A(x) of the adapter that ends at a node, if it is a branch of two plain products."""
    if output.meta.get(ADAPTER, ("", ""))[1] != "branch" or len(output.args) != 2:
        return None
    try:
        product = call_of(output.args[1], LOW_RANK_PRODUCT)
        return call_of(call_of(product.args[0], aten.mul.Tensor).args[0], LOW_RANK_PRODUCT)
    except NotJoinable:
        return None


def call_of(node: Any, target: Any, arguments: int = 2) -> fx.Node:
    """Return a node, if it is a call of the target with this number of arguments.

    Raises:
        NotJoinable: it is not.
    """
    if not (isinstance(node, fx.Node) and node.target == target and len(node.args) == arguments):
        raise NotJoinable("has another form")
    return node


def _dims(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None


# ---- groups -------------------------------------------------------------------------------------


@dataclass
class Groups:
    """The adapted layers of a graph, by groups that one op can compute.

    Attributes:
        groups: layers with one input, in graph order.
        others: the last node of every other adapter, with the reason.
    """

    groups: list[list[Layer]] = field(default_factory=list[list[Layer]])
    others: dict[fx.Node, str] = field(default_factory=dict[fx.Node, str])


def grouped(graph: fx.Graph) -> Groups:
    """Return the groups of adapted layers in a graph.

    A group is computed in the place of its first layer, so all that lies between must neither
    write to a tensor nor change a mode of torch.
    """
    found = Groups()
    order = {node: number for number, node in enumerate(graph.nodes)}
    layers = sorted(_layers(graph, found.others), key=lambda layer: order[layer.base])
    own = {node for layer in layers for node in layer.nodes}
    barriers = [number for node, number in order.items() if is_barrier(node)]
    latest: dict[fx.Node, list[Layer]] = {}

    def may_join(layer: Layer, first: fx.Node) -> bool:
        begin, end = order[first], order[layer.output]
        return not between(barriers, begin, end) and all(
            _movable(node, begin, order, own) for node in layer.operands
        )

    for layer in layers:
        group = latest.get(layer.x)
        if group and may_join(layer, group[0].base):
            group.append(layer)
        elif may_join(layer, layer.base):
            latest[layer.x] = [layer]
            found.groups.append(latest[layer.x])
        else:
            found.others[layer.output] = "has nodes between its own that may write to a tensor"
    return found


def _layers(graph: fx.Graph, others: dict[fx.Node, str]) -> Iterator[Layer]:
    for node in graph.nodes:
        if ADAPTER in node.meta:
            try:
                yield layer_of(node)
            except NotJoinable as reason:
                others[node] = str(reason)


def between(numbers: Sequence[int], begin: int, end: int) -> bool:
    """Whether one of some increasing numbers lies between two others."""
    index = bisect.bisect_right(numbers, begin)
    return index < len(numbers) and numbers[index] < end


def is_barrier(node: fx.Node) -> bool:
    """Whether a node may write to a tensor, or change a mode of torch."""
    if node.op != "call_function":
        return node.op not in ("placeholder", "get_attr", "output")
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    number = isinstance(node.meta.get("val"), int | float | torch.SymInt)
    return node.target is not operator.getitem and not number


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers, or may do so."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return is_barrier(node)
    return torch.Tag.nondeterministic_seeded in node.target.tags


def _movable(node: fx.Node, begin: int, order: dict[fx.Node, int], own: set[fx.Node]) -> bool:
    """Whether a node may be computed at a place in the graph, with the inputs that come later.

    It may not if it needs a node of an adapted layer (`own`), which is to be computed there, or
    draws random numbers, which others after it in the graph would draw then.
    """
    if order[node] < begin or node.op == "get_attr":
        return True
    if node.op != "call_function" or node in own or draws(node):
        return False
    return all(_movable(given, begin, order, own) for given in node.all_input_nodes)
