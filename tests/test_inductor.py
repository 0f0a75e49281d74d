"""Torch's default compiler, Inductor, on adapted graphs: it rewrites products and sums itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxlora
from fxlora import LoraConfig, Rule

from .laws import randomise
from .typed import plan_of

F64 = torch.float64
X = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(2))


class Reads(nn.Module):
    """Weights of several forms: a layer, a bare one, a stack, a normed one; takes (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.normed = nn.Linear(6, 9), weight_norm(nn.Linear(9, 5))
        self.bare = nn.Parameter(torch.randn(9, 7))
        self.stack = nn.Parameter(torch.randn(3, 8, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.layer(x))
        wide = torch.tanh(h @ self.bare.sigmoid())
        each = torch.bmm(self.stack.relu(), wide.T.expand(3, 7, len(x))).mean(0)
        return self.normed(h).sum(1) + each.sum(0)


@pytest.mark.parametrize(("dora", "optimized"), [(False, False), (True, True)])
def test_what_inductor_compiles_is_the_adapted_graph(dora: bool, optimized: bool) -> None:
    torch.manual_seed(0)
    gm = fxlora.capture(Reads().to(F64), X)
    plain = Rule(["layer", "bare", "stack", "*original1"], lora=LoraConfig(r=2, lora_alpha=7))
    rules = [Rule("layer", lora=LoraConfig(r=2, lora_alpha=7, use_dora=True)), plain]
    lora = fxlora.inject(gm, fxlora.match(gm, rules if dora else plain))
    assert {entry.form for entry in plan_of(lora)} == {"branch", "weight"}
    randomise(lora)
    expected = [lora(X), *gradients(lora)]
    assert float((expected[0] - gm(X)).detach().abs().min()) > 1e-3
    torch.compiler.reset()
    compiled: Any = torch.compile(fxlora.optimize(lora) if optimized else lora, fullgraph=True)
    for ours, theirs in zip([compiled(X), *gradients(compiled)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def gradients(module: Any) -> list[torch.Tensor]:
    """Return the gradients of the adapters' tensors."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(module(X).square().sum(), parameters))
