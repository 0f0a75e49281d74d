"""Small models of every kind, with example inputs, for the sweeps: one module per library.

Each has MODELS: family → name → a function that builds the model and its inputs. QUICK, where
there is one, is a part of it: one model of a kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

LIBRARIES = ("torchvision", "timm", "transformers")


@dataclass(frozen=True)
class Case:
    """A model and what to call it with."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


Families = Mapping[str, Mapping[str, Callable[[], Case]]]


def families(library: str) -> Families:
    """The table of one library."""
    return importlib.import_module(f"{__name__}.{library}").MODELS


def quick(library: str) -> Families:
    """The part of the table that has one model of a kind."""
    module = importlib.import_module(f"{__name__}.{library}")
    return getattr(module, "QUICK", module.MODELS)


def randomise_constants(model: nn.Module) -> None:
    """Random numbers wherever a parameter starts as a constant.

    A gate or a layer scale of zero, and a norm's bias, would hide what stands behind them.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel() or parameter.min() != parameter.max():
                continue
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.uniform_(0.5, 1.0)
            else:
                parameter.normal_(std=0.02)
