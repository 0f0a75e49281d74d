"""The combination types: how the pairs of several adapters at a site become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import is_finite, is_whole
from ..errors import AdapterError, ConfigError
from ..names import shown
from .merges import MERGES, Merge, Pruning
from .pairs import low_rank, product
from .shares import Share

Pair = tuple[torch.Tensor, torch.Tensor]

_OTHERS = tuple(name for name in MERGES if name != "linear")
TYPES = ("svd", "linear", "cat", *_OTHERS, *(f"{name}_svd" for name in _OTHERS))


@dataclass(frozen=True)
class Combination:
    """How adapters are combined: the arguments of `combine`, and the pairs that they give."""

    type: str
    svd_rank: int | None
    svd_clamp: float | None
    density: float | None
    majority_sign_method: str
    generator: torch.Generator | None

    @property
    def by_svd(self) -> bool:
        return self.type.endswith("svd")

    @property
    def merge(self) -> Merge:
        """The row of the table of merges; none for "cat"."""
        return MERGES.get(self.type.removesuffix("svd").removesuffix("_"), MERGES["linear"])

    def check(self) -> None:
        """Raise ConfigError for an option that is invalid, missing or without effect."""
        if self.type not in TYPES:
            raise ConfigError(
                f"combination_type must be one of {', '.join(TYPES)}, not {shown(self.type)}."
            )
        rank, clamp, density = self.svd_rank, self.svd_clamp, self.density
        if rank is not None and not (self.by_svd and is_whole(rank, 1, 2**20)):
            raise ConfigError(
                f"svd_rank must be an integer ≥ 1, for a type with svd, not {shown(rank)}."
            )
        if clamp is not None and not (self.by_svd and is_finite(clamp) and 0 <= clamp <= 1):
            raise ConfigError(
                f"svd_clamp must be in [0, 1], for a type with svd, not {shown(clamp)}."
            )
        if self.majority_sign_method not in ("total", "frequency"):
            raise ConfigError(
                'majority_sign_method must be "total" or "frequency", not '
                f"{shown(self.majority_sign_method)}."
            )
        if not isinstance(self.generator, torch.Generator | None):
            raise ConfigError(f"generator must be a torch.Generator: {shown(self.generator)}.")
        prunes = self.merge.prunes
        if density is None and prunes:
            raise ConfigError(f"{self.type} needs density=, the share of entries to keep.")
        if density is not None and not prunes:
            raise ConfigError(f"density has no effect on {self.type}: leave it out.")
        least = 0.0 if prunes is Pruning.largest else math.ulp(0.0)  # dare divides by it
        if density is not None and not (is_finite(density) and least <= density <= 1):
            raise ConfigError(f"density must be in [0, 1] (dare: above 0), not {shown(density)}.")

    # ---- pairs ----------------------------------------------------------------------------------

    def pair(self, shares: Sequence[Share], largest: int) -> Pair:
        """Return the combined A and B of a site, in float64.

        Args:
            shares: the adapters' parts at the site.
            largest: the largest rank of any adapter, which an SVD is cut to by default.
        """
        if self.type == "cat":
            return self._concatenated(shares)
        if not self.by_svd:
            return self._merged(shares)
        return self._by_svd(shares, self.svd_rank or largest)

    def _concatenated(self, shares: Sequence[Share]) -> Pair:
        pairs = [share.factors() for share in shares]
        dim_a, dim_b = shares[0].entry.layout.rank_dims
        scaled = [
            a * (share.weight * share.entry.scaling)
            for share, (a, _) in zip(shares, pairs, strict=True)
        ]
        return torch.cat(scaled, dim_a), torch.cat([b for _, b in pairs], dim_b)

    def _merged(self, shares: Sequence[Share]) -> Pair:
        pairs = [share.factors() for share in shares]
        if len({a.shape for a, _ in pairs}) > 1:
            ranks = sorted({a.shape[shares[0].entry.layout.rank_dims[0]] for a, _ in pairs})
            raise AdapterError(
                f"'{shares[0].entry.site}' has the ranks {', '.join(map(str, ranks))}, and "
                f'"{self.type}" adds A to A: take "cat", or a type with svd.'
            )
        strengths = [share.weight * share.entry.scaling for share in shares]
        roots = [math.sqrt(abs(s)) for s in strengths]
        signed = [math.copysign(root, s) for root, s in zip(roots, strengths, strict=True)]
        downs, ups = [a for a, _ in pairs], [b for _, b in pairs]
        return self._merge(downs, signed, shares), self._merge(ups, roots, shares)

    def _by_svd(self, shares: Sequence[Share], rank: int) -> Pair:
        entry = shares[0].entry
        layout, shape = entry.layout, entry.adapted_shape
        updates = [share.entry.scaling * product(entry, *share.factors()) for share in shares]
        update = self._merge(updates, [share.weight for share in shares], shares)
        pair = low_rank(layout, update, shape, min(rank, layout.max_rank(shape)))
        return self._clamped(*pair) if self.svd_clamp is not None else pair

    def _merge(
        self, tensors: Sequence[torch.Tensor], weights: Sequence[float], shares: Sequence[Share]
    ) -> torch.Tensor:
        density = 1.0 if self.density is None else self.density
        pruning = Pruning(density, shares[0].drawn, self.generator)
        by_count = self.majority_sign_method == "frequency"
        return self.merge(tensors, weights, pruning, by_count)

    def _clamped(self, a: torch.Tensor, b: torch.Tensor) -> Pair:
        values = torch.cat([b.flatten(), a.flatten()]).sort().values
        assert self.svd_clamp is not None
        place = self.svd_clamp * (len(values) - 1)  # as torch.quantile, for any size
        low, high = values[math.floor(place)], values[math.ceil(place)]
        limit = float(torch.lerp(low, high, place - math.floor(place)))
        return a.clamp(-limit, limit), b.clamp(-limit, limit)
