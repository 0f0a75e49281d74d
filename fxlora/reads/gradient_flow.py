"""Which nodes the outputs depend on, and which of them a gradient of the outputs reaches.

One backward sweep visits all graphs of a module and the graphs nested in them. A detach after the
call of a nested graph is therefore seen inside that graph, too.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from ..fx.calls import is_torch_call
from ..fx.effects import is_python_function, written_nodes
from ..fx.nested import Call, call_of
from .gradient_trials import passes_gradient


@dataclass(frozen=True, eq=False)
class Flow:
    """The result of a sweep over graphs.

    Attributes:
        live: the nodes that an output or a side effect depends on.
        trained: the nodes whose result a gradient of some output reaches.
        recording: the nodes that run with gradients enabled, in at least one of the calls of the
            nested graph that they are in.
        stops: pairs of a node and an input to which it is known to pass no gradient.
    """

    live: set[fx.Node] = field(default_factory=set[fx.Node])
    trained: set[fx.Node] = field(default_factory=set[fx.Node])
    recording: set[fx.Node] = field(default_factory=set[fx.Node])
    stops: Collection[tuple[fx.Node, fx.Node]] = ()

    @classmethod
    def of(
        cls,
        graphs: Iterable[fx.Graph],
        owner: nn.Module,
        stops: Collection[tuple[fx.Node, fx.Node]] = (),
    ) -> Flow:
        """Sweep over graphs of the module `owner`."""
        flow = cls(stops=stops)
        for graph in graphs:
            results = graph.output_node().all_input_nodes
            flow._back(graph, owner, set(results), set(results), True)
        return flow

    def reaches(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a gradient of the outputs passes through `node` to its input `source`."""
        through = node in self.trained and node in self.recording
        return through and (node, source) not in self.stops and passes_gradient(node, source)

    def _back(
        self,
        graph: fx.Graph,
        owner: nn.Module,
        live: Iterable[fx.Node],
        trained: Iterable[fx.Node],
        recording: bool,
    ) -> None:
        """Sweep over one graph from its end.

        Args:
            graph: the graph.
            owner: the module that the graph belongs to.
            live: nodes of the graph that are live because of its callers.
            trained: nodes of the graph that a gradient reaches because of its callers.
            recording: whether the graph runs with gradients enabled.
        """
        self.live.update(live)
        self.trained.update(trained)
        for node in reversed(graph.nodes):
            if recording:
                self.recording.add(node)
            written = written_nodes(node, owner)
            if written or _has_effect(node):
                self.live.add(node)
            if not self.trained.isdisjoint(written):  # later reads see this write
                self.trained.add(node)
            if call := call_of(node, owner):
                self._through(call, recording)
            elif node in self.live and node.op != "output":
                self.live.update(node.all_input_nodes)
                reached = (n for n in node.all_input_nodes if self.reaches(node, n))
                self.trained.update(reached if recording else ())

    def _through(self, call: Call, recording: bool) -> None:
        """Sweep over the nested graphs of a call, from its results to its operands."""
        recording = recording if call.grad is None else call.grad
        for graph in call.graphs:
            live, trained = (
                self._wanted(call, graph, among) for among in (self.live, self.trained)
            )
            self._loop(call, graph, live, trained, recording)
        followed = {outside for graph in call.graphs for _, outside in call.given(graph)}
        rest = [node for node in call.node.all_input_nodes if node not in followed]
        if call.node in self.live:  # operands that no graph gets, for example a cond's predicate
            self.live.update(rest)
        if call.node in self.trained and call.where is None:
            self.trained.update(rest)

    def _wanted(self, call: Call, graph: fx.GraphModule, among: set[fx.Node]) -> set[fx.Node]:
        """Return the results of a nested graph that reach nodes in `among` through the call.

        These are all results if a user takes the call's result as a whole, if no user is in
        `among`, or if the call does not return the graph's results by position. They are none if
        the call is not in `among`.
        """
        results = call.results(graph)
        if call.node not in among:
            return set()
        takers = [user for user in call.node.users if user in among]
        picked = [user.args[1] for user in takers if user.target is operator.getitem]
        every = any(user.target is not operator.getitem for user in takers) or not takers
        if every or not call.returns(graph):
            picked = list(range(len(results)))
        return {r for i, r in enumerate(results) if i in picked and isinstance(r, fx.Node)}

    def _loop(
        self,
        call: Call,
        graph: fx.GraphModule,
        live: set[fx.Node],
        trained: set[fx.Node],
        recording: bool,
    ) -> None:
        """Sweep over a nested graph until the values carried by a loop add no more nodes."""
        while True:
            self._back(graph.graph, graph, live, trained, recording)
            carried = [(r, i) for r, i in call.carried(graph) if isinstance(r, fx.Node)]
            more_live = {result for result, given in carried if given in self.live}
            more_trained = {result for result, given in carried if given in self.trained}
            if more_live <= live and more_trained <= trained:
                break
            live, trained = live | more_live, trained | more_trained
        for given, outside in call.given(graph):
            if isinstance(outside, fx.Node):
                self.live.update([outside] if given in self.live else ())
                self.trained.update([outside] if given in self.trained else ())


def _has_effect(node: fx.Node) -> bool:
    """Whether a node is live even if no other node uses its result.

    A module, or a function without a schema, may have side effects.
    """
    if node.op == "call_function" and node.is_impure():
        return True
    if node.op in ("output", "call_module"):
        return True
    if node.op != "call_function":
        return False
    return is_python_function(node) or not (
        is_torch_call(node) or isinstance(node.target, torch._ops.OperatorBase)
    )
