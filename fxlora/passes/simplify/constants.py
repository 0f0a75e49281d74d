"""EvaluateConstants: compute once what depends on parameters and buffers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from ...fx.effects import alias_roots
from ...module import CapturedModule
from ...module.memory import memory_id
from ...module.state import State
from ..base import Pass
from .values import SMALL, Constants


@dataclass(frozen=True)
class EvaluateConstants(Pass):
    """Replace the last nodes that depend on constants only by their values.

    Among them are parametrized weights, masks, positions and the embeddings of those. A view of a
    constant stays: it costs nothing. So does what the graph returns, which is new at each call.
    """

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            held = Constants(graph, module)
            returned = _memory(graph.output_node().all_input_nodes, module)
            for node in [n for n in graph.nodes if n in held.nodes and n.op == "call_function"]:
                if held.nodes.issuperset(node.users) or returned & _memory([node], module):
                    continue
                value = held.of(node)
                if not isinstance(value, torch.Tensor) or not _is_worth(node, value, held):
                    continue
                fetched = held.new(f"_simplified.{node.name}", value.clone(), node)
                fetched.meta = dict(node.meta)
                node.replace_all_uses_with(fetched)
            for node in reversed(list(graph.nodes)):
                if node in held.nodes and not node.users:
                    graph.erase_node(node)
        return module.known


def _memory(nodes: Iterable[fx.Node], module: CapturedModule) -> set[fx.Node]:
    """Return the nodes whose memory the values of some nodes may share, or the nodes themselves."""
    return {root for node in nodes for root in alias_roots(node, module)}


def _is_worth(node: fx.Node, value: torch.Tensor, held: Constants) -> bool:
    """Whether a value is computed, and not a view, and is not much larger than its constants."""
    sources: dict[fx.Node, torch.Tensor] = {}
    ahead, met = [node], set[fx.Node]()
    while ahead:
        given = ahead.pop()
        if given in met:
            continue
        met.add(given)
        if given.op == "get_attr":
            sources[given] = held.of(given)
        ahead += given.all_input_nodes
    view = memory_id(value) in {memory_id(tensor) for tensor in sources.values()}
    size = sum(tensor.numel() for tensor in sources.values())
    return not view and value.numel() <= max(SMALL, 2 * size)
