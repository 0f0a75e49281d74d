"""Pass: a rewrite of graphs, as a function from a captured module to a new one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import InjectError
from ..module import CapturedModule
from ..module.state import State


class Pass(ABC):
    """A rewrite of a captured module; the module that it is called with stays as it is.

    A subclass says in `check` what it needs, and in `rewrite` what it does to a module of its
    own: it edits the graphs and the tree in place, and returns what is known of the module then.
    """

    def check(self, module: CapturedModule) -> None:  # noqa: B027
        """Raise InjectError for a module that the pass cannot take."""

    @abstractmethod
    def rewrite(self, module: CapturedModule) -> State:
        """Edit the graphs and tensors of a module in place, and return its new state."""

    def apply(self, module: CapturedModule) -> None:
        """Check a module, and rewrite it in place."""
        self.check(module)
        module.known = self.rewrite(module)
        module.refresh()

    def __call__(self, module: CapturedModule) -> CapturedModule:
        if not isinstance(module, CapturedModule):
            raise InjectError(
                f"expected a captured module, not {type(module).__name__}: "
                "fxlora.capture(model, args) makes one."
            )
        result = module.derive()
        self.apply(result)
        return result


@dataclass(frozen=True)
class Chain(Pass):
    """Passes in a row, on one copy of the graphs."""

    passes: tuple[Pass, ...]

    def rewrite(self, module: CapturedModule) -> State:
        for step in self.passes:
            step.apply(module)
        return module.known


@dataclass(frozen=True)
class as_pass(PassBase):
    """A pass for torch.fx's PassManager, which takes and returns any GraphModule."""

    step: Callable[[CapturedModule], CapturedModule]

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule)
        return PassResult(self.step(graph_module), True)
