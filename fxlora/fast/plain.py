"""Where an autograd.Function of ours stands for the formula that it computes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - typed nowhere

_PLAIN = (Tensor, torch.nn.Parameter)
_TRACED = (*_PLAIN, FakeTensor, FunctionalTensor)


def is_plain(tensors: Sequence[Tensor], traced: bool = False) -> bool:
    """Whether a gradient of our own holds for these tensors.

    It does not, or is not known to, for tensor subclasses and other layouts, and where functorch
    or forward-mode AD asks for more than a gradient.

    Args:
        tensors: the tensors.
        traced: whether it also holds for those of torch's tracers.
    """
    kinds = _TRACED if traced else _PLAIN
    return (
        all(type(tensor) in kinds and tensor.layout is torch.strided for tensor in tensors)
        and not any(map(_is_batched, tensors))
        and _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _is_batched(tensor: Tensor) -> bool:
    """Whether a transform of functorch, or torch.autograd's batched gradients, wraps a tensor."""
    legacy = _functorch.is_legacy_batchedtensor(tensor)
    return legacy or _functorch.maybe_get_level(tensor) > -1


def autocast_to(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context with this autocast, or with none; also for devices that have none."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def autocast_of(device: str) -> torch.dtype | None:
    """Return the dtype of the caller's autocast, or None."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
