"""Inputs of a command besides the model: example inputs for the capture, and rules."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import LoraConfig, Rules, load_rules
from ..errors import ConfigError
from ..frontends import capture
from ..module import CapturedModule
from ..tables import did_you_mean
from .models import device

INPUT_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "bool"),
)


@dataclass(frozen=True)
class Input:
    """One `--input` option.

    Attributes:
        name: the keyword, or "" for a positional input.
        high: integers are below it. The default gives zeros, which are in range for any embedding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    high: int = 1

    def example(self) -> torch.Tensor:
        """Draw a tensor of this shape and dtype."""
        if _takes_fractions(self.dtype):
            return torch.randn(self.shape, dtype=self.dtype)
        return torch.randint(self.high, self.shape).to(self.dtype)


def _takes_fractions(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def parsed_input(text: str) -> Input:
    """Parse `[NAME=]SHAPE[:DTYPE[:HIGH]]`."""
    found = re.fullmatch(
        r"(?:([^\W\d]\w*)=)?([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+)(?::([1-9]\d*))?)?", text
    )
    if found is None:
        raise ArgumentTypeError(
            f"'{text}' is not [NAME=]SHAPE[:DTYPE[:HIGH]], as in 1x3x224x224, ids=2x16:int64 or, "
            "for integers below 1000, 2x16:int64:1000"
        )
    name, shape, dtype, high = found.groups(default="")
    if dtype and dtype not in INPUT_DTYPES:
        near = did_you_mean(dtype, INPUT_DTYPES)
        raise ArgumentTypeError(
            f"'{text}' has no known dtype.{near} Known: {', '.join(INPUT_DTYPES)}"
        )
    parsed: torch.dtype = getattr(torch, dtype or "float32")
    if high and _takes_fractions(parsed):
        raise ArgumentTypeError(f"'{text}': a bound is only for integers")
    if high and int(high) > (2 if parsed is torch.bool else torch.iinfo(parsed).max):
        raise ArgumentTypeError(f"'{text}': {dtype} has no integers up to that bound")
    return Input(name, tuple(map(int, shape.split("x"))), parsed, int(high or 1))


def example_inputs(options: Namespace) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Draw the positional and the keyword inputs that the `--input` options describe."""
    names = [given.name for given in options.input if given.name]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--input gives {', '.join(sorted(twice))} more than once.")
    with device(options):
        args = tuple(given.example() for given in options.input if not given.name)
        kwargs = {given.name: given.example() for given in options.input if given.name}
    return args, kwargs


def captured_model(model: nn.Module, options: Namespace) -> CapturedModule:
    """Capture a model with the example inputs, or by tracing if there are none."""
    with quiet(options):
        return capture(model, *example_inputs(options)) if options.input else capture(model)


@contextlib.contextmanager
def quiet(options: Namespace) -> Generator[None]:
    """Hide the logs and the partial graph that torch.export prints when it refuses a model.

    The error gives the reason in one line, and after a refusal the next attempt may succeed.
    `--debug` turns this off.
    """
    if options.debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def given_rules(options: Namespace) -> Rules:
    """Return the rules of the `--rules` file, or a LoraConfig of the other options."""
    if options.rules is None:
        return LoraConfig(**_lora_options(options))
    refuse_lora_options(options, "--rules")
    return load_rules(options.rules)


def refuse_lora_options(options: Namespace, source: str, *more: str) -> None:
    """Raise if LoRA options, or those in `more`, are given besides one that defines the adapters.

    Args:
        source: the option that defines the adapters: "--rules" or "--adapter".
        more: dests of further options to refuse.
    """
    given = [
        *_lora_options(options),
        *(name for name in more if getattr(options, name) is not None),
    ]
    if given:
        raise ConfigError(
            f"{source} already defines the adapters: leave out the options for {', '.join(given)}."
        )


def _lora_options(options: Namespace) -> dict[str, Any]:
    """Return the fields of LoraConfig that were given (the options' dests are its fields)."""
    fields = [field.name for field in dataclasses.fields(LoraConfig)]
    return {name: value for name in fields if (value := getattr(options, name, None)) is not None}
