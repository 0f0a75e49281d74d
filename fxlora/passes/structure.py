"""Adapters in a graph: put in, found again, taken out.

They are found from the graph's structure, starting at the A and B that the plan names, because
what hangs on nodes (meta, attributes) does not survive every copy. In a nested graph A and B are
inputs, which every call around it passes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from ..module import CapturedModule
from ..nested import Path, call_of, inside
from ..ops import Factors, Read, adapted_weight
from ..plan import Entry
from ..readers import Reader

aten = torch.ops.aten


@dataclass(frozen=True)
class Insertion:
    """One place where an adapter stands.

    Attributes:
        entry: whose it is.
        form: "branch" or "weight".
        base: the node that was there before: the op, or the weight.
        output: the node that stands for it now.
        path: the calls of nested graphs around it, from the outermost in.
    """

    entry: Entry
    form: str
    base: fx.Node
    output: fx.Node
    path: Path


# ---- putting in ---------------------------------------------------------------------------------


def insert_branch(entry: Entry, reader: Reader, dropout: float) -> None:
    """op(x, W) → op(x, W) + B(s·A(dropout(x)))."""
    base, op = reader.node, reader.op
    assert op is not None
    graph = base.graph
    x = base.args[op.input]
    assert isinstance(x, fx.Node)
    with graph.inserting_before(base.next):
        if dropout and op.dropout:
            x = graph.call_function(aten.dropout.default, (x, dropout, True))
        branch = op.branch(Read(graph, base, x), _factors(graph, entry, reader.path))
        output = graph.call_function(aten.add.Tensor, (base, branch))
        output.meta = dict(base.meta)  # a loop asks its outputs' values for their storage
    base.replace_all_uses_with(output, delete_user_cb=lambda user: user is not output)


def insert_weight(graph: fx.Graph, entry: Entry, weight: fx.Node) -> None:
    """W → W + s·BA, for every reader of this node."""
    readers = set(weight.users)
    with graph.inserting_before(weight.next):
        output = adapted_weight(_factors(graph, entry, ()), weight, entry.shape)
    weight.replace_all_uses_with(output, delete_user_cb=lambda user: user in readers)


def _factors(graph: fx.Graph, entry: Entry, path: Path) -> Factors:
    a, b = (_fetched(graph, name, path) for name in (entry.name_a, entry.name_b))
    return Factors(graph, a, b, entry.in_first, entry.scaling)


def _fetched(graph: fx.Graph, name: str, path: Path) -> fx.Node:
    """A parameter as a node of a graph; the calls that lead to the graph pass it on."""
    if not path:
        return graph.create_node("get_attr", name)
    outermost = path[0].node
    passed = (n for n in outermost.all_input_nodes if n.op == "get_attr" and n.target == name)
    with outermost.graph.inserting_before(outermost):
        node = next(passed, None) or outermost.graph.create_node("get_attr", name)
    return inside(path, graph, node)


def weight_nodes(graph: fx.Graph, names: tuple[str, ...] | list[str]) -> list[fx.Node]:
    """The nodes that fetch a parameter, under any of its names."""
    return [node for node in graph.nodes if node.op == "get_attr" and node.target in names]


# ---- finding ------------------------------------------------------------------------------------


def insertions(module: CapturedModule, graph: fx.Graph) -> list[Insertion]:
    """Every adapter in a graph of a module and in those nested in it, in order.

    What depends on an A or B belongs to its entry, up to the join: the sum whose first operand
    does not.
    """
    starts = {name: entry for entry in module.plan or () for name in (entry.name_a, entry.name_b)}
    fetched = [node for node in graph.nodes if node.op == "get_attr" and node.target in starts]
    return list(_insertions(module, graph, {node: starts[node.target] for node in fetched}, ()))


def _insertions(
    module: nn.Module, graph: fx.Graph, owner: dict[fx.Node, Entry], path: Path
) -> Iterator[Insertion]:
    for node in graph.nodes:
        entry = next((owner[n] for n in node.all_input_nodes if n in owner), None)
        if entry is None:
            continue
        if call := call_of(node, module):
            for nested in call.graphs:
                given = {i: owner[o] for i, o in call.given(nested) if o in owner}
                yield from _insertions(nested, nested.graph, given, (*path, call))
        elif node.target in (aten.add.Tensor, aten.addmm.default) and node.args[0] not in owner:
            yield _insertion(entry, node, path)
        else:
            owner[node] = entry


def _insertion(entry: Entry, join: fx.Node, path: Path) -> Insertion:
    base = join.args[0]
    assert isinstance(base, fx.Node)
    if join.target is aten.add.Tensor:
        return Insertion(entry, "branch", base, join, path)
    if len(entry.shape) == 2:
        return Insertion(entry, "weight", base, join, path)
    (output,) = join.users  # W is reshaped to a matrix before the sum, and back after it
    (weight,) = base.all_input_nodes
    return Insertion(entry, "weight", weight, output, path)


# ---- taking out ---------------------------------------------------------------------------------


def take_out(insertion: Insertion) -> None:
    """Leave the graphs as they were before the insertion."""
    insertion.output.replace_all_uses_with(insertion.base)
    _erase_unused(insertion.output, insertion.base, insertion.path)


def _erase_unused(node: fx.Node, keep: fx.Node, path: Path) -> None:
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        if source is keep or source.users:
            continue
        if source.op == "placeholder":
            _withdraw(source, path)
        else:
            _erase_unused(source, keep, path)


def _withdraw(given: fx.Node, path: Path) -> None:
    """Pass an A or B no longer into a graph where it is unused, unless a sister graph uses it."""
    call = path[-1]
    index = next(i for i in range(len(call.operands)) if given in dict(call.inputs(i)))
    operand = call.operands[index]
    if any(sister.users for sister, _ in call.inputs(index)):
        return
    call.drop(index)
    if operand.users:
        return
    if operand.op == "placeholder":
        _withdraw(operand, path[:-1])
    else:
        operand.graph.erase_node(operand)
