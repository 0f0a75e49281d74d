"""ForInference: run the eval graph in both modes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...module import CapturedModule
from ...module.state import State
from ..base import Pass


@dataclass(frozen=True)
class ForInference(Pass):
    """Drop the train graphs, and freeze all parameters."""

    def rewrite(self, module: CapturedModule) -> State:
        for program in module.programs:
            program.graphs["train"] = program.graphs["eval"]
            program.inputs["train"] = program.inputs["eval"]
            if autocasts := program.autocasts.get("eval"):
                program.autocasts["train"] = autocasts
            program.calls = {mode: program.calls.get("eval", ()) for mode in program.calls}
        module.requires_grad_(False)
        return replace(module.known, grads=frozenset(), unfolded=None)
