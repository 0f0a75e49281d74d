"""Leave out the gradients of frozen weights that a library's op computes all the same.

An op of a library has its backward in Python, which may compute the gradients of all inputs, of a
frozen weight, too. Where a trial shows that, and that the op is its own adjoint,

    y = op(x, W, …),  dx = op(dy, W^T, …)

(products with one matrix, or with a matrix for each group of rows), its call has this backward if
W is frozen: then neither dW is computed nor x saved.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..fx.calls import example_value
from ..fx.marks import ONE_GRADIENT
from .plain import autocast_of, autocast_to, is_plain

_BUILT_IN = ("aten", "prims", "prim", "fxlora")  # whose gradients are computed only where needed


def leave_out_frozen_gradients(graph: fx.Graph) -> None:
    """Replace calls of such ops by calls with a backward for x alone."""
    for node in list(graph.nodes):
        op: Any = node.target
        if not isinstance(op, OpOverload) or op.namespace in _BUILT_IN or node.kwargs:
            continue
        given = [example_value(value) for value in node.args]
        if len(given) not in (2, 3) or any(value is None for value in given):
            continue
        known = [value for value in given if value is not None]
        kinds = tuple((value.ndim, value.dtype.is_floating_point) for value in known)
        if _has_own_adjoint(op, kinds, known[0].dtype, known[-1].dtype):
            node.target = GradientOfInput(op)
            node.meta[ONE_GRADIENT] = str(op)


class GradientOfInput:
    """An op whose backward computes the gradient of its first input, if the second is frozen."""

    def __init__(self, op: OpOverload) -> None:
        self.op = op
        self.__name__ = f"{op.namespace}_{op.overloadpacket.__name__}"  # which torch.fx asks for
        self.__module__ = __name__

    def __call__(self, x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        needed = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
        own = needed and is_plain([x, weight, *others], traced=True)
        if not own or autocast_of(x.device.type) is not None:  # whose casts the op may have, or not
            return self.op(x, weight, *others)
        return _OfInput.apply(self.op, x, weight, *others)


class _OfInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: OpOverload, x: Tensor, weight: Tensor, *others: Tensor) -> Any:
        ctx.op = op
        ctx.save_for_backward(weight, *others)
        return op(x, weight, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, *others = ctx.saved_tensors
        with autocast_to(weight.device.type, None):  # as the forward ran
            of_x = ctx.op(grads[0], weight.transpose(-2, -1), *others)
        return None, of_x, None, *[None] * len(others)


# ---- the trial ----------------------------------------------------------------------------------

_MATRIX, _GROUPS = (2, True), (3, True)  # dimensions, and whether the entries are real numbers
_ENDS = (1, False)


@functools.cache
def _has_own_adjoint(
    op: OpOverload, kinds: tuple[tuple[int, bool], ...], dtype: torch.dtype, of_last: torch.dtype
) -> bool:
    """Whether runs show that an op is its own adjoint, and computes gradients that none needs.

    An op that does not take the numbers of the trial stays as it is. Exact numbers come first; then
    those of its own dtype, in which it may compute something else.
    """
    if kinds not in ((_MATRIX, _MATRIX), (_MATRIX, _GROUPS, _ENDS)):
        return False
    return all(
        _is_own_adjoint(op, kinds, of_last, last, tried)
        for tried in dict.fromkeys((torch.float64, dtype))
        for last in (9, 7)  # the last rows may belong to no group
    )


def _is_own_adjoint(
    op: OpOverload, kinds: Any, of_last: torch.dtype, last: int, dtype: torch.dtype
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, others, size = _stand_ins(kinds, of_last, last, random)
    try:
        with torch.enable_grad(), _Shapes() as seen:
            y = op(x.requires_grad_(), weight, *others)
            seen.shapes.clear()
            gradient = random(*size)
            (of_x,) = torch.autograd.grad(y, x, gradient)
            computed = weight.shape in seen.shapes
            adjoint = op(gradient, weight.transpose(-2, -1), *others)
    except Exception:  # noqa: BLE001 - an op raises anything for inputs that it does not take
        return False
    if not (computed and adjoint.dtype == of_x.dtype and adjoint.shape == of_x.shape):
        return False
    # Two roundings of sums of 5 products. Nothing else than rounding may make a difference.
    allowed = max(16 * torch.finfo(dtype).eps, 1e-12) * float(of_x.abs().max())
    return bool(of_x.any()) and float((of_x - adjoint).abs().max()) <= allowed


def _stand_ins(kinds: Any, dtype: torch.dtype, last: int, random: Any) -> Any:
    """Return x, W, the other inputs and the shape of the result; no two sizes are equal."""
    if len(kinds) == 2:
        return random(7, 3), random(3, 5), (), (7, 5)
    ends = torch.tensor([2, 2, 6, last], dtype=dtype)  # the second group is empty
    return random(9, 3), random(4, 3, 5), (ends,), (9, 5)


class _Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.shapes |= {t.shape for t in pytree.tree_leaves(result) if isinstance(t, Tensor)}
        return result
