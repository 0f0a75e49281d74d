"""route(…, mixture=k, weights=True): each sample gets a weighted sum of k adapters."""

from __future__ import annotations

import copy

import pytest
import torch

import fxlora
from fxlora import ConfigError, InjectError, InputError, UnsupportedOpError

from .laws import TOLERANCE
from .models import Mlp
from .oracle import floats
from .routing import GATHERED, X, adapted, captured, config

IDS = torch.tensor([[0, 1], [-1, -1], [1, -1], [0, 0], [1, 0], [-1, 0]])
WEIGHTS = torch.tensor([[0.5, -2], [3, 1], [0.25, 7], [2, 1.5], [1, 1], [9, -0.5]])


@pytest.mark.parametrize("kind", [kind for kind in GATHERED if kind != "attention"])
def test_a_mixture_is_the_weighted_sum_of_its_adapters(kind: str) -> None:
    make, args, rules = GATHERED[kind]
    model = make().double()
    gm = captured(model, *args)
    loras = [adapted(gm, rule) for rule in rules[:2]]
    loras += [adapted(gm, rules[0])] * (2 - len(loras))
    routed = fxlora.route(loras, mixture=2, weights=True)
    count = args[0].shape[0]
    ids, weights = IDS[:count], WEIGHTS[:count]
    with torch.no_grad():
        found = floats(routed(*args, adapter_ids=ids, adapter_weights=weights))
        base = floats(gm(*args))
    before = {name: p.detach().clone() for name, p in gm.named_parameters()}
    moved = [
        {name: p.detach() - before[name] for name, p in fxlora.fold(lora).named_parameters()}
        for lora in loras
    ]
    for sample in range(count):
        source = copy.deepcopy(model).eval()
        with torch.no_grad():
            for slot, weight in zip(ids[sample].tolist(), weights[sample].tolist(), strict=True):
                for name, parameter in source.named_parameters():
                    parameter.add_(moved[slot][name] * (weight if slot >= 0 else 0))
            expected = floats(source(*args))
        for ours, theirs, plain in zip(found, expected, base, strict=True):
            scale = float(theirs.abs().max())
            assert float((ours[sample] - theirs[sample]).abs().max()) <= TOLERANCE * scale
            changed = float((ours[sample] - plain[sample]).abs().max()) > 1e-6
            assert changed == bool((ids[sample] >= 0).any())
    assert fxlora.remove(routed).code == gm.code


def test_a_mixture_without_weights_is_a_sum_and_trains_only_its_adapters() -> None:
    gm = captured(Mlp(), X)
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["up"])), adapted(gm, config(3))]
    both = gm
    for name, lora in zip("ab", loras, strict=False):
        rules = config(lora.plan.entries[0].r, [e.site for e in lora.plan])  # pyright: ignore
        plan = fxlora.match(gm, rules, adapter_name=name)
        starts = {
            n.replace(".default.", f".{name}."): lora.get_parameter(n)
            for n in lora.adapter_parameters()
        }
        both = fxlora.inject(both, plan, starts=starts)
    routed = fxlora.route(loras, mixture=2)
    ids = torch.tensor([[0, 1]] * 6)
    y = routed(X, adapter_ids=ids)
    assert torch.allclose(y, both.eval()(X), rtol=0, atol=1e-12)
    assert not torch.allclose(y, loras[0](X))
    y.square().sum().backward()
    both(X).square().sum().backward()
    for lora, name, slot in ((loras[0], "a", 0), (loras[1], "b", 1)):
        for n in lora.adapter_parameters():
            expected = both.get_parameter(n.replace(".default.", f".{name}.")).grad
            stack = routed.get_parameter(n.replace(".default.", ".routed."))
            assert expected is not None and stack.grad is not None
            inner = stack.grad[(slot, *(slice(size) for size in expected.shape))]
            assert torch.allclose(inner, expected, rtol=0, atol=1e-12)
            assert not stack.grad[2].any() and not stack.grad[3].any()


def test_adapters_of_one_module_are_routed_by_name() -> None:
    gm = captured(Mlp(), X)
    lora = gm
    for name, r in (("a", 2), ("b", 1), ("c", 3)):
        lora = fxlora.inject(
            lora, fxlora.match(gm, config(r, init_lora_weights=False), adapter_name=name)
        )
    routed = fxlora.route(lora.eval(), adapters=["c", "a"], slots=3)
    y = routed(X, adapter_ids=torch.tensor([0, 1, -1, 2, 0, 1]))
    for sample, name in enumerate("ca--ca"):
        expected = fxlora.activate(lora, [] if name == "-" else name)(X)[sample]
        assert torch.allclose(y[sample], expected, rtol=0, atol=1e-12)
    assert fxlora.route(lora).known.routing.slots == 3  # pyright: ignore
    with pytest.raises(InjectError, match="no adapter 'd'"):
        fxlora.route(lora, adapters=["d"])
    with pytest.raises(InjectError, match="route takes one adapter, and a, b, c are active"):
        fxlora.route([lora])
    with pytest.raises(ConfigError, match="instead of a list"):
        fxlora.route([lora], adapters=["a"])


def test_what_a_mixture_cannot_do_is_refused() -> None:
    gm = captured(Mlp(), X)
    lora = adapted(gm, config(2))
    routed = fxlora.route([lora], mixture=2)
    with pytest.raises(InputError, match="adapter_ids"):
        routed(X, adapter_ids=torch.tensor([0] * 6))
    with pytest.raises(InputError, match="from -1"):
        routed(X, adapter_ids=torch.tensor([[0, 1]] * 6))
    with pytest.raises(ConfigError, match="mixture must be a number from 1"):
        fxlora.route([lora], mixture=0)
    dora = adapted(gm, config(2, use_dora=True))
    with pytest.raises(UnsupportedOpError, match=r"takes no weights and no mixture") as caught:
        fxlora.route([dora], mixture=2)
    assert "fxlora.combine" in str(caught.value)
