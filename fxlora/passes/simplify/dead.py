"""RemoveDead: what no output depends on, in graphs and in the module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ...fx.effects import is_python_function, statistics_written, written_nodes
from ...fx.nested import call_of
from ...module import CapturedModule
from ...module.state import State
from ..base import Pass
from .values import is_pure


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Erase nodes without users that have no effect, and tensors that no graph fetches."""

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            for node in reversed(list(graph.nodes)):
                if not node.users and not _has_effect(node, module):
                    graph.erase_node(node)
        if module.parent_module:  # its Python may read any of them
            return module.known
        read = {name for graph in module.distinct_graphs() for name in _fetched(graph)}
        within = tuple(f"{name}." for name in read)  # modules that a graph calls
        for name, _ in list(module.named_parameters(remove_duplicate=False)):
            if name not in read and not name.startswith(within):
                module.remove_parameter(name)
        for name, _ in list(module.named_buffers(remove_duplicate=False)):
            if name not in read and not name.startswith(within):
                owner, _, attribute = name.rpartition(".")
                del module.get_submodule(owner)._buffers[attribute]
        return module.known


def _has_effect(node: fx.Node, owner: nn.Module) -> bool:
    """Whether a node may do more than return a value, itself or in nested graphs of its owner."""
    if statistics_written(node, owner):
        return True
    if node.op == "get_attr" or is_pure(node):
        return False
    if node.op != "call_function" or node.is_impure() or written_nodes(node, owner):
        return True
    if call := call_of(node, owner):
        inner = ((one, graph) for graph in call.graphs for one in graph.graph.nodes)
        ends = ("placeholder", "output")
        return any(one.op not in ends and _has_effect(one, graph) for one, graph in inner)
    # Python's operators have none; an op that is not torch's, and any other function, may have.
    return isinstance(node.target, torch._ops.OperatorBase) or is_python_function(node)


def _fetched(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
