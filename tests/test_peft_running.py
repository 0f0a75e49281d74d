"""fxlora.peft: one base, with its buffers, serves all adapters, merged or not, as in PEFT."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fxlora import AdapterError, ConfigError, InjectError, LoraConfig
from fxlora.peft import get_peft_model

from .typed import untyped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

torch.manual_seed(0)
X = torch.randn(8, 6, dtype=torch.float64) * 3 + 1


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


CONFIGS: dict[str, dict[str, Any]] = {
    "x": {"r": 2, "lora_alpha": 3, "target_modules": ["a", "b"]},
    "y": {"r": 3, "target_modules": ["a", "b"]},
    "own": {"r": 1, "target_modules": ["b"], "modules_to_save": ["norm"]},
}


def renamed(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def set_both(theirs: Any, ours: Any, change: Callable[[torch.Tensor], Any]) -> None:
    """Change the tensors that train, in PEFT's model and so in ours."""
    held = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                change(parameter)
                held[renamed(name)].copy_(parameter)


@functools.cache
def made() -> tuple[Any, Any]:
    base = Normed().double().eval()
    theirs: Any = peft.get_peft_model(
        untyped(copy.deepcopy(base)), peft.LoraConfig(**CONFIGS["x"]), "x"
    )
    ours: Any = get_peft_model(base, LoraConfig(**CONFIGS["x"]), X, adapter_name="x")
    for name in ("y", "own"):
        theirs.add_adapter(name, peft.LoraConfig(**CONFIGS[name]))
        ours.add_adapter(name, LoraConfig(**CONFIGS[name]))
    set_both(theirs, ours, lambda tensor: tensor.add_(0.5 * torch.randn_like(tensor)))
    return theirs, ours.eval()


def pair() -> tuple[Any, Any]:
    """Return PEFT's model and ours, with equal tensors."""
    theirs, ours = (copy.deepcopy(model) for model in made())
    return theirs.eval(), ours


def active(model: Any, *names: str) -> None:
    mode = model.training
    getattr(model, "base_model", model).set_adapter(list(names))
    model.train(mode)


def assert_alike(theirs: Any, ours: Any) -> torch.Tensor:
    expected = theirs(X)
    torch.testing.assert_close(ours(X), expected, rtol=1e-10, atol=1e-10)
    return expected.detach()


def differ(*outputs: torch.Tensor) -> bool:
    return all(
        (one - other).abs().max() > 1e-3 for at, one in enumerate(outputs) for other in outputs[:at]
    )


def test_merges_in_steps_add_up_as_in_peft() -> None:
    models = theirs, ours = pair()
    plain, seen = ours.unload()(X), [assert_alike(*models)]
    for name in ("y", "x"):
        for model in models:
            model.merge_adapter([name])
        seen.append(assert_alike(*models))
    assert differ(plain, *seen) and ours.get_model_status().merged_adapters == ["y", "x"]
    with pytest.raises(ConfigError, match=r"'y' is merged: call unmerge_adapter\(\) first"):
        ours.delete_adapter("y")
    with pytest.raises(ValueError, match="while they are merged"):
        theirs.delete_adapter("y")
    assert_alike(copy.deepcopy(theirs).unload(), ours.unload())
    for model in models:
        model.unmerge_adapter()
    assert not differ(assert_alike(*models), seen[0])

    for model in models:
        model.merge_adapter(["y"])
    both = assert_alike(copy.deepcopy(theirs).merge_and_unload(), ours.merge_and_unload())
    assert not differ(both, seen[2])
    with theirs.disable_adapter(), ours.disable_adapter():
        assert not differ(assert_alike(*models), plain)
    assert not differ(assert_alike(*models), seen[0])  # no longer merged
    ours.delete_adapter("y")
    before = ours(X)
    with pytest.raises(
        ConfigError, match=r"own would run alone, and x, active, .*\['own', 'x'\]\)"
    ):
        ours.merge_adapter(["own"])
    assert ours.get_model_status().merged_adapters == [] and torch.equal(ours(X), before)

    for name in ("a.lora_A.x.weight", "a.lora_B.x.weight"):
        ours.get_parameter(name).data.fill_(1e200)
    with pytest.raises(InjectError, match="not finite"):
        ours.merge_adapter(safe_merge=True)
    assert ours.get_model_status().merged_adapters == []


def test_parameters_of_all_adapters_whatever_runs() -> None:
    def merged(model: Any) -> Any:
        model.merge_adapter(["x"])
        return model.unmerge_adapter

    def disabled(model: Any) -> Any:
        model = getattr(model, "base_model", model)
        model.disable_adapter_layers()
        return model.enable_adapter_layers

    for enter in (merged, disabled):
        models = pair()
        ours = models[1]
        before, names = assert_alike(*models), {n for n, _ in ours.named_parameters()}
        for model in models:
            model(X).square().sum().backward()
            leave = enter(model)
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            model.zero_grad()
            assert not any(p.grad is not None for p in model.parameters())
            leave()
            model(X).square().sum().backward()
            optimizer.step()
        assert differ(assert_alike(*models), before)
        leave = enter(ours)
        lora = {name for name in names if "lora_" in name}
        assert len(lora) == 10 and lora <= {n for n, _ in ours.named_parameters()}
        assert lora <= ours.state_dict().keys()


def test_a_loaded_base_serves_all_adapters() -> None:
    models = theirs, ours = pair()
    active(ours, "x", "y")  # held for later
    active(ours, "x")
    before, source, old = assert_alike(*models), ours.unload(), made()[1].state_dict()
    state = {
        name: tensor + 0.3 * torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    alike = {renamed(name): tensor for name, tensor in state.items()}
    alike = {
        name.replace("norm.original_module.", "norm."): tensor for name, tensor in alike.items()
    }
    assert alike.keys() == ours.state_dict().keys()
    ours.load_state_dict(alike)
    seen = [before, assert_alike(*models)]
    for names in (("y",), ("own",), ("x", "y")):
        for model in models:
            active(model, *names)
        seen.append(assert_alike(*models))
    with theirs.disable_adapter(), ours.disable_adapter():
        seen.append(assert_alike(*models))
    assert differ(*seen)
    assert_alike(copy.deepcopy(theirs).unload(), ours.unload())
    assert ours.unload() is not source and made()[1].unload() is source
    assert all(torch.equal(tensor, old[n]) for n, tensor in source.state_dict().items())
    ours.merge_adapter()
    with pytest.raises(ConfigError, match=r"x, y: merged now.*Call unmerge_adapter\(\)"):
        ours.load_state_dict(alike)
    ours.unmerge_adapter()
    ours.load_state_dict(alike)
    assert_alike(*models)


def test_a_state_of_other_active_adapters_is_refused_where_names_mean_others() -> None:
    _, ours = pair()
    state = ours.state_dict()  # norm.weight is the base's
    assert {"norm.modules_to_save.own.weight", "norm.modules_to_save.own.running_var"} <= set(state)
    other = copy.deepcopy(ours)
    active(ours, "own")
    with pytest.raises(
        AdapterError, match=r"the state has norm\.modules_to_save\.own.*set_adapter"
    ):
        ours.load_state_dict(state)
    own = ours.state_dict()  # norm.weight is the adapter's
    with pytest.raises(AdapterError, match=r"the state has no norm\.modules_to_save\.own"):
        other.load_state_dict(own)
    active(other, "own")
    other.load_state_dict(own)
    ours.disable_adapter_layers()
    ours.load_state_dict(state)
    ours.enable_adapter_layers()
    assert torch.equal(other(X), ours(X))


def test_buffers_are_those_of_peft_whichever_adapter_ran() -> None:
    models = pair()
    active(models[1], "x", "y")
    seen = []
    for step, names in enumerate((("x",), ("x", "y"), ("own",), ("y",), ("own",), ("x", "y"))):
        for model in models:
            active(model, *names)
            model.train()
            model(X - step)
            if step == 3:
                with model.disable_adapter():
                    model(X + 1)
            model.eval()
        seen.append(assert_alike(*models))
        with models[0].disable_adapter(), models[1].disable_adapter():
            seen.append(assert_alike(*models))
    copied = copy.deepcopy(models[1])
    assert_alike(models[0], copied)
    for model in (models[0], copied):
        active(model, "x")
    assert_alike(models[0], copied)
    active(models[0], "own")
    merged = models[1].merge_and_unload(adapter_names=["x", "y"])
    active(models[0], "x", "y")
    assert_alike(models[0], merged)
    stats = models[1].get_buffer("norm.running_mean")
    assert differ(stats, made()[1].get_buffer("norm.running_mean"))
    assert differ(*seen[::2])


def test_what_trains_after_the_adapters_were_off() -> None:
    """As in PEFT: nothing while they are, and then the active ones only."""
    models = pair()

    def trained(model: Any) -> set[str]:
        found = {name for name, p in model.named_parameters() if p.requires_grad}
        return {adapter for adapter in ("x", "y", "own") for name in found if f".{adapter}" in name}

    assert len({frozenset(trained(model)) for model in models}) == 1 and trained(models[0])
    for model in models:
        with model.disable_adapter():
            assert not trained(model)
    assert trained(models[0]) == trained(models[1]) == {"x"}


def test_unload_has_what_calls_and_training_left_in_the_model() -> None:
    """Statistics of a batch norm, and heads that train in full, as PEFT's result has them."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)).double().eval()
    x = torch.randn(8, 6, dtype=torch.float64)
    for head in ([], ["2"]):
        options: Any = {"r": 2, "target_modules": ["0"], "modules_to_save": head}
        ours = get_peft_model(copy.deepcopy(base), LoraConfig(**options), x)
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
        for model in (ours, theirs):
            model.train()
            torch.manual_seed(1)
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            values = [p for n, p in named if "lora_" not in n and n.endswith("weight")]
            with torch.no_grad():
                model(x)
                for value in values:
                    value.copy_(torch.linspace(-1, 1, value.numel()).view_as(value))
        found, expected = ours.unload().eval()(x), theirs.unload().eval()(x)
        assert len(values) == len(head) and differ(expected.detach(), base(x).detach())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_another_adapter_ends_a_merge(weighted: bool) -> None:
    models = pair()
    for model, config in zip(models, (peft.LoraConfig, LoraConfig), strict=True):
        model.merge_adapter(["x"])
        if weighted:
            model.add_weighted_adapter(["x", "y"], [0.5, 2.0], "new", "cat")
        else:
            model.add_adapter("new", untyped(config)(r=2, target_modules=["a"]))
        assert model.get_model_status().merged_adapters == []
    assert differ(assert_alike(*models), made()[1].unload()(X))
    torch.testing.assert_close(models[1].unload()(X), models[0].unload()(X), rtol=1e-10, atol=1e-10)
