"""RemoveDead: what no output depends on, in graphs and in the module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...module import CapturedModule
from ...module.state import State
from ..base import Pass


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Erase nodes without users that have no effect, and tensors that no graph fetches."""

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            graph.eliminate_dead_code()
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


def _fetched(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")]
