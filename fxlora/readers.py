"""Readers: the nodes where each weight of a captured module meets the data, in every graph."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from .dialect import written_attributes
from .module import CapturedModule
from .nested import Call, Path, call_of, every_call, shared
from .ops import (
    Op,
    flat_inputs,
    is_product,
    is_transpose,
    kind_of,
    reads_no_values,
    row_of,
)
from .provenance import call_site, source_line


@dataclass(frozen=True)
class Reader:
    """One node where a weight meets the data.

    Attributes:
        node: the reading node.
        weight: what it is given: the weight, or what was made of it.
        op: its row in the table of ops, or None where it reads the weight in another way.
        kind: the op's name.
        through: what it reads is not the weight but a function of it, and this is the first op
            on the way (a cast, a weight norm); "" where it is the weight or its transpose.
        call_site: path of the module whose forward made the call, as far as capture knows.
        line: `file:line` of the call, or "".
        alone: whether the node reads weights alone.
        path: the calls of nested graphs around the node, from the outermost in.
        shared: whether several calls share a graph around the node.
    """

    node: fx.Node
    weight: fx.Node
    op: Op | None
    kind: str
    through: str
    call_site: str
    line: str
    alone: bool = False
    path: Path = ()
    shared: bool = False

    @property
    def graph(self) -> fx.Graph:
        """The graph of the captured module that the read is part of."""
        return self.path[0].node.graph if self.path else self.node.graph

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
    constants = functools.cache(_constants)
    dims = {name: p.ndim for name, p in module.named_parameters(remove_duplicate=False)}
    for node in itertools.chain(*(graph.nodes for graph in module.distinct_graphs())):
        if node.op == "get_attr":
            found = _readers(node, module, dims.get(str(node.target), 0), constants)
            readers.setdefault(str(node.target), []).extend(found)
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


def _readers(
    weight: fx.Node,
    module: nn.Module,
    dims: int,
    constants: Callable[[fx.Graph], set[fx.Node]],
) -> Iterator[Reader]:
    """Where a weight, or what weights alone make, takes part in a product or meets data.

    Also inside the nested graphs that it is passed into, and in the graph's order: that of
    `users` is no copy's.
    """
    seen: set[fx.Node] = set()

    def follow(
        value: fx.Node, owner: nn.Module, path: Path, transposed: bool, through: str
    ) -> Iterator[Reader]:
        for user in sorted(value.users):
            if reads_no_values(user) or user in seen:
                continue
            inputs = _nested_inputs(user, value, owner)
            if inputs:
                for call, given, graph in inputs:
                    yield from follow(given, graph, (*path, call), transposed, through)
                continue
            row = row_of(user, value, transposed)
            alone = user in constants(user.graph) and bool(user.users)
            turns = is_transpose(user, value, dims) and bool(user.users)
            if not turns and not (alone and (through or not is_product(user))):
                yield _reader(user, value, row, path, through, alone)
                continue
            seen.add(user)
            on = through if turns else through or kind_of(user)
            yield from follow(user, owner, path, transposed ^ turns, on)

    return follow(weight, module, (), False, "")


def _nested_inputs(
    user: fx.Node, value: fx.Node, owner: nn.Module
) -> list[tuple[Call, fx.Node, fx.GraphModule]]:
    """The inputs of nested graphs that a value is passed on to, if that is all a call does."""
    call = call_of(user, owner)
    passed = [i for i, o in enumerate(call.operands) if o is value] if call else []
    if call is None or len(passed) != sum(n is value for n in flat_inputs(user)):
        return []
    return [(call, given, graph) for i in passed for given, graph in call.inputs(i)]


def _reader(
    node: fx.Node,
    weight: fx.Node,
    op: Op | None,
    path: Path = (),
    through: str = "",
    alone: bool = False,
) -> Reader:
    kind = op.kind if op else f"operand of {kind_of(node)}" if is_product(node) else kind_of(node)
    if node.op == "call_module":
        kind = f"module {node.target}"
    nodes = [node, *(call.node for call in reversed(path))]  # the body of a loop has no places
    site = next(filter(None, map(call_site, nodes)), "")
    line = next(filter(None, map(source_line, nodes)), "")
    return Reader(node, weight, op, kind, through, site, line, alone, path)


def _marked(reader: Reader, together: set[fx.GraphModule]) -> Reader:
    around = {graph for call in reader.path for graph in call.graphs}
    return dataclasses.replace(reader, shared=bool(around & together))
