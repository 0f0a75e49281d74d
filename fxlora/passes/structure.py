"""Adapters in a graph: put in, found again, taken out.

They are found from the graph's structure, starting at the A and B that the plan names, because
what hangs on nodes (meta, attributes) does not survive every copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..ops import Factors, Read, adapted_weight
from ..plan import Entry, Plan
from ..sites import Reader

aten = torch.ops.aten


@dataclass(frozen=True)
class Insertion:
    """One place where an adapter stands.

    Attributes:
        entry: whose it is.
        form: "branch" or "weight".
        base: the node that was there before: the op, or the weight.
        output: the node that stands for it now.
    """

    entry: Entry
    form: str
    base: fx.Node
    output: fx.Node


# ---- putting in ---------------------------------------------------------------------------------


def insert_branch(graph: fx.Graph, entry: Entry, reader: Reader, dropout: float) -> None:
    """op(x, W) → op(x, W) + B(s·A(dropout(x)))."""
    base, op = reader.node, reader.op
    assert op is not None
    x = base.args[op.input]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(base.next):
        if dropout and op.dropout:
            x = graph.call_function(aten.dropout.default, (x, dropout, True))
        branch = op.branch(Read(graph, base, x), _factors(graph, entry))
        output = graph.call_function(aten.add.Tensor, (base, branch))
    base.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)


def insert_weight(graph: fx.Graph, entry: Entry, weight: fx.Node) -> None:
    """W → W + s·BA, for every reader of this node."""
    readers = set(weight.users)
    with graph.inserting_before(weight.next):
        output = adapted_weight(_factors(graph, entry), weight, entry.shape)
    weight.replace_all_uses_with(output, delete_user_cb=lambda user: user in readers)


def _factors(graph: fx.Graph, entry: Entry) -> Factors:
    a, b = (graph.create_node("get_attr", name) for name in (entry.name_a, entry.name_b))
    return Factors(graph, a, b, entry.in_first, entry.scaling)


def weight_nodes(graph: fx.Graph, names: tuple[str, ...] | list[str]) -> list[fx.Node]:
    """The nodes that fetch a parameter, under any of its names."""
    return [node for node in graph.nodes if node.op == "get_attr" and node.target in names]


# ---- finding ------------------------------------------------------------------------------------


def insertions(graph: fx.Graph, plan: Plan) -> Iterator[Insertion]:
    """Every adapter in a graph, in order.

    What depends on an A or B belongs to its entry, up to the join: the sum whose first operand
    does not.
    """
    starts = {name: entry for entry in plan for name in (entry.name_a, entry.name_b)}
    owner: dict[fx.Node, Entry] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and node.target in starts:
            owner[node] = starts[node.target]
            continue
        entry = next((owner[n] for n in node.all_input_nodes if n in owner), None)
        if entry is None:
            continue
        joins = node.target in (aten.add.Tensor, aten.addmm.default)
        if joins and node.args[0] not in owner:
            yield _insertion(entry, node)
        else:
            owner[node] = entry


def _insertion(entry: Entry, join: fx.Node) -> Insertion:
    base = join.args[0]
    assert isinstance(base, fx.Node)
    if join.target is aten.add.Tensor:
        return Insertion(entry, "branch", base, join)
    if len(entry.shape) == 2:
        return Insertion(entry, "weight", base, join)
    (output,) = join.users  # W is reshaped to a matrix before the sum, and back after it
    (weight,) = base.all_input_nodes
    return Insertion(entry, "weight", weight, output)


# ---- taking out ---------------------------------------------------------------------------------


def take_out(graph: fx.Graph, insertion: Insertion) -> None:
    """Leave the graph as it was before the insertion."""
    insertion.output.replace_all_uses_with(insertion.base)
    _erase_unused(graph, insertion.output, insertion.base)


def _erase_unused(graph: fx.Graph, node: fx.Node, keep: fx.Node) -> None:
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for source in inputs:
        if source is not keep and not source.users:
            _erase_unused(graph, source, keep)
