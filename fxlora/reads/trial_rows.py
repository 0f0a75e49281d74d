"""Functions of the user's or of a library that compute a product with a quantised weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..lora.ops import OPS, matrix_products
from ..lora.row import Op

_SHAPES = (5, 3, 4)  # rows of the input, inputs, outputs


def row_by_trial(node: fx.Node, weight: fx.Node) -> Op | None:
    """Return the row of the op that a function computes, found by a run; None if it is none.

    The function has no schema (it is an autograd.Function), and takes x and the weight. Run on
    random numbers, its result and its gradient of x must be those of the op.
    """
    if isinstance(node.target, torch._ops.OperatorBase) or list(node.args[1:]) != [weight]:
        return None
    if node.op != "call_function" or node.kwargs or node.args[0] is weight:
        return None
    generator = torch.Generator().manual_seed(0)
    rows, size_i, size_o = _SHAPES
    x = torch.randn(rows, size_i, generator=generator, dtype=torch.float64).requires_grad_()
    for overload in matrix_products():
        row = OPS[overload, 1]
        shape = (size_i, size_o) if row.in_first else (size_o, size_i)
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        if _same(node.target, overload, x, matrix):
            return row
    return None


def _same(function: Any, overload: Any, x: torch.Tensor, matrix: torch.Tensor) -> bool:
    try:
        with torch.enable_grad():
            results = [one(x, matrix) for one in (function, overload)]
            gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in results]
    except Exception:  # noqa: BLE001 - a function raises anything for inputs that it does not take
        return False
    pairs = (results, gradients)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-10) for a, b in pairs)
