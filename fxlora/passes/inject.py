"""Inject: add a plan's adapters to the graphs as explicit nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..errors import InjectError
from ..fx.effects import written_attributes
from ..module import CapturedModule
from ..module.sharded import whole
from ..module.state import State, aside
from ..names import shown
from ..plan import Entry, Plan, separated
from ..tables import some
from .active import check_together, put_in, take_out
from .base import Pass
from .fits import check_fits, check_starts
from .initialize import new_tensors
from .shard_adapters import shard_like_weight, share_whole_adapters


@dataclass(frozen=True)
class Inject(Pass):
    """Add a plan's adapters to every graph, and freeze all parameters that the plan does not train.

    Adapters that are active already stay so.

    Attributes:
        plan: the plan to inject.
        starts: initial values of adapter tensors, by name; the others are initialized as the plan's
            entries say.
    """

    plan: Plan
    starts: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def rewrite(self, module: CapturedModule) -> State:
        before = module.known.active
        new = separated(self.plan)
        if taken := [name for name in new if name in module.known.adapters]:
            raise InjectError(
                f"the module has an adapter {some(map(shown, taken))} already: match with another "
                "adapter_name, or remove that one first (fxlora.remove(module, adapter=…))."
            )
        check_together(module, [*(module.known.adapters[n] for n in before), *new.values()])
        take_out(module)
        check_fits(module, self.plan)
        check_starts(self.plan, self.starts)
        held = {name: with_dtypes(module, plan) for name, plan in new.items()}
        module.known = replace(module.known, adapters={**module.known.adapters, **held})
        for plan in held.values():
            for entry in plan:
                _add_tensors(module, entry, self.starts)
            for name in plan.trained:
                value = module.get_parameter(name).detach().clone()
                module.set_parameter(aside(plan.adapter, name), nn.Parameter(value))
        put_in(module, (*before, *held))
        share_whole_adapters(module)
        return module.known


def with_dtypes(module: CapturedModule, plan: Plan) -> Plan:
    """Return the plan with the dtypes of this module's weights.

    A parameter that the plan trains in full keeps the model's dtype if Python reads it, or a graph
    writes to it: no cast in a graph would help there.
    """
    weights = dict(module.named_parameters(remove_duplicate=False))
    kept = _bare_names(module) if plan.trained else set[str]()
    names = {name: group for group in module.aliases().values() for name in group}
    fixed = {name: False for name in plan.trained if not kept.isdisjoint(names[name])}
    return replace(plan.over(weights), trained_dtypes={**plan.trained_dtypes, **fixed})


def _bare_names(module: CapturedModule) -> set[str]:
    """Return the names of parameters that Python or a module reads, or that a graph writes to."""
    found = set(module.uncovered)
    for graph in module.distinct_graphs():
        for node in graph.nodes:
            found.update(written_attributes(node, module))
            if node.op == "call_module":
                inside = module.get_submodule(str(node.target)).named_parameters()
                found.update(f"{node.target}.{name}" for name, _ in inside)
    return found


def _add_tensors(module: CapturedModule, entry: Entry, starts: Mapping[str, torch.Tensor]) -> None:
    """Add an entry's parameters to the module: from `starts`, or else newly initialized."""
    weight = module.get_parameter(entry.parameter)
    dtype = entry.dtype_over(weight.dtype)
    given = {
        name: nn.Parameter(
            whole(starts[name]).detach().to(weight.device, dtype, copy=True).contiguous(),
            name in entry.trainable,
        )
        for name in entry.tensors
        if name in starts
    }
    fresh = {} if len(given) == len(entry.tensors) else new_tensors(entry, whole(weight))
    for name, parameter in (fresh | given).items():
        module.set_parameter(name, shard_like_weight(entry, name, parameter, weight))
