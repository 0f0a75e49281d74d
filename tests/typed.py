"""Values with the types that they have in tests, where an annotation leaves more open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hypothesis import HealthCheck, settings
from torch import nn

import fxlora

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """torch.autograd.Function, whose `backward` torch declares with *args only."""

        backward: Any

    class OpenModule(nn.Module):
        """nn.Module, whose attributes torch declares to be tensors and modules."""

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

else:
    Function, OpenModule = torch.autograd.Function, nn.Module


def plan_of(module: fxlora.CapturedModule) -> fxlora.Plan:
    """Return the plan of a module that has adapters."""
    assert module.plan is not None
    return module.plan


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a tensor that has one."""
    assert tensor.grad is not None
    return tensor.grad


def untyped(value: object) -> Any:
    """Return the value, for a call that does not declare its type.

    Either the test is that the call refuses it, or the call takes more than torch declares.
    """
    return value


def examples(count: int) -> settings:
    """Return hypothesis' settings for so many examples, however long each takes."""
    checks: Any = list(HealthCheck)  # its metaclass declares no type of item
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook. As a lambda, pyright would take it for one that is given kwargs, too."""
    return output * 2
