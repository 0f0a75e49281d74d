"""What a folded weight must be: the reference of `verify`, in float64 and apart from the graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..module import CapturedModule
from ..passes.adapted_weight import adapted_weight
from ..plan import Entry, scales_outputs


@dataclass(frozen=True)
class Exact:
    """A folded weight in float64, and how far one rounding of a good sum may be from it."""

    value: torch.Tensor
    bound: torch.Tensor


def exact_weight(module: CapturedModule, entries: Sequence[Entry]) -> Exact:
    """W0 + s·BA, and what variants make of it, of the entries of one weight.

    The bound is half the distance of the dtype's numbers around W, and with the ε' of the type
    that products accumulate in (2r + 2)·ε'·(|W0| + s·|B||A|) (Higham, Accuracy and Stability,
    §3.1); where a variant scales the outputs by g, that is scaled with them and g's own error is
    added.
    """
    weight = module.get_parameter(entries[0].parameter).detach()
    accumulator = torch.float64 if weight.dtype == torch.float64 else torch.float32
    value, error = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for entry in entries:
        tensors = {n: module.get_parameter(n).detach().double() for n in entry.tensors}
        error += torch.finfo(accumulator).eps * _terms(entry, value, tensors)
        value = adapted_weight(entry, value, tensors)
    return Exact(value, _half_a_step(value.abs() + error, weight.dtype) + error)


def _half_a_step(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding to a dtype may be off by, at numbers of a size: half of the step there.

    Below the smallest normal number it is all of that: some devices round to zero there.
    """
    kind = torch.finfo(dtype)
    _, exponent = torch.frexp(size)  # size = m·2^exponent with m in [1/2, 1)
    return torch.ldexp(torch.full_like(size, kind.eps / 2), exponent - 1) + kind.tiny


def _terms(entry: Entry, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many ε' of each entry the sums may be off by: what is summed, times how much of it."""
    scaled = scales_outputs(entry)
    unscaled = entry.without_gains()
    largest = {name: tensor.abs() for name, tensor in tensors.items()}
    size = (2 * entry.r + 2) * adapted_weight(unscaled, weight.abs(), largest)
    if not scaled:
        return size
    stack = entry.layout.sizes(entry.covered)[0]
    outputs = math.prod(stack) * entry.layout.features(entry.covered)[1]
    features = math.prod(entry.covered) // outputs
    adapted = adapted_weight(entry, weight, tensors)
    gain = (adapted / adapted_weight(unscaled, weight, tensors)).nan_to_num().abs()
    return size * gain + (features + 4) * adapted.abs()
