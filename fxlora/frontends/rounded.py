"""Round the activations of a captured graph straight-through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..fx.calls import example_value
from ..fx.straight_through import Rounding
from .subgraphs import as_module, computed_from


def round_straight_through(graph: fx.Graph) -> None:
    """Make each round trip of an activation through integers one node that passes gradients."""
    for last in list(graph.nodes):
        trip = _RoundTrip.to(last)
        if trip is None:
            continue
        given = (trip.start, *trip.constants)
        target = Rounding(as_module(given, trip.nodes))
        with graph.inserting_before(last):
            made = graph.create_node("call_function", target, given)
        made.meta = dict(last.meta)
        last.replace_all_uses_with(made)
        for node in reversed(trip.nodes):
            graph.erase_node(node)


@dataclass(frozen=True)
class _RoundTrip:
    """Ops that turn a tensor into integers and back.

    Attributes:
        start: the node of the tensor.
        nodes: the ops, in order.
        constants: the nodes of their other inputs.
    """

    start: fx.Node
    nodes: Sequence[fx.Node]
    constants: Sequence[fx.Node]

    @classmethod
    def to(cls, last: fx.Node) -> _RoundTrip | None:
        """Return the round trip that ends at a node, or None."""
        value, nodes, node = example_value(last), list[fx.Node](), last
        if value is None or not value.is_floating_point():
            return None
        while True:
            target = node.target
            nodes.append(node)
            op = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
            before = node.args[0] if op and node.args else None
            if not isinstance(before, fx.Node) or (held := example_value(before)) is None:
                return None
            if held.shape != value.shape:
                return None
            if held.is_floating_point():
                break
            if len(before.users) > 1:
                return None
            node = before
        inputs = (given for n in nodes for given in n.all_input_nodes)
        constants = [n for n in dict.fromkeys(inputs) if n is not before and n not in nodes]
        rounds = len(nodes) > 1 and held.dtype == value.dtype
        if not rounds or computed_from(before) is not None:
            return None
        if any(n.op != "get_attr" for n in constants):
            return None
        return cls(before, nodes[::-1], constants)
