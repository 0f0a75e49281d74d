"""Readers: the nodes, in every graph of a captured module, that combine a weight with data.

The search starts at each node that fetches the weight. It follows the users of a value as long as
they compute a function of weights only (a transpose, a slice, W1 * mask), into nested graphs too,
and ends at each

    product          that a branch may be added to, even with another weight: W1 @ W2
    other call       that takes data as well, or the graph's output

Calls that read only the shape or dtype of a value are skipped, and so are calls that neither an
output nor a side effect depends on. Each call that writes to a weight is its writer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..fx.calls import call_site, flat_inputs, kind_of, source_line
from ..fx.effects import written_attributes
from ..fx.nested import Call, Path, call_of, every_call, shared
from ..lora.layout import Layout
from ..lora.ops import is_product, layout_given, row_of
from ..lora.row import Op
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..module.quantised import is_quantised
from .facts import reads_no_values
from .gradient_flow import Flow
from .gradient_trials import passes_gradient
from .moves import Moved, moved
from .trial_rows import row_by_trial
from .weights_only import WeightsOnly


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
    weights, nested = WeightsOnly(parameters.keys()), _NestedInputs()
    flow = Flow.of(graphs, module)
    for node in itertools.chain(*(graph.nodes for graph in graphs)):
        if node.op == "get_attr":
            name = str(node.target)
            weight = parameters.get(name, torch.empty(()))
            search = _Search(module, weights, flow, name, weight, nested)
            readers.setdefault(name, []).extend(_unique(search.follow(node, module)))
        if node.op == "call_module":
            for name in _parameters_in(module, str(node.target)):
                readers.setdefault(name, []).append(_reader(node, node, None))
        for name in written_attributes(node, module):
            writers.setdefault(name, _reader(node, node, None))
    several = shared(call for graph in graphs for call in every_call(graph, module))
    marked = {name: [_mark_shared(r, several) for r in found] for name, found in readers.items()}
    return marked, writers


def _parameters_in(module: CapturedModule, path: str) -> list[str]:
    """Return the names of the parameters of a module that the tracer did not enter."""
    return [f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters()]


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
class _Search:
    """The search for the readers of one weight, from one node that fetches it.

    It follows the graph order, because a copy of a graph does not keep the order of `users`.

    Attributes:
        module: the captured module.
        weights: the nodes that are computed from weights only.
        flow: the nodes that are live, and those that a gradient reaches.
        name: the weight's name in the graphs.
        weight: the weight; without entries if the name is not a parameter's.
        nested: the inputs of nested graphs.
        visited: the calls that were followed, each with the op that cut off the gradient before.
    """

    module: CapturedModule
    weights: WeightsOnly
    flow: Flow
    name: str
    weight: torch.Tensor
    nested: _NestedInputs
    visited: set[tuple[fx.Node, str]] = field(default_factory=set[tuple[fx.Node, str]])

    def follow(
        self, value: fx.Node, owner: nn.Module, chain: _OpChain = _OpChain()
    ) -> Iterator[Reader]:
        """Yield the readers of a value, in a graph of the module `owner`."""
        for user in sorted(value.users):
            if reads_no_values(user, value) or user not in self.flow.live:
                continue
            if (user, chain.cut) in self.visited:
                continue
            inputs = self.nested.of(user, value, owner)
            for call, given, graph in inputs:
                yield from self.follow(given, graph, chain.into(call))
            if inputs:
                continue
            if self._continues(user, value, chain):
                self.visited.add((user, chain.cut))
                yield from self.follow(user, owner, chain.over(user, value))
            else:
                yield self._reader(user, value, chain)

    def _continues(self, node: fx.Node, value: fx.Node, chain: _OpChain) -> bool:
        """Whether the search continues at the users of a call.

        It does if the call computes a function of weights only. It ends at a product that a branch
        may be added to, unless this product only moves entries.
        """
        if not (node.users and self.weights.include(node, value)):
            return False
        if not is_product(node) or self._moved(node, chain) is not None:
            return True
        return not self._is_plain(row_of(node, value), self._moved(value, chain), chain)

    def _moved(self, node: fx.Node, chain: _OpChain) -> Moved | None:
        names = frozenset((self.name,))
        return moved(node, self.weight, names, self.module, chain.path)

    @staticmethod
    def _is_plain(row: Op | None, given: Moved | None, chain: _OpChain) -> bool:
        """Whether the op takes the weight in a form that a branch may be added for."""
        if given is None or chain.cut:
            return False
        return given.same or (
            given.transposed and row is not None and row.transposed_kind is not None
        )

    def _reader(self, node: fx.Node, value: fx.Node, chain: _OpChain) -> Reader:
        row, given = row_of(node, value), self._moved(value, chain)
        if row is None and is_quantised(self.weight):
            row = row_by_trial(node, value)
        read = given and layout_given(node, value, row, given.dims)
        layout = given.layout(read) if given and read else None
        weights_only = bool(node.users) and self.weights.include(node, value)
        if weights_only and self.weights.becomes_weight(node):
            layout = None  # the outputs of this product are not a layer's outputs
        ops = () if self._is_plain(row, given, chain) else chain.ops
        if ops and _grows(value, self.weight):
            row = None  # a magnitude or mask, broadcast over a weight: not a layer's weight
        transposed = row.transposed_kind if row and given and given.transposed and not ops else None
        found = _reader(node, value, row, chain.path)
        return dataclasses.replace(
            found,
            kind=transposed or found.kind,
            ops_between=ops,
            layout=layout,
            moved=given,
            weights_only=weights_only,
            other_weight=row is not None
            and self.weights.other_operand(row, node, value, chain.path),
            untrained=self._untrained(node, value, chain, given),
        )

    def _untrained(
        self, node: fx.Node, value: fx.Node, chain: _OpChain, given: Moved | None
    ) -> str:
        """Return why a read passes no gradient to the weight, or ""."""
        if given and not all(len(coordinates) for coordinates in given.reached):
            if not chain.ops:
                return "as it has no entries"
            return f"through {chain.ops[0]}, which selects none of its entries"
        if chain.cut:
            return f"through {chain.cut}"
        if node not in self.flow.recording:
            return "under torch.no_grad()"
        if node not in self.flow.trained:
            return "where no gradient of the outputs arrives"
        reached = self.flow.reaches(node, value)
        return "" if reached else f"by {kind_of(node)}, which has no gradient"


def _unique(readers: Iterator[Reader]) -> Iterator[Reader]:
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
    example = value.meta.get("val")
    return isinstance(example, torch.Tensor) and example.numel() > weight.numel()


class _NestedInputs:
    """The inputs of nested graphs that calls pass values to, found once per call."""

    def __init__(self) -> None:
        self._by_call: dict[fx.Node, dict[fx.Node, list[_NestedInput]]] = {}

    def of(self, user: fx.Node, value: fx.Node, owner: nn.Module) -> list[_NestedInput]:
        """Return the inputs that a call passes a value to.

        The list is empty if the call also uses the value in another way.
        """
        if user not in self._by_call:
            self._by_call[user] = self._inputs(user, owner)
        return self._by_call[user].get(value, [])

    @staticmethod
    def _inputs(user: fx.Node, owner: nn.Module) -> dict[fx.Node, list[_NestedInput]]:
        call = call_of(user, owner)
        if call is None:
            return {}
        operands = call.operands
        passed = Counter(operand for operand in operands if isinstance(operand, fx.Node))
        uses = Counter(flat_inputs(user))
        found: dict[fx.Node, list[_NestedInput]] = {}
        for graph in call.graphs:
            for given, value in call.inputs_of(graph):
                if isinstance(value, fx.Node) and passed[value] == uses[value]:
                    found.setdefault(value, []).append((call, given, graph))
        return found


_NestedInput = tuple[Call, fx.Node, fx.GraphModule]


def _reader(node: fx.Node, weight: fx.Node, op: Op | None, path: Path = ()) -> Reader:
    kind = op.kind if op else f"operand of {kind_of(node)}" if is_product(node) else kind_of(node)
    if node.op == "call_module":
        kind = f"module {node.target}"
    nodes = [node, *(call.node for call in reversed(path))]  # a loop's body has no locations
    site = next(filter(None, map(call_site, nodes)), "")
    line = next(filter(None, map(source_line, nodes)), "")
    return Reader(node, weight, op, kind, site, line, path=path)


def _mark_shared(reader: Reader, several: set[fx.GraphModule]) -> Reader:
    """Return the reader with `shared` set, given the nested graphs that have several calls."""
    around = {graph for call in reader.path for graph in call.graphs}
    return dataclasses.replace(reader, shared=bool(around & several))
