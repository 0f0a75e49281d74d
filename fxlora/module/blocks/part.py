"""The part of a graph that one recorded call of a submodule is: nodes, arguments and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...errors import SubmoduleError
from ...fx.calls import example_value
from .recorded import CALLS, VALUES, CallKey, ModuleCall


class CallPart:
    """The part of one call, which is to be replaced by a call of the submodule.

    Attributes:
        rest: the graph that the call is in, which is rewritten.
        call: the call.
        repeatable: the nodes that can be computed again (see `prepared_copy`).
        nodes: the nodes of the call, in order.
        inside: the same nodes, to look one up.
        given: the nodes of the computed leaves of its arguments, by index.
        results: the nodes of the computed leaves of its output, by index.
    """

    def __init__(self, rest: fx.Graph, call: ModuleCall, repeatable: frozenset[fx.Node]) -> None:
        self.rest = rest
        self.call = call
        self.repeatable = repeatable
        self.nodes = [node for node in rest.nodes if call.key in node.meta.get(CALLS, ())]
        self.inside = frozenset(self.nodes)
        self.given = self._values(output=False)
        self.results = self._values(output=True)

    def _values(self, output: bool) -> dict[int, fx.Node]:
        """Return the node of each computed leaf.

        An adapter inserted after a node copies its meta, so the last match wins.
        """
        leaves = self.call.output if output else self.call.inputs
        found: dict[int, fx.Node] = {}
        for node in self.rest.nodes:
            for value in node.meta.get(VALUES, ()):
                if value.call == self.call.key and value.output is output:
                    found[value.index] = node
        missing = set(leaves.computed) - found.keys()
        if missing:
            what = "returns" if output else "gets"
            raise self.refusal(f"{what} a value that is not in the graph")
        return found

    @property
    def around(self) -> tuple[CallKey, ...]:
        """The calls around this one, outermost first."""
        stack = self.nodes[0].meta[CALLS] if self.nodes else ()
        return tuple(stack[: stack.index(self.call.key)]) if self.call.key in stack else ()

    @property
    def alike(self) -> frozenset[tuple[int, int]]:
        """Pairs of arguments that are one value: the submodule's graph has the first for both."""
        first: dict[fx.Node, int] = {}
        for index in self.call.inputs.computed:
            first.setdefault(self.given[index], index)
        pairs = ((first[self.given[i]], i) for i in self.call.inputs.computed)
        return frozenset(pair for pair in pairs if pair[0] != pair[1])

    def refusal(self, why: str) -> SubmoduleError:
        return SubmoduleError(
            f"'{self.call.path}' cannot be a module of its own: it {why}. Outline the module "
            "around it, or those inside."
        )


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def axis_of(node: fx.Node, size: Any) -> int | None:
    """Return a dimension of a node's tensor that has this size, or None."""
    value = example_value(node)
    if value is None or not isinstance(size, torch.SymInt):
        return None
    for axis, found in enumerate(value.shape):
        if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
            return axis
    return None
