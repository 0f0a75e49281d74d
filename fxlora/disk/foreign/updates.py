"""Updates: what a file says of one weight, in the one form that all formats are brought into.

A pair is down (r, in) and up (out, r), with ΔW = up·down as a matrix (out, in), where kernel
dimensions are flattened into in. Products of low rank stay pairs:

    Hadamard   (u₁d₁) ∘ (u₂d₂) = (u₁ ⊙ u₂)(d₁ ⊙ d₂), ⊙ by rows and by columns: rank r₁·r₂
    Kronecker  (u₁d₁) ⊗ (u₂d₂) = (u₁ ⊗ u₂)(d₁ ⊗ d₂): rank r₁·r₂

A matrix that is no product is the pair of itself and the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # down (r, in), up (out, r)


@dataclass(frozen=True)
class Update:
    """W0 + s·BA of one weight, in float64 where it was computed.

    Attributes:
        pairs: one pair for the whole weight, or one for each enabled part of it.
        scaling: s.
        magnitude: DoRA's m (out,), or None.
        enable: which of the equal parts of the outputs have a pair; None for the whole weight.
        note: how the pair was made, if the file does not hold it.
    """

    pairs: tuple[Pair, ...]
    scaling: float
    magnitude: torch.Tensor | None = None
    enable: tuple[bool, ...] | None = None
    note: str = ""


def matrix_pair(matrix: torch.Tensor) -> Pair:
    """Return the smaller pair of a matrix (out, in) and an identity."""
    out, size = matrix.shape
    if out <= size:
        return matrix, torch.eye(out, dtype=matrix.dtype)
    return torch.eye(size, dtype=matrix.dtype), matrix


def matrix_of(pair: Pair) -> torch.Tensor:
    down, up = pair
    return up @ down  # (out, r) @ (r, in)


def shortened(pair: Pair) -> Pair:
    """Return the pair, or that of its product where the rank is no lower than the product's."""
    down, up = pair
    full = min(down.shape[1], up.shape[0])
    return pair if down.shape[0] < full else matrix_pair(matrix_of(pair))


def hadamard(one: Pair, other: Pair) -> Pair:
    """Return a pair of the elementwise product of two pairs' matrices."""
    down = one[0].unsqueeze(1) * other[0].unsqueeze(0)  # (r1, r2, in)
    up = one[1].unsqueeze(2) * other[1].unsqueeze(1)  # (out, r1, r2)
    return down.flatten(0, 1), up.flatten(1, 2)


def kronecker(one: Pair, other: Pair) -> Pair:
    """Return a pair of the Kronecker product of two pairs' matrices."""
    (down, up), (below, above) = one, other
    return torch.kron(down, below.contiguous()), torch.kron(up, above.contiguous())


def tucker(core: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return Σ core[i, j, …]·up[:, i]·down[j, :] as a matrix (out, in·kernel).

    Args:
        core: (r, r, *kernel).
        up: (out, r).
        down: (r, in).
    """
    found = torch.einsum("ij...,pi,jq->pq...", core, up, down)
    return found.flatten(1)
