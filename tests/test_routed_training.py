"""Training of a routed graph: the gradient of a sample reaches its own adapter only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import (
    UnsupportedOpError,
)

from .models import Mlp
from .routing import ALL, GATHERED, IDS, PER_SLOT, X, adapted, captured, check_samples, config
from .typed import grad_of

# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolutions", "padding", "parts", "tied"])
def test_gradients_are_those_of_each_adapter_alone(kind: str) -> None:
    model, args, rules = GATHERED[kind]
    _check_gradients(model(), args, rules)


@pytest.mark.parametrize("kind", ["dora", "head in full", "recurrent"])
def test_gradients_where_values_are_computed_once_per_slot(kind: str) -> None:
    model, args, rules = PER_SLOT[kind]
    _check_gradients(model(), args, rules)


def _check_gradients(model: nn.Module, args: tuple[Any, ...], rules: list[Any]) -> None:
    gm = captured(model, *args)
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras, slots=3)
    routed(*args, adapter_ids=IDS).square().sum().backward()
    routing = routed.known.routing
    assert routing is not None
    places = {entry.prefix: entry for entry in routing.entries}
    for slot, lora in enumerate(loras):
        own = slot == IDS
        lora(*(given[own] for given in args)).square().sum().backward()
        for entry in lora.plan or ():
            for name, stack in zip(entry.tensors, places[entry.prefix].tensors, strict=True):
                parameter = lora.get_parameter(name)
                if parameter.requires_grad:
                    _compare_gradient(routed.get_parameter(stack), slot, grad_of(parameter))
        for name in lora.trained:
            stack = routed.get_parameter(routing.full[name])
            _compare_gradient(stack, slot, grad_of(lora.get_parameter(name)))
    for name in routing.trainable:
        assert not grad_of(routed.get_parameter(name))[2:].any()  # the empty slot, and the base


def _compare_gradient(stack: nn.Parameter, slot: int, expected: torch.Tensor) -> None:
    found = grad_of(stack)[slot]
    own = tuple(slice(size) for size in expected.shape)
    assert float(expected.abs().max()) > 0
    scale = float(expected.abs().max())
    assert float((found[own] - expected).abs().max()) <= 1e-9 * scale
    rest = found.clone()
    rest[own] = 0
    assert not rest.any()  # the padding


@pytest.mark.parametrize("first", [{}, {"use_dora": True}, {"modules_to_save": ["down"]}])
def test_what_no_adapter_trains_stays_as_it_is_in_training(first: dict[str, Any]) -> None:
    gm = captured(Mlp(), X)
    every = ["up"] if "modules_to_save" in first else ALL
    more = {"use_dora": True} if "use_dora" in first else {}
    loras = [adapted(gm, config(3, every, **first)), adapted(gm, config(1, ["up"], **more))]
    routed = fxlora.route(loras, slots=3)
    parameters = fxlora.lora_parameters(routed)
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
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


def test_dropout_is_in_the_train_graph_only_and_alike() -> None:
    gm = captured(Mlp(), X)
    loras = [adapted(gm, config(2, lora_dropout=0.5)) for _ in range(2)]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    ids = torch.zeros(6, dtype=torch.long)
    first, second = (routed.train()(X, adapter_ids=ids) for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(UnsupportedOpError, match=r"differ in dropout \(0\.5 and 0\.0\)"):
        fxlora.route([loras[0], adapted(gm, config(2))])


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
