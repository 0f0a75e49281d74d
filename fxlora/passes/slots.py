"""A graph with the input `adapter_ids`: what gathered branches and values once per slot share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from ..fx.marks import ROUTED
from ..fx.nested import Call, Path, call_of
from ..lora.row import aten
from ..module.blocks.recorded import CALLS
from ..module.routing import INPUT, INPUTS, WEIGHTS

KEPT = None  # the mark of a node that replaces no other


class SlotGraph:
    """A graph that gets the input `adapter_ids`, and the nodes that depend on it.

    Attributes:
        graph: the graph.
        slots: the number of adapters that it has room for.
        mixture: the number of adapters of each sample.
        rows: the node of the rows of the stacks that the ids choose: (b,), or (b, mixture).
        weights: the node of a further factor for each of them, or None.
    """

    def __init__(self, graph: fx.Graph, slots: int, weights: bool, mixture: int) -> None:
        self.graph, self.slots, self.mixture = graph, slots, mixture
        self._tracers: dict[fx.Graph, _Tracer] = {}
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        ids = self._input(INPUT, last)
        self.weights = self._input(WEIGHTS, ids) if weights else None
        extend_inputs(graph, INPUTS if weights else (INPUT,))
        with graph.inserting_before((self.weights or ids).next):
            self.rows = self._checked(self.proxy(ids)).node
        node = self.rows  # of no block, though one may be all that uses it
        while node is not (self.weights or ids):
            node.meta[CALLS], node = (), node.prev

    def _input(self, name: str, before: fx.Node) -> fx.Node:
        with self.graph.inserting_after(before):
            node = self.graph.placeholder(name)
        node.meta[ROUTED] = KEPT
        return node

    def _checked(self, ids: Any) -> Any:
        """Return the rows of the stacks that ids choose: -1 chooses the last.

        The assertion has a message; ONNX has none. There, an id out of range is an index that the
        table does not have, which a runtime refuses.
        """
        outside = aten.logical_or.default(aten.lt.Scalar(ids, -1), aten.ge.Scalar(ids, self.slots))
        message = f"adapter_ids must be from -1 (the base) to {self.slots - 1}"
        aten._assert_async.msg(aten.logical_not.default(aten.any.default(outside)), message)
        ones = aten.new_ones.default(ids, [self.slots + 1])
        table = aten.sub.Tensor(aten.cumsum.default(ones, 0), 1)  # 0 … slots
        return aten.index.Tensor(table, [aten.masked_fill.Scalar(ids, outside, self.slots + 1)])

    def proxy(self, node: fx.Node) -> Any:
        """Return a proxy of a node of this graph or of a nested one, whose ops emit nodes there."""
        return fx.Proxy(node, self._tracers.setdefault(node.graph, _Tracer(node.graph)))

    def fetch(self, name: str, path: Path = ()) -> Any:
        """Fetch a parameter; return its proxy in the graph that a path of calls leads to.

        Args:
            name: the name of the parameter.
            path: the calls of nested graphs around the place of use, outermost first.
        """
        if not path:
            return self.proxy(self._marked(self.graph.create_node("get_attr", name)))
        outermost = path[0].node
        passed = (n for n in outermost.all_input_nodes if n.op == "get_attr" and n.target == name)
        with self.graph.inserting_before(outermost):
            node = next(passed, None) or self.graph.create_node("get_attr", name)
        return self.seen(self._marked(node), path)

    def seen(self, node: fx.Node, path: Path) -> Any:
        """Return the proxy of a node of this graph, as a nested graph gets it from its calls."""
        for depth, call in enumerate(path):
            given = [self._marked(each) for each in call.seen_as(node)]
            inner = path[depth + 1].node.graph if depth + 1 < len(path) else None
            node = next(each for each in given if inner in (None, each.graph))
        return self.proxy(node)

    @staticmethod
    def _marked(node: fx.Node) -> fx.Node:
        node.meta[ROUTED] = KEPT
        return node

    def replace(self, base: fx.Node, output: fx.Node, at: int, users: set[fx.Node]) -> None:
        """Replace a node in its earlier users by one that has it as an argument, number `at`."""
        output.meta = {**base.meta, ROUTED: at}
        base.replace_all_uses_with(output, delete_user_cb=lambda user: user in users)


class _Tracer(GraphAppendingTracer):
    """Tracer that marks the nodes it emits."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[ROUTED] = KEPT
        return node


# ---- the graph's arguments ----------------------------------------------------------------------


def extend_inputs(graph: fx.Graph, inputs: Sequence[str]) -> None:
    """Have the graph's code take further keyword arguments."""
    leaf = pytree.tree_structure(0)
    more = dict.fromkeys(inputs, leaf)
    _set_inputs(graph, lambda names, named: ([*names, *more], {**named, **more}))


def shorten_inputs(graph: fx.Graph) -> None:
    """Undo `extend_inputs`."""

    def without(names: list[str], named: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        kept = {name: spec for name, spec in named.items() if name not in INPUTS}
        return [name for name in names if name not in INPUTS], kept

    _set_inputs(graph, without)


def _set_inputs(
    graph: fx.Graph,
    change: Callable[[list[str], dict[str, Any]], tuple[list[str], dict[str, Any]]],
) -> None:
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    info = codegen.pytree_info
    positional, named = info.in_spec.children()
    names, specs = change(
        list(info.orig_args), dict(zip(named.context, named.children(), strict=True))
    )
    made = pytree.TreeSpec(dict, list(specs), list(specs.values()))
    in_spec = pytree.TreeSpec(tuple, None, [positional, made])
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, info.out_spec)))


# ---- taking out ---------------------------------------------------------------------------------


def remove_slots(graph: fx.Graph, owner: nn.Module) -> None:
    """Take all nodes that were added for slots out of a graph, and out of its nested graphs."""
    _erase(graph, owner, ())
    shorten_inputs(graph)


def _erase(graph: fx.Graph, owner: nn.Module, kept: Sequence[str]) -> None:
    """Erase the marked nodes of a graph, but for the kinds to keep."""
    for node in reversed(list(graph.nodes)):
        if ROUTED in node.meta and node.op not in kept:
            if (at := node.meta[ROUTED]) is not KEPT:
                node.replace_all_uses_with(node.args[at])
            graph.erase_node(node)
        elif call := call_of(node, owner):
            _erase_inside(call)


def _erase_inside(call: Call) -> None:
    """Erase the marked nodes of nested graphs, and the operands that only these used."""
    for nested in call.graphs:
        _erase(nested.graph, nested, ("placeholder",))
    for index in reversed(range(len(call.operands))):
        if any(ROUTED in given.meta for given, _ in call.inputs(index)):
            call.drop(index)
