"""Derive a fast graph from an explicit one."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from ..fx.marks import ADAPTER, APART, JOINED
from ..fx.nested import Call, checkpointed
from .frozen import leave_out_frozen_gradients
from .layers import Layer, grouped, is_barrier
from .linears import direct_linears
from .losses import chunk_losses
from .merged import merge_convolutions
from .nested import make_nested_fast
from .norms import rewrite_norms
from .recompute import recompute_chains

aten = torch.ops.aten


@dataclass(frozen=True)
class Fast:
    """What a fast graph may do.

    Attributes:
        recompute: compute chains of elementwise ops again in the backward.
        chunked_loss: compute a linear head and its cross-entropy for some rows at a time.
    """

    recompute: bool = False
    chunked_loss: bool = False


def fast_graph(graph: fx.Graph, how: Fast, owner: nn.Module | None = None) -> fx.Graph:
    """Return a copy of a graph in which one op computes each group of adapted layers.

    Args:
        graph: the explicit graph, which stays as it is.
        how: what the copy may do.
        owner: the module that holds the nested graphs that it calls; None keeps these explicit.
    """
    fast = copy.deepcopy(graph)

    def nested(explicit: fx.GraphModule, call: Call) -> fx.Graph:
        # a checkpoint computes all of it again in any case
        again = how.recompute and call.node.target is not checkpointed
        return fast_graph(explicit.graph, replace(how, recompute=again), explicit)

    if owner is not None:
        make_nested_fast(fast, owner, nested)
    if how.chunked_loss:
        chunk_losses(fast, lambda part: fast_graph(part, Fast()))
    found = grouped(fast)
    order = {node: number for number, node in enumerate(fast.nodes)}
    for layers in found.groups:
        _join(layers, order)
    for node, reason in found.others.items():
        node.meta[APART] = reason
    rewrite_norms(fast)
    if how.recompute:
        recompute_chains(fast, is_barrier)
    # whatever torch does not know comes last: others take it for what may write to a tensor
    merge_convolutions(fast, owner)
    leave_out_frozen_gradients(fast)
    for joint in fast.find_nodes(op="call_function", target=torch.ops.fxlora.linears.default):
        joint.target = direct_linears
    fast.lint()
    return fast


def _join(layers: Sequence[Layer], order: dict[fx.Node, int]) -> None:
    """Replace the nodes of layers with one input by one op, in the place of the first."""
    first = layers[0].base
    graph = first.graph
    for layer in layers:
        for node in layer.operands:
            _move(node, first, order)
    with graph.inserting_before(first):
        joint = graph.call_function(
            torch.ops.fxlora.linears.default,
            (
                layers[0].x,
                [_out_first(layer) for layer in layers],
                [None if layer.gain else layer.bias for layer in layers],
                [layer.down for layer in layers],
                [layer.up for layer in layers],
                [layer.scaling for layer in layers],
            ),
        )
        joint.meta[JOINED] = tuple(layer.name for layer in layers)
        outputs = [graph.call_function(operator.getitem, (joint, n)) for n in range(len(layers))]
    order.update(dict.fromkeys(outputs, order[first]))
    for layer, found in zip(layers, outputs, strict=True):
        output = _scaled(layer, found, order) if layer.gain else found
        output.meta = {key: value for key, value in layer.output.meta.items() if key != ADAPTER}
        layer.output.replace_all_uses_with(output)
        for node in layer.nodes:
            graph.erase_node(node)


def _scaled(layer: Layer, unscaled: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """Return g·y + b, from the outputs y of the adapted layer without its bias, in their dtype."""
    graph = unscaled.graph
    with graph.inserting_before(layer.output):
        if layer.bias is None:
            output = graph.call_function(aten.mul.Tensor, (unscaled, layer.gain))
        else:
            given = (layer.bias, unscaled, layer.gain)
            output = graph.call_function(aten.addcmul.default, given)
        same = graph.call_function(aten.type_as.default, (output, unscaled))
    order.update(dict.fromkeys((output, same), order[layer.output]))
    return same


def _out_first(layer: Layer) -> fx.Node:
    """Return the weight as (out, in)."""
    if not layer.row.in_first:
        return layer.weight
    return layer.base.graph.call_function(aten.t.default, (layer.weight,))


def _move(node: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> None:
    """Move a node in front of another, unless it is there, and its inputs before it."""
    if order[node] > order[before]:
        for given in node.all_input_nodes:
            _move(given, before, order)
        before.prepend(node)
        order[node] = -1  # it is there now
