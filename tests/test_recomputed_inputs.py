"""Inputs of joint ops that are computed again in the backward, instead of saved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import CapturedModule, LoraConfig, Rule

from .laws import randomise
from .test_fast import EXACT, saved

X = torch.randn(4, 5, 6, dtype=torch.float64)
CONFIG = LoraConfig(r=2, target_modules="all-linear")


class Block(nn.Module):
    """A norm in front of three layers, a gate, a GELU, and views between an op and its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.rms = nn.Linear(6, 6), nn.LayerNorm(6), nn.RMSNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.wide, self.back = nn.Linear(8, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        h = self.norm(x)
        h = self.q(h).tanh() * self.k(h).sigmoid() + self.v(h)
        h = self.back(F.gelu(self.wide(h)).view(-1, 10)).view(x.shape) + x
        g = self.rms(h)
        return h + self.down(F.silu(self.gate(g)) * self.up(g))


def made(rules: Any = CONFIG, x: torch.Tensor = X) -> tuple[CapturedModule, CapturedModule]:
    """Return an adapted block with an effect, and its optimized form."""
    torch.manual_seed(0)
    model = Block().to(x.dtype)
    lora = fxlora.adapt(model, x, rules=rules).train()
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    assert float((lora(x) - model(x)).detach().abs().max()) > 0.1
    return lora, fxlora.optimize(lora, recompute=True)


def ends(module: CapturedModule) -> set[str]:
    """Return the first op of each chain."""
    assert module.schedule is not None
    return {chain.ops[0].split(".")[1] for chain, _ in module.schedule.recomputed}


def gradients(module: CapturedModule, x: torch.Tensor = X, **how: Any) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    trained = [x, *fxlora.lora_parameters(module)]
    return list(torch.autograd.grad(module(x).sin().sum(), trained, **how))


def assert_alike(ours: Any, theirs: Any, **tolerance: Any) -> None:
    assert len(ours) == len(theirs) and any(g.detach().abs().max() > 0.01 for g in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **(tolerance or EXACT))


def test_norms_gates_and_gelus_are_not_saved() -> None:
    x = torch.randn(64, 32, 6, dtype=torch.float64)
    lora, fast = made(x=x)
    assert ends(fast) >= {"layer_norm", "gelu", "rms_norm", "silu"}
    wide = x.numel() // 6 * 8  # the bytes of a column
    without = saved(fxlora.optimize(lora), x) - saved(fast, x)
    assert without > (6 + 10 + 6 + 9) * wide  # what the four joint ops read, at least


def test_the_gradients_are_the_explicit_ones() -> None:
    lora, fast = made()
    torch.testing.assert_close(fast(X), lora(X), **EXACT)
    assert_alike(gradients(fast), gradients(lora))
    assert_alike(gradients(fast, retain_graph=True), gradients(lora))


def test_some_gradients_one_after_another() -> None:
    lora, fast = made()
    found: list[list[torch.Tensor]] = []
    for module in (lora, fast):
        loss, trained = module(X).sin().sum(), fxlora.lora_parameters(module)
        apart = [torch.autograd.grad(loss, p, retain_graph=True)[0] for p in trained]
        found.append([*apart, *torch.autograd.grad(loss, trained)])
    assert_alike(*found[::-1])


def test_gradients_of_gradients_and_transforms() -> None:
    lora, fast = made()

    def second(module: CapturedModule) -> list[torch.Tensor]:
        firsts = gradients(module, create_graph=True)
        norm = torch.stack([g.square().sum() for g in firsts]).sum()
        return list(torch.autograd.grad(norm, fxlora.lora_parameters(module)))

    assert_alike(second(fast), second(lora))
    trained = dict(fast.named_parameters())
    for transform in (torch.func.grad, torch.func.jacfwd):
        ours, theirs = (
            transform(lambda p, m=m: torch.func.functional_call(m, p, X).sin().sum())(trained)
            for m in (fast, lora)
        )
        assert_alike(list(ours.values()), list(theirs.values()))


def test_batches_of_gradients() -> None:
    lora, fast = made()
    basis = torch.randn(3, *X.shape[:2], 6, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(m(X), fxlora.lora_parameters(m), basis, is_grads_batched=True)
        for m in (fast, lora)
    )
    assert_alike(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoints(reentrant: bool) -> None:
    lora, fast = made()
    found: list[Any] = []
    for module in (lora, fast):
        x = X.clone().requires_grad_()
        loss = checkpoint(module, x, use_reentrant=reentrant).sin().sum()
        loss.backward()
        found.append([x.grad, *(p.grad for p in fxlora.lora_parameters(module))])
        module.zero_grad()
    assert_alike(*found[::-1])


def test_a_frozen_a_and_trained_weights() -> None:
    lora, fast = made(LoraConfig(r=2, target_modules="all-linear", variant="fa"))
    assert_alike(gradients(fast), gradients(lora))
    lora, fast = made([Rule("up", train=True), Rule(["gate", "down", "q"], lora=LoraConfig(r=2))])
    assert_alike(gradients(fast), gradients(lora))


@pytest.mark.autocast
def test_under_autocast() -> None:
    x = X.float()
    lora, fast = made(x=x)
    plain = fxlora.optimize(lora)
    found: list[list[torch.Tensor]] = []
    for module in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).float().sin().sum()
        found.append([*torch.autograd.grad(loss, fxlora.lora_parameters(module))])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_compiled() -> None:
    lora, fast = made()
    torch._dynamo.reset()
    compiled: Any = torch.compile(fast, backend="aot_eager", fullgraph=True)
    x = X.clone().requires_grad_()
    trained = [x, *fxlora.lora_parameters(fast)]
    assert_alike(torch.autograd.grad(compiled(x).sin().sum(), trained), gradients(lora))


@pytest.mark.slow
def test_a_compiled_backward_reads_what_each_call_saved() -> None:
    lora, fast = made()
    compiler: Any = torch.compile(backend="aot_eager")
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn_like(X)
        found: list[Any] = []
        for module, context in ((lora, nullcontext()), (fast, compiled_autograd._enable(compiler))):
            loss = module(x).sin().sum()
            with context:
                loss.backward()
            found.append([p.grad for p in fxlora.lora_parameters(module)])
            module.zero_grad()
        assert_alike(*found[::-1])


def test_a_write_to_what_is_read_again_is_an_error() -> None:
    class Writes(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            y = self.down(F.silu(self.gate(x)) * self.up(x))
            return y + x.mul_(2)  # which the joint op of the gate saved

    model = Writes().double()
    lora = fxlora.adapt(model, X, rules=CONFIG)
    fast = fxlora.optimize(lora, recompute=True)
    for module in (lora, fast):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            module(X).sum().backward()


class Moved(nn.Module):
    """Writes to an alias of a chain's input between the chain and the layer that reads it."""

    def __init__(self, alias: Callable[[torch.Tensor], torch.Tensor], constant: bool) -> None:
        super().__init__()
        self.alias, self.constant = alias, constant
        self.first, self.q, self.c = nn.Linear(6, 6), nn.Linear(6, 8), nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        a = F.silu(x + 1)
        z = self.alias(x)
        z += 1 if self.constant else self.c
        return self.q(a) + z.sum()


@pytest.mark.parametrize(
    "alias",
    [
        lambda x: F.dropout(x, 0.3, False),
        lambda x: x.type_as(torch.ones(1, dtype=x.dtype)),
        lambda x: torch.einsum("abc->bac", x),
        lambda x: torch.broadcast_tensors(x, x[:1])[0],
        lambda x: x.view(-1, 6),
    ],
    ids=["dropout", "type_as", "einsum", "broadcast", "view"],
)
def test_a_chain_does_not_pass_a_write(alias: Any) -> None:
    model = Moved(alias, constant=False).double()
    lora = fxlora.adapt(model, X, rules=CONFIG).eval()
    randomise(lora)
    fast = fxlora.optimize(lora, recompute=True)
    torch.testing.assert_close(fast(X), lora(X), **EXACT)
    assert_alike(gradients(fast), gradients(lora))


def test_a_chain_that_ends_in_a_bias() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.last = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b = self.h(x).mean((0, 1))
            return F.linear(x, self.last.weight, (b * b.sigmoid()).tanh() * 0.5)

    lora = fxlora.adapt(Biased().double(), X, rules=CONFIG)
    randomise(lora)
    fast = fxlora.optimize(lora, recompute=True)
    assert_alike(gradients(fast), gradients(lora))


def test_with_a_frozen_a_no_more_is_saved() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(((-x).unsqueeze(0).expand(8, *x.shape) + 1) * 2)

    x = torch.randn(16, 5, 6, dtype=torch.float64)
    plain = LoraConfig(r=2, target_modules="all-linear")
    for config in (plain, replace(plain, variant="fa")):
        lora = fxlora.adapt(Wide().double(), x, rules=config).train()
        randomise(lora)
        fast = fxlora.optimize(lora, recompute=True)
        assert_alike(gradients(fast, x), gradients(lora, x))
        less = saved(fast, x) < saved(fxlora.optimize(lora), x)
        assert less is (config is plain) and less is bool(ends(fast))
        assert saved(fast, x) <= saved(fxlora.optimize(lora), x)
