"""Refuse backward hooks of modules and of tensors.

Forward hooks are captured with the forward: torch.export calls every module through `__call__`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import CaptureError
from ..places import called_at
from .patches import patched


def refuse_backward_hooks(model: nn.Module) -> None:
    """Raise if a module has backward hooks, which the graph of its forward does not include."""
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"{type(model).__name__}: '{path or 'the model itself'}' has backward hooks, which "
                "a graph does not include: gradients that they change would silently differ. "
                "Remove them for the capture."
            )


@contextmanager
def no_tensor_hooks() -> Generator[None]:
    """Within the context, raise if a forward registers a hook on a tensor."""
    with patched(torch.Tensor, **{name: _refusal(name) for name in _TENSOR_HOOKS}):
        yield


_TENSOR_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


def _refusal(name: str) -> Any:
    """Return a replacement for a method of Tensor that registers a hook: it raises."""

    def refuse(self: torch.Tensor, hook: Any) -> Any:
        raise CaptureError(
            f"the forward calls {name} on a tensor at {called_at()}, but a graph does not include "
            "hooks: gradients that this one changes would silently differ. Write it as a "
            "torch.autograd.Function (those are kept), or leave it out for the capture."
        )

    return refuse
