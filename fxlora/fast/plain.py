"""Where an autograd.Function of ours stands for the formula that it computes."""

from __future__ import annotations

from collections.abc import Sequence
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
        and not any(_functorch.maybe_get_level(tensor) > -1 for tensor in tensors)
        and _functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )
