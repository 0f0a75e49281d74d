"""Quantisers: functions that store a weight in the form in which another one is stored."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, QuantisedError
from .decoded import DecodedTensor
from .quantised import dequantised, is_quantised, stored

Quantiser = Callable[[torch.Tensor], torch.Tensor]

# A quantiser may store its own values otherwise (the scales of NF4 are quantised themselves): by
# this much of their norm.
_MOST_CHANGED = 0.05


def quantiser_of(weight: torch.Tensor, given: Any = None) -> Quantiser:
    """Return the quantiser that made a weight: the given one, or the constructor of its subclass.

    It has to prove itself: applied to the values of the weight, it must give the weight's own form
    (the type, the shapes of its parts, all else that it holds), and nearly its values.

    Args:
        weight: a quantised weight.
        given: a function of a plain tensor, or a configuration of torchao's `quantize_`.

    Raises:
        QuantisedError: there is none, or it gives another form.
        ConfigError: `given` is neither of the two.
    """
    values = dequantised(weight)
    tried = [_from_user(given)] if given is not None else list(_constructors(weight))
    why = f"{type(weight).__name__} has no constructor from plain values that gives the same form"
    for quantise in tried:
        try:
            again = quantise(values)
        except Exception as error:  # noqa: BLE001 - a constructor raises anything for what misfits
            why = f"it raises {type(error).__name__}: {error}" if given is not None else why
            continue
        if _form(again) == _form(weight):
            change = torch.linalg.vector_norm(dequantised(again) - values)
            if float(change) <= _MOST_CHANGED * float(torch.linalg.vector_norm(values)):
                return quantise
            why = "it changes the values of the weight itself"
        elif given is not None:
            why = "it gives another form than the weight has"
    raise QuantisedError(
        f"no quantiser is known for the weights of {type(weight).__name__}: {why}. Give the one "
        "that made them (quantiser=, a function of a tensor or a configuration of torchao's "
        'quantize_), or fold with quantised="dequantise" or quantised="keep".'
    )


def _form(tensor: torch.Tensor) -> Any:
    """Return all that a quantised tensor is but for its numbers."""
    if not is_quantised(tensor):
        return None
    held: Any = tensor
    names, context = held.__tensor_flatten__()
    parts = tuple((tuple(part.shape), part.dtype) for part in stored(tensor))
    return type(tensor), tuple(names), repr(context), parts, tensor.dtype, tuple(tensor.shape)


def _from_user(given: Any) -> Quantiser:
    if callable(given):
        function: Any = given
        return function
    if type(given).__module__.startswith("torchao."):
        return lambda values: _by_configuration(values, given)
    raise ConfigError(
        "quantiser must be a function of a tensor that returns the quantised one, or a "
        f"configuration of torchao's quantize_, not {type(given).__name__}."
    )


def _by_configuration(values: torch.Tensor, configuration: Any) -> torch.Tensor:
    """Return values as torchao's `quantize_` stores them in a linear layer."""
    from torchao.quantization import quantize_  # its configuration was given: it is installed

    layer = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(values, requires_grad=False)
    quantize_(layer, configuration)
    return layer.weight.detach()


# ---- the constructors of subclasses -------------------------------------------------------------


def _constructors(weight: torch.Tensor) -> Iterator[Quantiser]:
    """Yield calls of the constructors of a subclass, with the arguments that the weight tells."""
    if isinstance(weight, DecodedTensor):
        yield weight.encoded
    for name in ("from_hp", "from_tensor"):
        if make := getattr(type(weight), name, None):
            parameters = list(inspect.signature(make).parameters.values())[1:]
            choices = [list(_values(weight, parameter)) for parameter in parameters]
            for chosen in itertools.product(*choices):
                named = {p.name: v for p, v in zip(parameters, chosen, strict=True) if v is not p}
                yield lambda values, make=make, named=named: make(values, **named)


def _values(weight: Any, parameter: inspect.Parameter) -> Iterator[Any]:
    """Yield values for a parameter of a constructor; the parameter itself for its default."""
    if parameter.name in ("scale", "zero_point"):  # fresh ones
        yield parameter
        return
    held = getattr(weight, parameter.name, None)
    if held is not None and not isinstance(held, torch.Tensor):
        yield held
    elif parameter.name == "granularity":
        yield from _granularities(weight)
    elif parameter.default is not parameter.empty:
        yield parameter
        if isinstance(parameter.default, Enum):
            yield from (one for one in type(parameter.default) if one is not parameter.default)


def _granularities(weight: Any) -> Iterator[Any]:
    """Yield torchao's names for the blocks of entries that share a scale."""
    from torchao.quantization import granularity  # the weight is one of torchao's

    yield granularity.PerRow()
    yield granularity.PerTensor()
    if block := getattr(weight, "block_size", None):
        yield granularity.PerGroup(int(block[-1]))
