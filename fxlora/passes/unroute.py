"""Unroute: undo a routing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ..errors import InjectError
from ..module import CapturedModule
from ..module.casts import unmark
from ..module.contract import InputSpec
from ..module.routing import INPUTS
from ..module.state import State
from .active import merge_modes
from .base import Pass
from .route_blocks import take_from_blocks
from .slots import remove_slots


@dataclass(frozen=True)
class Unroute(Pass):
    """Take the input `adapter_ids`, and all that depends on it, out of the graphs."""

    routed: ClassVar[bool] = True

    def check(self, module: CapturedModule) -> None:
        if module.known.routing is None:
            raise InjectError("nothing to undo: the module is not routed.")

    def rewrite(self, module: CapturedModule) -> State:
        unmark(module)
        graphs: list[fx.Graph] = module.distinct_graphs()
        for graph in graphs:
            remove_slots(graph, module)
        for program in module.programs:
            take_from_blocks(program)
            program.inputs = {mode: _without(spec) for mode, spec in program.inputs.items()}
        for name in module.adapter_parameters():
            module.remove_parameter(name)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in module.known.grads)
        merge_modes(module)
        return dataclasses.replace(module.known, routing=None)


def _without(spec: InputSpec | None) -> InputSpec | None:
    """Return a contract without the arguments that routing added, its last ones."""
    if spec is None:
        return spec
    kept = sum(name not in INPUTS for name in spec.names)
    return dataclasses.replace(
        spec,
        names=spec.names[:kept],
        structures=spec.structures[:kept],
        leaves=spec.leaves[:kept],
    )
