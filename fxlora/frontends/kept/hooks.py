"""Hooks on the backward, of modules and of tensors: refused.

Hooks on the forward are captured with it: torch.export calls every module as Python does.
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
    """Raise where a module has hooks on its backward, which no graph of its forward shows."""
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"{type(model).__name__}: '{path or 'the model itself'}' has backward hooks, which "
                "are no part of a graph: gradients that they change would silently differ. Remove "
                "them for the capture."
            )


@contextmanager
def no_tensor_hooks() -> Generator[None]:
    """Refuse hooks that a forward puts on tensors."""
    with patched(torch.Tensor, **{name: _refusal(name) for name in _TENSOR_HOOKS}):
        yield


_TENSOR_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


def _refusal(name: str) -> Any:
    def refuse(self: torch.Tensor, hook: Any) -> Any:
        raise CaptureError(
            f"the forward calls {name} on a tensor at {called_at()}, which is no part of a graph: "
            "gradients that the hook changes would silently differ. Write it as a "
            "torch.autograd.Function (those are kept), or leave it out for the capture."
        )

    return refuse
