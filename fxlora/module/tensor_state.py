"""The state of a tensor, where a graph depends on it: its order in memory, its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch


@dataclass(frozen=True)
class Order:
    """How a tensor lies in memory.

    Attributes:
        strides: its strides in elements, or None for those of a contiguous tensor.
        offset: its offset in its storage, or None for any.
        lazy: whether it is still to be conjugated, and to be negated.
    """

    strides: tuple[int, ...] | None
    offset: int | None = None
    lazy: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, tensor: torch.Tensor, offset: bool = False) -> Order | None:
        """Return the order of an example tensor, or None if it depends on symbolic sizes."""
        begin: Any = tensor.storage_offset() if offset else None
        lazy = tensor.is_conj(), tensor.is_neg()
        strides = [_expression(stride) for stride in tensor.stride()]
        if strides == _contiguous([_expression(size) for size in tensor.shape]):
            return cls(None, begin, lazy)
        known = all(isinstance(stride, int) for stride in tensor.stride())
        return cls(tuple(tensor.stride()), begin, lazy) if known else None

    def difference(self, tensor: torch.Tensor) -> str:
        """Describe how a tensor's order differs from this one, or return ""."""
        if tensor.layout is not torch.strided:
            return f"a tensor of layout {tensor.layout}"
        wanted = _contiguous(tensor.shape) if self.strides is None else list(self.strides)
        if list(tensor.stride()) != wanted:
            return f"strides {tuple(tensor.stride())} instead of {tuple(wanted)}"
        if (tensor.is_conj(), tensor.is_neg()) != self.lazy:
            return "a tensor that is a lazy conjugate or negative, or is none"
        if self.offset is not None and tensor.storage_offset() != self.offset:
            return f"storage offset {tensor.storage_offset()} instead of {self.offset}"
        return ""


def _contiguous(sizes: Sequence[Any]) -> list[Any]:
    """Return the strides of a contiguous tensor of these sizes."""
    strides: list[Any] = []
    last: Any = 1
    for size in reversed(sizes):
        strides.insert(0, strides[0] * last if strides else 1)
        last = max(size, 1) if isinstance(size, int) else size
    return strides


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@dataclass(frozen=True)
class Gradient:
    """The autograd state of a tensor.

    Attributes:
        requires_grad: whether it requires a gradient.
        is_leaf: whether it is a leaf.
        is_inference: whether it is of inference mode.
        computed: whether a graph computes it, so that it has no gradient where these are disabled.
    """

    requires_grad: bool
    is_leaf: bool
    is_inference: bool
    computed: bool = False

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Gradient:
        compiling = torch.compiler.is_compiling()  # which cannot ask this
        return cls(tensor.requires_grad, tensor.is_leaf, not compiling and tensor.is_inference())

    def difference(self, tensor: torch.Tensor) -> str:
        """Describe how a tensor differs from this one, or return ""."""
        found = Gradient.of(tensor)
        if self.computed and not (found.requires_grad or torch.is_grad_enabled()):
            return ""
        if self.requires_grad is not found.requires_grad:
            return f"requires_grad {self.requires_grad}, called with {found.requires_grad}"
        if self.is_leaf is not found.is_leaf:
            return f"is_leaf {self.is_leaf}, called with {found.is_leaf}"
        if self.is_inference is not found.is_inference:
            return f"is_inference() {self.is_inference}, called with {found.is_inference}"
        return ""
