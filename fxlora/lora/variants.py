"""Variants of LoRA. A table: a variant is a row, and nothing else in fxlora knows its name.

LoRA trains V = W0 + s·BA. A variant may hold tensors of its own, let something else stand for A
and B, and scale the outputs of V. The functions take tensors and torch.fx's proxies alike, so one
text makes the branch, the weight form, the fold, and the reference that `verify` checks against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from .inits import STARTS
from .layout import Layout, Shape

aten = torch.ops.aten


def _as_they_are(layout: Layout, a: Any, b: Any, *tensors: Any) -> tuple[Any, Any]:
    return a, b


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes:
        tensors: (layout, shape, r) → names and shapes of what it holds beside A and B.
        trains: whether they train.
        start: (V as it starts (…, out, in), A, B) → their first values.
        factors: (layout, A, B, *tensors) → what stands for A and B, perhaps of a higher rank.
        gain: (V (…, out, in), *tensors) → a factor (…, out) on V's outputs, or None where V is
            taken as it is. V comes without gradients.
    """

    tensors: Callable[[Layout, Shape, int], dict[str, Shape]]
    trains: bool
    start: Callable[..., tuple[torch.Tensor, ...]]
    factors: Callable[..., tuple[Any, Any]] = _as_they_are
    gain: Callable[..., Any] | None = None


# ---- DoRA (Liu et al. 2024, eq. 5): W = m·V/‖V‖, the norm over the inputs of each output, taken
# as a constant for gradients (§4.3). Kernels are inputs; groups of a transposed convolution share
# the magnitudes as they share B. ----------------------------------------------------------------


def _magnitude(layout: Layout, shape: Shape, r: int) -> dict[str, Shape]:
    stack = [math.prod(layout.sizes(shape)[0])] if layout.stacked else []
    return {"lora_magnitude_vector": (*stack, layout.features(shape)[1])}


def _norms(adapted: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    norms = aten.linalg_vector_norm.default(adapted, 2, [-1])
    if not norms.is_meta and bool((norms == 0).any()):
        raise ConfigError(
            "DoRA learns how long the weights of each output are, and their direction: here an "
            "output has weights that are all zero, which have none. Take plain LoRA (a rule of its "
            "own for this site)."
        )
    return (norms,)


def _relative(adapted: Any, magnitude: Any) -> Any:
    return aten.div.Tensor(magnitude, aten.linalg_vector_norm.default(adapted, 2, [-1]))


# ---- an init that starts from the weight: V = W0 + s·(BA - B'A'), A' and B' as A and B started,
# so that W0 stays the source's. What trains is what trains beside a weight of W0 - s·B'A'. -----


def _first_pair(layout: Layout, shape: Shape, r: int) -> dict[str, Shape]:
    a, b = layout.factor_shapes(shape, r)
    return {"lora_start_A": a, "lora_start_B": b}


def _taken_away(_: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return a.clone(), -b


def _both_pairs(layout: Layout, a: Any, b: Any, start_a: Any, start_b: Any) -> tuple[Any, Any]:
    dim_a, dim_b = layout.rank_dims
    return aten.cat.default([a, start_a], dim_a), aten.cat.default([b, start_b], dim_b)


VARIANTS: dict[str, Variant] = {
    "from_weight": Variant(_first_pair, False, _taken_away, factors=_both_pairs),
    "dora": Variant(_magnitude, True, _norms, gain=_relative),
}


def variants_of(init: bool | str, variant: str | None) -> tuple[str, ...]:
    """The rows that a configuration asks for, in the order in which they apply."""
    asked = {variant, "from_weight" if init in STARTS else None}
    return tuple(name for name in VARIANTS if name in asked)
