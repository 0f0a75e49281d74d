"""Adapted 1x1 convolutions with the one weight W + s·BA: equal to the branch, where it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora import CapturedModule, LoraConfig
from fxlora.fast import merged
from fxlora.fast.merged import Merged

from .laws import randomise

F64 = torch.float64


class Narrow(nn.Module):
    """Convolutions with and without kernels, groups, steps and biases, and narrow layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(3, 4, 3, padding=1)
        self.point, self.step = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1, stride=2, bias=False)
        self.line = nn.Conv1d(5, 7, 1)
        self.grouped, self.linear = nn.Conv1d(7, 14, 1, groups=7), nn.Linear(14, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.step(self.point(self.kernel(x).tanh()).tanh()).flatten(2).tanh()
        h = self.grouped(self.line(h).tanh()).transpose(1, 2).tanh()
        return self.linear(h)


X = torch.randn(2, 3, 10, 12, dtype=F64)
CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules=["kernel", "point", "step", "line", "linear"])


def adapted(x: torch.Tensor = X, **changed: Any) -> CapturedModule:
    torch.manual_seed(0)
    lora = fxlora.adapt(Narrow().to(x.dtype), x, rules=CONFIG, **changed)
    randomise(lora)
    return lora


def sites(fast: CapturedModule) -> set[str]:
    assert fast.schedule is not None
    return {site for group in fast.schedule.groups if group.merged for site in group.sites}


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    given = x.clone().requires_grad_()
    wrt = [given, *(p for p in module.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(module(given).sin().sum(), wrt))


NARROW = {"point", "step", "line"}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "_SHARE", 0.0)


@pytest.mark.parametrize("mode", [True, False])
def test_it_is_the_branch(mode: bool, always: None) -> None:
    lora = adapted().train(mode)
    fast = fxlora.optimize(lora)
    assert sites(fast) == NARROW and "one weight, W + s·BA" in str(fast.schedule)
    assert not any(isinstance(node.target, Merged) for node in lora.graph.nodes)
    y = lora(X)
    assert float((y - fxlora.remove(lora)(X)).detach().abs().max()) > 0.01
    torch.testing.assert_close(fast(X), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast(X), fxlora.fold(lora)(X), rtol=1e-10, atol=1e-10)
    for found, expected in zip(gradients(fast, X), gradients(lora, X), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert str(fxlora.explicit(fast).graph) == str(lora.graph)


def test_it_is_the_formula_of_a_convolution(always: None) -> None:
    lora = adapted()
    nodes = fxlora.optimize(lora).running(lora.graph).nodes
    call: Any = next(n for n in nodes if isinstance(n.target, Merged) and "point" in str(n.args))
    w, a, b = (torch.randn(*s, dtype=F64) for s in ((6, 4, 1, 1), (2, 4, 1, 1), (6, 2, 1, 1)))
    x, bias = torch.randn(2, 4, 5, 3, dtype=F64), torch.randn(6, dtype=F64)
    given = [value.requires_grad_() for value in (x, a, b)]

    def called(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return call.target(x, w, a, b, bias)

    summed = torch.einsum("oi,bihw->bohw", w[..., 0, 0] + 1.5 * b.flatten(1) @ a.flatten(1), x)
    expected = summed + bias[:, None, None]
    torch.testing.assert_close(called(*given), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(called, given)


def test_only_where_it_pays() -> None:
    assert merged.pays(3136, 64, 256, 16) and merged.pays(3136, 256, 64, 16)
    assert not merged.pays(784, 128, 512, 16) and not merged.pays(256, 1024, 1024, 16)
    assert not merged.pays(1, 64, 64, 4)  # the weight would be formed for one row
    wide = nn.Sequential(nn.Conv2d(64, 96, 1), nn.Tanh(), nn.Conv2d(96, 4, 1))
    x = torch.randn(1, 64, 9, 10)
    lora = fxlora.adapt(wide, x, rules=LoraConfig(r=2, target_modules=["0", "2"]))
    assert sites(fxlora.optimize(lora)) == {"2"}


def test_the_rows_of_each_call_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted(dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})
    fast = fxlora.optimize(lora)
    assert "point" in sites(fast)
    nodes = fast.running(fast.graph).nodes
    call: Any = next(n for n in nodes if isinstance(n.target, Merged) and "point" in str(n.args))
    asked: list[int] = []

    def pays(rows: int, *_: int) -> bool:
        asked.append(rows)
        return rows > 120

    monkeypatch.setattr(merged, "pays", pays)
    for samples in (1, 3):
        x = torch.randn(samples, 3, 10, 12, dtype=F64)
        torch.testing.assert_close(fast(x), lora(x), rtol=1e-10, atol=1e-10)
    assert {120, 360} <= set(asked) and call.target.steps == 1


def test_in_half_precision_and_under_autocast_it_is_the_branch(always: None) -> None:
    fast = fxlora.optimize(adapted(X.float()))
    nodes = fast.running(fast.graph).nodes
    call: Any = next(n for n in nodes if isinstance(n.target, Merged) and "point" in str(n.args))
    w, a, b = torch.randn(6, 4, 1, 1), torch.randn(2, 4, 1, 1), torch.randn(6, 2, 1, 1)
    x, bias = torch.randn(2, 4, 5, 3), torch.randn(6)
    half = [value.bfloat16() for value in (x, w, a, b, bias)]
    branch = F.conv2d(half[0], half[1], half[4])
    branch = branch + F.conv2d(F.conv2d(half[0], half[2]) * 1.5, half[3])
    assert torch.equal(call.target(*half), branch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call.target(x, w, a, b, bias), branch)
    assert not sites(fxlora.optimize(adapted(X.bfloat16())))


def test_compiled_and_in_transforms(always: None) -> None:
    lora = adapted()
    fast = fxlora.optimize(lora)
    compiled: Any = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for found, expected in zip(gradients(compiled, X), gradients(lora, X), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    trained = {n: p for n, p in fast.named_parameters() if p.requires_grad}

    def loss(module: nn.Module) -> Any:
        return lambda p: torch.func.functional_call(module, p, X).sin().sum()

    ours, theirs = (torch.func.grad(loss(module))(trained) for module in (fast, lora))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10)
