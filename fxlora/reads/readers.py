"""Readers: the nodes where each weight of a captured module meets the data, in every graph."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..fx.calls import call_site, flat_inputs, kind_of, source_line
from ..fx.effects import written_attributes
from ..fx.nested import Call, Path, call_of, every_call, origin, shared
from ..lora.ops import Op, is_product, row_of
from ..module import CapturedModule
from .facts import is_transpose, reads_no_values, stops_gradients


@dataclass(frozen=True)
class Reader:
    """One node where a weight meets the data.

    Attributes:
        node: the reading node.
        weight: what it is given: the weight, or what was made of it.
        op: its row in the table of ops, or None where it reads the weight in another way.
        kind: the op's name.
        way: what it reads is not the weight but a function of it, and these are the ops on the way
            (a cast, a weight norm), less transposes; () where it is the weight or its transpose.
        call_site: path of the module whose forward made the call, as far as capture knows.
        line: `file:line` of the call, or "".
        alone: whether the node reads weights alone.
        beside: whether the op applies it to another parameter itself (not to what is computed
            from one).
        detached: whether no gradient comes back: a detach is on the way to it, or from it on.
        path: the calls of nested graphs around the node, from the outermost in.
        shared: whether several calls share a graph around the node.
    """

    node: fx.Node
    weight: fx.Node
    op: Op | None
    kind: str
    call_site: str
    line: str
    way: tuple[str, ...] = ()
    alone: bool = False
    beside: bool = False
    detached: bool = False
    path: Path = ()
    shared: bool = False

    @property
    def graph(self) -> fx.Graph:
        """The graph of the captured module that the read is part of."""
        return self.path[0].node.graph if self.path else self.node.graph

    @property
    def through(self) -> str:
        """The first op on the way, or ""."""
        return self.way[0] if self.way else ""

    @property
    def branch(self) -> Op | None:
        """The row by which a branch can stand beside this read."""
        return None if self.through else self.op

    def describe(self) -> str:
        """The op and where it is called, for messages."""
        return f"{self.kind} reads at {self.line}" if self.line else f"{self.kind} reads"


def readers_and_writers(
    module: CapturedModule,
) -> tuple[dict[str, list[Reader]], dict[str, Reader]]:
    """Every reader, and a writer, of every attribute by the name it has in the graphs."""
    readers: dict[str, list[Reader]] = {}
    writers: dict[str, Reader] = {}
    constants, live, heard = map(functools.cache, (_constants, _live, _heard))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for node in itertools.chain(*(graph.nodes for graph in module.distinct_graphs())):
        if node.op == "get_attr":
            weight = parameters.get(str(node.target), torch.empty(()))
            walk = _Walk(module, weight, frozenset(parameters), constants, live, heard)
            readers.setdefault(str(node.target), []).extend(_once(walk.follow(node, module)))
        if node.op == "call_module":
            for name in _inside(module, str(node.target)):
                readers.setdefault(name, []).append(_reader(node, node, None))
        for name in written_attributes(node, module):
            writers.setdefault(name, _reader(node, node, None))
    together = shared(call for g in module.distinct_graphs() for call in every_call(g, module))
    return {name: [_marked(r, together) for r in found] for name, found in readers.items()}, writers


def _inside(module: CapturedModule, path: str) -> list[str]:
    """Names of the parameters of a module that the tracer kept whole."""
    return [f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters()]


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters and buffers alone."""
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op == "call_function" and constants.issuperset(node.all_input_nodes)
        if computed or node.op == "get_attr":
            constants.add(node)
    return constants


@dataclass(frozen=True)
class _Way:
    """How a value comes from a weight.

    Attributes:
        path: the calls of nested graphs around it.
        transposed: whether it is the transpose.
        ops: those on the way that are no transposes.
        detached: whether no gradient comes back.
    """

    path: Path = ()
    transposed: bool = False
    ops: tuple[str, ...] = ()
    detached: bool = False

    def into(self, call: Call) -> _Way:
        return dataclasses.replace(self, path=(*self.path, call))

    def over(self, op: fx.Node, turns: bool) -> _Way:
        return _Way(
            self.path,
            self.transposed ^ turns,
            self.ops if turns else (*self.ops, kind_of(op)),
            self.detached or stops_gradients(op),
        )


@dataclass(frozen=True)
class _Walk:
    """Where a weight, or what weights alone make, takes part in a product or meets data.

    Also inside the nested graphs that it is passed into, and in the graph's order: that of
    `users` is no copy's.
    """

    module: CapturedModule
    weight: torch.Tensor
    parameters: frozenset[str]
    constants: Callable[[fx.Graph], set[fx.Node]]
    live: Callable[[fx.Graph], set[fx.Node]]
    heard: Callable[[fx.Graph], set[fx.Node]]
    seen: set[tuple[fx.Node, bool]] = field(default_factory=set[tuple[fx.Node, bool]])

    def follow(self, value: fx.Node, owner: nn.Module, way: _Way = _Way()) -> Iterator[Reader]:
        for user in sorted(value.users):
            if reads_no_values(user) or user not in self.live(user.graph):
                continue
            if (user, way.detached) in self.seen:
                continue
            inputs = _nested_inputs(user, value, owner)
            if inputs:
                for call, given, graph in inputs:
                    yield from self.follow(given, graph, way.into(call))
                continue
            row = row_of(user, value, way.transposed)
            alone = user in self.constants(user.graph) and bool(user.users)
            turns = is_transpose(user, value, self.weight.ndim) and bool(user.users)
            if not turns and not (alone and (way.ops or not is_product(user))):
                yield self._reader(user, value, row, way, alone)
                continue
            self.seen.add((user, way.detached))
            yield from self.follow(user, owner, way.over(user, turns))

    def _reader(
        self, node: fx.Node, value: fx.Node, row: Op | None, way: _Way, alone: bool
    ) -> Reader:
        if row and way.ops and _grows(value, self.weight):
            row = None  # a magnitude or a mask, spread over the weight: no layer's weight
        return dataclasses.replace(
            _reader(node, value, row, way.path),
            way=way.ops,
            alone=alone,
            beside=row is not None and self._beside(row, node, value, way.path),
            detached=way.detached or node not in self.heard(node.graph),
        )

    def _beside(self, row: Op, node: fx.Node, value: fx.Node, path: Path) -> bool:
        """Whether the input is a parameter itself: two adapters would miss Δu·Δv.

        (The indices of a look-up are none.)
        """
        source = row.input_of(node, value) if row.dropout else None
        if not isinstance(source, fx.Node):
            return False
        source = origin(path, source)
        while is_transpose(source, source, 2):
            source = source.all_input_nodes[0]
        return source.op == "get_attr" and source.target in self.parameters


def _once(readers: Iterator[Reader]) -> Iterator[Reader]:
    """Each read once; what it reads may come over a detach and past it (straight-through)."""
    found: dict[tuple[fx.Node, fx.Node, Path], Reader] = {}
    for reader in readers:
        key = (reader.node, reader.weight, reader.path)
        before = found.setdefault(key, reader)
        found[key] = dataclasses.replace(before, detached=before.detached and reader.detached)
    yield from found.values()


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that something comes of: an output or an effect (export leaves dead code)."""
    return _leading_on(graph, lambda node: False)


def _heard(graph: fx.Graph) -> set[fx.Node]:
    """Those of them that a gradient may come back to."""
    return _leading_on(graph, stops_gradients)


def _leading_on(graph: fx.Graph, ends: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes from which a way leads to an output or an effect, over no node that ends it."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if ends(node):
            continue
        known = isinstance(node.target, torch._ops.OpOverload)  # else it may do anything
        impure = node.op == "output" or (node.op == "call_function" and node.is_impure())
        if impure or not (known or node.users) or not live.isdisjoint(node.users):
            live.add(node)
    return live


def _grows(value: fx.Node, weight: torch.Tensor) -> bool:
    """Whether what was made of a weight has more numbers than the weight."""
    seen = value.meta.get("val")
    return isinstance(seen, torch.Tensor) and seen.numel() > weight.numel()


def _nested_inputs(
    user: fx.Node, value: fx.Node, owner: nn.Module
) -> list[tuple[Call, fx.Node, fx.GraphModule]]:
    """The inputs of nested graphs that a value is passed on to, if that is all a call does."""
    call = call_of(user, owner)
    passed = [i for i, o in enumerate(call.operands) if o is value] if call else []
    if call is None or len(passed) != sum(n is value for n in flat_inputs(user)):
        return []
    return [(call, given, graph) for i in passed for given, graph in call.inputs(i)]


def _reader(node: fx.Node, weight: fx.Node, op: Op | None, path: Path = ()) -> Reader:
    kind = op.kind if op else f"operand of {kind_of(node)}" if is_product(node) else kind_of(node)
    if node.op == "call_module":
        kind = f"module {node.target}"
    nodes = [node, *(call.node for call in reversed(path))]  # the body of a loop has no places
    site = next(filter(None, map(call_site, nodes)), "")
    line = next(filter(None, map(source_line, nodes)), "")
    return Reader(node, weight, op, kind, site, line, path=path)


def _marked(reader: Reader, together: set[fx.GraphModule]) -> Reader:
    around = {graph for call in reader.path for graph in call.graphs}
    return dataclasses.replace(reader, shared=bool(around & together))
