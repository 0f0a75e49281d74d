"""Initial values of A and B: a table with one function per value of `init_lora_weights`.

`FILLS` holds the inits that do not depend on the weight. They fill A, (…, r, in), and B,
(…, out, r), in place; kernel dimensions are flattened into in or out.

`STARTS` holds the inits computed from the weight. They take the weight as (…, out, in), in float32
or a wider dtype, with the rank and the scaling s, and return the initial A and B. The product
s·BA of this pair is subtracted from W0, so that the outputs start unchanged (see `variants`).
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
    """Fill A, whose columns are looked up, with zeros and B from a normal distribution.

    This is loralib's init for embeddings.
    """
    nn.init.zeros_(a)
    nn.init.normal_(b)


def _orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Fill A and B with random values such that BA = 0.

    A and B use orthogonal halves of a random basis of the r rank dimensions (Büyükakyüz and
    others; PEFT's "orthogonal").
    """
    r = a.shape[-2]
    if r % 2:
        raise ConfigError(f'init_lora_weights="orthogonal" halves the rank: r={r} must be even.')
    size = (*a.shape[:-2], r, r)
    basis = torch.linalg.qr(torch.randn(size, dtype=_wide(a.dtype), device=a.device)).Q
    # (…, in, r/2) @ (…, r/2, r) -> (…, in, r)
    down = torch.randn(*a.shape[:-2], a.shape[-1], r // 2).to(basis) @ basis[..., 0::2, :] / 10
    # (…, out, r/2) @ (…, r/2, r) -> (…, out, r)
    up = torch.randn(*b.shape[:-1], r // 2).to(basis) @ basis[..., 1::2, :] / 10
    a.copy_(down.mT)
    b.copy_(up)


FILLS: dict[bool | str, Fill] = {
    True: _kaiming_uniform,  # the default of loralib and PEFT, except for embeddings
    "kaiming_uniform": _kaiming_uniform,
    "kaiming_normal": _kaiming_normal,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    False: _random,
}


def _pissa(weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B from the r largest singular values, with s·BA = U_r S_r V_r^T.

    Source: Meng et al. 2024, PiSSA, eq. 2-3.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[..., :r] / scaling).sqrt()
    return root.unsqueeze(-1) * vh[..., :r, :], u[..., :r] * root.unsqueeze(-2)


def _olora(weight: torch.Tensor, r: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first r rows of R as A, and the first r columns of Q as B.

    Q and R are the QR decomposition of the weight (Büyükakyüz 2024, OLoRA).
    """
    q, upper = torch.linalg.qr(weight)
    return upper[..., :r, :], q[..., :r]


def rank_multiple(init: bool | str) -> int:
    """Return the number that the rank must be a multiple of."""
    return 2 if init == "orthogonal" else 1


STARTS: dict[bool | str, Start] = {"pissa": _pissa, "olora": _olora}

INITS: tuple[bool | str, ...] = (*FILLS, *STARTS)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
