"""Fast forms of the graphs that a graph calls: regions of the forward, such as autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from ..fx.nested import Call, call_of, nested_graph
from .chunks import Chunks, LogProbabilities


class Fetched:
    """Fetches a fast nested graph, in the place of a `get_attr` node that fetches the explicit one.

    It shares the tensors of the explicit one, so that both are moved together.
    """

    def __init__(self, explicit: fx.GraphModule, graph: fx.Graph) -> None:
        self.module = fx.GraphModule(explicit, graph)
        for held in ("_parameters", "_buffers", "_modules"):
            self.module.__dict__[held] = explicit.__dict__[held]
        self.__name__, self.__module__ = "fast_nested_graph", __name__  # which torch.fx asks for

    def __call__(self) -> fx.GraphModule:
        return self.module


def make_nested_fast(
    graph: fx.Graph, owner: nn.Module, fast: Callable[[fx.GraphModule, Call], fx.Graph]
) -> None:
    """Have the regions that a graph calls run their fast graphs.

    The branches of a choice and the bodies of a loop stay: torch traces them itself.
    """
    for source in list(graph.find_nodes(op="get_attr")):
        explicit = nested_graph(source, owner)
        if explicit is None:
            continue
        calls = [call_of(user, owner) for user in source.users]
        regions = [call for call in calls if call and call.runs_once]
        if regions and len(regions) == len(calls):
            with graph.inserting_after(source):
                fetched = graph.call_function(Fetched(explicit, fast(explicit, regions[0])))
            source.replace_all_uses_with(fetched)
            graph.erase_node(source)


def running_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes of a graph, and of the fast graphs that it calls."""
    for node in graph.nodes:
        yield node
        if isinstance(node.target, Fetched | Chunks | LogProbabilities):
            yield from running_nodes(node.target.module.graph)
