"""Outlining, the opposite of inlining: submodules as modules of their own, which a graph calls.

Outlining does not change the graph itself, which passes rewrite, and fold, verify and save read. A
copy of it is split, and runs instead: the nodes of each outlined call become a graph of their own,
and one call of a module replaces them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from ...errors import SubmoduleError
from ...fx.calls import is_in
from ...fx.nested import call_of, every_call
from ..constants import EqualConstants
from ..contract import InputSpec
from .around import keep_inside, put_call
from .contract import contract_of
from .inside import graph_inside
from .part import CallPart
from .prepared import prepared_copy
from .recorded import CALLS, ModuleCall


@dataclass(frozen=True)
class OutlinedGraph:
    """The graph of an outlined call.

    Attributes:
        call: the call.
        graph: its graph: one placeholder for each computed leaf of the arguments; it returns the
            leaves of the output. Names of tensors are relative to the submodule, or start with
            "outer." and are relative to the whole model.
        inputs: its input contract.
        alike: pairs of indices among the arguments' leaves that were one value.
    """

    call: ModuleCall
    graph: fx.Graph
    inputs: InputSpec
    alike: frozenset[tuple[int, int]]


def split_at_calls(
    graph: fx.Graph,
    calls: Sequence[ModuleCall],
    paths: Iterable[str],
    equal: EqualConstants,
    ordered: bool,
) -> tuple[fx.Graph, dict[str, list[OutlinedGraph]]]:
    """Split a graph at the calls of submodules.

    Args:
        graph: the graph, which stays as it is.
        calls: all recorded calls in it.
        paths: the submodules to outline.
        equal: the names of constants in the submodules' graphs.
        ordered: whether the forward reads how its tensors lie in memory.

    Returns:
        A graph that calls the submodules, as "facade.<path>", and the graph of each call of each
        submodule.

    Raises:
        SubmoduleError: a submodule has a part in the graph other than by its calls, or it shares
            more than arguments and results with the code around it.
    """
    rest, repeatable = prepared_copy(graph)
    made: dict[str, list[OutlinedGraph]] = {}
    for path in sorted(paths, key=lambda path: (-path.count("."), path)):  # the innermost first
        own = [call for call in calls if call.path == path]
        if _is_called_otherwise(graph, path, recorded=bool(own)):
            raise SubmoduleError(
                f"'{path}' cannot be a module of its own: it is a container that is not called, or "
                "it is called under torch.no_grad or torch.autocast in the forward, or only by one "
                "of its methods. Outline the module around it, or those inside "
                f"(modules='{path}.*')."
            )
        made[path] = [
            _outline(CallPart(rest, call, repeatable), equal, ordered)  # of what the last one left
            for call in own
        ]
    _lint(rest, "the graph around the submodules")
    return rest, made


def _outline(part: CallPart, equal: EqualConstants, ordered: bool) -> OutlinedGraph:
    """Replace the nodes of a call by a call of the submodule, and return the submodule's graph."""
    if all(node.op == "get_attr" for node in part.nodes):
        raise part.refusal("computes nothing: it returns its arguments, or parameters")
    keep_inside(part)
    graph = graph_inside(part, equal)
    _lint(graph, f"'{part.call.path}'")
    inputs = contract_of(part, ordered)
    put_call(part)
    return OutlinedGraph(part.call, graph, inputs, part.alike)


def _lint(graph: fx.Graph, what: str) -> None:
    """Raise SubmoduleError for a graph in which a value is used before it is computed."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise SubmoduleError(
            f"{what} cannot be split from the rest ({str(error).splitlines()[0]}). Outline other "
            "modules, or none, and report this to fxlora."
        ) from error


def _is_called_otherwise(graph: fx.Graph, path: str, recorded: bool) -> bool:
    """Whether a submodule has a part in a graph that no recorded call has.

    Args:
        graph: the graph.
        path: the submodule's path.
        recorded: whether there are recorded calls of it; else each node of it counts.
    """
    owner = graph.owning_module
    assert owner is not None
    for node in graph.nodes:
        if not recorded and is_in(node, path):
            return True
        call = call_of(node, owner)
        if call and path not in {key[0] for key in node.meta.get(CALLS, ())}:
            deeper = (inner for g in call.graphs for inner in every_call(g.graph, g))
            graphs = (*call.graphs, *(g for inner in deeper for g in inner.graphs))
            if any(is_in(found, path) for g in graphs for found in g.graph.nodes):
                return True
    return False


def same_graph(one: OutlinedGraph, other: OutlinedGraph) -> bool:
    """Whether two calls of a submodule have the same graph and structure."""
    if one is other:
        return True
    same = one.call.inputs == other.call.inputs and one.call.output == other.call.output
    if not same or one.call.names != other.call.names:
        return False
    ours, theirs = (made.graph.python_code("self") for made in (one, other))
    return (ours.src, ours.globals) == (theirs.src, theirs.globals)
