"""The graph of an outlined submodule: copies of the nodes of one call, on its own tensors."""

from __future__ import annotations

import torch
from torch import fx

from ..constants import EqualConstants
from ..program import FACADE, OUTER
from .part import CallPart, axis_of, is_size

aten = torch.ops.aten


def graph_inside(part: CallPart, equal: EqualConstants) -> fx.Graph:
    """Return the graph of a call: it takes the leaves that are computed, and returns the output's.

    Args:
        part: the call's part of the whole graph.
        equal: the names of constants in the submodules' graphs.

    Raises:
        SubmoduleError: the submodule takes a value other than as an argument.
    """
    return _Copier(part, equal).made()


class _Copier:
    """Copies the nodes of a call.

    Attributes:
        part: the call's part of the whole graph.
        equal: the names of constants.
        graph: the submodule's graph.
        copies: its nodes, by the nodes that they are copied from.
    """

    def __init__(self, part: CallPart, equal: EqualConstants) -> None:
        self.part = part
        self.equal = equal
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def made(self) -> fx.Graph:
        for index in self.part.call.inputs.computed:
            node = self.part.given[index]
            placeholder = self.graph.placeholder(f"given_{index}")
            placeholder.meta = {k: v for k, v in node.meta.items() if k == "val"}
            self.copies.setdefault(node, placeholder)
        for node in self.part.nodes:
            at_use = node.op == "get_attr" or node in self.part.repeatable or is_size(node)
            if not at_use:  # those are copied at their first use, so that equal calls are alike
                self._copy_of(node)
        results = self.part.results
        returned = [
            self._copy_of(results[index]) if index in results else constant
            for index, constant in enumerate(self.part.call.output.constants)
        ]
        self.graph.output(returned)
        return self.graph

    def _copy_of(self, node: fx.Node) -> fx.Node:
        """Return the submodule's node for a node of the whole graph."""
        if node in self.copies:
            return self.copies[node]
        if node.op == "get_attr":
            fetched = self.graph.get_attr(self._relative(str(node.target), ""))
            fetched.meta = dict(node.meta)
            self.copies[node] = fetched
            return fetched
        if is_size(node):
            return self._size(node)
        if node in self.part.inside or node in self.part.repeatable:
            return self._copy(node)
        raise self.part.refusal(f"takes the value of '{node.name}' other than as an argument")

    def _copy(self, node: fx.Node) -> fx.Node:
        args = fx.map_arg(node.args, self._copy_of)
        kwargs = fx.map_arg(node.kwargs, self._copy_of)
        target = node.target
        if node.op == "call_module":
            prefix = f"{FACADE}." if str(target).startswith(f"{FACADE}.") else ""
            target = self._relative(str(target).removeprefix(prefix), prefix)
        copied = self.graph.create_node(node.op, target, args, kwargs, type_expr=node.type)
        copied.meta = dict(node.meta)
        self.copies[node] = copied
        return copied

    def _size(self, node: fx.Node) -> fx.Node:
        """Return a size, taken from a tensor that the submodule is given where one has it.

        torch.export takes a size from an input of the whole model, at its first use anywhere.
        """
        for index in self.part.call.inputs.computed:
            given = self.part.given[index]
            if (axis := axis_of(given, node.meta["val"])) is not None:
                size = self.graph.call_function(aten.sym_size.int, (self.copies[given], axis))
                size.meta["val"] = node.meta["val"]
                self.copies[node] = size
                return size
        return self._copy(node)

    def _relative(self, name: str, prefix: str) -> str:
        own = f"{self.part.call.path}."
        if name.startswith(own):
            return prefix + name.removeprefix(own)
        return f"{OUTER}.{prefix}{self.equal.name_of(name)}"
