"""Adapters in a graph: put in, found again, taken out.

Where an adapter stands is marked in the `meta` of its last node, which every copy of a graph
keeps. In a nested graph its tensors are inputs, which every call around it passes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

from ..fx.calls import argument
from ..fx.nested import Path, call_of, inside
from ..lora.row import Op, Read
from ..module import CapturedModule
from ..plan import Entry, scales_outputs
from ..reads.facts import padding_row
from ..reads.readers import Reader
from .adapted_weight import adapted_weight, factors, output_gains, rank

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
    assert reader.op is not None
    base, result = reader.node, reader.op.result
    if result is not None:
        base = next(user for user in base.users if user.args[1] == result)
    readers = set(base.users)
    with base.graph.inserting_before(base.next):
        proxied = _proxies(base.graph)
        values = _values(entry, base.graph, reader.path, proxied)
        branch = _Branch(entry, reader, reader.op, values, proxied).emitted(dropout)
        output = aten.add.Tensor(proxied(base), branch).node
    output.meta = dict(base.meta)  # a loop asks its outputs' values for their storage
    _stand_for(entry, "branch", base, output, readers)


@dataclass(frozen=True)
class _Branch:
    """What is added to the result of one read, as it is emitted into the read's graph."""

    entry: Entry
    reader: Reader
    op: Op
    values: dict[str, Any]
    proxied: Callable[[fx.Node], Any]

    def emitted(self, dropout: float) -> Any:
        branch = self._low_rank(dropout)
        if scales_outputs(self.entry):
            branch = self._with_gains(branch)
        return branch if self.entry.rows is None else self._padded(branch, self.entry.rows)

    def _low_rank(self, dropout: float) -> Any:
        node, weight = self.reader.node, self.reader.weight
        x = self.proxied(self.op.input_of(node, weight))
        if dropout and self.op.dropout:
            x = aten.dropout.default(x, dropout, True)
        entry, layout = self.entry, self.reader.layout or self.entry.layout
        down, up = factors(entry, self.values)
        if layout.in_first != entry.layout.in_first:  # read the other way round: W^T = R^T L^T
            turn = entry.layout.transposed
            down, up = turn(up), turn(down)
        trains = entry.padding_idx is None and padding_row(node, entry.shape[0]) is not None
        read = Read(node, weight, x, layout, entry.shape, rank(entry), entry.scaling, trains)
        return self.op.branch(read, down, up)

    def _padded(self, branch: Any, rows: tuple[int, int]) -> Any:
        """Zeros for the outputs of other parts."""
        behind = self.entry.shape[self.entry.layout.part_dim] - rows[1]
        return aten.constant_pad_nd.default(branch, [0, 0] * self._behind + [rows[0], behind])

    def _with_gains(self, branch: Any) -> Any:
        """(g - 1)·(op(x, W) - bias) + g·branch, for variants that scale the outputs by g."""
        weight = self.reader.weight
        while weight.op != "get_attr":  # the op may be given the transpose
            (weight,) = weight.all_input_nodes
        for gain in output_gains(self.entry, self.proxied(weight), self.values):
            shaped = self._along_outputs(gain)
            change = aten.mul.Tensor(aten.sub.Tensor(shaped, 1), self._product())
            branch = aten.add.Tensor(change, aten.mul.Tensor(shaped, branch))
        return branch

    def _product(self) -> Any:
        """The op's result less its bias."""
        bias = None if self.op.bias is None else argument(self.reader.node, self.op.bias)
        product = self.proxied(self.reader.node)
        if not isinstance(bias, fx.Node):
            return product
        return aten.sub.Tensor(product, self._along_outputs(self.proxied(bias)))

    def _along_outputs(self, vector: Any) -> Any:
        """(out,) → (out, 1, …), for the output's dimension (a linear's bias is as it is)."""
        ones = [1] * self._behind
        return aten.reshape.default(vector, [-1, *ones]) if ones else vector

    @property
    def _behind(self) -> int:
        """How many dimensions of the result come after that of the outputs."""
        assert self.op.output is not None
        return -1 - self.op.output


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


def _proxies(graph: fx.Graph) -> Callable[[fx.Node], Any]:
    """Nodes as what emits further nodes when an op is called on it."""
    tracer = GraphAppendingTracer(graph)
    return lambda node: fx.Proxy(node, tracer)


def _values(
    entry: Entry, graph: fx.Graph, path: Path, proxied: Callable[[fx.Node], Any]
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


class WeightNodes:
    """The nodes of a graph that fetch parameters, as they are before weights are adapted."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: number for number, node in enumerate(graph.nodes)}
        self._by_name: dict[str, list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            self._by_name.setdefault(str(node.target), []).append(node)

    def read(self, names: Iterable[str]) -> list[fx.Node]:
        """Those of a parameter, under any of its names, that anything reads; in graph order."""
        found = [node for name in dict.fromkeys(names) for node in self._by_name.get(name, ())]
        return sorted((node for node in found if node.users), key=self._order.__getitem__)


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
