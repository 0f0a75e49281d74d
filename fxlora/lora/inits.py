"""How A and B start. A table: an init of another kind is another row.

A row fills A as (…, r, in) and B as (…, out, r), both flat. One that starts from the weight gets
it as (…, out, in), in float32 at least, and gives back the pair whose product it starts from: the
weight that is trained beside it is W0 less that (see `variants`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ..errors import ConfigError

Fill = Callable[[torch.Tensor, torch.Tensor], None]
Start = Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]


def _kaiming_uniform(a: torch.Tensor, b: torch.Tensor) -> None:
    nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
    nn.init.zeros_(b)


def _kaiming_normal(a: torch.Tensor, b: torch.Tensor) -> None:
    nn.init.kaiming_normal_(a.flatten(0, -2), a=math.sqrt(5))
    nn.init.zeros_(b)


def _gaussian(a: torch.Tensor, b: torch.Tensor) -> None:
    nn.init.normal_(a, std=1 / a.shape[-2])
    nn.init.zeros_(b)


def _random(a: torch.Tensor, b: torch.Tensor) -> None:
    nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
    nn.init.kaiming_uniform_(b.flatten(0, -2), a=math.sqrt(5))


def embedding(a: torch.Tensor, b: torch.Tensor) -> None:
    """loralib's for embeddings: rows that are looked up start at zero."""
    nn.init.zeros_(a)
    nn.init.normal_(b)


def _orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """A and B both random, with BA = 0: they meet in orthogonal halves of the rank (Büyükakyüz
    and others; PEFT's "orthogonal")."""
    r = a.shape[-2]
    if r % 2:
        raise ConfigError(f'init_lora_weights="orthogonal" halves the rank: r={r} must be even.')
    size = (*a.shape[:-2], r, r)
    basis = torch.linalg.qr(torch.randn(size, dtype=_wide(a.dtype), device=a.device)).Q
    down = torch.randn(*a.shape[:-2], a.shape[-1], r // 2).to(basis) @ basis[..., 0::2, :] / 10
    up = torch.randn(*b.shape[:-1], r // 2).to(basis) @ basis[..., 1::2, :] / 10
    a.copy_(down.mT)
    b.copy_(up)


FILLS: dict[bool | str, Fill] = {
    True: _kaiming_uniform,  # loralib's and PEFT's, for layers
    "kaiming_uniform": _kaiming_uniform,
    "kaiming_normal": _kaiming_normal,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    False: _random,
}


def _pissa(weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The r largest singular values and their vectors (Meng et al. 2024, PiSSA, eq. 2-3)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[..., :r] / scaling).sqrt()
    return root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)


def _olora(weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The first r columns of Q and rows of R (Büyükakyüz 2024, OLoRA)."""
    q, upper = torch.linalg.qr(weight)
    return upper[..., :r, :], q[..., :r]


def step_of(init: bool | str) -> int:
    """What the rank must be a multiple of."""
    return 2 if init == "orthogonal" else 1


STARTS: dict[bool | str, Start] = {"pissa": _pissa, "olora": _olora}

INITS: tuple[bool | str, ...] = (*FILLS, *STARTS)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
