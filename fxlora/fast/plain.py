"""Where an autograd.Function of ours stands for the formula that it computes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
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
    if _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    legacy, level = _functorch.is_legacy_batchedtensor, _functorch.maybe_get_level
    for tensor in tensors:  # spelled out, because the calls for one token wait for it
        kind = type(tensor)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            known = _has_no_code(kind) or (traced and kind in _TRACED)
            if not known:
                return False
        # a transform of functorch, or torch.autograd's batched gradients, may wrap a tensor
        if tensor.layout is not _STRIDED or legacy(tensor) or level(tensor) > -1:
            return False
    return True


_STRIDED = torch.strided


def _has_no_code(kind: type[Tensor]) -> bool:
    """Whether a subclass leaves tensors to torch's kernels, without code of its own."""
    return issubclass(kind, torch.nn.Parameter) and kind.__torch_function__ in _NO_CODE


_NO_CODE: Any = (Tensor.__torch_function__, torch.nn.Parameter.__torch_function__)


def autocast_to(device: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context with this autocast, or with none; also for devices that have none."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    if dtype is None and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)


def autocast_of(device: str) -> torch.dtype | None:
    """Return the dtype of the caller's autocast, or None."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@contextmanager
def outside_of_transforms() -> Generator[None]:
    """Leave the transforms of functorch and batches of gradients, for tensors that none wraps."""
    batches: Any = torch._C
    levels = batches._vmapmode_increment_nesting()
    for _ in range(levels):
        batches._vmapmode_decrement_nesting()
    try:
        with ExitStack() as stack:
            while _functorch.peek_interpreter_stack() is not None:
                stack.enter_context(temporarily_pop_interpreter_stack())
            yield
    finally:
        for _ in range(levels - 1):
            batches._vmapmode_increment_nesting()
