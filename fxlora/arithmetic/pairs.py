"""Pairs A, B and the updates BA that they stand for."""

from __future__ import annotations

import torch

from ..lora.layout import Layout, Shape
from ..plan import Entry


def product(entry: Entry, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return BA in the shape of the adapted weight, or of the part's slice of it."""
    layout, shape = entry.layout, entry.adapted_shape
    zero = layout.matrix(a.new_zeros(shape), shape)
    return layout.unmatrix(layout.add_pair(zero, a, b, 1.0, shape), shape)


def singular(
    layout: Layout, update: torch.Tensor, shape: Shape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the reduced SVD U, S, Vᵀ of an update in a weight's shape, as (…, out, in)."""
    matrix = layout.matrix(update, shape)
    outputs_first = matrix.mT if layout.in_first else matrix
    return torch.linalg.svd(outputs_first, full_matrices=False)


def low_rank(
    layout: Layout, update: torch.Tensor, shape: Shape, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A = Vᵀ and B = U·S of the nearest update of rank r (Eckart and Young 1936).

    Returns:
        A and B in the shapes of `Layout.factor_shapes`.
    """
    u, s, vh = singular(layout, update, shape)
    down, up = vh[..., :r, :], u[..., :r] * s[..., None, :r]
    return layout.with_kernels(down, up, shape)
