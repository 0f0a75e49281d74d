"""A copy of a graph that can be split at calls, and the nodes of it that may be computed again.

Every node gets the calls that it is in, also those that a pass inserted. Nodes that depend on
parameters and constants only can be computed in each graph that uses them; so no value crosses the
border of a submodule because of them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from ...fx.effects import statistics_written, written_nodes
from .recorded import CALLS, VALUES, CallKey


def prepared_copy(graph: fx.Graph) -> tuple[fx.Graph, frozenset[fx.Node]]:
    """Return a copy of a graph that can be split, and its nodes that can be recomputed."""
    rest = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rest.output(rest.graph_copy(graph, copies))
    rest.set_codegen(graph._codegen)
    written = _written(graph, copies)
    _bypass_in_place_results(rest)
    _annotate(rest)
    return rest, _repeatable_nodes(rest, written)


def _annotate(graph: fx.Graph) -> None:
    """Record the calls around each node that a pass inserted: those that all its users are in."""
    for node in reversed(list(graph.nodes)):
        if CALLS not in node.meta and node.op not in ("placeholder", "output"):
            around = [user.meta.get(CALLS, ()) for user in node.users]
            node.meta = {**node.meta, CALLS: _common(around)}


def _common(stacks: Sequence[tuple[CallKey, ...]]) -> tuple[CallKey, ...]:
    shared = list(zip(*stacks, strict=False))
    count = next((i for i, keys in enumerate(shared) if len(set(keys)) > 1), len(shared))
    return tuple(stacks[0][:count]) if stacks else ()


def _repeatable_nodes(graph: fx.Graph, written: frozenset[object]) -> frozenset[fx.Node]:
    """Return the nodes that depend on parameters and constants only, so that copies are the same.

    Without values that are written to, and anything computed from one.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            fixed = node.target not in written
        else:
            fixed = node.op == "call_function" and node not in written and _repeatable(node)
        if fixed and found.issuperset(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _repeatable(node: fx.Node) -> bool:
    """Whether a call does the same each time: it writes nothing, and draws no random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # a nested graph may draw, or write
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _written(graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> frozenset[object]:
    """Return the tensors that a graph writes to: names of fetched ones, copied nodes of others."""
    owner = graph.owning_module
    assert owner is not None
    roots = {root for node in graph.nodes for root in written_nodes(node, owner)}
    roots |= {root for node in graph.nodes for root in statistics_written(node, owner)}
    return frozenset(root.target if root.op == "get_attr" else copies[root] for root in roots)


def _bypass_in_place_results(graph: fx.Graph) -> None:
    """Have the users of an in-place op's result use the op's first argument: it is the same tensor.

    So a buffer that a submodule updates can be read outside of it, and is updated once.
    """
    for node in graph.nodes:
        given = node.args[0] if _in_place(node) else None
        if isinstance(given, fx.Node) and VALUES not in node.meta:
            node.replace_all_uses_with(given)


def _in_place(node: fx.Node) -> bool:
    """Whether a call returns its first argument, which it wrote to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    declared = node.target._schema
    results = [result.alias_info for result in declared.returns]
    first = declared.arguments[0].alias_info if declared.arguments else None
    if len(results) != 1 or first is None or not first.is_write or results[0] is None:
        return False
    return bool(results[0].is_write) and results[0].before_set == first.before_set
