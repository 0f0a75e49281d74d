"""How A and B start. A table: an init of another kind is another row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from .plan import Entry


def _kaiming_uniform(a: torch.Tensor, b: torch.Tensor, r: int) -> None:
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def _kaiming_normal(a: torch.Tensor, b: torch.Tensor, r: int) -> None:
    nn.init.kaiming_normal_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def _gaussian(a: torch.Tensor, b: torch.Tensor, r: int) -> None:
    nn.init.normal_(a, std=1 / r)
    nn.init.zeros_(b)


def _embedding(a: torch.Tensor, b: torch.Tensor, r: int) -> None:
    nn.init.zeros_(a)
    nn.init.normal_(b)


def _random(a: torch.Tensor, b: torch.Tensor, r: int) -> None:
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))


INITS: dict[bool | str, Callable[[torch.Tensor, torch.Tensor, int], None]] = {
    True: _kaiming_uniform,  # loralib's and PEFT's, for layers
    "kaiming_uniform": _kaiming_uniform,
    "kaiming_normal": _kaiming_normal,
    "gaussian": _gaussian,
    False: _random,
}


def new_pair(entry: Entry, weight: torch.Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A fresh A and B for an entry, on the weight's device and in its dtype."""
    a, b = (torch.empty(s, device=weight.device, dtype=weight.dtype) for s in entry.shapes)
    init = _embedding if entry.init is True and entry.op == "embedding" else INITS[entry.init]
    init(a, b, entry.r)
    if entry.padding_idx is not None:
        # No gradient reaches this column, so the row it stands for stays as it was for good.
        a.select(1, entry.padding_idx).zero_()
    return nn.Parameter(a), nn.Parameter(b)
