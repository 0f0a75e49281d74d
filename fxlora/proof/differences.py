"""The difference of two tensors, relative to each number's size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST = 2**20  # numbers that the usual size is estimated of
# Numbers this many times as large as the smallest hundredth stand for something else, as those of a
# mask do. The largest of a million normal numbers is about 400 times that hundredth.
_FAR = 1e3


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return |found - expected| of each number, relative to its size, in float64 on the CPU.

    The size is that of the number expected, or the usual one of its tensor if that is larger: one
    number, such as a mask's minimum, says nothing about the error of the others. The error is inf
    where one is not finite and the other is not the same.
    """
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to("cpu", kind).flatten(), expected.detach().to("cpu", kind).flatten()
    finite = torch.isfinite(b)
    same = torch.where(finite, torch.isfinite(a), (a == b) | (torch.isnan(a) & torch.isnan(b)))
    if not bool(same.all()):
        return torch.full((max(1, a.numel()),), math.inf, dtype=torch.float64)
    a, b = a[finite], b[finite]
    scale = max(_usual_size(b.abs()), torch.finfo(expected.dtype).tiny)
    return (a - b).abs() / b.abs().clamp_min(scale)


def largest(errors: Tensor) -> float:
    """Return the largest error; 0 of none."""
    return float(errors.max()) if errors.numel() else 0.0


def _usual_size(sizes: Tensor) -> float:
    """Return the median of the sizes that occur, each once, but zero and those far above others.

    Fill values are one size; there may be more of a mask's numbers than of others.
    """
    step = -(-sizes.numel() // _MOST) or 1
    occurring = sizes[::step].unique()
    occurring = occurring[occurring > 0]
    if not occurring.numel():
        return float(sizes.max()) if sizes.numel() else 0.0
    count = len(occurring)
    small = occurring[max(count // 100, min(2, count // 8))]
    near = occurring[occurring <= _FAR * small]
    return float(near.median())
