"""Which nodes are computed from weights only: parameters and buffers, and no input of the model.

W1 @ W2 is such a node. Whether it is a weight itself, or the output of a layer whose input happens
to be a parameter, depends on what reads it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from torch import fx

from ..fx.nested import Path, operand_of
from ..lora.ops import row_of
from ..lora.row import Op


@dataclass(frozen=True)
class WeightsOnly:
    """The nodes of a module's graphs that are computed from weights only.

    Attributes:
        parameters: names of all parameters.
    """

    parameters: Set[str]
    _nodes: dict[fx.Graph, set[fx.Node]] = field(default_factory=dict[fx.Graph, set[fx.Node]])

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
        worklist = [(operand, path)] if isinstance(operand, fx.Node) else []
        from_parameter, visited = False, set[fx.Node]()
        while worklist:
            value, around = worklist.pop()
            outside = operand_of(around[-1], value) if around else None
            if value.op == "placeholder" and outside is None:
                return False  # data, or a value that a loop carries
            if outside is not None:
                worklist.append((outside, around[:-1]))
            from_parameter |= value.op == "get_attr" and value.target in self.parameters
            visited.add(value)
            worklist += [(n, around) for n in value.all_input_nodes if n not in visited]
        return from_parameter
