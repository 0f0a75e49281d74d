"""Training of a routed graph: the gradient of a sample reaches its own adapter only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import CapturedModule

from .models import Mlp
from .routing import ALL, GATHERED, IDS, PER_SLOT, X, adapted, captured, check_gradients, config

# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolutions", "padding", "parts", "tied"])
def test_gradients_are_those_of_each_adapter_alone(kind: str) -> None:
    model, args, rules = GATHERED[kind]
    check_gradients(model(), args, rules)


@pytest.mark.parametrize("kind", ["dora", "head in full", "recurrent"])
def test_gradients_where_values_are_computed_once_per_slot(kind: str) -> None:
    model, args, rules = PER_SLOT[kind]
    check_gradients(model(), args, rules)


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        ({}, "AdamW"),
        ({}, "SGD"),
        ({"use_dora": True}, "SGD"),
        ({"modules_to_save": ["down"]}, "AdamW"),
    ],
)
def test_what_no_adapter_trains_stays_as_it_is_in_training(
    first: dict[str, Any], kind: str
) -> None:
    gm = captured(Mlp(), X)
    every = ["up"] if "modules_to_save" in first else ALL
    more = {"use_dora": True} if "use_dora" in first else {}
    loras = [adapted(gm, config(3, every, **first)), adapted(gm, config(1, ["up"], **more))]
    routed = fxlora.route(loras, slots=3)
    parameters = fxlora.lora_parameters(routed)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    if kind == "SGD":
        momentum = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
        optimizer = torch.optim.SGD(parameters, lr=0.01, **momentum)
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(3):
        optimizer.zero_grad()
        routed.train()(X, adapter_ids=IDS).square().sum().backward()
        optimizer.step()
    assert any((p - b).abs().max() > 0.01 for p, b in zip(parameters, before, strict=True))
    for parameter, old in zip(parameters, before, strict=True):
        assert not parameter[old == 0].any()  # the padding
    routed.eval()
    for slot in (-1, 2):
        assert torch.allclose(routed(X, adapter_ids=IDS * 0 + slot), gm(X), rtol=0, atol=1e-14)
    taken = fxlora.take_adapter(routed, 1)  # without a part of the first adapter
    assert torch.allclose(routed(X, adapter_ids=IDS * 0 + 1), taken(X), rtol=0, atol=1e-14)
    assert not torch.allclose(taken(X), gm(X), atol=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_adapter_that_no_sample_chose_only_decays(decay: float) -> None:
    gm = captured(Mlp(), X)
    routed = fxlora.route([adapted(gm, config(2)), adapted(gm, config(1, ["up"]))])
    parameters, ids = fxlora.lora_parameters(routed), IDS.clamp(max=0)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(parameters, lr=0.05, weight_decay=decay),
        torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=decay),
    ]
    for optimizer in optimizers:
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.zero_grad()
        routed(X, adapter_ids=ids).square().sum().backward()
        optimizer.step()
        assert any((p - b).abs().max() > 0.01 for p, b in zip(parameters, before, strict=True))
        for parameter, old in zip(parameters, before, strict=True):
            assert torch.allclose(parameter[1], old[1] * (1 - 0.05 * decay), rtol=1e-12, atol=0)


def dropping(gm: CapturedModule, p: float) -> CapturedModule:
    """Return an adapter that adds its input, with dropout in training."""
    lora = adapted(gm, config(5, lora_dropout=p, lora_alpha=5))
    with torch.no_grad():
        for name in lora.adapter_parameters():
            lora.get_parameter(name).copy_(torch.eye(5))
    return lora


def dropped(found: torch.Tensor, p: float) -> None:
    """Assert that ones were dropped with a probability, and the others scaled."""
    kept = 1 / (1 - p)
    assert torch.all((found == 0) | ((found - kept).abs() < 1e-6))
    assert abs(float((found == 0).double().mean()) - p) < 0.05


def test_each_sample_is_dropped_as_its_own_adapter_is(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layer = nn.Linear(5, 5, bias=False)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer)
    ones = torch.ones(1200, 5, dtype=torch.float64)
    gm = captured(model, ones)
    loras = [dropping(gm, p) for p in (0.5, 0.0, 0.25)]
    routed = fxlora.route(loras, slots=4)
    ids = torch.arange(1200) % 5 - 1
    assert torch.equal(routed(ones, adapter_ids=ids), ((ids >= 0) & (ids < 3))[:, None] * ones)
    fxlora.swap_adapter(routed, 3, dropping(gm, 0.8))
    found = routed.train()(ones, adapter_ids=ids)
    for slot, p in enumerate((0.5, 0.0, 0.25, 0.8)):
        dropped(found[ids == slot], p)
    assert not found[ids == -1].any()
    for slot, p in enumerate((0.5, 0.0, 0.25, 0.8)):
        plan = fxlora.take_adapter(routed, slot).plan
        assert plan is not None and [entry.dropout for entry in plan] == [p]
    assert routed.to(torch.bfloat16).get_parameter("0.lora_dropout.routed.weight")[2] == 0.25
    fxlora.export(routed.double().eval(), tmp_path / "a.pt2", ones, {"adapter_ids": ids})
    mixed = fxlora.route(loras, mixture=2).train()  # a mask for each
    found = mixed(ones, adapter_ids=torch.tensor([[0, 2]]).expand(1200, 2).contiguous())
    assert set(found.mul(3).round().unique().tolist()) == {0, 4, 6, 10}
    with pytest.warns(fxlora.FxLoraWarning, match="no adapter had lora_dropout there"):
        fxlora.swap_adapter(fxlora.route([loras[1]]).train(), 0, loras[0])


def test_dropout_that_a_weight_computed_per_slot_cannot_have_is_warned_of() -> None:
    gm = captured(Mlp(), X)
    lora = adapted(gm, config(2, ["up"], use_dora=True, lora_dropout=0.5))
    with pytest.warns(fxlora.FxLoraWarning, match="up: .* lora_dropout does not apply"):
        fxlora.route([lora])


def test_a_trained_adapter_is_taken_out_and_saved(tmp_path: Path) -> None:
    gm = captured(Mlp(), X)
    routed = fxlora.route(
        [adapted(gm, config(2, ["down"])), adapted(gm, config(1, ["down"], modules_to_save=["up"]))]
    )
    optimizer = torch.optim.SGD(fxlora.lora_parameters(routed), lr=0.01)
    routed(X, adapter_ids=IDS.clamp(max=1)).square().sum().backward()
    optimizer.step()
    for slot in (0, 1):
        taken = fxlora.take_adapter(routed, slot)
        fxlora.save_adapter(taken, tmp_path / str(slot))
        loaded = fxlora.load_adapter(gm, tmp_path / str(slot)).eval()
        expected = routed(X, adapter_ids=torch.full((6,), slot))
        assert torch.allclose(loaded(X), expected, atol=1e-12, rtol=0)
        assert not torch.allclose(loaded(X), gm(X), atol=1e-3)
