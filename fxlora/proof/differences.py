"""The difference of two tensors, relative to each number's size, and whether it is of rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST = 2**20  # numbers that the usual size is estimated of
# Numbers this many times as large as the smallest hundredth stand for something else, as those of a
# mask do. The largest of a million normal numbers is about 400 times that hundredth.
_FAR = 1e3

# How many times as large as a module's own error that of another order of the same sums may be, as
# the root of the mean square of n numbers: it is no larger but for chance, which few numbers have.
_LARGER, _CHANCE = 2.0, 8.0  # _LARGER + _CHANCE / √n
_OF_LARGEST = 2.0  # and this many times that for the largest error


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


def only_rounds(
    found: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor]
) -> bool:
    """Whether the errors of one output are about as large as the module's own.

    Args:
        found: the output in several calls.
        expected: the module's own.
        exact: the same in a wider dtype.
    """
    if any(t.is_complex() is not e.is_complex() for t, e in zip(found, exact, strict=True)):
        return False
    theirs, ours = (
        torch.cat([relative_errors(one, known) for one, known in zip(of, exact, strict=True)])
        for of in (found, expected)
    )
    factor = _LARGER + _CHANCE / math.sqrt(max(1, ours.numel()))
    mean = _mean(ours)
    small = _mean(theirs) <= factor * mean < math.inf
    return small and largest(theirs) <= _OF_LARGEST * factor * largest(ours)


def _mean(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt()) if errors.numel() else 0.0


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
