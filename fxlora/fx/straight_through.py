"""Values that are rounded, with the gradient of what they were rounded from.

The derivative of rounding is zero almost everywhere. The straight-through estimator (Bengio et al.
2013, arXiv:1308.3432, section 3) takes it as one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return the rounded values, whose gradients pass to the exact ones."""
    if not (torch.is_grad_enabled() and exact.requires_grad):
        return rounded
    result: Any = _StraightThrough.apply(exact, rounded.detach())
    return result


class Rounding:
    """A node's target that rounds a tensor by a graph of its own, straight-through."""

    writes_nothing = True
    __name__ = __qualname__ = "rounded"

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def __call__(self, x: torch.Tensor, *constants: torch.Tensor) -> torch.Tensor:
        return straight_through(x, self.module(x, *constants))

    def __repr__(self) -> str:
        return f"rounded by {self.module.code.strip()!r}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rounding) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Rounding:
        return self
