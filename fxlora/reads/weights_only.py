"""Which nodes are computed from weights only: parameters and buffers, and no input of the model.

W1 @ W2 is such a node. Whether it is a weight itself, or the output of a layer whose input happens
to be a parameter, depends on what reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..fx.nested import Path, operands_of
from ..lora.ops import row_of
from ..lora.row import Op


@dataclass(frozen=True)
class _Origin:
    """Where a node's value comes from.

    Attributes:
        placeholders: the placeholders of its graph that it depends on, a bit for each.
        parameter: whether it depends on a parameter that its graph fetches.
    """

    placeholders: int
    parameter: bool


@dataclass(frozen=True)
class _Given:
    """The placeholders of a graph that depend on data, and on parameters, a bit for each."""

    data: int
    parameters: int


@dataclass(frozen=True)
class WeightsOnly:
    """The nodes of a module's graphs that are computed from weights only.

    Attributes:
        parameters: names of all parameters.
    """

    parameters: Set[str]
    _nodes: dict[fx.Graph, set[fx.Node]] = field(default_factory=dict[fx.Graph, set[fx.Node]])
    _found: dict[fx.Graph, dict[fx.Node, _Origin]] = field(default_factory=dict[Any, Any])
    _passed: dict[tuple[Any, ...], _Given] = field(default_factory=dict[Any, Any])

    def nodes(self, graph: fx.Graph) -> Set[fx.Node]:
        """Return the nodes of a graph that depend on parameters and buffers only."""
        if graph not in self._nodes:
            found = self._nodes[graph] = set[fx.Node]()
            for node in graph.nodes:
                called = node.op in ("call_function", "call_method")
                computed = called and found.issuperset(node.all_input_nodes)
                if computed or node.op == "get_attr":
                    found.add(node)
        return self._nodes[graph]

    def include(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a call is among them, given that its input `value` is.

        In a nested graph, `value` may be a placeholder that a weight is passed to.
        """
        constant = node in self.nodes(node.graph)
        return constant or (node.op != "output" and node.all_input_nodes == [value])

    def becomes_weight(self, node: fx.Node) -> bool:
        """Whether a result becomes a product's weight, directly or by ops on weights only."""
        constants = self.nodes(node.graph)
        worklist, visited = [node], set[fx.Node]()
        while worklist:
            value = worklist.pop()
            if any(row_of(user, value) for user in value.users):
                return True
            visited.add(value)
            worklist += [u for u in value.users if u in constants and u not in visited]
        return False

    def other_operand(self, row: Op, node: fx.Node, weight: fx.Node, path: Path) -> bool:
        """Whether the other operand of a product is computed from parameters only.

        Branches for both weights would omit the term Δu·Δv. A look-up has indices instead of
        another operand.

        Args:
            row: the row of the product in the table of ops.
            node: the product.
            weight: its operand that is the weight.
            path: the calls of nested graphs around it, outermost first.
        """
        operand = row.input_of(node, weight) if row.dropout else None
        if not isinstance(operand, fx.Node):
            return False
        origin, given = self._origins(operand.graph)[operand], self._given(operand.graph, path)
        if origin.placeholders & given.data:
            return False
        return origin.parameter or bool(origin.placeholders & given.parameters)

    def _origins(self, graph: fx.Graph) -> Mapping[fx.Node, _Origin]:
        """Return where the values of a graph's nodes come from."""
        if graph not in self._found:
            found = self._found[graph] = dict[fx.Node, _Origin]()
            bit = 1
            for node in graph.nodes:
                placeholders = 0
                if node.op == "placeholder":
                    placeholders, bit = bit, bit << 1
                parameter = node.op == "get_attr" and node.target in self.parameters
                for value in node.all_input_nodes:
                    placeholders |= found[value].placeholders
                    parameter |= found[value].parameter
                found[node] = _Origin(placeholders, parameter)
        return self._found[graph]

    def _given(self, graph: fx.Graph, path: Path) -> _Given:
        """Return what the calls of nested graphs pass to the placeholders of a graph."""
        key = (graph, *(call.node for call in path))
        if key not in self._passed:
            data = parameters = 0
            around = operands_of(path[-1], graph) if path else {}
            for placeholder in graph.find_nodes(op="placeholder"):
                bit = self._origins(graph)[placeholder].placeholders
                outside = around.get(placeholder)
                if outside is None:  # data, or a value that a loop carries
                    data |= bit
                    continue
                origin = self._origins(outside.graph)[outside]
                given = self._given(outside.graph, path[:-1])
                data |= bit if origin.placeholders & given.data else 0
                from_parameter = origin.parameter or origin.placeholders & given.parameters
                parameters |= bit if from_parameter else 0
            self._passed[key] = _Given(data, parameters)
        return self._passed[key]
