"""ToWeightForm: rewrite op(x, W) + s·B(A(x)) to op(x, W + s·BA)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..module import CapturedModule
from ..module.casts import set_casts
from ..module.state import State
from ..plan import Plan
from .base import Pass
from .structure import WeightNodes, insert_weight, insertions, remove_insertion


@dataclass(frozen=True)
class ToWeightForm(Pass):
    """Rewrite every branch to the weight form, by linearity of the op in its weight.

    The weight form has no branch input, so the result has no dropout.
    """

    def rewrite(self, module: CapturedModule) -> State:
        if module.plan is None:
            return module.known
        for graph in module.distinct_graphs():
            branches = [i for i in insertions(module, graph) if i.form == "branch"]
            for branch in reversed(branches):
                remove_insertion(branch)
            weights = WeightNodes(graph)
            for entry in {b.entry.name_a: b.entry for b in branches}.values():
                for node in weights.read(entry.names):
                    insert_weight(graph, entry, node)
        set_casts(module)
        return module.known.with_plans(_in_weight_form)


def _in_weight_form(plan: Plan) -> Plan:
    entries = tuple(dataclasses.replace(e, form="weight", dropout=0.0) for e in plan)
    return dataclasses.replace(plan, entries=entries)
