"""What is measured of a weight while it is folded.

The error budget: how much of an update survives the rounding to the weight's dtype; and hashes of
W0, which tell whether the adapter was trained over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ...lora.dtypes import correctly_rounded

_SHARE = 8  # of the rows of each measured block, one in so many: all would double the time


@dataclass
class Budget:
    """Sums over some of a weight's rows: a 32nd, in blocks, and eight at least.

    With d the exact update (in float64) and e the rounding's error, folded = W0 + d + e.

    Attributes:
        error: the largest |e|.
        update: the largest |d|.
        kept: ⟨d + e, d⟩.
        square: ‖d‖².
        overflows: whether an entry is not finite where the weight's is.
        hashes: the row hashes of W0, in the order of its pieces.
    """

    error: float = 0.0
    update: float = 0.0
    kept: float = 0.0
    square: float = 0.0
    overflows: bool = False
    hashes: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    def observe(self, weight: torch.Tensor, exact: torch.Tensor, _: object = None) -> None:
        """Take account of a block: W0, and the sum in float64."""
        weight, exact = (tensor.flatten(0, -2) for tensor in (weight, exact))
        rows = max(8, len(exact) // _SHARE)
        weight, exact = weight[:rows], exact[:rows]
        update = exact - weight.to(torch.float64)
        error = correctly_rounded(exact, weight.dtype).to(torch.float64) - exact
        self.error = max(self.error, _largest(error))
        self.update = max(self.update, _largest(update))
        square = float(update.square().sum())
        self.kept += square + float(error.mul_(update).sum())
        self.square += square

    def add(self, other: Budget) -> None:
        """Take account of the blocks of another piece of the weight."""
        self.error, self.update = max(self.error, other.error), max(self.update, other.update)
        self.kept, self.square = self.kept + other.kept, self.square + other.square
        self.overflows |= other.overflows
        self.hashes += other.hashes

    @property
    def relative_error(self) -> float:
        """The largest rounding error, relative to the largest entry of the update."""
        return self.error / self.update if self.update else 0.0

    @property
    def survives(self) -> float:
        """The share of the update that the rounded weight has: ⟨folded - W0, d⟩ / ‖d‖²."""
        return self.kept / self.square if self.square else 1.0


def _largest(tensor: torch.Tensor) -> float:
    return max((abs(float(bound)) for bound in tensor.aminmax()), default=math.nan)
