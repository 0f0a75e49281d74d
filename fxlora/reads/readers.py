"""Readers: the nodes, in every graph of a captured module, that combine a weight with data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..fx.calls import call_site, flat_inputs, kind_of, source_line
from ..fx.effects import written_attributes
from ..fx.nested import Call, Path, call_of, every_call, operand_of, shared
from ..lora.layout import Layout
from ..lora.ops import is_product, layout_given, row_of
from ..lora.row import Op
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from .facts import reads_no_values
from .gradient_flow import Flow
from .gradient_trials import passes_gradient
from .moves import Moved, moved


@dataclass(frozen=True)
class Reader:
    """One node that combines a weight with data.

    Attributes:
        node: the reading node.
        weight: the node of its operand: the weight, or a function of it.
        op: the row of its op in the table of ops, or None if it reads the weight in another way.
        kind: the op's name.
        ops_between: the kinds of the ops between the weight and the node; () if the node takes the
            weight unchanged or, if the row allows that, transposed.
        layout: the layout of the weight in this read, or None if unknown.
        moved: where the entries of the weight are in the operand, or None if unknown.
        call_site: path of the module whose forward made the call, as far as capture knows.
        line: `file:line` of the call, or "".
        weights_only: whether the node depends on parameters and buffers only.
        other_weight: whether the op's other operand is computed from parameters, not from inputs.
        untrained: why this read passes no gradient to the weight, or "".
        path: the calls of nested graphs around the node, outermost first.
        shared: whether one of the nested graphs around the node has several calls.
    """

    node: fx.Node
    weight: fx.Node
    op: Op | None
    kind: str
    call_site: str
    line: str
    ops_between: tuple[str, ...] = ()
    layout: Layout | None = None
    moved: Moved | None = None
    weights_only: bool = False
    other_weight: bool = False
    untrained: str = ""
    path: Path = ()
    shared: bool = False

    @property
    def graph(self) -> fx.Graph:
        """The outermost graph that the read is part of."""
        return self.path[0].node.graph if self.path else self.node.graph

    @property
    def through(self) -> str:
        """The kind of the first op between the weight and the node, or ""."""
        return self.ops_between[0] if self.ops_between else ""

    @property
    def branch(self) -> Op | None:
        """The row whose branch can be added to this read, or None."""
        return None if self.through else self.op

    def reaches(self, dim: int, rows: tuple[int, int]) -> bool:
        """Whether the read takes entries with a coordinate in `rows` (start, stop) along `dim`.

        True if that is unknown.
        """
        if self.moved is None:
            return True
        coordinates = self.moved.reached[dim]
        return bool(((coordinates >= rows[0]) & (coordinates < rows[1])).any())

    def describe(self) -> str:
        """Return the op and the line of its call, for messages."""
        return f"{self.kind} reads at {self.line}" if self.line else f"{self.kind} reads"


@no_ambient_modes()
def readers_and_writers(
    module: CapturedModule,
) -> tuple[dict[str, list[Reader]], dict[str, Reader]]:
    """Return the readers, and a writer, of each attribute, by its name in the graphs."""
    readers: dict[str, list[Reader]] = {}
    writers: dict[str, Reader] = {}
    graphs = module.distinct_graphs()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    seen = _Seen(module, frozenset(parameters), Flow.of(graphs, module))
    for node in itertools.chain(*(graph.nodes for graph in graphs)):
        if node.op == "get_attr":
            name = str(node.target)
            walk = _Walk(seen, name, parameters.get(name, torch.empty(())))
            readers.setdefault(name, []).extend(_once(walk.follow(node, module)))
        if node.op == "call_module":
            for name in _inside(module, str(node.target)):
                readers.setdefault(name, []).append(_reader(node, node, None))
        for name in written_attributes(node, module):
            writers.setdefault(name, _reader(node, node, None))
    together = shared(call for graph in graphs for call in every_call(graph, module))
    return {name: [_marked(r, together) for r in found] for name, found in readers.items()}, writers


def _inside(module: CapturedModule, path: str) -> list[str]:
    """Return the names of the parameters of a module that the tracer did not enter."""
    return [f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters()]


@dataclass(frozen=True)
class _Seen:
    """The facts about a module's graphs that all walks share.

    Attributes:
        parameters: names of all parameters.
        flow: the nodes that are live, and those that a gradient reaches.
    """

    module: CapturedModule
    parameters: frozenset[str]
    flow: Flow
    _constants: dict[fx.Graph, set[fx.Node]] = field(default_factory=dict[fx.Graph, set[fx.Node]])

    def constants(self, graph: fx.Graph) -> set[fx.Node]:
        """Return the nodes of a graph that depend on parameters and buffers only."""
        if graph not in self._constants:
            found = self._constants[graph] = set[fx.Node]()
            for node in graph.nodes:
                called = node.op in ("call_function", "call_method")
                computed = called and found.issuperset(node.all_input_nodes)
                if computed or node.op == "get_attr":
                    found.add(node)
        return self._constants[graph]


@dataclass(frozen=True)
class _OpChain:
    """The chain of ops by which a value is computed from a weight.

    Attributes:
        path: the calls of nested graphs around the value, outermost first.
        ops: the kinds of the ops in the chain.
        cut: the kind of the first op that passes no gradient, or "".
    """

    path: Path = ()
    ops: tuple[str, ...] = ()
    cut: str = ""

    def into(self, call: Call) -> _OpChain:
        """Return the chain as seen in the nested graphs of a call."""
        return dataclasses.replace(self, path=(*self.path, call))

    def over(self, op: fx.Node, value: fx.Node) -> _OpChain:
        """Return the chain extended by `op`, which takes `value`."""
        cut = self.cut or ("" if passes_gradient(op, value) else kind_of(op))
        return _OpChain(self.path, (*self.ops, kind_of(op)), cut)


@dataclass(frozen=True)
class _Walk:
    """Finds the nodes that use a weight, or a function of weights only, in a product or with data.

    The search also covers the nested graphs that the weight is passed to. It follows the graph
    order, because a copy of a graph does not keep the order of `users`.
    """

    seen: _Seen
    name: str
    weight: torch.Tensor
    done: set[tuple[fx.Node, str]] = field(default_factory=set[tuple[fx.Node, str]])

    def follow(
        self, value: fx.Node, owner: nn.Module, way: _OpChain = _OpChain()
    ) -> Iterator[Reader]:
        for user in sorted(value.users):
            if reads_no_values(user, value) or user not in self.seen.flow.live:
                continue
            if (user, way.cut) in self.done:
                continue
            inputs = _nested_inputs(user, value, owner)
            for call, given, graph in inputs:
                yield from self.follow(given, graph, way.into(call))
            if inputs:
                continue
            if self._goes_on(user, value, way):
                self.done.add((user, way.cut))
                yield from self.follow(user, owner, way.over(user, value))
            else:
                yield self._reader(user, value, way)

    def _goes_on(self, node: fx.Node, value: fx.Node, way: _OpChain) -> bool:
        """Whether the search continues at the users of a call.

        It does if the call computes a function of weights only. It ends at a product that a branch
        may be added to, unless this product only moves entries.
        """
        if not (node.users and self._alone(node, value)):
            return False
        if not is_product(node) or self._moved(node, way) is not None:
            return True
        return not self._is_plain(row_of(node, value), self._moved(value, way), way)

    def _alone(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a call depends on parameters and buffers only."""
        constants = node in self.seen.constants(node.graph)
        return constants or (node.op != "output" and node.all_input_nodes == [value])

    def _moved(self, node: fx.Node, way: _OpChain) -> Moved | None:
        names = frozenset((self.name,))
        return moved(node, self.weight, names, self.seen.module, way.path)

    @staticmethod
    def _is_plain(row: Op | None, given: Moved | None, way: _OpChain) -> bool:
        """Whether the op takes the weight in a form that a branch may be added for."""
        if given is None or way.cut:
            return False
        return given.same or (
            given.transposed and row is not None and row.transposed_kind is not None
        )

    def _reader(self, node: fx.Node, value: fx.Node, way: _OpChain) -> Reader:
        row, given = row_of(node, value), self._moved(value, way)
        read = given and layout_given(node, value, row, given.dims)
        layout = given.layout(read) if given and read else None
        alone = bool(node.users) and self._alone(node, value)
        if alone and self._makes_weight(node):
            layout = None  # the outputs of this product are not a layer's outputs
        ops = () if self._is_plain(row, given, way) else way.ops
        if ops and _grows(value, self.weight):
            row = None  # a magnitude or mask, broadcast over a weight: not a layer's weight
        turned = row.transposed_kind if row and given and given.transposed and not ops else None
        found = _reader(node, value, row, way.path)
        return dataclasses.replace(
            found,
            kind=turned or found.kind,
            ops_between=ops,
            layout=layout,
            moved=given,
            weights_only=alone,
            other_weight=row is not None and self._other_weight(row, node, value, way.path),
            untrained=self._untrained(node, value, way, given),
        )

    def _makes_weight(self, node: fx.Node) -> bool:
        """Whether the result becomes a product's weight, directly or by ops on weights only."""
        constants = self.seen.constants(node.graph)
        ahead, met = [node], set[fx.Node]()
        while ahead:
            value = ahead.pop()
            if any(row_of(user, value) for user in value.users):
                return True
            met.add(value)
            ahead += [user for user in value.users if user in constants and user not in met]
        return False

    def _untrained(self, node: fx.Node, value: fx.Node, way: _OpChain, given: Moved | None) -> str:
        """Return why a read passes no gradient to the weight, or ""."""
        flow = self.seen.flow
        if given and not all(len(coordinates) for coordinates in given.reached):
            if not way.ops:
                return "as it has no entries"
            return f"through {way.ops[0]}, which selects none of its entries"
        if way.cut:
            return f"through {way.cut}"
        if node not in flow.recording:
            return "under torch.no_grad()"
        if node not in flow.trained:
            return "where no gradient of the outputs arrives"
        return "" if flow.reaches(node, value) else f"by {kind_of(node)}, which has no gradient"

    def _other_weight(self, row: Op, node: fx.Node, value: fx.Node, path: Path) -> bool:
        """Whether the op's other operand is computed from parameters only.

        Branches for both weights would omit the term Δu·Δv. A look-up has indices instead of
        another operand.
        """
        source = row.input_of(node, value) if row.dropout else None
        ahead: list[tuple[fx.Node, Path]] = [(source, path)] if isinstance(source, fx.Node) else []
        parameter, met = False, set[fx.Node]()
        while ahead:
            source, around = ahead.pop()
            outside = operand_of(around[-1], source) if around else None
            if source.op == "placeholder" and outside is None:
                return False  # data, or a value that a loop carries
            if outside is not None:
                ahead.append((outside, around[:-1]))
            parameter |= source.op == "get_attr" and source.target in self.seen.parameters
            met.add(source)
            ahead += [(given, around) for given in source.all_input_nodes if given not in met]
        return parameter


def _once(readers: Iterator[Reader]) -> Iterator[Reader]:
    """Yield each read once: two chains may lead to it, one of them cut off (straight-through)."""
    found: dict[tuple[fx.Node, fx.Node, Path], Reader] = {}
    for reader in readers:
        key = (reader.node, reader.weight, reader.path)
        before = found.setdefault(key, reader)
        # If no gradient passes one of two chains, only the weight form has the right gradients.
        through = next((r for r in (before, reader) if r.ops_between), before)
        found[key] = dataclasses.replace(through, untrained=before.untrained and reader.untrained)
    yield from found.values()


def _grows(value: fx.Node, weight: torch.Tensor) -> bool:
    """Whether a value computed from a weight has more entries than the weight."""
    seen = value.meta.get("val")
    return isinstance(seen, torch.Tensor) and seen.numel() > weight.numel()


def _nested_inputs(
    user: fx.Node, value: fx.Node, owner: nn.Module
) -> list[tuple[Call, fx.Node, fx.GraphModule]]:
    """Return the inputs of nested graphs that a call passes a value to.

    The list is empty if the call also uses the value in another way.
    """
    call = call_of(user, owner)
    passed = [i for i, o in enumerate(call.operands) if o is value] if call else []
    if call is None or len(passed) != sum(n is value for n in flat_inputs(user)):
        return []
    return [(call, given, graph) for i in passed for given, graph in call.inputs(i)]


def _reader(node: fx.Node, weight: fx.Node, op: Op | None, path: Path = ()) -> Reader:
    kind = op.kind if op else f"operand of {kind_of(node)}" if is_product(node) else kind_of(node)
    if node.op == "call_module":
        kind = f"module {node.target}"
    nodes = [node, *(call.node for call in reversed(path))]  # a loop's body has no locations
    site = next(filter(None, map(call_site, nodes)), "")
    line = next(filter(None, map(source_line, nodes)), "")
    return Reader(node, weight, op, kind, site, line, path=path)


def _marked(reader: Reader, together: set[fx.GraphModule]) -> Reader:
    around = {graph for call in reader.path for graph in call.graphs}
    return dataclasses.replace(reader, shared=bool(around & together))
