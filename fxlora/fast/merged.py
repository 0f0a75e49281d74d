"""Compute an adapted 1x1 convolution with the weight W + s·BA, where that takes less.

For each position of an image, a training step multiplies

    by the branch: 3·r·(in + out),  by one weight: in·out, for the gradient of W + s·BA

more than without an adapter; forming the weight, and the gradients of A and B, are 3·r·in·out once.
So one weight is less for few channels on many positions: the first stages of a network for images.
The products of rank r are slower than wide ones, too, so it pays from a share of the branch's
numbers on (benchmarks/layer_forms.py). Linear layers have the joint op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..fx.calls import argument, example_value
from ..fx.marks import ADAPTER, MERGED
from ..fx.trials import concrete_sizes
from ..lora.ops import OPS
from .layers import Layer, NotJoinable, call_of
from .plain import is_plain

aten = torch.ops.aten

_SHARE = 0.6  # of the numbers of one weight, that the branch's are at least
_EXACT = (torch.float32, torch.float64)  # below, the sum of W and s·BA loses digits of s·BA


def pays(rows: int, inputs: int, outputs: int, r: int) -> bool:
    """Whether one weight takes less than the branch, for a layer on this many rows."""
    branch = 3 * r * (inputs + outputs) * rows
    return branch >= _SHARE * inputs * outputs * (rows + 3 * r)


class Merged:
    """An adapted layer: by one weight where that pays, and by its explicit nodes otherwise."""

    def __init__(self, explicit: fx.Graph, merged: fx.Graph, steps: int) -> None:
        """Take graphs of (x, W, A, B, …), and the positions of x for each one of the result."""
        self.explicit, self.merged = (fx.GraphModule(nn.Module(), g) for g in (explicit, merged))
        self.steps = steps
        self.__name__, self.__module__ = "merged_layer", __name__  # which torch.fx asks for

    def __call__(self, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, *others: Any) -> Any:
        form = self.merged if self._pays(x, weight, down, up) else self.explicit
        return form.forward(x, weight, down, up, *others)

    def _pays(self, *tensors: Tensor) -> bool:
        x, weight, down, up = tensors
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
            return False
        if x.dtype not in _EXACT or any(t.dtype is not x.dtype for t in (weight, down, up)):
            return False
        inputs = math.prod(down.shape[1:])
        rows = x.numel() // inputs // self.steps
        return is_plain(tensors) and pays(rows, inputs, up.shape[0], down.shape[0])


def merge_convolutions(graph: fx.Graph, owner: nn.Module | None) -> None:
    """Replace adapted convolutions by calls that merge the weight where that pays.

    Those of other kernels than 1x1 stay: there the gradient of the whole weight is slower.

    Args:
        graph: the graph, which is changed.
        owner: the module that holds A and B, whose sizes no graph knows.
    """
    for node in list(graph.nodes):
        layer = _convolution(node)
        if layer and owner and (steps := _steps(layer, owner)):
            _replace(layer, steps)


def _steps(layer: Layer, owner: nn.Module) -> int:
    """Return the positions of x for each of the result, if one weight pays in the example; or 0."""
    x, y = example_value(layer.x), example_value(layer.base)
    if x is None or y is None:
        return 0
    weight, down, up = (_held(node, owner) for node in (layer.weight, layer.down, layer.up))
    if weight is None or down is None or up is None or x.dtype not in _EXACT:
        return 0
    if any(t.dtype is not x.dtype for t in (weight, down, up)):
        return 0
    inputs, outputs = math.prod(down.shape[1:]), up.shape[0]
    before, rows = (math.prod(concrete_sizes(t.shape)) for t in (x, y))
    before, rows = before // inputs, rows // outputs
    if not rows or not pays(rows, inputs, outputs, down.shape[0]):
        return 0
    return max(1, before // rows)


def _held(node: fx.Node, owner: nn.Module) -> Tensor | None:
    """Return the tensor of a module that a node fetches, or None."""
    path, _, name = str(node.target).rpartition(".")
    if node.op != "get_attr":
        return None
    found = getattr(owner.get_submodule(path), "_parameters", {}).get(name)
    return found if isinstance(found, Tensor) else None


def _convolution(output: fx.Node) -> Layer | None:
    """Return the adapted convolution that ends at a node, if its kernel has one entry."""
    name, form = output.meta.get(ADAPTER, ("", ""))
    base = output.args[0] if output.args else None
    if form != "branch" or output.target != aten.add.Tensor or not isinstance(base, fx.Node):
        return None
    row = OPS.get((base.target, 1))
    weight = example_value(argument(base, 1))
    if row is None or not row.kernel or row.in_first or weight is None:
        return None
    if math.prod(weight.shape[2:]) != 1 or argument(base, 6) != 1:
        return None
    try:
        product = call_of(output.args[1], getattr(aten, f"conv{row.kernel}d").default, 7)
        scaled = call_of(product.args[0], aten.mul.Tensor)
        hidden = call_of(scaled.args[0], base.target, 7)
    except NotJoinable:
        return None
    layer = Layer(name, row, 1, base, hidden, scaled, product, output)
    geometry = [argument(base, position) for position in range(3, 7)]
    same = hidden.args[0] is layer.x and list(hidden.args[3:]) == geometry and not base.kwargs
    own = set(layer.nodes)
    private = all(own.issuperset(node.users) for node in layer.nodes[1:])
    nodes = all(isinstance(n, fx.Node) for n in (layer.x, *layer.operands))
    scaling = isinstance(layer.scaling, int | float)
    return layer if same and private and nodes and scaling else None


def _replace(layer: Layer, steps: int) -> None:
    given = list(dict.fromkeys([layer.x, layer.weight, layer.down, layer.up]))
    if len(given) != 4:
        return
    own = set(layer.nodes)
    others = [n for node in layer.nodes for n in node.all_input_nodes if n not in own]
    given += [node for node in dict.fromkeys(others) if node not in given]
    function = Merged(_explicit(layer, given), _merged(layer, given), steps)
    with layer.output.graph.inserting_before(layer.output):
        call = layer.output.graph.call_function(function, tuple(given))
    call.meta = {key: value for key, value in layer.output.meta.items() if key != ADAPTER}
    call.meta[MERGED] = layer.name
    layer.output.replace_all_uses_with(call)
    for node in layer.nodes:
        node.graph.erase_node(node)


def _explicit(layer: Layer, given: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    made = {node: graph.placeholder(f"given_{n}") for n, node in enumerate(given)}
    order = {node: number for number, node in enumerate(layer.output.graph.nodes)}
    for node in sorted(layer.nodes, key=order.__getitem__):
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[layer.output])
    return graph


def _merged(layer: Layer, given: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    made = {node: graph.placeholder(f"given_{n}") for n, node in enumerate(given)}
    weight, down, up = (made[node] for node in (layer.weight, layer.down, layer.up))

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(op, args, kwargs)

    # (out, r) @ (r, in) -> (out, in)
    left, right = (call(aten.flatten.using_ints, factor, 1) for factor in (up, down))
    matrix = call(aten.mm.default, call(aten.mul.Tensor, left, layer.scaling), right)
    change = call(aten.view_as.default, matrix, weight)
    made[layer.weight] = call(aten.add.Tensor, weight, change)
    graph.output(graph.node_copy(layer.base, made.__getitem__))
    return graph
