"""DropIdentities: ops that return their input in eval, as dropout does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...fx.calls import example_value, named_argument
from ...module import CapturedModule
from ...module.state import State
from ..base import Pass
from .values import call


@dataclass(frozen=True)
class DropIdentities(Pass):
    """Drop random ops that are switched off, if a run on random numbers returns these."""

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            for node in list(graph.nodes):
                source = _switched_off(node)
                if source is not None and _returns(node, source):
                    node.replace_all_uses_with(source)
                    graph.erase_node(node)
        return module.known


def _switched_off(node: fx.Node) -> fx.Node | None:
    """Return the input of a random op that does not train, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    random = torch.Tag.nondeterministic_seeded in target.tags and not target._schema.is_mutable
    off = named_argument(node, "train", "training") is False
    source = node.args[0] if node.args else None
    one_input = isinstance(source, fx.Node) and node.all_input_nodes == [source]
    return source if random and off and one_input and isinstance(source, fx.Node) else None


def _returns(node: fx.Node, source: fx.Node) -> bool:
    example = example_value(source)
    if example is None or not example.is_floating_point():
        return False
    values = torch.randn([2] * example.ndim, generator=torch.Generator().manual_seed(0))
    values = values.to(example.dtype)
    found = call(node, {source: values})
    return isinstance(found, torch.Tensor) and torch.equal(found, values)
