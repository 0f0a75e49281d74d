"""Adapters in a graph: how they are inserted, found and taken out.

An adapter is marked in the `meta` of its last node, which copies of a graph keep. In a nested graph
the adapter's tensors are inputs, passed on by every call around it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.proxy import GraphAppendingTracer

from ..errors import ConfigError
from ..fx.calls import argument
from ..fx.marks import ADAPTER
from ..fx.nested import Path, call_of, inside, operand_of
from ..lora.row import Op, Read
from ..module import CapturedModule
from ..module.adapted_weight import adapted_weight, factors, output_gains, rank, to_weights
from ..names import shown
from ..plan import Entry, scales_outputs
from ..reads.facts import padding_row
from ..reads.readers import Reader

aten = torch.ops.aten


@dataclass(frozen=True)
class Insertion:
    """One place in a graph where an adapter is inserted.

    Attributes:
        entry: the adapter's entry in the plan.
        form: "branch" or "weight".
        base: the node that the adapter adds to: the op's result, or the weight.
        output: the adapter's last node, which replaces the base for its users.
        path: the calls of nested graphs around it, outermost first.
    """

    entry: Entry
    form: str
    base: fx.Node
    output: fx.Node
    path: Path

    @property
    def read(self) -> tuple[fx.Node, fx.Node]:
        """The node that reads the weight in a branch's insertion, and the node of the weight."""
        node = self.base
        if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
            node = source
        sources = (given for given in node.all_input_nodes if self._is_weight(given))
        return node, next(sources)

    def _is_weight(self, given: fx.Node) -> bool:
        path = self.path
        while given.op == "placeholder" and path:
            outside = operand_of(path[-1], given)
            if outside is None:
                return False
            given, path = outside, path[:-1]
        return given.op == "get_attr" and str(given.target) in self.entry.names


# ---- inserting ----------------------------------------------------------------------------------


def insert_branch(entry: Entry, reader: Reader, dropout: float) -> None:
    """Rewrite op(x, W) to op(x, W) + s·B(A(dropout(x))), at one read.

    Args:
        entry: the adapter.
        reader: the read.
        dropout: probability of dropout on x; 0 inserts none.
    """
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
    _erase_dead(base, output)
    output.meta = dict(base.meta)  # loop ops check their outputs' example values for aliases
    _replace_by_adapter(entry, "branch", base, output, readers)


@dataclass(frozen=True)
class _Branch:
    """The branch that is added to the result of one read.

    Attributes:
        entry: the adapter.
        reader: the read.
        op: the read's row in the table of ops.
        values: proxies of the adapter's tensors in the read's graph, by name.
        proxied: makes a proxy of a node of the read's graph.
    """

    entry: Entry
    reader: Reader
    op: Op
    values: dict[str, Any]
    proxied: Callable[[fx.Node], Any]

    def emitted(self, dropout: float) -> Any:
        """Emit the whole branch, in the shape of the op's result."""
        branch = self._low_rank(dropout)
        if scales_outputs(self.entry):
            branch = self._with_gains(branch)
        if self.entry.rows is None or self._turned:
            return branch
        return self._padded(branch, self.entry.rows)

    @property
    def _turned(self) -> bool:
        """Whether this op takes the entry's outputs as inputs."""
        layout = self.reader.layout or self.entry.layout
        return layout.in_first != self.entry.layout.in_first

    def _low_rank(self, dropout: float) -> Any:
        """Emit s·B(A(dropout(x)))."""
        node, weight = self.reader.node, self.reader.weight
        x = self.proxied(self.op.input_of(node, weight))
        if dropout and self.op.dropout:
            x = aten.dropout.default(x, dropout, True)
        entry, layout = self.entry, self.reader.layout or self.entry.layout
        down, up = factors(entry, self.values)
        if self._turned:  # (BA)^T = A^T B^T
            turn = entry.layout.transpose_factor
            down, up = turn(up), turn(down)  # (…, out, r) -> (…, r, out), (…, r, in) -> (…, in, r)
            if entry.rows is not None:
                down = self._over_all(down, entry.rows)
        # Without a padding_idx in the entry, another read of the tied weight trains this row.
        trains = entry.padding_idx is None and padding_row(node, entry.shape[0]) is not None
        read = Read(node, weight, x, layout, entry.shape, rank(entry), entry.scaling, trains)
        return self.op.branch(read, down, up)

    def _padded(self, branch: Any, rows: tuple[int, int]) -> Any:
        """Pad a part's outputs with zeros to all outputs of the weight."""
        behind = self.entry.shape[self.entry.layout.part_dim] - rows[1]
        return aten.constant_pad_nd.default(branch, [0, 0] * self._behind + [rows[0], behind])

    def _over_all(self, down: Any, rows: tuple[int, int]) -> Any:
        """Pad the factor of a part of the inputs with zeros to all inputs of the weight."""
        layout, shape = self.entry.layout, self.entry.shape
        size = shape[layout.part_dim]
        each = layout.features(shape)[1] // size  # of several dimensions, the part is of the first
        pad = [rows[0] * each, (size - rows[1]) * each]
        return aten.constant_pad_nd.default(down, [0, 0] * len(layout.kernel(shape)) + pad)

    def _with_gains(self, branch: Any) -> Any:
        """Emit branch + (g - 1)·(op(x, W) - bias + branch), for variants that scale outputs by g.

        Added to op(x, W), it gives g·(op(x, W) - bias + branch) + bias. Near 1, g - 1 has more
        digits than g in the weight's dtype.
        """
        weight = self.reader.weight
        while weight.op != "get_attr":  # the op may take the weight's transpose
            (weight,) = weight.all_input_nodes
        for gain in output_gains(self.entry, self.proxied(weight), self.values):
            more = to_weights(self.entry, aten.sub.Tensor(self._along_outputs(gain), 1))
            outputs = aten.add.Tensor(self._product(), branch)
            branch = aten.add.Tensor(branch, aten.mul.Tensor(more, outputs))
        # Under autocast g is wider than the op's result, whose dtype the sum must keep.
        return aten.type_as.default(branch, self.proxied(self.reader.node))

    def _product(self) -> Any:
        """Emit the op's result without its bias."""
        bias = None if self.op.bias is None else argument(self.reader.node, self.op.bias)
        product = self.proxied(self.reader.node)
        if not isinstance(bias, fx.Node):
            return product
        return aten.sub.Tensor(product, self._along_outputs(self.proxied(bias)))

    def _along_outputs(self, vector: Any) -> Any:
        """Reshape (out,) to (out, 1, …), so that it broadcasts along the result's outputs."""
        ones = [1] * self._behind
        return aten.reshape.default(vector, [-1, *ones]) if ones else vector

    @property
    def _behind(self) -> int:
        """Number of dimensions of the result after the output dimension."""
        assert self.op.output is not None
        return -1 - self.op.output


def insert_weight(graph: fx.Graph, entry: Entry, weight: fx.Node) -> None:
    """Rewrite W to W + s·BA, for every user of this node."""
    readers = set(weight.users)
    with graph.inserting_before(weight.next):
        proxied = _proxies(graph)
        values = _values(entry, graph, (), proxied)
        output = adapted_weight(entry, proxied(weight), values).node
    _erase_dead(weight, output)
    _replace_by_adapter(entry, "weight", weight, output, readers)


def _erase_dead(first: fx.Node, last: fx.Node) -> None:
    """Erase the unused nodes between two others, such as those of a V that no gain reads."""
    node = last.prev
    while node is not first:
        node, dead = node.prev, node
        if not dead.users:
            dead.graph.erase_node(dead)


def _replace_by_adapter(
    entry: Entry, form: str, base: fx.Node, output: fx.Node, readers: set[fx.Node]
) -> None:
    """Mark an adapter's last node, and replace the base by it in the base's earlier users."""
    output.meta[ADAPTER] = (entry.name_a, form)
    base.replace_all_uses_with(output, delete_user_cb=lambda user: user in readers)


def _proxies(graph: fx.Graph) -> Callable[[fx.Node], Any]:
    """Return a function that wraps nodes in proxies: an op called on a proxy emits a node."""
    tracer = _OverloadTracer(graph)
    return lambda node: fx.Proxy(node, tracer)


class _OverloadTracer(GraphAppendingTracer):
    """Tracer that emits calls of overloads only: the one dialect of captured graphs."""

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if not (isinstance(target, OpOverload) or target is operator.getitem):
            raise ConfigError(
                f"the function of a registered op or variant calls {shown(target)}, which is not "
                "an overload. Write it in overloads: torch.ops.aten.add.Tensor(a, b), not a + b."
            )
        return super().create_node(kind, target, *args, **kwargs)


def _values(
    entry: Entry, graph: fx.Graph, path: Path, proxied: Callable[[fx.Node], Any]
) -> dict[str, Any]:
    """Fetch the adapter's tensors into a graph; return their proxies by name."""
    return {name: proxied(_fetched(graph, name, path)) for name in entry.tensors}


def _fetched(graph: fx.Graph, name: str, path: Path) -> fx.Node:
    """Return a node of a graph that holds a parameter; calls around a nested graph pass it in."""
    if not path:
        return graph.create_node("get_attr", name)
    outermost = path[0].node
    passed = (n for n in outermost.all_input_nodes if n.op == "get_attr" and n.target == name)
    with outermost.graph.inserting_before(outermost):
        node = next(passed, None) or outermost.graph.create_node("get_attr", name)
    return inside(path, graph, node)


class WeightNodes:
    """Index of a graph's get_attr nodes by parameter, made before weights are adapted."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: number for number, node in enumerate(graph.nodes)}
        self._by_name: dict[str, list[fx.Node]] = {}
        for node in graph.find_nodes(op="get_attr"):
            self._by_name.setdefault(str(node.target), []).append(node)

    def read(self, names: Iterable[str]) -> list[fx.Node]:
        """Return the nodes with users that fetch one of these names, in graph order."""
        found = [node for name in dict.fromkeys(names) for node in self._by_name.get(name, ())]
        return sorted((node for node in found if node.users), key=self._order.__getitem__)


# ---- finding ------------------------------------------------------------------------------------


def insertions(module: CapturedModule, graph: fx.Graph) -> list[Insertion]:
    """Return every adapter in a graph of a module and in its nested graphs, in graph order."""
    entries = {entry.name_a: entry for entry in module.plan or ()}
    return list(_insertions(module, graph, entries, ()))


def _insertions(
    module: nn.Module, graph: fx.Graph, entries: dict[str, Entry], path: Path
) -> Iterator[Insertion]:
    for node in graph.nodes:
        if call := call_of(node, module):
            for nested in call.graphs:
                yield from _insertions(nested, nested.graph, entries, (*path, call))
        if ADAPTER in node.meta:
            name, form = node.meta[ADAPTER]
            yield Insertion(entries[name], form, _base(node, form, entries[name]), node, path)


def _base(output: fx.Node, form: str, entry: Entry) -> fx.Node:
    """Return the node that an adapter's last node was added to."""
    if form == "branch":
        base = output.args[0]
        assert isinstance(base, fx.Node)
        return base
    # The weight or, where another part of it was adapted before, that adapter's last node.
    above = list(output.all_input_nodes)
    while (node := above.pop()).target not in entry.names and ADAPTER not in node.meta:
        above += node.all_input_nodes
    return node


# ---- taking out ---------------------------------------------------------------------------------


def remove_insertion(insertion: Insertion) -> None:
    """Restore the graphs to their form before the insertion."""
    insertion.output.replace_all_uses_with(insertion.base)
    _erase_unused(insertion.output, insertion.base, insertion.path)


def _erase_unused(node: fx.Node, keep: fx.Node, path: Path) -> None:
    """Erase a node and, recursively, its inputs that have no other users, except `keep`."""
    ahead, erased = [node], set[fx.Node]()
    while ahead:
        unused = ahead.pop()
        if unused is keep or unused.users or unused in erased:
            continue
        erased.add(unused)
        if unused.op == "placeholder":
            _drop_operand(unused, path)
        else:
            ahead += unused.all_input_nodes
            unused.graph.erase_node(unused)


def _drop_operand(given: fx.Node, path: Path) -> None:
    """Stop passing an adapter's tensor into a nested graph where it is unused.

    It stays an operand if another graph of the same call uses it.
    """
    call = path[-1]
    index = call.index_of(given)
    assert index is not None
    operand = call.operands[index]
    if any(sister.users for sister, _ in call.inputs(index)):
        return
    call.drop(index)
    if operand.users:
        return
    if operand.op == "placeholder":
        _drop_operand(operand, path[:-1])
    else:
        operand.graph.erase_node(operand)
