"""The parts that several adapters have at each site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import AdapterError
from ..module import CapturedModule
from ..module.adapted_weight import factors, rank
from ..module.sharded import whole
from ..plan import Entry, Plan


@dataclass(frozen=True)
class Share:
    """One adapter's part at a site: its entry, its weight, and the module that holds A and B."""

    entry: Entry
    weight: float
    module: CapturedModule

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A (…, r, in) and B (…, out, r) as they are added to the base, in float64."""
        held = {name: whole(self.module.get_parameter(name)) for name in self.entry.tensors}
        return factors(self.entry, {name: t.detach().double() for name, t in held.items()})

    @property
    def rank(self) -> int:
        """The rank of these factors."""
        return rank(self.entry)

    @property
    def drawn(self) -> torch.dtype:
        """The dtype of A and B, in which random masks are drawn."""
        return self.module.get_parameter(self.entry.name_a).dtype


def shares_of(
    adapters: Sequence[CapturedModule], plans: Sequence[Plan], weights: Sequence[float]
) -> dict[str, list[Share]]:
    """Return the shares of each site, by its name.

    Raises:
        AdapterError: two adapters adapt one weight differently.
    """
    found: dict[str, list[Share]] = {}
    for module, plan, weight in zip(adapters, plans, weights, strict=True):
        for entry in plan:
            found.setdefault(entry.site, []).append(Share(entry, float(weight), module))
    for name, shares in found.items():
        if len({_place(share.entry) for share in shares}) > 1:
            raise AdapterError(
                f"'{name}' is adapted differently (its names, parts or layout): capture one model, "
                "and match all adapters there."
            )
    return found


def _place(entry: Entry) -> tuple[object, ...]:
    """Return what two entries must have in common for their pairs to be added."""
    return (entry.parameter, entry.names, entry.shape, entry.layout, entry.rows, entry.padding_idx)
