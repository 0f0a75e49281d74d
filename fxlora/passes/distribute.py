"""Distribute: op(x, W) + s·B(A(x)) → op(x, W + s·BA)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..module import CapturedModule
from .structure import insert_weight, insertions, take_out, weight_nodes


@dataclass(frozen=True)
class Distribute(PassBase):
    """Rewrite every branch as the weight form, by linearity of the op in its weight.

    Dropout on a branch's input goes with the branch: the result is the adapter without it.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule)
        result = graph_module.derive()
        if result.plan is None:
            return PassResult(result, False)
        for graph in result.distinct_graphs():
            branches = [i for i in insertions(result, graph) if i.form == "branch"]
            for branch in reversed(branches):
                take_out(branch)
            for entry in {b.entry.name_a: b.entry for b in branches}.values():
                for node in weight_nodes(graph, entry.names):
                    if node.users:
                        insert_weight(graph, entry, node)
        entries = tuple(dataclasses.replace(e, form="weight", dropout=0.0) for e in result.plan)
        result.plan = dataclasses.replace(result.plan, entries=entries)
        result.refresh()
        return PassResult(result, True)
