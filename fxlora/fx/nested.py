"""Calls of nested graphs: which operand of a higher-order op is which input of its graphs.

torch.export keeps a region of a model (autocast, no_grad, cond, scan, …) as a nested graph. A
`get_attr` node fetches it, and a higher-order op calls it with the values that the region reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Operands:
    """Position of the operands that a higher-order op passes unchanged to each of its graphs.

    They are the last inputs of each graph. The values that a loop carries from step to step, and
    the slices that it takes at each step, come before them.

    Attributes:
        position: index among the op's arguments of the first operand, or of the sequence of them.
        spread: whether the operands are arguments of the op themselves, not one sequence.
        carried: index of the sequence of values that a loop carries from step to step, or None.
        test: whether the first graph is the condition of a loop.
    """

    position: int
    spread: bool = False
    carried: int | None = None
    test: bool = False

    def of(self, node: fx.Node) -> list[Any]:
        """Return the operands of a call."""
        found: Any = node.args[self.position :] if self.spread else node.args[self.position]
        return list(found)

    def put(self, node: fx.Node, operands: list[Any]) -> None:
        """Replace the operands of a call."""
        args = list(node.args)
        if self.spread:
            args[self.position :] = operands
        else:
            sequence: Any = args[self.position]
            args[self.position] = tuple(operands) if isinstance(sequence, tuple) else operands
        node.args = tuple(args)


def checkpointed(graph: fx.GraphModule, written: tuple[Any, ...], *operands: Any) -> Any:
    """Run a nested graph, and again in the backward instead of storing its activations.

    Args:
        written: the graph's first inputs: buffers that it writes to, which a checkpoint must not
            save.
        operands: the graph's other inputs.
    """
    return checkpoint(lambda *rest: graph(*written, *rest), *operands, use_reentrant=False)


# Any other higher-order op is opaque: if a weight is passed to it, the call is the reader.
OPERANDS: dict[str, Operands] = {
    "cond": Operands(3),  # (predicate, graph, graph, operands)
    "map_impl": Operands(2),  # (graph, sliced, operands)
    "scan": Operands(3, carried=1),  # (graph, carried, sliced, operands)
    "while_loop": Operands(3, carried=2, test=True),  # (graph, graph, carried, operands)
    "wrap_with_autocast": Operands(5, spread=True),  # (device, dtype, on, cache, graph, *operands)
    "wrap_with_set_grad_enabled": Operands(2, spread=True),  # (enabled, graph, *operands)
}


@dataclass(frozen=True)
class Call:
    """One call of one or more nested graphs, which all get the same operands.

    Attributes:
        node: the calling node.
        graphs: the graphs that it may run: the branches of a cond, the condition and body of a
            loop.
    """

    node: fx.Node
    graphs: tuple[fx.GraphModule, ...]

    @property
    def where(self) -> Operands | None:
        """Position of the operands, or None if the op is not known."""
        return _operands(self.node)

    @property
    def operands(self) -> list[Any]:
        """The operands that every graph gets unchanged."""
        return self.where.of(self.node) if self.where else []

    @property
    def chooses(self) -> bool:
        """Whether values may decide which graph runs, or how often: true of an op not known."""
        return self.where is None or len(self.graphs) > 1

    @property
    def runs_once(self) -> bool:
        """Whether the call runs its one graph exactly once: a region, such as autocast."""
        return self.where is not None and self.where.spread and len(self.graphs) == 1

    @property
    def grad(self) -> bool | None:
        """The grad mode (on or off) that the call sets, or None if it sets none."""
        return bool(self.node.args[0]) if _name(self.node) == "wrap_with_set_grad_enabled" else None

    def given(self, graph: fx.GraphModule) -> list[tuple[fx.Node, Any]]:
        """Return the inputs of a graph, each with the value passed for it, as far as known.

        Operands come last, in an unknown op too, so inputs and values are paired from the end.
        """
        values: list[Any] = []
        map_aggregate(self.node.args, values.append)
        inputs = _inputs(graph)
        count = min(len(inputs), len(values))
        return list(zip(inputs[-count:], values[-count:], strict=True)) if count else []

    def results(self, graph: fx.GraphModule) -> list[Any]:
        """Return the results of a graph, in order."""
        found: Any = graph.graph.output_node().args[0]
        return list(found) if isinstance(found, list | tuple) else [found]

    def returns(self, graph: fx.GraphModule) -> bool:
        """Whether the call is known to return the results of a graph, each at the same index."""
        return self.where is not None and not (self.where.test and graph is self.graphs[0])

    def carried(self, graph: fx.GraphModule) -> list[tuple[Any, fx.Node]]:
        """Return the results of a loop's graph that its next step takes, each with its input."""
        if self.where is None or self.where.carried is None or not self.returns(graph):
            return []
        sequence: Any = self.node.args[self.where.carried]
        count = len(sequence) if isinstance(sequence, list | tuple) else 1
        return list(zip(self.results(graph)[:count], _inputs(graph), strict=False))

    def inputs(self, index: int) -> list[tuple[fx.Node, fx.GraphModule]]:
        """Return, for each graph, its input that gets the operand of this index, and the graph."""
        behind = len(self.operands) - index
        return [(_inputs(graph)[-behind], graph) for graph in self.graphs]

    def inputs_of(self, graph: fx.GraphModule) -> list[tuple[fx.Node, Any]]:
        """Return the inputs of a graph that get operands, each with its operand."""
        operands = self.operands
        inputs = _inputs(graph)[-len(operands) :] if operands else []
        return list(zip(inputs, operands, strict=True))

    def index_of(self, given: fx.Node) -> int | None:
        """Return the index of the operand that an input of a graph gets, or None."""
        operands = self.operands
        nested = next((graph for graph in self.graphs if graph.graph is given.graph), None)
        inputs = _inputs(nested)[-len(operands) :] if nested and operands else []
        return inputs.index(given) if given in inputs else None

    def seen_as(self, operand: fx.Node) -> list[fx.Node]:
        """Return each graph's input for an outer node, made an operand if it is none yet."""
        where = self.where
        assert where is not None
        operands = self.operands
        if operand not in operands:
            for graph in self.graphs:
                _append_input(graph.graph, operand.name)
            operands = [*operands, operand]
            where.put(self.node, operands)
        return [given for given, _ in self.inputs(operands.index(operand))]

    def drop(self, index: int) -> None:
        """Remove an operand that no graph uses, and the graphs' inputs for it."""
        where = self.where
        assert where is not None
        for given, _ in self.inputs(index):
            given.graph.erase_node(given)
        operands = self.operands
        del operands[index]
        where.put(self.node, operands)


Path = tuple[Call, ...]  # the calls around a node, outermost first


def call_of(node: fx.Node, owner: nn.Module) -> Call | None:
    """Return a node as a call of nested graphs, which `owner` holds, or None if it is none."""
    if node.op != "call_function":
        return None
    graphs = tuple(
        graph for source in node.all_input_nodes if (graph := nested_graph(source, owner))
    )
    return Call(node, graphs) if graphs else None


def nested_graph(node: fx.Node, owner: nn.Module) -> fx.GraphModule | None:
    """Return the nested graph that a `get_attr` node fetches, or None."""
    if node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    found = owner.get_submodule(path)._modules.get(name)
    return found if isinstance(found, fx.GraphModule) else None


def every_call(graph: fx.Graph, owner: nn.Module) -> Iterator[Call]:
    """Yield the calls of nested graphs in a graph, in the graphs that those call, and so on."""
    for node in graph.nodes:
        if call := call_of(node, owner):
            yield call
            for inner in call.graphs:
                yield from every_call(inner.graph, inner)


def shared(calls: Iterator[Call]) -> set[fx.GraphModule]:
    """Return the graphs that several calls share: a change for one call would apply to all."""
    counts = Counter(graph for call in calls for graph in call.graphs)
    return {graph for graph, count in counts.items() if count > 1}


def inside(path: Path, graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """Return a nested graph's input for an outer node; have the calls around pass it in, if needed.

    Args:
        path: the calls that lead to the graph; the first is in the graph of the outer node.
        graph: the nested graph.
        operand: the outer node.
    """
    around = [*(call.node.graph for call in path[1:]), graph]
    for call, inner in zip(path, around, strict=True):
        operand = next(given for given in call.seen_as(operand) if given.graph is inner)
    return operand


def graph_around(path: Path, node: fx.Node) -> fx.GraphModule:
    """Return the nested graph that contains a node; `path` holds the calls around it."""
    return next(graph for graph in path[-1].graphs if graph.graph is node.graph)


def operands_of(call: Call, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the outer node that a call passes unchanged to each input of a graph, if any."""
    nested = [nested for nested in call.graphs if nested.graph is graph]
    pairs = call.inputs_of(nested[0]) if nested else []
    return {given: operand for given, operand in pairs if isinstance(operand, fx.Node)}


def operand_of(call: Call, given: fx.Node) -> fx.Node | None:
    """Return the outer node that a call passes unchanged to this input of a graph, or None."""
    index = call.index_of(given)
    operand = None if index is None else call.operands[index]
    return operand if isinstance(operand, fx.Node) else None


def _name(node: fx.Node) -> str:
    """Return the name of a higher-order op, else ""."""
    return node.target.name() if isinstance(node.target, torch._ops.HigherOrderOperator) else ""


def _operands(node: fx.Node) -> Operands | None:
    if node.target is checkpointed:  # (graph, written, *operands)
        return Operands(2, spread=True)
    return OPERANDS.get(_name(node))


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def _append_input(graph: fx.Graph, name: str) -> None:
    last: fx.Node | None = None
    for node in graph.nodes:
        last = node if node.op == "placeholder" else last
    with graph.inserting_after(last):  # None: at the start
        graph.placeholder(name)
