"""The input of a routed graph, swaps of its slots, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import fxlora
from fxlora import (
    AdapterError,
    CapturedModule,
    ConfigError,
    InjectError,
    InputError,
    UnsupportedOpError,
)

from .laws import assert_same
from .models import Mlp, Normed
from .oracle import floats
from .routing import IDS, Two, X, adapted, captured, check_samples, config, wide

# ---- the input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed() -> CapturedModule:
    gm = captured(Mlp(), X)
    return fxlora.route([adapted(gm, config(2, ["up"])), adapted(gm, config(1))], slots=3)


@pytest.mark.parametrize("wrong", [-2, 3])
def test_an_id_out_of_range_raises(routed: CapturedModule, wrong: int) -> None:
    ids = IDS.clone()
    ids[4] = wrong
    with pytest.raises(InputError, match=f"from -1 .the base. to 2, but called with {wrong}"):
        routed(X, adapter_ids=ids)
    compiled = torch.compile(routed, backend="aot_eager", dynamic=True)
    with pytest.raises(RuntimeError, match="adapter_ids must be from -1"):
        compiled(X, adapter_ids=ids)


def test_the_ids_are_checked_like_every_input(routed: CapturedModule) -> None:
    for ids, why in ((None, "missing"), (IDS[:5], "is 5"), (IDS.int(), "int32")):
        given = {} if ids is None else {"adapter_ids": ids}
        with pytest.raises(InputError, match=why):
            routed(X, **given)


def test_functions_that_do_not_take_a_routed_module_say_what_to_do(routed: CapturedModule) -> None:
    for function in (fxlora.fold, fxlora.report, lambda m: fxlora.match(m, config(1))):
        with pytest.raises(InjectError, match="take_adapter"):
            function(routed)


def test_copies_and_moves_keep_the_slots(routed: CapturedModule) -> None:
    expected = routed(X, adapter_ids=IDS)
    copied = copy.deepcopy(routed)
    copied.load_state_dict(routed.state_dict())
    assert torch.equal(copied(X, adapter_ids=IDS), expected)
    moved = copied.to(torch.float32)
    found = moved(X.float(), adapter_ids=IDS)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_half_precision_is_rounded_as_with_one_adapter() -> None:
    gm = fxlora.capture(Mlp().bfloat16(), X.bfloat16()).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1))]
    found = fxlora.route(loras, slots=3)(X.bfloat16(), adapter_ids=IDS)
    for sample, slot in enumerate(IDS.tolist()):
        module = loras[slot] if slot in (0, 1) else gm
        assert torch.allclose(found[sample], module(X.bfloat16())[sample], atol=0.02)


def test_export_keeps_the_input_and_the_batch(routed: CapturedModule, tmp_path: Path) -> None:
    path = fxlora.export(routed, tmp_path / "routed.pt2", X, {"adapter_ids": IDS})
    program = torch.export.load(path).module()
    expected = routed(X, adapter_ids=IDS)
    assert torch.allclose(program(X[:4], adapter_ids=IDS[:4]), expected[:4], atol=1e-12)


def test_weights_multiply_the_effect_of_each_sample() -> None:
    gm = captured(Mlp(), X)
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["up"]))]
    routed = fxlora.route(loras, weights=True)
    ids = torch.tensor([0, -1, 1, 1, 0, 0])
    strengths = torch.tensor([0.5, 3.0, -2.0, 0.0, 1.0, 0.25])
    found = routed(X, adapter_ids=ids, adapter_weights=strengths)
    for sample, (slot, strength) in enumerate(zip(ids.tolist(), strengths.tolist(), strict=True)):
        module = copy.deepcopy(loras[slot] if slot >= 0 else gm)
        with torch.no_grad():
            for entry in module.plan or ():
                module.get_parameter(entry.name_b).mul_(strength)
        expected = module(X)[sample]
        assert torch.allclose(found[sample], expected, rtol=0, atol=1e-12)
        assert slot < 0 or strength == 1 or not torch.allclose(expected, loras[slot](X)[sample])
    with pytest.raises(InputError, match="adapter_weights: missing"):
        routed(X, adapter_ids=ids)
    assert fxlora.remove(routed).code == gm.code
    dora = adapted(gm, config(2, use_dora=True))
    with pytest.raises(UnsupportedOpError, match=r"'up\.weight' .* takes no weights"):
        fxlora.route([dora], weights=True)


# ---- swapping -----------------------------------------------------------------------------------


def test_swap_writes_in_place_without_another_compilation(tmp_path: Path) -> None:
    gm = captured(Mlp(), X)
    loras = [
        adapted(gm, config(2, ["up"], modules_to_save=["down"])),
        adapted(gm, config(1, ["up"])),
    ]
    routed = fxlora.route(loras, slots=3)
    other = adapted(gm, config(1, ["up"], lora_alpha=5))
    fxlora.save_adapter(other, tmp_path)
    counter = torch._dynamo.testing.CompileCounter()
    compiled: Any = torch.compile(routed, backend=counter, dynamic=True)
    with torch.no_grad():
        before = compiled(X, adapter_ids=IDS)
    count = counter.frame_count
    assert count > 0
    fxlora.swap_adapter(routed, 2, tmp_path)
    with torch.no_grad():
        after = compiled(X, adapter_ids=IDS)
    check_samples(compiled, gm, [*loras, other], (X,))
    assert counter.frame_count == count
    assert torch.equal(after[:4], before[:4]) and not torch.equal(after[4], before[4])
    fxlora.swap_adapter(routed, 0, other)
    check_samples(compiled, gm, [other, loras[1], other], (X,))
    assert counter.frame_count == count


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    gm = captured(Mlp(), X)
    routed = fxlora.route([adapted(gm, config(2, ["up"]))], rank=3)
    before = {name: tensor.clone() for name, tensor in routed.state_dict().items()}
    nan = adapted(gm, config(2, ["up"]))
    with torch.no_grad():
        fxlora.lora_parameters(nan)[-1].fill_(float("nan"))
    wrong = {
        "rank 4": adapted(gm, config(4, ["up"])),
        "down": adapted(gm, config(1, ["down"])),
        "not finite": nan,
        "variants": adapted(gm, config(1, ["up"], use_dora=True)),
    }
    for why, lora in wrong.items():
        with pytest.raises(AdapterError, match=why):
            fxlora.swap_adapter(routed, 0, lora)
    assert all(torch.equal(before[n], t) for n, t in routed.state_dict().items())
    roomy = adapted(gm, config(3, ["up"]))  # what the error advises
    fxlora.swap_adapter(routed, 0, roomy)
    check_samples(routed, gm, [roomy], (X,), ids=IDS.clamp(max=0))


def test_slots_are_checked(routed: CapturedModule) -> None:
    with pytest.raises(ConfigError, match="slot must be from 0 to 2"):
        fxlora.take_adapter(routed, 3)
    with pytest.raises(InjectError, match="slot 2 is empty"):
        fxlora.take_adapter(routed, 2)
    gm = fxlora.remove(routed)
    lora = adapted(gm, config(1))
    with pytest.raises(InjectError, match="takes a routed module"):
        fxlora.swap_adapter(lora, 0, lora)
    for modules, slots, why in (([], None, "with at least one"), ([lora] * 2, 1, "do not fit")):
        with pytest.raises(ConfigError, match=why):
            fxlora.route(modules, slots=slots)
    for module in ([gm], gm):
        with pytest.raises(InjectError, match="inject a plan first"):
            fxlora.route(module)


def test_modules_over_other_bases_are_refused() -> None:
    model = Mlp()
    one, two = captured(model, X), captured(copy.deepcopy(model), X)
    with torch.no_grad():
        two.get_parameter("up.bias").add_(1)
    with pytest.raises(InjectError, match=r"different base weights or calls \(up\.bias"):
        fxlora.route([adapted(one, config(1)), adapted(two, config(1))])


def test_buffers_that_one_adapter_changed_are_refused() -> None:
    gm = captured(Normed(), wide(6, 3, 5, 5))
    lora = adapted(gm, config(1, ["fc"]))
    lora.train()(wide(6, 3, 5, 5))
    with pytest.raises(InjectError, match=r"changed bn\.running_mean"):
        fxlora.route([lora])


def test_statistics_of_a_batch_that_trains_in_full_are_refused() -> None:
    gm = captured(Normed(), wide(6, 3, 5, 5))
    with pytest.raises(UnsupportedOpError, match=r"'bn\.weight': .* writes to memory"):
        fxlora.route([adapted(gm, config(1, ["fc"], modules_to_save=["bn"]))])


def test_adapters_that_differ_in_kind_at_a_weight_are_refused() -> None:
    gm = captured(Mlp(), X)
    with pytest.raises(UnsupportedOpError, match=r"'up': the adapters differ in variants"):
        fxlora.route(
            [adapted(gm, config(1, ["up"])), adapted(gm, config(1, ["up"], use_dora=True))]
        )
    with pytest.raises(UnsupportedOpError, match=r"'up\.weight' is trained in full by one"):
        fxlora.route(
            [
                adapted(gm, config(1, ["up"])),
                adapted(gm, config(1, ["down"], modules_to_save=["up"])),
            ]
        )


@pytest.mark.parametrize("modules", ["0", ["0.up", "1"], ["0", "0.up"]], ids=str)
def test_blocks_get_the_rows_as_an_argument(modules: Any) -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 4)).double()
    gm = fxlora.capture(model, X, modules=modules).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["0.up", "1"]))]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    seen: list[Any] = []
    block = routed.get_submodule(modules[0] if isinstance(modules, list) else modules)
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    routed(X, adapter_ids=IDS)
    handle.remove()
    assert seen[0]["adapter_rows"].tolist() == [i if i >= 0 else 3 for i in IDS.tolist()]
    mixed = fxlora.route(loras, mixture=2, weights=True)
    ids, weights = IDS.clamp(max=1)[:, None].repeat(1, 2), torch.tensor([[0.25, 0.75]] * 6)
    found = mixed(X, adapter_ids=ids, adapter_weights=weights)
    flat = fxlora.route(loras)(X, adapter_ids=ids[:, 0])
    assert torch.allclose(found, flat, rtol=0, atol=1e-12)
    removed = fxlora.remove(routed)
    assert removed.code == gm.code
    assert_same(floats(removed(X)), floats(gm(X)))
    routed.train()(X, adapter_ids=IDS).square().sum().backward()
    assert all(p.grad is not None for p in fxlora.lora_parameters(routed))


def test_every_captured_call_gets_the_input() -> None:
    class Scaled(Two):
        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) if scale is None else super().forward(x) * scale

    gm = fxlora.capture(Scaled().double(), calls=[((X,), {}), ((X, wide(6, 3)), {})]).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["b"]))]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    check_samples(routed, gm, loras, (X, wide(6, 3)))
