"""Round the activations of a captured graph straight-through."""

from __future__ import annotations

import torch
from torch import fx

from ..fx.calls import example_value
from ..fx.straight_through import Rounding
from .subgraphs import as_module, computed_from

# The libraries whose ops quantise by definition. Other ops may cast for any reason: a comparison
# cast to floats is a mask, whose gradient is zero.
_NAMESPACES = ("quantized_decomposed", "torchao")


def round_straight_through(graph: fx.Graph) -> None:
    """Make the readers that dequantise a quantised activation pass their gradients to it.

    Each becomes one node that quantises and dequantises. Other readers of the codes stay.
    """
    for quantise in list(graph.nodes):
        if not _is_op(quantise, "quantize_") or computed_from(quantise) is not None:
            continue
        for dequantise in list(quantise.users):
            if dequantises(dequantise):
                _join(quantise, dequantise)
        if not quantise.users:
            graph.erase_node(quantise)


def dequantises(node: fx.Node) -> bool:
    """Whether a node calls an op that dequantises by definition."""
    return _is_op(node, "dequantize_")


def _is_op(node: fx.Node, prefix: str) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.partition("::")[2]
    known = target.namespace in _NAMESPACES and name.startswith(prefix)
    return known and not target._schema.is_mutable


def _join(quantise: fx.Node, dequantise: fx.Node) -> None:
    """Replace a node that dequantises by one that does both, if their values allow it."""
    start = quantise.args[0] if quantise.args else None
    if not isinstance(start, fx.Node) or dequantise.args[:1] != (quantise,):
        return
    before, after = example_value(start), example_value(dequantise)
    if before is None or after is None or before.shape != after.shape:
        return
    if before.dtype != after.dtype or not before.is_floating_point():
        return
    inputs = (*quantise.all_input_nodes, *dequantise.all_input_nodes)
    given = [node for node in dict.fromkeys((start, *inputs)) if node is not quantise]
    graph = dequantise.graph
    with graph.inserting_before(dequantise):
        target = Rounding(as_module(given, (quantise, dequantise)))
        made = graph.create_node("call_function", target, tuple(given))
    made.meta = dict(dequantise.meta)
    dequantise.replace_all_uses_with(made)
    graph.erase_node(dequantise)
