"""Small models in which no two dimensions are equal, so that a transposed matrix cannot pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora


class Mlp(nn.Module):
    """Two linear layers, 5 → 7 → 3, with dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.dropout(torch.tanh(self.up(x)), 0.3, self.training))


class Convolutions(nn.Module):
    """1d, 2d and 3d convolutions in every geometry; takes (N, 6, 5, 18, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.c3 = nn.Conv3d(6, 8, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 2))
        self.c2 = nn.Conv2d(8, 12, 3, dilation=2, padding="same", padding_mode="zeros")
        self.reflect = nn.Conv2d(12, 10, (3, 1), padding=(1, 0), padding_mode="reflect")
        self.grouped = nn.Conv2d(10, 15, 3, groups=5, stride=2, bias=False)
        self.depthwise = nn.Conv2d(15, 15, 3, padding=1, groups=15)
        self.c1 = nn.Conv1d(15, 4, 3, stride=2, padding=1, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.c3(x)).mean(2)
        x = self.reflect(torch.tanh(self.c2(x)))
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))
        return self.c1(x.mean(3))


class Readers(nn.Module):
    """Weights read by functions and operators; takes (N, 5) and indices (N, 4)."""

    subscripts: ClassVar = {
        "w_left": "oi",
        **dict.fromkeys(("w_matmul", "w_addmm", "w_einsum", "w_sliced"), "io"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6, padding_idx=2)
        self.functional = nn.Linear(5, 6)
        self.w_matmul = nn.Parameter(torch.randn(6, 7))
        self.w_left = nn.Parameter(torch.randn(9, 4))
        self.w_addmm = nn.Parameter(torch.randn(7, 8))
        self.bias = nn.Parameter(torch.randn(8))
        self.w_einsum = nn.Parameter(torch.randn(8, 3))
        self.w_sliced = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        tokens = self.w_left @ self.emb(index)  # (N, 9, 6)
        x = F.linear(x, self.functional.weight, self.functional.bias) + tokens.sum(1)
        x = torch.addmm(self.bias, torch.tanh(x) @ self.w_matmul, self.w_addmm)
        x = torch.einsum("ni,io->no", torch.tanh(x), self.w_einsum)
        return x + x @ self.w_sliced[:3]


class Tied(nn.Module):
    """A language model whose head is its embedding; takes indices (N, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(17, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 17, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.emb(ids))))


class Attention(nn.Module):
    """nn.MultiheadAttention, and nn.TransformerEncoder with its fused kernel; takes (N, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended, _ = self.mha(x, x, x)
        return self.encoder(attended)


class Normed(nn.Module):
    """Batch norm, a module called twice, a weight in two modules, an unused layer, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.twice = nn.Linear(6, 6)
        self.first = nn.Linear(6, 5, bias=False)
        self.second = nn.Linear(6, 5)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(5, 4)
        self.unused = nn.Linear(2, 9)
        self.register_buffer("offset", torch.randn(4), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.first(x) + self.second(x)
        return {"logits": self.fc(x) + self.offset, "features": x}


class Reads(nn.Module):
    """Reads one weight `w`, of the given shape and subscripts (see `oracle.py`), by a function."""

    def __init__(
        self,
        read: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        subscripts: str,
        *shape: int,
    ) -> None:
        super().__init__()
        self.subscripts = {"w": subscripts}
        self.w = nn.Parameter(torch.randn(shape))
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x, self.w)


class Several(nn.Module):
    """Calls each of its parts with the same inputs: one capture serves all of them."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part(x) for part in self.parts]


@functools.cache
def gpt2() -> tuple[nn.Module, dict[str, Any], fxlora.CapturedModule]:
    """Return a GPT-2 of one layer in float64, its keyword arguments, and its capture.

    All tests of GPT-2 share them, because no verb changes its argument.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 24, "n_head": 3, "n_positions": 8, "n_inner": 40}
    tokens = {"vocab_size": 53, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **tokens, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    ids = torch.randint(3, 53, (2, 7))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    fixed = dict.fromkeys(kwargs)  # twice as fast; no test depends on it
    return model, kwargs, fxlora.capture(model, (), kwargs, dynamic_shapes=fixed)


def skip_unless_grouped(dtype: torch.dtype) -> None:
    """Skip a test where this torch has no grouped products of a dtype."""
    x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((10, 16), (3, 16, 24)))
    try:
        F.grouped_mm(x, w, offs=torch.empty(3, dtype=torch.int32, device="meta"))
    except RuntimeError:
        pytest.skip(f"this torch cannot export grouped products of {dtype}")
