"""Reference values of folded weights for `verify`, in float64 and independent of the graphs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..module import CapturedModule
from ..module.adapted_weight import adapted_weight
from ..module.quantised import dequantised
from ..plan import Entry, scales_outputs


@dataclass(frozen=True)
class Exact:
    """A folded weight in float64, and the largest error that one rounding of a good sum may have.

    Attributes:
        value: the weight, in its shape.
        bound: the bound on the error of each entry.
    """

    value: torch.Tensor
    bound: torch.Tensor


def exact_weight(module: CapturedModule, entries: Sequence[Entry]) -> Exact:
    """Return W0 + s·BA of one weight in float64, for all its entries, with the variants applied.

    The error bound is half the spacing of the dtype's numbers around W, plus
    (2r + 2)·ε'·(|W0| + s·|B||A|), with the machine epsilon ε' of float64, in which a fold sums
    (Higham, Accuracy and Stability, §3.1). Where a variant scales the outputs by g, the second term
    is scaled by g as well, and the error of g itself is added.
    """
    weight = dequantised(module.get_parameter(entries[0].parameter).detach())
    value, error = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for entry in entries:
        tensors = {n: module.get_parameter(n).detach().double() for n in entry.tensors}
        error += torch.finfo(torch.float64).eps * _terms(entry, value, tensors)
        value = adapted_weight(entry, value, tensors)
    return Exact(value, _half_a_step(value.abs() + error, weight.dtype) + error)


def _half_a_step(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest error of rounding numbers of these sizes to a dtype: half their spacing.

    The smallest normal number is added, because some devices flush smaller ones to zero.
    """
    kind = torch.finfo(dtype)
    _, exponent = torch.frexp(size)  # size = m·2^exponent with m in [1/2, 1)
    return torch.ldexp(torch.full_like(size, kind.eps / 2), exponent - 1) + kind.tiny


def _terms(entry: Entry, weight: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the largest error of each entry's sum in units of ε'.

    That is the number of roundings per entry times the sum of the magnitudes that are added. Where
    a variant scales the outputs by g, it is scaled by |g|, and the error of g is added: that of a
    norm over `features` inputs.
    """
    scaled = scales_outputs(entry)
    unscaled = entry.without_gains()
    largest = {name: tensor.abs() for name, tensor in tensors.items()}
    positive = dataclasses.replace(unscaled, scaling=abs(entry.scaling))
    size = (2 * entry.r + 2) * adapted_weight(positive, weight.abs(), largest)
    if not scaled:
        return size
    stack = entry.layout.sizes(entry.adapted_shape)[0]
    outputs = math.prod(stack) * entry.layout.features(entry.adapted_shape)[1]
    features = math.prod(entry.adapted_shape) // outputs
    adapted = adapted_weight(entry, weight, tensors)
    gain = (adapted / adapted_weight(unscaled, weight, tensors)).nan_to_num().abs()
    return size * gain + (features + 4) * adapted.abs()
