"""What a folded weight must be: the reference of `verify`, in float64 and apart from the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .module import CapturedModule
from .plan import Entry


@dataclass(frozen=True)
class Exact:
    """A folded weight in float64, and how far one rounding of a good sum may be from it."""

    value: torch.Tensor
    bound: torch.Tensor


def exact_weight(module: CapturedModule, entries: Sequence[Entry]) -> Exact:
    """W0 + s·BA of the entries of one weight.

    The bound, in the dtype's ε and the ε' of the type that products accumulate in, is
    ε/2·|W| + (r + 2)·ε'·(|W0| + s·|B||A|) (Higham, Accuracy and Stability, §3.1).
    """
    weight = module.get_parameter(entries[0].parameter).detach()
    value, size = weight.double(), weight.double().abs()
    for entry in entries:
        a, b = (module.get_parameter(n).detach().double() for n in (entry.name_a, entry.name_b))
        value = value + entry.scaling * _product(entry, a, b)
        size = size + abs(entry.scaling) * _product(entry, a.abs(), b.abs())
    accumulator = torch.float64 if weight.dtype == torch.float64 else torch.float32
    bound = torch.finfo(weight.dtype).eps / 2 * value.abs() + torch.finfo(weight.dtype).tiny
    terms = sum(entry.r for entry in entries) + 2
    return Exact(value, bound + terms * torch.finfo(accumulator).eps * size)


def _product(entry: Entry, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """BA in the weight's shape."""
    product = b.flatten(1) @ a.flatten(1)
    return (product.T if entry.in_first else product).reshape(entry.shape)
