"""Gradients of frozen weights that a library's op computes: optimize leaves them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxlora
from fxlora import CapturedModule, LoraConfig
from fxlora.fast.frozen import GradientOfInput

from .laws import randomise

F64 = torch.float64


# ---- ops as libraries have them -----------------------------------------------------------------


@torch.library.custom_op("fxlora_test_frozen::grouped", mutates_args=())
def grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    y, begin = x.new_zeros(x.shape[0], w.shape[2]), 0
    for group, end in enumerate(ends.tolist()):
        y[begin:end] = x[begin:end] @ w[group]
        begin = end
    return y


@torch.library.custom_op("fxlora_test_frozen::grouped_backward", mutates_args=())
def grouped_backward(
    x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor, g: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    of_x, of_w, begin = torch.zeros_like(x), torch.zeros_like(w), 0
    for group, end in enumerate(ends.tolist()):
        of_x[begin:end] = g[begin:end] @ w[group].T
        of_w[group] = x[begin:end].T @ g[begin:end]
        begin = end
    return of_x, of_w


grouped.register_fake(lambda x, w, ends: x.new_empty(x.shape[0], w.shape[2]))
grouped_backward.register_fake(lambda x, w, ends, g: (torch.empty_like(x), torch.empty_like(w)))
WASTEFUL = torch.ops.fxlora_test_frozen.grouped_backward.default


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


grouped.register_autograd(
    lambda ctx, g: (*grouped_backward(*ctx.saved_tensors, g), None), setup_context=_keep
)


def product(name: str, of_x: Any, of_w: Any) -> Any:
    """Return an op x @ w with these gradients."""

    @torch.library.custom_op(f"fxlora_test_frozen::{name}", mutates_args=())
    def multiplied(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    multiplied.register_fake(lambda x, w: x.new_empty(x.shape[0], w.shape[1]))
    multiplied.register_autograd(
        lambda ctx, g: (of_x(g, *ctx.saved_tensors), of_w(ctx, g, *ctx.saved_tensors)),
        setup_context=_keep,
    )
    return multiplied


def both(ctx: Any, g: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.T @ g


WASTEFUL_PRODUCT = product("both", lambda g, x, w: g @ w.T, both)
FRUGAL = product(
    "needed",
    lambda g, x, w: g @ w.T,
    lambda ctx, g, x, w: x.T @ g if ctx.needs_input_grad[1] else None,
)
CLIPPED = product("clipped", lambda g, x, w: (g @ w.T).clamp(-0.5, 0.5), both)


# ---- models -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A layer, groups of its rows with a matrix each, and a layer; some rows are in no group."""

    def __init__(self, trained: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(7, 3)
        self.experts = nn.Parameter(torch.randn(4, 5, 7), requires_grad=trained)
        self.register_buffer("ends", torch.tensor([3, 3, 8, 10]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(grouped(self.first(x), self.experts, self.ends).tanh())


class Product(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.first, self.last, self.op = nn.Linear(6, 5), nn.Linear(7, 3), op
        self.matrix = nn.Parameter(torch.randn(5, 7), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.op(self.first(x), self.matrix).tanh())


X = torch.randn(11, 6, dtype=F64)


def adapted(model: nn.Module, **options: Any) -> tuple[CapturedModule, Any]:
    """Return an adapted module and its optimized form."""
    torch.manual_seed(0)
    rules = LoraConfig(r=2, lora_alpha=3, target_modules=["first", "last"], **options)
    lora = fxlora.adapt(model.to(F64), X, rules=rules).train()
    randomise(lora)
    return lora, fxlora.optimize(lora)


def called(fast: CapturedModule) -> Any:
    """Return what the running graph calls in the place of the op."""
    nodes = fast.running(fast.graph).nodes
    return next(node.target for node in nodes if isinstance(node.target, GradientOfInput))


def left_out(fast: CapturedModule) -> dict[str, int]:
    assert fast.schedule is not None
    return dict(fast.schedule.one_gradient)


class Ops(TorchDispatchMode):
    """Notes the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def step(module: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor], list[Any]]:
    """Return the output, the gradients, and the ops of the backward."""
    y = module(X)
    wrt = [p for p in module.parameters() if p.requires_grad]
    with Ops() as ops:
        found = torch.autograd.grad(y.sin().sum(), wrt)
    return y, list(found), ops.seen


# ---- tests --------------------------------------------------------------------------------------


def test_the_gradient_of_frozen_experts_is_left_out() -> None:
    lora, fast = adapted(Experts())
    assert left_out(fast) == {"fxlora_test_frozen.grouped.default": 1}
    assert "gradient of a frozen weight left out" in str(fast.schedule)
    (y, expected, ops), (found_y, found, fast_ops) = step(lora), step(fast)
    assert float((y - fxlora.remove(lora)(X)).detach().abs().max()) > 0.01
    assert all(g.any() for g in expected)
    torch.testing.assert_close(found_y, y, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert WASTEFUL in ops and WASTEFUL not in fast_ops
    assert left_out(fxlora.optimize(lora.eval())) == left_out(fast)


def test_it_has_the_gradients_of_the_formula() -> None:
    _, fast = adapted(Experts())
    call = called(fast)
    w, ends = torch.randn(4, 5, 7, dtype=F64), torch.tensor([3, 3, 8, 10])

    def formula(x: torch.Tensor) -> torch.Tensor:
        parts = [x[:3] @ w[0], x[3:8] @ w[2], x[8:10] @ w[3], x[10:] @ w[3] * 0]
        return torch.cat(parts)

    x = torch.randn(11, 5, dtype=F64, requires_grad=True)
    torch.testing.assert_close(call(x, w, ends), formula(x), rtol=1e-10, atol=1e-10)
    found, expected = (
        torch.autograd.grad(f.sin().sum(), x)[0] for f in (call(x, w, ends), formula(x))
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def of_x(x: torch.Tensor) -> torch.Tensor:
        return call(x, w, ends)

    assert torch.autograd.gradcheck(of_x, x)
    assert torch.autograd.gradgradcheck(of_x, x)


def test_a_trained_weight_keeps_its_gradient() -> None:
    lora, fast = adapted(Experts(), target_parameters=["experts"])
    (y, expected, _), (found_y, found, ops) = step(lora), step(fast)
    torch.testing.assert_close(found_y, y, rtol=1e-12, atol=1e-12)
    assert WASTEFUL in ops
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("op", "leaves_out"), [(WASTEFUL_PRODUCT, True), (FRUGAL, False), (CLIPPED, False)]
)
def test_only_ops_that_are_their_own_adjoint_and_waste_change(op: Any, leaves_out: bool) -> None:
    lora, fast = adapted(Product(op))
    assert bool(left_out(fast)) is leaves_out
    (y, expected, _), (found_y, found, _) = step(lora), step(fast)
    torch.testing.assert_close(found_y, y, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_without_gradients_under_autocast_and_compiled() -> None:
    lora, fast = adapted(Product(WASTEFUL_PRODUCT))
    with torch.no_grad():
        torch.testing.assert_close(fast(X), lora(X), rtol=1e-10, atol=1e-10)
    given = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert "OfInput" not in called(fast)(*given).grad_fn.name()
    assert "OfInput" in called(fast)(*given).grad_fn.name()
    torch._dynamo.reset()
    run = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(X), lora(X), rtol=1e-10, atol=1e-10)
    wrt = [p for p in fast.parameters() if p.requires_grad]
    theirs = [p for p in lora.parameters() if p.requires_grad]
    pairs = (torch.autograd.grad(m(X).sum(), p) for m, p in ((run, wrt), (lora, theirs)))
    for mine, its in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)
