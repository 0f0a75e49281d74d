"""The ops that are affine for each channel by definition, y = s·x + t, and their s and t.

An op without a row here is left alone: no run can tell a clamp from its identity in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from ...fx.calls import argument
from .values import Constants

aten = torch.ops.aten


class Affine(NamedTuple):
    """y = scale·x + shift, both in float64 on the CPU, as they broadcast against x."""

    scale: torch.Tensor
    shift: torch.Tensor


def affine_of(node: fx.Node, source: fx.Node, held: Constants) -> Affine | None:
    """Return scale and shift of a call in its one input that is no constant; None if unknown."""
    row = _ROWS.get(node.target)
    found = row(node, source, held) if row else None
    finite = found and all(bool(value.isfinite().all()) for value in found)
    return found if finite else None


def scale_of(node: fx.Node, source: fx.Node, held: Constants) -> torch.Tensor | None:
    """Return the factor of a call that is a product with constants, as they broadcast, or None.

    A sum with zero is none: it makes -0 to 0.
    """
    found = affine_of(node, source, held) if _ROWS.get(node.target) in _SCALES else None
    return found and found.scale


def is_bounded(node: fx.Node) -> bool:
    """Whether all numbers of a result are from -1 to 1, by definition."""
    return node.target in _BOUNDED


def channelwise(
    node: fx.Node, source: fx.Node, dims: int, channel: int, features: int, held: Constants
) -> Affine | None:
    """Return scale and shift (features,) of a call that is affine for each channel, or None.

    Args:
        node: the call.
        source: its one input that is no constant.
        dims: the number of dimensions of that input.
        channel: the dimension of that input that holds the channels.
        features: their number.
        held: the constants of the graph.
    """
    found = affine_of(node, source, held)
    if found is None:
        return None
    channel %= dims
    if node.target is aten.batch_norm.default:  # whose channels are in dimension 1
        fits = channel == 1 and found.scale.numel() == features
        return found if fits else None
    values = [_along(value, dims, channel, features) for value in found]
    scale, shift = values
    return None if scale is None or shift is None else Affine(scale, shift)


def _along(value: torch.Tensor, dims: int, channel: int, features: int) -> torch.Tensor | None:
    """Return a value (features,) that broadcasts along the channels only, or None."""
    if value.ndim > dims:
        return None
    shape = (1,) * (dims - value.ndim) + tuple(value.shape)
    if shape[channel] not in (1, features) or value.numel() != shape[channel]:
        return None
    return value.reshape(-1).expand(features).clone()


# ---- rows ---------------------------------------------------------------------------------------

Row = Callable[[fx.Node, fx.Node, Constants], Affine | None]


def _value(given: Any, held: Constants) -> torch.Tensor | None:
    """Return a real number or a constant in float64, or None."""
    if isinstance(given, fx.Node):
        value = held.of(given) if given in held.nodes else None
        if not isinstance(value, torch.Tensor) or value.is_complex():
            return None
        return value.detach().cpu().double()
    return torch.tensor(float(given), dtype=torch.float64) if type(given) in (int, float) else None


def _operands(node: fx.Node, source: fx.Node, held: Constants) -> tuple[bool, torch.Tensor] | None:
    """Return whether the input is the first of two operands, and the value of the other."""
    first = argument(node, 0) is source
    value = _value(argument(node, 1 if first else 0), held)
    return None if value is None else (first, value)


def _product(node: fx.Node, source: fx.Node, held: Constants) -> Affine | None:
    found = _operands(node, source, held)
    return Affine(found[1], torch.zeros_like(found[1])) if found else None


def _quotient(node: fx.Node, source: fx.Node, held: Constants) -> Affine | None:
    found = _operands(node, source, held)
    if found is None or not found[0]:  # c / x
        return None
    return Affine(1 / found[1], torch.zeros_like(found[1]))


def _sum(first: float, second: float, *, scales_first: bool = False) -> Row:
    """Return the row of first·a + second·α·b; α scales a instead if `scales_first`."""

    def row(node: fx.Node, source: fx.Node, held: Constants) -> Affine | None:
        found, alpha = _operands(node, source, held), _value(argument(node, 2, 1), held)
        if found is None or alpha is None or alpha.ndim:
            return None
        at_first, value = found
        one = torch.ones_like(alpha)
        factors = (first * alpha, second * one) if scales_first else (first * one, second * alpha)
        own, other = factors if at_first else factors[::-1]
        return Affine(own, other * value)

    return row


def _negative(node: fx.Node, source: fx.Node, held: Constants) -> Affine | None:
    one = torch.ones((), dtype=torch.float64)
    return Affine(-one, 0 * one)


def _batch_norm(node: fx.Node, source: fx.Node, held: Constants) -> Affine | None:
    """(x - mean)·weight / √(var + ε) + bias, of the running statistics, for each channel."""
    if argument(node, 0) is not source or argument(node, 5) is not False:
        return None
    mean, variance = (_value(argument(node, at), held) for at in (3, 4))
    if mean is None or variance is None:
        return None
    scale, shift = 1 / (variance + float(argument(node, 7))).sqrt(), torch.zeros_like(mean)
    if argument(node, 1) is not None:
        weight = _value(argument(node, 1), held)
        if weight is None:
            return None
        scale = scale * weight
    if argument(node, 2) is not None:
        bias = _value(argument(node, 2), held)
        if bias is None:
            return None
        shift = bias
    return Affine(scale, shift - mean * scale)


_BOUNDED = frozenset(
    [
        *(aten.sin.default, aten.cos.default, aten.tanh.default, aten.erf.default),
        *(aten.sigmoid.default, aten.softmax.int, aten._softmax.default),
    ]
)
_SCALES = (_product, _quotient, _negative)
_ROWS: dict[Any, Row] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor), _product),
    **dict.fromkeys((aten.multiply.Scalar,), _product),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.divide.Tensor), _quotient),
    **dict.fromkeys((aten.divide.Scalar, aten.true_divide.Tensor), _quotient),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1, 1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor), _sum(1, -1)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum(-1, 1, scales_first=True)),
    **dict.fromkeys((aten.neg.default, aten.negative.default), _negative),
    aten.batch_norm.default: _batch_norm,
}
