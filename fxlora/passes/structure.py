"""Adapters in a graph: put in, found again, taken out.

Where an adapter stands is marked in the `meta` of its last node, which every copy of a graph
keeps. In a nested graph its tensors are inputs, which every call around it passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..adapted import adapted_weight, factors, output_gains, rank, scales_outputs
from ..module import CapturedModule
from ..nested import Path, call_of, inside
from ..ops import Op, Read
from ..plan import Entry
from ..readers import Reader

aten = torch.ops.aten

MARK = "fxlora"  # key in a node's meta


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
    """op(x, W) → op(x, W) + s·B(A(dropout(x)))."""
    op, base = reader.op, reader.node
    assert op is not None
    if op.result is not None:
        base = next(user for user in base.users if user.args[1] == op.result)
    readers = set(base.users)
    with base.graph.inserting_before(base.next):
        proxied = _proxies(base.graph)
        values = _values(entry, base.graph, reader.path, proxied)
        branch = _branch(entry, reader, op, values, proxied, dropout)
        if scales_outputs(entry):
            branch = _scaled_outputs(entry, reader, op, branch, values, proxied)
        output = aten.add.Tensor(proxied(base), branch).node
    output.meta = dict(base.meta)  # a loop asks its outputs' values for their storage
    _stand_for(entry, "branch", base, output, readers)


def _branch(
    entry: Entry,
    reader: Reader,
    op: Op,
    values: dict[str, Any],
    proxied: Callable[[fx.Node], fx.Proxy],
    dropout: float,
) -> Any:
    node, weight = reader.node, reader.weight
    x = proxied(op.input_of(node, weight))
    if dropout and op.dropout:
        x = aten.dropout.default(x, dropout, True)
    layout = op.layout_of(node, weight, len(entry.shape))
    down, up = factors(entry, values)
    if layout.in_first != entry.layout.in_first:  # read the other way round: W^T = R^T L^T
        turn = entry.layout.transposed
        down, up = turn(up), turn(down)
    read = Read(node, weight, x, layout, entry.shape, rank(entry), entry.scaling)
    branch = op.branch(read, down, up)
    if entry.rows is None:
        return branch
    assert op.output is not None
    start, stop = entry.rows
    behind = entry.shape[entry.layout.part_dim] - stop
    return aten.constant_pad_nd.default(branch, [0, 0] * (-1 - op.output) + [start, behind])


def _scaled_outputs(
    entry: Entry,
    reader: Reader,
    op: Op,
    branch: Any,
    values: dict[str, Any],
    proxied: Callable[[fx.Node], fx.Proxy],
) -> Any:
    """(g - 1)·(op(x, W) - bias) + g·branch, for variants that scale the outputs by g."""
    weight = reader.weight
    while weight.op != "get_attr":  # the op may be given the transpose
        (weight,) = weight.all_input_nodes
    for gain in output_gains(entry, proxied(weight), values):
        assert op.output is not None
        behind = [1] * (-1 - op.output)
        shaped = aten.reshape.default(gain, [-1, *behind]) if behind else gain
        bias = reader.node.args[op.bias] if _has_bias(reader.node, op) else None
        product: Any = proxied(reader.node)
        if isinstance(bias, fx.Node):
            added: Any = proxied(bias)
            if behind:
                added = aten.reshape.default(added, [-1, *behind])
            product = aten.sub.Tensor(product, added)
        change = aten.mul.Tensor(aten.sub.Tensor(shaped, 1), product)
        branch = aten.add.Tensor(change, aten.mul.Tensor(shaped, branch))
    return branch


def _has_bias(node: fx.Node, op: Op) -> bool:
    return op.bias is not None and op.bias < len(node.args)


def insert_weight(graph: fx.Graph, entry: Entry, weight: fx.Node) -> None:
    """W → W + s·BA, for every reader of this node."""
    readers = set(weight.users)
    with graph.inserting_before(weight.next):
        proxied = _proxies(graph)
        values = _values(entry, graph, (), proxied)
        output = adapted_weight(entry, proxied(weight), values).node
    _stand_for(entry, "weight", weight, output, readers)


def _stand_for(
    entry: Entry, form: str, base: fx.Node, output: fx.Node, readers: set[fx.Node]
) -> None:
    output.meta[MARK] = (entry.name_a, form)
    base.replace_all_uses_with(output, delete_user_cb=lambda user: user in readers)


def _proxies(graph: fx.Graph) -> Callable[[fx.Node], fx.Proxy]:
    """Nodes as what emits further nodes when an op is called on it."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    return lambda node: fx.Proxy(node, tracer)


def _values(
    entry: Entry, graph: fx.Graph, path: Path, proxied: Callable[[fx.Node], fx.Proxy]
) -> dict[str, Any]:
    return {name: proxied(_fetched(graph, name, path)) for name in entry.tensors}


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
    """Every adapter in a graph of a module and in those nested in it, in order."""
    entries = {entry.name_a: entry for entry in module.plan or ()}
    return list(_insertions(module, graph, entries, ()))


def _insertions(
    module: nn.Module, graph: fx.Graph, entries: dict[str, Entry], path: Path
) -> Iterator[Insertion]:
    for node in graph.nodes:
        if call := call_of(node, module):
            for nested in call.graphs:
                yield from _insertions(nested, nested.graph, entries, (*path, call))
        if MARK in node.meta:
            name, form = node.meta[MARK]
            yield Insertion(entries[name], form, _base(node, form, entries[name]), node, path)


def _base(output: fx.Node, form: str, entry: Entry) -> fx.Node:
    """What stood where an adapter's last node stands."""
    if form == "branch":
        base = output.args[0]
        assert isinstance(base, fx.Node)
        return base
    # The weight, or what stands for it since another part of it was adapted.
    above = list(output.all_input_nodes)
    while (node := above.pop()).target not in entry.names and MARK not in node.meta:
        above += node.all_input_nodes
    return node


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
