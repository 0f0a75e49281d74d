"""Graphs that compute with the quantised weights that a fold gives: merge-aware training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..fx.marks import ADAPTER
from ..fx.straight_through import straight_through
from ..plan import Entry, Plan
from .adapted_weight import adapted_weight
from .folded_weight import folded_weight
from .quantised import dequantised
from .quantiser import Quantiser


def merge_aware_graph(graph: fx.Graph, plan: Plan, quantisers: Mapping[str, Quantiser]) -> fx.Graph:
    """Return a copy of a graph that reads Q(W + s·BA) wherever it reads a quantised weight.

    Args:
        graph: the explicit graph, with a branch at each read.
        plan: its plan.
        quantisers: the quantiser of each weight, by the name of its parameter.
    """
    derived = copy.deepcopy(graph)
    entries = {entry.name_a: entry for entry in plan}
    for node in list(derived.nodes):
        read, above = _read(node, entries)
        if read is None or above[0].parameter not in quantisers:
            continue
        if any(ADAPTER in user.meta and user.args[0] is node for user in node.users):
            continue  # another part of the weight is adapted after this one
        position = next(n for n, given in enumerate(read.args) if _fetches(given, above[0]))
        target = MergeAware(read.target, position, above, quantisers[above[0].parameter])
        with derived.inserting_before(node):
            tensors = [derived.create_node("get_attr", name) for name in target.names]
            made = derived.create_node("call_function", target, (*read.args, *tensors), read.kwargs)
        made.meta = {key: value for key, value in node.meta.items() if key != ADAPTER}
        node.replace_all_uses_with(made)
        _erase_unused(node)
    derived.lint()
    return derived


def _read(node: fx.Node, entries: Mapping[str, Entry]) -> tuple[fx.Node | None, list[Entry]]:
    """Return the read whose branch a node is the last of, and the entries up to it."""
    found: list[Entry] = []
    while ADAPTER in node.meta and node.meta[ADAPTER][1] == "branch":
        found.insert(0, entries[node.meta[ADAPTER][0]])
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    return (node, found) if found else (None, found)


def _fetches(given: Any, entry: Entry) -> bool:
    return isinstance(given, fx.Node) and given.op == "get_attr" and given.target in entry.names


def _erase_unused(node: fx.Node) -> None:
    ahead = [node]
    while ahead:
        unused = ahead.pop()
        if not unused.users and unused.op in ("call_function", "get_attr") and unused._prev:
            ahead += unused.all_input_nodes
            unused.graph.erase_node(unused)


class MergeAware:
    """A node's target that calls an op with the quantised W + s·BA, straight-through.

    Its arguments are the op's, with the quantised W, and then the tensors of the adapters. The
    result has the bits that the op has with the folded weight. Gradients pass to A and B as if
    nothing were rounded, and to the input through the quantised weight.
    """

    writes_nothing = True
    __name__ = __qualname__ = "merge_aware"

    def __init__(
        self, op: Any, position: int, entries: Sequence[Entry], quantise: Quantiser
    ) -> None:
        self.op, self.position, self.entries, self.quantise = op, position, entries, quantise
        self.names = [name for entry in entries for name in entry.tensors]

    def __call__(self, *given: Any, **kwargs: Any) -> torch.Tensor:
        count = len(given) - len(self.names)
        args, values = list(given[:count]), dict(zip(self.names, given[count:], strict=True))
        before = dequantised(args[self.position])
        with torch.no_grad():
            fixed = {name: value.detach() for name, value in values.items()}
            quantised = self.quantise(folded_weight(self.entries, before, fixed))
            args[self.position] = quantised
            shipped = self.op(*args, **kwargs)
        if not torch.is_grad_enabled():
            return shipped
        weight = before
        for entry in self.entries:
            cast = {name: values[name].to(before.dtype) for name in entry.tensors}
            weight = adapted_weight(entry, weight, cast)
        args[self.position] = straight_through(weight, dequantised(quantised))
        return straight_through(self.op(*args, **kwargs), shipped)

    def __deepcopy__(self, memo: dict[int, Any]) -> MergeAware:
        return self
