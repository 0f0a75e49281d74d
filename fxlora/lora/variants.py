"""Variants of LoRA: a table with one row per variant.

Plain LoRA trains V = W0 + s·BA. A variant may add tensors, replace A and B by other factors, and
scale the outputs of V. Outside this table, only the configuration and PEFT's file format refer to
a variant by its name.

`factors` and `gain` take tensors and torch.fx's proxies alike, so the same code makes the branch,
the weight form, the fold, and the reference that `verify` checks against.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..names import WORD_RULE, is_word, shown
from .inits import STARTS
from .layout import Layout, Shape

aten = torch.ops.aten


def _as_they_are(layout: Layout, a: Any, b: Any, *tensors: Any) -> tuple[Any, Any]:
    return a, b


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        tensors: function (layout, shape, r) → names and shapes of the tensors besides A and B.
        trains: whether these tensors are trainable.
        start: function (V before training (…, out, in), A, B) → their initial values.
        factors: function `(layout, A, B, *tensors)` → the factors used instead of A and B, which
            may have a higher rank.
        gain: function `(V, *tensors)`, V (…, out, in) → a factor (…, out) that V's outputs are
            multiplied with; None if the variant does not scale V. V is detached.
        freezes: those of A and B that do not train, by name ("lora_A").
        by_output: whether the gain of an output depends on that output only: on its part of V, and
            of tensors whose last dimension is out. Then a fold need not hold all of V.
    """

    tensors: Callable[[Layout, Shape, int], dict[str, Shape]]
    trains: bool
    start: Callable[..., tuple[torch.Tensor, ...]]
    factors: Callable[..., tuple[Any, Any]] = _as_they_are
    gain: Callable[..., Any] | None = None
    by_output: bool = False
    freezes: tuple[str, ...] = ()

    @property
    def keeps_factors(self) -> bool:
        """Whether A and B are used as they are."""
        return self.factors is _as_they_are


# ---- DoRA ---------------------------------------------------------------------------------------
# W = m·V/‖V‖ (Liu et al. 2024, eq. 5). The norm is taken over the inputs of each output, including
# kernel dimensions, and is a constant for autograd (§4.3). The groups of a transposed convolution
# share the magnitudes m as they share B.


def _magnitude(layout: Layout, shape: Shape, r: int) -> dict[str, Shape]:
    stack = [math.prod(layout.sizes(shape)[0])] if layout.stacked else []
    return {"lora_magnitude_vector": (*stack, layout.features(shape)[1])}


def _norms(adapted: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    norms = aten.linalg_vector_norm.default(adapted, 2, [-1])
    if not norms.is_meta and bool((norms == 0).any()):
        raise ConfigError(
            "DoRA learns the norm and the direction of each output's weights. Here the weights of "
            "an output are all zero, so they have no direction. Use plain LoRA for this site, by a "
            "separate rule."
        )
    return (norms,)


def _relative(adapted: Any, magnitude: Any) -> Any:
    return aten.div.Tensor(magnitude, aten.linalg_vector_norm.default(adapted, 2, [-1]))


# ---- an init computed from the weight -----------------------------------------------------------
# V = W0 + s·(BA - B'A'), where A' and B' are the initial A and B. W0 stays the source's weight;
# training sees the residual W0 - s·B'A' as the base weight.


def _first_pair(layout: Layout, shape: Shape, r: int) -> dict[str, Shape]:
    a, b = layout.factor_shapes(shape, r)
    return {"lora_start_A": a, "lora_start_B": b}


def _taken_away(_: Any, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return a.clone(), -b


def _both_pairs(layout: Layout, a: Any, b: Any, start_a: Any, start_b: Any) -> tuple[Any, Any]:
    dim_a, dim_b = layout.rank_dims
    return aten.cat.default([a, start_a], dim_a), aten.cat.default([b, start_b], dim_b)


# ---- LoRA-FA ------------------------------------------------------------------------------------
# A stays as it is drawn (Zhang et al. 2023, LoRA-FA, §3): the backward needs A·x (…, r) for B's
# gradient, and x (…, in) no more.


def _nothing(*_: Any) -> dict[str, Shape]:
    return {}


def _no_tensors(*_: Any) -> tuple[torch.Tensor, ...]:
    return ()


VARIANTS: dict[str, Variant] = {
    "from_weight": Variant(_first_pair, False, _taken_away, factors=_both_pairs),
    "fa": Variant(_nothing, False, _no_tensors, freezes=("lora_A",)),
    "dora": Variant(_magnitude, True, _norms, gain=_relative, by_output=True),
}


def register_variant(name: str, variant: Variant) -> None:
    """Make a variant of LoRA available as `LoraConfig(variant=name)`.

    Args:
        name: its name in configurations and in saved adapters. A process that loads such an
            adapter must register the variant, too.
        variant: the row: its tensors, their initial values and its formula.

    Raises:
        ConfigError: the name is taken, or is not a word.

    Example:
        A learned factor on every output, W = g·(W0 + s·BA), g (out,) starting at 1:

        >>> import torch, fxlora
        >>> def tensors(layout, shape, r):
        ...     return {"lora_gain": (layout.features(shape)[1],)}  # (out,)
        >>> def start(adapted, a, b):  # adapted (out, in)
        ...     return (torch.ones_like(adapted[:, 0]),)
        >>> def gain(adapted, g):
        ...     return g
        >>> fxlora.register_variant("gain", fxlora.Variant(tensors, True, start, gain=gain))
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear", variant="gain")
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> lora = fxlora.adapt(model, torch.randn(3, 6), rules=config)
        >>> [name for name, p in lora.named_parameters() if p.requires_grad][-1]
        '0.lora_gain.default.weight'
    """
    if not is_word(name):
        raise ConfigError(f"a variant's name must be {WORD_RULE}, not {shown(name)}.")
    if name in VARIANTS:
        raise ConfigError(f"there is a variant {name!r} already.")
    VARIANTS[name] = variant


def variants_of(init: bool | str, variant: str | None) -> tuple[str, ...]:
    """Return the names of the rows that a configuration selects, in the order they apply."""
    asked = {variant, "from_weight" if init in STARTS else None}
    return tuple(name for name in VARIANTS if name in asked)
