"""Pass: a function from a captured module to a new one with rewritten graphs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..module import CapturedModule, check_captured
from ..module.state import State


class Pass(ABC):
    """A rewrite of a captured module. Calling the pass leaves the given module unchanged.

    A subclass raises in `check` if its preconditions do not hold. In `rewrite` it edits the graphs,
    parameters and buffers of a copy in place, and returns the copy's new state.
    """

    def check(self, module: CapturedModule) -> None:  # noqa: B027
        """Raise InjectError unless the module meets the pass's preconditions."""

    routed: ClassVar[bool] = False  # whether it takes a routed module

    @abstractmethod
    def rewrite(self, module: CapturedModule) -> State:
        """Edit the graphs and tensors of a module in place, and return its new state."""

    def apply(self, module: CapturedModule) -> None:
        """Check the preconditions, and rewrite the module in place."""
        self.check(module)
        with module.editing():
            module.known = self.rewrite(module)
        module.refresh()

    def __call__(self, module: CapturedModule) -> CapturedModule:
        check_captured(module, type(self).__name__, routed=self.routed)
        result = self.copied(module)
        self.apply(result)
        return result

    def copied(self, module: CapturedModule) -> CapturedModule:
        """Return the copy of a module that the pass edits."""
        return module.derive()


@dataclass(frozen=True)
class as_pass(PassBase):
    """Wrapper of a pass for torch.fx's PassManager, which calls passes with a GraphModule.

    The GraphModule must be a CapturedModule. The result is always reported as modified.
    """

    step: Callable[[CapturedModule], CapturedModule]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule)
        return PassResult(self.step(graph_module), True)
