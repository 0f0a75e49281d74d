"""Small models of every kind, with example inputs, for the sweeps: one module per library.

Each module has MODELS: family → name → a function that builds the model and its inputs. Some have
QUICK, a subset of MODELS with one model of each kind.
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
    """A model and the arguments to call it with."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


Families = Mapping[str, Mapping[str, Callable[[], Case]]]


def families(library: str) -> Families:
    """Return the table of one library."""
    return importlib.import_module(f"{__name__}.{library}").MODELS


def quick(library: str) -> Families:
    """Return the library's QUICK table or, if it has none, the whole table."""
    module = importlib.import_module(f"{__name__}.{library}")
    return getattr(module, "QUICK", module.MODELS)


def randomise_constants(model: nn.Module) -> None:
    """Draw random numbers for every parameter that starts as a constant.

    A gate, a layer scale or a norm's bias of zeros would hide the effect of other weights.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel() or parameter.min() != parameter.max():
                continue
            if parameter.numel() == max(parameter.shape, default=1):
                parameter.uniform_(0.5, 1.0)
            else:
                parameter.normal_(std=0.02)
