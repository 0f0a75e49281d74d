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
# A module whose own errors are larger, as the root of the mean square and the largest of all, over
# the error that is allowed in any case, has numbers that rounding decides (a choice of the largest,
# a step): what these are in a file says nothing about the others.
_MOST_OF_ITS_OWN = 1.0, 16.0
_SHARES = (
    0.5,
    0.9,
    0.99,
)  # of the numbers, each of which has no larger errors than a few of its own


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
    found: Sequence[Tensor],
    expected: Sequence[Tensor],
    exact: Sequence[Tensor],
    allowed: float,
) -> bool:
    """Whether the errors of one output are about as large as the module's own.

    Args:
        found: the output in several calls.
        expected: the module's own.
        exact: the same in a wider dtype.
        allowed: the relative error of a number that is allowed in any case.
    """
    if any(t.is_complex() is not e.is_complex() for t, e in zip(found, exact, strict=True)):
        return False
    theirs, ours = (
        torch.cat([relative_errors(one, known) for one, known in zip(of, exact, strict=True)])
        for of in (found, expected)
    )
    factor = _LARGER + _CHANCE / math.sqrt(max(1, ours.numel()))
    mean = _mean(ours)
    most_of_mean, most = (times * allowed for times in _MOST_OF_ITS_OWN)
    if mean > most_of_mean or largest(ours) > most or _mean(theirs) > factor * mean:
        return False
    eps = max(torch.finfo(tensor.dtype).eps for tensor in expected)
    pairs = zip(_at_shares(theirs), _at_shares(ours), strict=True)
    if any(their > factor * our + eps for their, our in pairs):
        return False
    return largest(theirs) <= _OF_LARGEST * factor * largest(ours)


def _at_shares(errors: Tensor) -> list[float]:
    """Return the errors that these shares of all are no larger than."""
    ordered = errors.sort().values
    return [float(ordered[int(share * (len(ordered) - 1))]) for share in _SHARES if len(ordered)]


def _mean(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt()) if errors.numel() else 0.0


def _usual_size(sizes: Tensor) -> float:
    """Return the median of the sizes that occur, each once, but zero and those far above others.

    Fill values are one size; there may be more of a mask's numbers than of others.
    """
    if sizes.numel() > _MOST:  # at random: every second number may be one column
        generator = torch.Generator().manual_seed(0)
        sizes = sizes[torch.randint(sizes.numel(), (_MOST,), generator=generator)]
    occurring = sizes.unique()
    occurring = occurring[occurring > 0]
    if not occurring.numel():
        return float(sizes.max()) if sizes.numel() else 0.0
    count = len(occurring)
    small = occurring[max(count // 100, min(2, count // 8))]
    near = occurring[occurring <= _FAR * small]
    return float(near.median())
