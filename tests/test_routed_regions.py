"""route inside regions that the graph calls: autocast, no_grad, checkpoints, and nested ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import UnsupportedOpError
from fxlora.fx.nested import every_call

from .routing import (
    IDS,
    Checkpointed,
    Two,
    X,
    adapted,
    captured,
    check,
    check_gradients,
    check_samples,
    config,
    long,
    per_slot,
    wide,
)
from .typed import grad_of, untyped


class Autocast(Two):
    """bfloat16 where the weights are float32; no float64 is cast to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.tanh(self.a(x))
        return self.b(hidden.to(x.dtype))


class InBoth(Two):
    """A checkpoint inside of an autocast, with tokens flattened, and time first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(rows: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.a(rows))

        b, t, _ = x.shape
        with torch.autocast("cpu", enabled=False):
            rows = untyped(checkpoint(inner, x.reshape(b * t, -1), use_reentrant=False))
            hidden = self.b(rows.reshape(b, t, -1).transpose(0, 1))
        return hidden.transpose(0, 1)


class NoGrad(Two):
    """The first layer is read under no_grad, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            still = torch.sigmoid(self.b(torch.tanh(x[:, :4])))
        return self.b(torch.tanh(self.a(x))) * still


class Embedded(nn.Module):
    """A look-up, a convolution and a product in a region."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv = nn.Embedding(11, 5), nn.Conv1d(5, 6, 3, padding=1)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        def inner(ids: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.conv(self.emb(ids).transpose(1, 2)))
            return self.out(hidden.transpose(1, 2))

        return untyped(checkpoint(inner, ids, use_reentrant=False))


REGIONS: dict[str, tuple[type[nn.Module], tuple[Any, ...], list[Any]]] = {
    "autocast": (Autocast, (X,), [config(2, lora_alpha=5), config(1, ["a"])]),
    "both": (InBoth, (wide(6, 7, 5),), [config(2), config(3, ["b"], use_rslora=True)]),
    "no_grad": (NoGrad, (X,), [config(2), config(1, ["b"])]),
    "each op": (
        Embedded,
        (long(6, 7),),
        [config(2, ["emb", "conv", "out"]), config(1, ["conv"], lora_alpha=3)],
    ),
}


@pytest.mark.parametrize("kind", REGIONS)
def test_gathered_in_regions(kind: str) -> None:
    model, args, rules = REGIONS[kind]
    routed = check(model(), args, *rules)
    assert not per_slot(routed)
    graph = routed.graphs["eval"]
    inside = [n for call in every_call(graph, routed) for g in call.graphs for n in g.graph.nodes]
    gathers = [node for node in inside if node.target is torch.ops.aten.index.Tensor]
    assert gathers


@pytest.mark.parametrize("kind", ["both", "each op"])
def test_gradients_in_regions(kind: str) -> None:
    model, args, rules = REGIONS[kind]
    check_gradients(model(), args, rules)


class Partly(Two):
    """A region with a layer that is computed once per slot, and one that is gathered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(given: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(given)).flip(0)).flip(0)

        return untyped(checkpoint(inner, x, use_reentrant=False))


def test_a_region_with_both_ways() -> None:
    assert per_slot(check(Partly(), (X,), config(2), config(1, ["a"])))
    rules = [config(2, ["b"], use_dora=True), config(1, ["a"])]
    assert per_slot(check(Checkpointed(), (X,), *rules))
    check_gradients(Partly(), (X,), [config(2), config(1, ["b"])])


class Linear(nn.Module):
    """A product in a checkpoint, of a weight that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4, bias=False)
        nn.init.zeros_(self.a.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return untyped(checkpoint(self.a.forward, x, use_reentrant=False))


@pytest.mark.parametrize("more", [{}, {"mixture": 2}], ids=str)
def test_dropout_in_regions_is_the_same_in_the_backward(more: Any) -> None:
    gm = captured(Linear(), X)
    loras = [adapted(gm, config(2, lora_dropout=p)) for p in (0.5, 0.0)]
    routed = fxlora.route(loras, **more)
    ids = IDS.clamp(max=1)
    given = {"adapter_ids": torch.stack([ids, ids * 0 - 1], 1) if more else ids}
    expected = routed(X, **given)
    found = routed.train()(X, **given)
    found.sum().backward()
    up = routed.get_parameter("a.lora_B.routed.weight")  # of which the outputs are linear
    assert abs(float((up * grad_of(up)).sum() - found.sum())) < 1e-10
    equal = (found - expected).abs().amax(1) < 1e-10
    assert not equal[ids == 0].any() and equal[ids != 0].all()
    assert fxlora.remove(routed).code == gm.code


def test_weights_and_mixtures_in_regions() -> None:
    gm = captured(Checkpointed(), X)
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["a"]))]
    mixed = fxlora.route(loras, mixture=2, weights=True)
    ids = torch.tensor([[0, -1], [0, 1], [1, 0], [-1, -1], [1, -1], [0, 1]])
    weights = torch.tensor([[1.0, 9], [0.5, 0.5], [0.5, 0.5], [1, 1], [1, 9], [0, 1]])
    found = mixed(X, adapter_ids=ids, adapter_weights=weights)
    mean = fxlora.combine(loras, [0.5, 0.5], "cat").eval()
    expected = [loras[0], mean, mean, gm, loras[1], loras[1]]
    for sample, module in enumerate(expected):
        assert torch.allclose(found[sample], module(X)[sample], rtol=0, atol=1e-10)
        assert module is gm or not torch.allclose(found[sample], gm(X)[sample], atol=1e-3)
    assert fxlora.remove(mixed).code == gm.code


class Deciding(Two):
    """A choice by a value inside of a region, in front of the second layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(given: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.a(given))
            chosen = torch.cond(hidden.sum() > 0, torch.sin, lambda h: h.flip(0).cos(), (hidden,))
            return self.b(untyped(chosen))

        return untyped(checkpoint(inner, x, use_reentrant=False))


class Decided(Two):
    """A region behind a choice by a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        chosen = torch.cond(hidden.sum() > 0, torch.sin, lambda h: h.flip(0).cos(), (hidden,))
        return untyped(
            checkpoint(lambda given: self.b(given), untyped(chosen), use_reentrant=False)
        )


@pytest.mark.parametrize("kind", [Deciding, Decided])
def test_nothing_is_known_behind_a_choice_by_a_value(kind: type[Two]) -> None:
    with pytest.raises(UnsupportedOpError, match=r"'b\.weight': .* cannot be told apart"):
        fxlora.route([adapted(captured(kind(), X), config(2, ["b"]))])


def test_autocast_rounds_as_with_one_adapter() -> None:
    torch.manual_seed(1)
    gm = fxlora.capture(Autocast(), X.float()).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1))]
    found = fxlora.route(loras, slots=3)(X.float(), adapter_ids=IDS)
    for sample, slot in enumerate(IDS.tolist()):
        module = loras[slot] if slot in (0, 1) else gm
        assert torch.allclose(found[sample], module(X.float())[sample], atol=0.02)


def test_blocks_beside_regions() -> None:
    model = nn.Sequential(Checkpointed(), nn.Tanh(), nn.Linear(3, 4)).double()
    gm = fxlora.capture(model, X, modules="2").eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["0.a", "2"]))]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    routed.train()(X, adapter_ids=IDS).square().sum().backward()
    assert all(p.grad is not None for p in fxlora.lora_parameters(routed))
    assert fxlora.remove(routed).code == gm.code


class Reordering(nn.Module):
    """Python that no graph holds, between two submodules that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Two(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        order = sorted(range(len(hidden)), key=lambda i: float(hidden[i].sum()))
        return self.second(hidden[order])


@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
def test_python_between_submodules_is_refused() -> None:
    model = Reordering().double()
    gm = fxlora.capture(model, X).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1))]
    with pytest.raises(UnsupportedOpError, match=r"may reorder the samples.*activate"):
        fxlora.route(loras)
    check(model.first, (X,), config(2), config(1))  # what the error advises
    traced = fxlora.capture(Two().double())
    with pytest.raises(UnsupportedOpError, match=r"without example inputs.*capture\(model, args\)"):
        fxlora.route([adapted(traced, config(2))])
