"""An adapted module again, with other adapters on its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ..module import CapturedModule
from ..module.sharded import whole, write
from ..passes import Inject, Remove
from ..plan import Plan


@torch.no_grad()
def with_adapters(
    module: CapturedModule,
    plan: Plan,
    adapters: Mapping[str, torch.Tensor],
    in_full: Mapping[str, CapturedModule],
) -> CapturedModule:
    """Return a new module: the base of an adapted one, with the adapters of another plan.

    Args:
        module: an adapted module; it is not changed. Its buffers are the new module's.
        plan: the plan of the new module.
        adapters: the values of the plan's adapter tensors, by name.
        in_full: the module that has the values of each parameter that the plan trains in full.
    """
    base = Remove()(module)
    result = Inject(dataclasses.replace(plan, rules=()), adapters)(base)
    held = result.state_tensors()
    for name, buffer in module.state_tensors().items():
        if name not in result.trained:
            write(held[name], whole(buffer))
    for name, source in in_full.items():
        write(result.get_parameter(name), whole(source.get_parameter(name).detach()))
    recorded = module.known.base_fingerprints  # so that a base written to since stays noticed
    marks = result.known.base_fingerprints
    result.update_state(
        base_fingerprints={names: recorded.get(names, mark) for names, mark in marks.items()}
    )
    result.training = module.training
    return result
