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

_TRACED = (FakeTensor, FunctionalTensor)


def is_plain(tensors: Sequence[Tensor], traced: bool = False) -> bool:
    """Whether a gradient of our own holds for these tensors.

    It does not, or is not known to, for tensor subclasses and other layouts, and where functorch
    or forward-mode AD asks for more than a gradient.

    Args:
        tensors: the tensors.
        traced: whether it also holds for those of torch's tracers.
    """
    kinds = _TRACED if traced else ()
    return (
        all(_is_dense(t) or (type(t) in kinds and t.layout is torch.strided) for t in tensors)
        and not any(map(_is_batched, tensors))
        and _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether torch's kernels take a tensor as it is: a strided one, without code of a subclass."""
    kind = type(tensor)
    plain = kind is Tensor or issubclass(kind, torch.nn.Parameter)
    return plain and kind.__torch_function__ in _NO_CODE and tensor.layout is torch.strided


_NO_CODE: Any = (Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)


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
