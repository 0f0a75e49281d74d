"""DropIdentities: ops that return their input in eval, as dropout does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...fx.calls import argument
from ...module import CapturedModule
from ...module.state import State
from ..base import Pass

aten = torch.ops.aten

# (input, p, train): each returns its input itself without train, and for p = 0.
_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)


@dataclass(frozen=True)
class DropIdentities(Pass):
    """Drop dropouts that are switched off."""

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            for node in list(graph.nodes):
                source = argument(node, 0)
                if _is_switched_off(node) and isinstance(source, fx.Node):
                    node.replace_all_uses_with(source)
                    graph.erase_node(node)
        return module.known


def _is_switched_off(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return False
    p, train = argument(node, 1), argument(node, 2)
    return train is False or (type(p) in (int, float) and p == 0)
