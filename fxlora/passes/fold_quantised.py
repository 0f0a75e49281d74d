"""The fold of quantised weights: to their values plus s·BA, as plain weights or quantised anew.

A quantised weight lies on a grid. Rounding W + d to a grid loses every entry of d below half a
step, so that a fold may lose what was trained. **Retention** tells how much is left:
⟨Q(W + d) - Q(W), d⟩ / ‖d‖², which is 1 if Q keeps d on average, and 0 if it loses it. A few large
entries may make up the norm of d while all others are lost. So it is taken in four ways, and the
one furthest from 1 counts: of d, and of d with its entries, its rows or its columns of about equal
norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ..errors import NoProductError, QuantisedError
from ..fx.calls import example_value
from ..fx.trials import concrete_sizes
from ..module.quantised import dequantised
from ..module.quantiser import Quantiser, quantiser_of

# The norm of the difference between a layer's outputs and the product with the values of its
# weight, relative to that of the product. In 16 bits, rounding results up to four times gives
# 2.5e-3 (bfloat16); rounding the inputs to 8 bits gives more than 6e-3 from 16 features on.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
_TOLERANCE = 4e-3


@dataclass(frozen=True)
class QuantisedFold:
    """How a fold treats quantised weights.

    Attributes:
        how: "dequantise" or "requantise".
        quantiser: the quantiser that made them, or None to find it.
        min_retention: the least retention of a site; below it, the fold raises.
        known: the quantisers that the module was trained for, by the names of the parameters. What
            they round away was away in the training, too: any retention is as it should be.
    """

    how: str
    quantiser: Any = None
    min_retention: float = 0.9
    known: Mapping[str, Quantiser] = field(default_factory=dict[str, Quantiser])

    def stored(
        self,
        site: str,
        name: str,
        weight: torch.Tensor,
        folded: torch.Tensor,
        retention: dict[str, float],
    ) -> torch.Tensor:
        """Return a folded weight as it is to be stored, and note its retention.

        Args:
            site: the site's name.
            name: the name of the weight's parameter.
            weight: the quantised weight.
            folded: its values plus s·BA.
            retention: the retention by site, which is added to.
        """
        if self.how == "dequantise":
            return folded
        known, values = self.known.get(name), dequantised(weight)
        moved = folded.double() - values.double()
        if known is None and not bool(moved.any()):
            retention[site] = 1.0
            return weight
        quantiser = known or quantiser_of(weight, self.quantiser)
        quantised = quantiser(folded)
        before, after = (dequantised(q).double() for q in (quantiser(values), quantised))
        retention[site] = retained(after - before, moved)
        if known is None:
            self._check_base(site, before - values.double(), moved)
        return quantised

    def _check_base(self, site: str, shift: torch.Tensor, moved: torch.Tensor) -> None:
        """Raise QuantisedError if quantising the base anew changes it by more than s·BA does."""
        squares, sizes = (of.square().flatten(1) for of in (shift, moved))
        ratios = [float((w * squares).sum() / (w * sizes).sum()) ** 0.5 for w in _weights(sizes)]
        if not all(ratio <= 2 - self.min_retention for ratio in ratios):
            raise QuantisedError(
                f"'{site}': the quantiser does not give the base's own values again: they change "
                f"by {max(ratios):.2g} times as much as s·BA, or its smaller entries, change them, "
                f"which is the noise of a rounding twice. {self._other_quantiser}"
                'old with quantised="dequantise" or quantised="keep".'
            )

    @property
    def _other_quantiser(self) -> str:
        if self.quantiser is None:
            return "Give the quantiser that made the base (quantiser=); or f"
        return "The one that made the base, with all its options, does not; otherwise f"

    def check(self, retention: Mapping[str, float]) -> None:
        """Raise QuantisedError if a site retains less than the least, or as much more than 1."""
        least = self.min_retention
        off = {site: kept for site, kept in retention.items() if not least <= kept <= 2 - least}
        if off:
            sites = ", ".join(f"'{site}' {kept:.3f}" for site, kept in off.items())
            raise QuantisedError(
                "the grid of the quantised weights is too coarse for what was trained: of s·BA, or "
                f"of its smaller entries, {sites} is retained, less than min_retention={least:g} "
                f"or more than {2 - least:g}, which is the noise of rounding. Train with "
                "fxlora.merge_aware, whose forward has the quantised weights that this fold gives; "
                'or fold with quantised="dequantise" or quantised="keep".'
            )


def retained(kept: torch.Tensor, moved: torch.Tensor) -> float:
    """Return the retention ⟨kept, moved⟩ / ‖moved‖² that is furthest from 1 of four (see above).

    Args:
        kept: Q(W + d) - Q(W), in float64.
        moved: d, in float64.
    """
    shares, sizes = (kept * moved).flatten(1), moved.square().flatten(1)
    if not bool(sizes.any()):
        return 1.0
    found = [float((w * shares).sum() / (w * sizes).sum()) for w in _weights(sizes)]
    return max(found, key=lambda one: math.inf if math.isnan(one) else abs(one - 1))


def _weights(sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the four weights of entries, for the squares (rows, columns) of a change."""
    return (
        torch.ones_like(sizes),
        _equal(sizes),
        _equal(sizes.sum(1, True)),
        _equal(sizes.sum(0, True)),
    )


def _equal(norms: torch.Tensor) -> torch.Tensor:
    """Return weights for squared norms, so that none counts more than twice the usual one."""
    return 1 / (norms + norms[norms > 0].median())


@torch.no_grad()
def check_products(site: str, weight: torch.Tensor, reads: Iterable[tuple[fx.Node, Any]]) -> None:
    """Raise NoProductError unless reads of a quantised weight compute the product with its values.

    They are run on random inputs. A weight may have its inputs quantised, too, and a fold to its
    values would leave that out. One entry of each row outweighs the others, so that a grid for the
    row is coarse for them.

    Args:
        site: the site's name.
        weight: the quantised weight.
        reads: the reading nodes, each with the node that it takes the weight from.
    """
    values = dequantised(weight)
    for node, source in reads:
        generator = torch.Generator().manual_seed(0)
        inputs = {n: _random(n, generator, weight) for n in node.all_input_nodes if n is not source}
        if unknown := [n.name for n, value in inputs.items() if value is None]:
            raise NoProductError(
                f"'{site}': it is not known what shapes {', '.join(unknown)} have, so it cannot be "
                "proved that the layer computes the product with the values of its weight."
            )
        found, expected = (_run(node, {**inputs, source: held}) for held in (weight, values))
        exact = expected.double()
        error = float((found.double() - exact).norm() / exact.norm().clamp_min(1e-30))
        if not error <= _TOLERANCES.get(found.dtype, _TOLERANCE):
            raise NoProductError(
                f"'{site}': its layer computes more than the product with the values of its "
                f"weight, as one does that quantises its inputs, too (they differ by {error:.2g})."
            )


def _run(node: fx.Node, given: Mapping[fx.Node, Any]) -> torch.Tensor:
    function: Any = node.target
    args: Any = map_aggregate(node.args, lambda a: given[a] if isinstance(a, fx.Node) else a)
    kwargs: Any = map_aggregate(
        dict(node.kwargs), lambda a: given[a] if isinstance(a, fx.Node) else a
    )
    return function(*args, **kwargs)


def _random(node: fx.Node, generator: torch.Generator, weight: torch.Tensor) -> Any:
    """Return random values like the example of a node; zeros for indices; None if unknown."""
    example = example_value(node)
    if example is None:
        return None
    shape = concrete_sizes(example.shape)
    if not example.is_floating_point():
        return torch.zeros(shape, dtype=example.dtype, device=weight.device)
    # The example may be of before a `.to()`; the weight is as it is now.
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1 and shape[-1] > 0:
        values[..., 0] = 3 * math.sqrt(shape[-1])
    return values.to(weight.device, weight.dtype)
