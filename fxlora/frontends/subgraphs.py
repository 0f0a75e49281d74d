"""Parts of a graph, as graphs of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn


def computed_from(last: fx.Node) -> list[fx.Node] | None:
    """Return a node and all that it is computed from, in graph order, if these are constants.

    None if it depends on an input, on anything that is not an op of torch, or on a write.
    """
    found, ahead = {last}, [last]
    while ahead:
        node = ahead.pop()
        if node.op not in ("call_function", "get_attr"):
            return None
        target = node.target
        if node.op == "call_function" and (
            not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable
        ):
            return None
        ahead += [given for given in node.all_input_nodes if given not in found]
        found.update(node.all_input_nodes)
    return sorted(found)


def as_module(sources: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """Return a graph of some nodes, with a placeholder for each source; the last is its output."""
    graph = fx.Graph()
    made = {node: graph.placeholder(f"part_{n}") for n, node in enumerate(sources)}
    for node in nodes:
        if node not in made:
            made[node] = graph.node_copy(node, lambda given: made[given])
            made[node].meta = {}
    graph.output(made[nodes[-1]])
    return fx.GraphModule(nn.Module(), graph)
