"""Classifier-free guidance: a denoiser with a condition, without one, and with both in a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import LoraConfig

from .laws import assert_close, assert_same, assert_untouched, distance, randomise, snapshot
from .oracle import called_with, merged_weights
from .typed import grad_of

Denoiser = Callable[..., torch.Tensor]


class CrossAttention(nn.Module):
    """Attends from the places of an image to the tokens of a condition."""

    def __init__(self, size: int, context: int, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.GroupNorm(2, size), heads
        self.to_q = nn.Linear(size, 12, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, 12, bias=False) for _ in range(2))
        self.to_out = nn.Linear(12, size)

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:  # (batch, tokens, 12): a sequence per head
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        places = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(places), self.to_k(context), self.to_v(context)
        found = F.scaled_dot_product_attention(split(q), split(k), split(v))
        out = self.to_out(found.transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).unflatten(-1, h.shape[2:])


class UNet(nn.Module):
    """Predicts the noise in an image, as those of diffusers do; no condition is a learned one.

    The last layer's attention is left out of calls without a condition.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(6, 14), nn.SiLU(), nn.Linear(14, 8))
        self.inlet = nn.Conv2d(3, 8, 3, padding=1)
        self.attend = CrossAttention(8, 5)
        self.down = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.middle = CrossAttention(10, 5)
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.last = CrossAttention(16, 5)
        self.outlet = nn.Conv2d(16, 3, 3, padding=1)
        self.null = nn.Parameter(torch.randn(4, 5))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.1, 0.01], dtype=x.dtype)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        context = self.null.expand(x.shape[0], 4, 5) if condition is None else condition
        skip = self.attend(self.inlet(x) + time, context)
        h = self.up(self.middle(F.silu(self.down(skip)), context))
        h = torch.cat([h, skip], 1)
        return self.outlet(F.silu(h if condition is None else self.last(h, context)))


SCALE = 4.0


def both(denoise: Denoiser, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Guide by two calls (Ho & Salimans 2022, eq. 6, with a weight of SCALE - 1)."""
    unconditional = denoise(x, t, None)
    return unconditional + SCALE * (denoise(x, t, c) - unconditional)


def at_once(denoise: Denoiser, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Guide by one call: the conditions of the two halves of the batch are an empty one and c."""
    found = denoise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(c), c]))
    unconditional, conditional = found.chunk(2)
    return unconditional + SCALE * (conditional - unconditional)


def sampled(guide: Callable[..., torch.Tensor], denoise: Denoiser, *given: Any) -> torch.Tensor:
    """Return an image after three steps, through all of which gradients flow."""
    x, c = given
    for step in (9.0, 5.0, 2.0):
        x = x - 0.1 * guide(denoise, x, torch.full((len(x),), step, dtype=x.dtype), c)
    return x


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 3, 6, 4, generator=drawn, dtype=torch.float64)
    return x, torch.randn(rows, 4, 5, generator=drawn, dtype=torch.float64)


def examples() -> list[Any]:
    """Return a call with a condition, one without, and one with both in a batch of 2."""
    (x, c), t = inputs(1), torch.tensor([3.0], dtype=torch.float64)
    pair = torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.zeros_like(c), c])
    return [((x, t, c), {}), ((x, t), {}), (pair, {})]


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    return UNet().double().eval()


@pytest.fixture(scope="module")
def lora(model: UNet) -> fxlora.CapturedModule:
    """The captured model with adapters on all cross-attention, B still 0."""
    gm = fxlora.capture(model, calls=examples())
    assert len(gm.programs) == 2  # the batch of both is a larger one of the first call
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out"])
    return fxlora.inject(gm, fxlora.match(gm, config)).eval()


@pytest.mark.parametrize("training", [False, True])
def test_with_b_zero_each_call_is_the_sources(
    model: UNet, lora: fxlora.CapturedModule, training: bool
) -> None:
    frozen = [copy.deepcopy(m).requires_grad_(False).train(training) for m in (lora, model)]
    for args, kwargs in examples():  # torch chooses attention kernels by requires_grad
        assert_same(*([module(*args, **kwargs)] for module in frozen))
        if len(args) == 2:
            assert_same(*([module(*args, condition=None)] for module in frozen))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("guide", [both, at_once])
def test_guidance_and_its_gradients_are_the_merged_sources(
    model: UNet, lora: fxlora.CapturedModule, guide: Callable[..., torch.Tensor], rows: int
) -> None:
    before = snapshot(model)
    ours = copy.deepcopy(lora)
    randomise(ours)
    names = [name for entry in ours.plan or () for name in entry.trainable]
    assert len(names) == 24
    factors = {n: ours.get_parameter(n).detach().clone().requires_grad_() for n in names}
    weights = merged_weights(model, ours, factors)

    def merged(*args: Any) -> torch.Tensor:
        return called_with(model, weights, args)[0]

    given = inputs(rows)
    with torch.no_grad():
        bare = sampled(guide, model, *given)
    found, expected = sampled(guide, ours, *given), sampled(guide, merged, *given)
    assert distance([expected], [bare]) > 1e-2
    assert_close([found], [expected])
    with torch.no_grad():
        assert_close([sampled(guide, fxlora.fold(ours), *given)], [expected])
        assert_close([sampled(guide, fxlora.hosted(model, ours), *given)], [expected])
    found.square().sum().backward()
    wanted = torch.autograd.grad(expected.square().sum(), list(factors.values()))
    for name, gradient in zip(names, wanted, strict=True):
        assert float(gradient.abs().max()) > 1e-6, name
        assert_close([grad_of(ours.get_parameter(name))], [gradient])
    assert_untouched(model, before)


def test_a_guide_by_two_calls_needs_the_one_without_a_condition(model: UNet) -> None:
    gm = fxlora.capture(model, calls=examples()[2:]).eval()
    x, c = inputs(3)
    expected = sampled(at_once, model, x, c)
    assert_close([sampled(at_once, gm, x, c)], [expected])
    with pytest.raises(fxlora.InputError, match=r"condition.*None.*capture_more"):
        sampled(both, gm, x, c)
    more = fxlora.capture_more(gm, model, *examples()[1])
    assert_close([sampled(both, more, x, c)], [sampled(both, model, x, c)])


def test_the_condition_is_what_the_guidance_follows(
    model: UNet, lora: fxlora.CapturedModule
) -> None:
    """Adapters that only one of the calls reaches are found, and the sums are not the same."""
    ours = copy.deepcopy(lora)
    randomise(ours)
    report = fxlora.verify(ours, calls=examples())
    assert len(report.sites) == 12 and all(site.effect > 0 for site in report.sites)
    with pytest.raises(fxlora.VerificationError, match=r"'last\.to_.*several as calls="):
        fxlora.verify(ours, calls=examples()[1:2])
    x, c = inputs(2)
    guided = [sampled(both, ours, x, condition) for condition in (c, -c)]
    assert distance(guided[:1], guided[1:]) > 1e-3
