"""Merges of task tensors: several tensors of one shape, with a weight for each, become one.

    linear            Σ wᵢ·tᵢ                          (Ilharco et al. 2022, task arithmetic, §2)
    magnitude_prune   Σ wᵢ·top(tᵢ)
    dare_linear       Σ wᵢ·drop(tᵢ)                    (Yu et al. 2023, DARE, eq. 2)
    ties              mean of wᵢ·top(tᵢ) over the i that have the elected sign
                                                       (Yadav et al. 2023, TIES, alg. 1)
    dare_ties         the same of wᵢ·drop(tᵢ)

where top keeps the share `density` of entries that are largest in absolute value, and drop keeps
each entry with the probability `density` and divides it by `density`. As in PEFT, the signs are
elected before the weights are applied, and a sum of zero elects the sign +.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Pruning:
    """How task tensors lose entries before they are merged.

    Attributes:
        density: the share of entries to keep, in [0, 1].
        drawn: the dtype in which random masks are drawn, which their values depend on.
        generator: draws them; None for torch's own.
    """

    density: float = 1.0
    drawn: torch.dtype = torch.float32
    generator: torch.Generator | None = None

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep the entries that are largest in absolute value."""
        if self.density >= 1:
            return tensor
        flat = tensor.abs().reshape(-1)
        kept = torch.topk(flat, int(self.density * flat.numel())).indices
        mask = torch.zeros_like(flat).index_fill_(0, kept, 1)
        return tensor * mask.reshape(tensor.shape)

    def dropped(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep entries at random, and divide them by the density."""
        if self.density >= 1:
            return tensor
        chances = torch.full_like(tensor, self.density, dtype=self.drawn)
        return tensor * torch.bernoulli(chances, generator=self.generator) / self.density


def _sum(tensors: Tensors, weights: Sequence[float]) -> torch.Tensor:
    return torch.stack([t * w for t, w in zip(tensors, weights, strict=True)]).sum(0)


def _mean_of_elected(
    tensors: Tensors, weights: Sequence[float], by_count: bool = False
) -> torch.Tensor:
    """Return the mean of the weighted entries whose sign is that of most, by sum or by count."""
    signs = torch.stack([t.sign() for t in tensors])
    votes = signs.sum(0) if by_count else torch.stack(list(tensors)).sum(0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    weighted = torch.stack([t * w for t, w in zip(tensors, weights, strict=True)])
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


@dataclass(frozen=True)
class Merge:
    """A row of the table.

    Attributes:
        prunes: the method of `Pruning` that is applied to each task tensor, or None.
        elects: whether signs are elected.
    """

    prunes: Callable[[Pruning, torch.Tensor], torch.Tensor] | None = None
    elects: bool = False

    def __call__(
        self, tensors: Tensors, weights: Sequence[float], pruning: Pruning, by_count: bool
    ) -> torch.Tensor:
        """Return the merged tensor.

        Args:
            tensors: the task tensors, of one shape.
            weights: a weight for each.
            pruning: how they lose entries.
            by_count: elect signs by the number of tensors that have them, not by their sum.
        """
        if self.prunes is not None:
            tensors = [self.prunes(pruning, tensor) for tensor in tensors]
        return (
            _mean_of_elected(tensors, weights, by_count) if self.elects else _sum(tensors, weights)
        )


MERGES = {
    "linear": Merge(),
    "magnitude_prune": Merge(Pruning.largest),
    "dare_linear": Merge(Pruning.dropped),
    "ties": Merge(Pruning.largest, elects=True),
    "dare_ties": Merge(Pruning.dropped, elects=True),
}
