"""What an adapter file says about a module: the plan, and the values by their names there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..plan import Plan


@dataclass(frozen=True)
class Reading:
    """The content of an adapter file of any format, in the names and shapes of a module.

    Attributes:
        plan: the adapters, and the parameters that train in full.
        starts: values of adapter tensors, by name. Those that a file leaves out (the initial pair
            of PiSSA and OLoRA in PEFT's) are computed from the base weight again.
        stored: values of parameters trained in full and of buffers, by name.
        notes: warnings for the user.
        wrapped: the names under which PEFT has pairs of each adapted parameter, for its folders.
    """

    plan: Plan
    starts: dict[str, torch.Tensor]
    stored: dict[str, torch.Tensor]
    notes: tuple[str, ...] = field(default=())
    wrapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    def with_plan(self, plan: Plan) -> Reading:
        return dataclasses.replace(self, plan=plan)
