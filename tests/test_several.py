"""Several adapters in one module: each runs, trains, saves, folds and is removed alone."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import (
    AdapterError,
    CapturedModule,
    ConfigError,
    InjectError,
    InputError,
    LoraConfig,
    Rule,
    UnsupportedOpError,
)
from fxlora.fx.compare import difference

from .laws import assert_close, assert_same, randomise, run, snapshot
from .models import Convolutions, Mlp, Normed, Readers, Tied
from .oracle import called_with, merged_weights
from .routing import Checkpointed, long, wide
from .typed import grad_of, plan_of, untyped

ALL = "all-linear"
X = wide(6, 5)


def config(r: int, targets: Any = ALL, **more: Any) -> LoraConfig:
    return LoraConfig(r=r, target_modules=targets, **more)


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedModule:
    torch.manual_seed(1)
    return fxlora.capture(model.double(), args, **kwargs).eval()


def added(module: CapturedModule, rules: Any, name: str) -> CapturedModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxlora.FxLoraWarning)  # a pair larger than its weight
        plan = fxlora.match(module, rules, adapter_name=name)
    return fxlora.inject(module, plan)


def drawn(module: CapturedModule, rules: Any, name: str, seed: int) -> CapturedModule:
    """Return a module with one more adapter, with random values; all of its adapters active."""
    lora = added(module, rules, name)
    torch.manual_seed(seed)
    alone = fxlora.activate(lora, name)  # over the same memory
    randomise(alone)
    with torch.no_grad():
        for full in sorted(alone.trained):
            alone.get_parameter(full).add_(torch.randn_like(alone.get_parameter(full)), alpha=0.3)
    return lora.eval()


def two(
    rules_a: Any = None, rules_b: Any = None
) -> tuple[CapturedModule, CapturedModule, CapturedModule, CapturedModule]:
    """Return a base, modules with adapter a and with adapter b, and one with both."""
    gm = captured(Mlp(), X)
    of_a, of_b = rules_a or config(2), rules_b or config(1, ["up"])
    one = drawn(gm, of_a, "a", 2)
    return gm, one, drawn(gm, of_b, "b", 3), drawn(one, of_b, "b", 3)


def rule(names: Any = "*", **more: Any) -> Rule:
    return Rule(names, lora=LoraConfig(**more))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], Any, Any]] = {
    "linear, dropout": (Mlp, (X,), config(2, lora_dropout=0.2), config(1, ["up"])),
    "convolutions": (Convolutions, (wide(2, 6, 5, 18, 11),), rule(r=2), rule("c*", r=1)),
    "readers, weight form": (Readers, (X, long(6, 4)), rule(r=2), rule(r=1)),
    "tied": (Tied, (long(6, 4),), rule("emb", r=2), rule(["emb", "mix"], r=1)),
    "parts": (
        lambda: nn.Sequential(nn.Linear(5, 9)),
        (X,),
        Rule("0", parts=3, enable=[True, False, True], lora=LoraConfig(r=2)),
        rule("0", r=1),
    ),
    "nested graph": (Checkpointed, (X,), config(2), config(1, ["a"])),
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_runs_alone_and_together(kind: str) -> None:
    make, args, of_a, of_b = MODELS[kind]
    model = make().double()
    before = snapshot(model)
    gm = captured(model, *args)
    a, b = drawn(gm, of_a, "a", 2), drawn(gm, of_b, "b", 3)
    started = added(a, of_b, "b").eval()
    assert_same(run(started, args, {}), run(a, args, {}))  # B = 0
    both = drawn(a, of_b, "b", 3)
    base, alone_a, alone_b, together = (run(m, args, {}) for m in (gm, a, b, both))
    for one, other in ((base, alone_a), (base, alone_b), (together, alone_a), (together, alone_b)):
        assert max(float((x - y).abs().max()) for x, y in zip(one, other, strict=True)) > 1e-4
    for names, expected in (([], gm), (["a"], a), (["b"], b), (["b", "a"], both)):
        chosen = fxlora.activate(both, names)
        assert_same(run(chosen, args, {}), run(expected, args, {}))
        assert_same(run(chosen.train(), args, {}), run(expected.train(), args, {}))
        for mode in ("train", "eval"):
            assert difference(chosen.graphs[mode], expected.graphs[mode]) is None
        expected.eval()
    # W0 + s·BA of each, written out by the oracle
    source = dict(model.named_parameters(remove_duplicate=False))
    factors = {n: both.get_parameter(n).detach() for n in both.adapter_parameters()}
    of_each = [merged_weights(model, lora, factors) for lora in (a, b)]
    names = of_each[0].keys() | of_each[1].keys()
    summed = {n: sum((w[n] - source[n] for w in of_each if n in w), source[n]) for n in names}
    if kind != "nested graph":  # its checkpoint restores the old weights
        assert_close(
            together, [t.detach() for t in called_with(model.eval(), untyped(summed), args)]
        )
        model.train()
    folded = fxlora.fold(both)
    assert_close(run(folded, args, {}), together)
    for mode in ("train", "eval"):
        assert difference(folded.graphs[mode], gm.graphs[mode]) is None
    assert_close(run(fxlora.fold(both, adapter="b"), args, {}), alone_b)
    for name, left in (("a", b), ("b", a)):
        removed = fxlora.remove(both, adapter=name)
        assert list(removed.state_dict()) == list(left.state_dict())
        assert removed.known.adapters.keys() == left.known.adapters.keys()
        assert removed.code == left.code
        assert_same(run(removed, args, {}), run(left, args, {}))
    everything = fxlora.remove(both)
    assert everything.code == gm.code
    assert list(everything.state_dict()) == list(gm.state_dict())
    after = snapshot(model)
    assert all(torch.equal(after["state"][n], t) for n, t in before["state"].items())


def test_verify_of_each_and_of_all() -> None:
    _, _, _, both = two(config(2, lora_dropout=0.2), config(1, ["up"], lora_dropout=0.1))
    assert [site.site for site in fxlora.verify(both, X).sites] == ["up (a)", "down (a)", "up (b)"]
    assert [site.site for site in fxlora.verify(both, X, adapter="b").sites] == ["up"]
    optimized = fxlora.optimize(both)
    assert_close(run(optimized, (X,), {}), run(both, (X,), {}))
    with torch.no_grad():
        both.get_parameter("down.lora_A.a.weight")[0, 0] = float("nan")
    with pytest.raises(fxlora.VerificationError, match=r"down\.lora_A\.a\.weight"):
        fxlora.verify(both, X)
    with pytest.raises(InjectError, match="no adapter 'c': the module has a, b"):
        fxlora.verify(both, X, adapter="c")


def test_each_trains_alone() -> None:
    _, one, other, both = two()
    for name, reference in (("a", one), ("b", other)):
        chosen = fxlora.activate(both, name).train()
        own = {n for n in both.adapter_parameters() if f".{name}." in n}
        assert {n for n, p in chosen.named_parameters() if p.requires_grad} == own
        before = {n: p.detach().clone() for n, p in both.named_parameters()}
        for module in (chosen, reference.train()):
            optimizer = torch.optim.AdamW(fxlora.lora_parameters(module), lr=0.1, weight_decay=0.1)
            torch.manual_seed(5)
            module(X).square().sum().backward()
            optimizer.step()
        for n, p in both.named_parameters():  # what one trains, the other has
            assert torch.equal(p, before[n]) == (n not in own), n
            if n in own:
                assert torch.equal(p, reference.get_parameter(n))
    together = both.train()
    together(X).square().sum().backward()
    assert all(grad_of(p).abs().sum() > 0 for p in fxlora.lora_parameters(together))


def test_each_saves_and_loads_alone(tmp_path: Path) -> None:
    gm, one, other, both = two()
    for name, reference in (("a", one), ("b", other)):
        fxlora.save_adapter(both, tmp_path / name, adapter=name)
        fxlora.save_adapter(reference, tmp_path / f"{name}alone")
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            ours, theirs = (tmp_path / folder / file for folder in (name, f"{name}alone"))
            assert ours.read_bytes() == theirs.read_bytes()
    loaded = fxlora.load_adapter(gm, tmp_path / "a", adapter_name="a")
    loaded = fxlora.load_adapter(loaded, tmp_path / "b", adapter_name="b", strict_base=True).eval()
    assert_same(run(loaded, (X,), {}), run(both, (X,), {}))
    with pytest.raises(AdapterError, match="a, b are active: name one"):
        fxlora.save_adapter(both, tmp_path / "c")
    with pytest.raises(AdapterError, match="has an adapter 'b' already"):
        fxlora.load_adapter(loaded, tmp_path / "b", adapter_name="b")
    other_names = copy.deepcopy(both)
    other_names.load_state_dict(loaded.state_dict())
    assert_same(run(other_names, (X,), {}), run(both, (X,), {}))


def test_a_combination_is_folded() -> None:
    gm, one, other, both = two()
    parts = [fxlora.activate(both, name) for name in ("a", "b")]
    combined = fxlora.combine(parts, [0.5, -2.0], "cat")
    expected = fxlora.fold(fxlora.combine([one, other], [0.5, -2.0], "cat"))
    assert_close(run(fxlora.fold(combined), (X,), {}), run(expected, (X,), {}))
    weight = gm.get_parameter("up.weight")
    moved = [fxlora.fold(m).get_parameter("up.weight") - weight for m in (one, other)]
    folded = fxlora.fold(combined).get_parameter("up.weight")
    assert_close([folded], [weight + 0.5 * moved[0] - 2 * moved[1]])


# ---- heads, DoRA, buffers -----------------------------------------------------------------------

HEADS = (config(2, ["up"], modules_to_save=["down"]), config(1, ["up"], modules_to_save=["down"]))


def test_heads_in_full_of_each(tmp_path: Path) -> None:
    gm = captured(Mlp(), X)
    alone = [
        drawn(gm, rules, name, seed) for rules, name, seed in zip(HEADS, "ab", (2, 3), strict=True)
    ]
    with pytest.raises(InjectError, match=r"'down\.weight' is trained in full by one") as caught:
        added(alone[0], HEADS[1], "b")
    assert "activate(module, [])" in str(caught.value)
    held = fxlora.activate(alone[0], [])
    assert_same(run(held, (X,), {}), run(gm, (X,), {}))
    both = drawn(held, HEADS[1], "b", 3)
    assert both.known.active == ("b",)
    assert "down.modules_to_save.a.weight" in both.state_dict()
    with pytest.raises(InjectError, match="cannot be active together"):
        fxlora.activate(both, ["a", "b"])
    for name, expected in zip("ab", alone, strict=True):
        chosen = fxlora.activate(both, name)
        assert_same(run(chosen, (X,), {}), run(expected, (X,), {}))
        fxlora.verify(chosen, X)
        assert_close(run(fxlora.fold(both, adapter=name), (X,), {}), run(expected, (X,), {}))
        fxlora.save_adapter(both, tmp_path / name, adapter=name)
        loaded = fxlora.load_adapter(gm, tmp_path / name).eval()
        assert_same(run(loaded, (X,), {}), run(expected, (X,), {}))
        copied = fxlora.activate(copy.deepcopy(both).to(torch.float32), name)
        assert_close(
            run(copied, (X.float(),), {}), [t.float() for t in run(expected, (X,), {})], 1e-5
        )
    # a training of the head of a, through another graph over the same memory
    trained = fxlora.activate(both, "a")
    with torch.no_grad():
        trained.get_parameter("down.weight").add_(1)
    again = fxlora.activate(both, "a")
    assert_same(run(again, (X,), {}), run(trained, (X,), {}))
    assert_same(run(fxlora.remove(both), (X,), {}), run(gm, (X,), {}))


def test_dora_has_no_sum_with_another() -> None:
    gm = captured(Mlp(), X)
    dora = drawn(gm, config(2, ["up"], use_dora=True), "dora", 2)
    with pytest.raises(InjectError, match=r"scales the outputs of 'up' \(DoRA\)"):
        added(dora, config(1, ["up"]), "b")
    beside = drawn(dora, config(1, ["down"]), "other", 4)  # another weight
    fxlora.verify(beside, X)
    both = drawn(fxlora.activate(dora, []), config(1, ["up"]), "b", 3)
    for name, alone in (("dora", dora), ("b", drawn(gm, config(1, ["up"]), "b", 3))):
        assert_same(run(fxlora.activate(both, name), (X,), {}), run(alone, (X,), {}))
    with pytest.raises(InjectError, match="cannot be active together"):
        fxlora.activate(both, ["dora", "b"])


def test_dora_on_one_part_has_a_sum_with_another_part() -> None:
    gm = captured(nn.Sequential(nn.Linear(5, 9)), X)

    def of(*enable: bool, dora: bool = False) -> Rule:
        lora = LoraConfig(r=2, variant="dora" if dora else None)
        return Rule("0", parts=dict.fromkeys("qkv", 3), enable=enable, lora=lora)

    dora = drawn(gm, of(True, False, True, dora=True), "a", 2)  # q and v
    for enable in ((True, False, False), (False, False, True), (True, True, True)):
        with pytest.raises(InjectError, match=r"scales the outputs of '0\.[qv]' \(DoRA\)"):
            added(dora, of(*enable), "b")
    with pytest.raises(InjectError, match=r"scales the outputs of '0' \(DoRA\)"):
        added(dora, rule("0", r=1), "b")
    key = drawn(gm, of(False, True, False), "b", 3)
    both = drawn(dora, of(False, True, False), "b", 3)
    found, base = both(X), gm(X)
    assert_close([found - base], [dora(X) - base + key(X) - base])
    for part in range(3):
        columns = slice(3 * part, 3 * part + 3)
        assert (found - base)[:, columns].abs().max() > 1e-3
    assert_close(run(fxlora.fold(both), (X,), {}), [found.detach()])
    routed = fxlora.route([dora, key])  # each part of a weight in a way of its own
    ids = torch.tensor([0, 1, -1, 1, 0, 0])
    expected = torch.stack([(dora, key, gm)[slot](X)[n] for n, slot in enumerate(ids.tolist())])
    assert_close([routed(X, adapter_ids=ids)], [expected.detach()])


def test_ties_under_different_names_have_no_sum() -> None:
    gm = captured(Tied(), long(6, 4))
    one = added(gm, rule("emb", r=2), "a")
    with pytest.raises(InjectError, match="different names of a tied weight"):
        added(one, rule("emb", r=2, tied="share"), "b")


def test_buffers_are_those_of_the_adapter_that_changed_them(tmp_path: Path) -> None:
    images = wide(4, 3, 8, 7)
    gm = captured(Normed(), images)
    rules = Rule("fc", lora=LoraConfig(r=2))
    one = drawn(gm, rules, "a", 2)
    one.train()(images)  # updates the statistics
    one.eval()
    assert not torch.equal(one.get_buffer("bn.running_mean"), gm.get_buffer("bn.running_mean"))
    with pytest.raises(InjectError, match="calls changed bn"):
        added(one, rules, "b")
    both = drawn(fxlora.activate(one, []), rules, "b", 3)
    alone = drawn(gm, rules, "b", 3)
    for module in (both, alone):
        module.train()(2 * images + 1)
        module.eval()
    for name, expected in (("a", one), ("b", alone)):
        chosen = fxlora.activate(both, name)
        assert_same(run(chosen, (images,), {}), run(expected, (images,), {}))
        fxlora.save_adapter(both, tmp_path / name, adapter=name)
        assert_same(
            run(fxlora.load_adapter(gm, tmp_path / name).eval(), (images,), {}),
            run(expected, (images,), {}),
        )
    with pytest.raises(InputError, match="state dict has those of the active one"):
        fxlora.activate(both, "b").load_state_dict(both.state_dict())
    with pytest.raises(AdapterError, match=r"load it onto activate\(module, \[\]\)"):
        fxlora.load_adapter(both, tmp_path / "a", adapter_name="c")
    fxlora.load_adapter(fxlora.activate(both, []), tmp_path / "a", adapter_name="c")
    assert_same(run(fxlora.activate(both, []), (images,), {}), run(gm, (images,), {}))
    assert_same(run(fxlora.remove(both), (images,), {}), run(gm, (images,), {}))


class Regional(nn.Module):
    """A model whose Python reads a value, and so has no whole graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        return self.down(hidden * 2 if float(hidden.sum().detach()) > 1e9 else hidden)


@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
@pytest.mark.filterwarnings("ignore:no rule can adapt")
def test_regions_with_two_adapters() -> None:
    gm = captured(Regional(), X)
    assert gm.parent_module
    one, other = drawn(gm, config(2), "a", 2), drawn(gm, config(1, ["up"]), "b", 3)
    both = drawn(one, config(1, ["up"]), "b", 3)
    for names, expected in ((["a"], one), (["b"], other), ([], gm)):
        assert_same(run(fxlora.activate(both, names), (X,), {}), run(expected, (X,), {}))
    assert_close(run(fxlora.fold(both), (X,), {}), run(both, (X,), {}))
    with pytest.raises(UnsupportedOpError, match=r"run activate\(module, name\) on the samples"):
        fxlora.route(both)


def test_blocks_with_two_adapters() -> None:
    gm = captured(Mlp(), X, modules=["up"])
    one, other = drawn(gm, config(2), "a", 2), drawn(gm, config(1, ["up"]), "b", 3)
    both = drawn(one, config(1, ["up"]), "b", 3)
    assert_close(run(fxlora.fold(both), (X,), {}), run(both, (X,), {}))
    assert_same(run(fxlora.activate(both, "b"), (X,), {}), run(other, (X,), {}))
    assert_same(run(fxlora.activate(both, ["a"]), (X,), {}), run(one, (X,), {}))


# ---- what is refused ----------------------------------------------------------------------------


def test_names_and_functions_say_what_to_do() -> None:
    gm, _, _, both = two()
    none = fxlora.activate(both, [])
    with pytest.raises(InjectError, match=r"none of its adapters is active. activate\(module, 'a'"):
        fxlora.fold(none)
    with pytest.raises(InjectError, match="none of its adapters is active"):
        fxlora.lora_parameters(none)
    with pytest.raises(InjectError, match="no adapters"):
        fxlora.activate(gm, [])
    with pytest.raises(ConfigError, match="a list of names: 5"):
        fxlora.activate(both, untyped(5))
    with pytest.raises(InjectError, match="no adapter 'c', 'd': the module has a, b"):
        fxlora.activate(both, ["c", "a", "d"])
    with pytest.raises(InjectError, match="has an adapter 'a' already"):
        fxlora.inject(both, fxlora.match(gm, config(1), adapter_name="a"))
    with pytest.raises(ConfigError, match="has an adapter 'a' already"):
        fxlora.match(both, config(1), adapter_name="a")
    with pytest.raises(InjectError, match="no adapter 'c'"):
        fxlora.remove(both, adapter="c")
    with pytest.raises(fxlora.InputError, match="with one adapter"):
        fxlora.capture_more(both, Mlp().double(), wide(2, 3, 5))
    with pytest.raises(InjectError, match=r"scale_adapter takes one adapter, and a, b are active"):
        fxlora.scale_adapter(both, 0.5)
    with pytest.raises(InjectError, match="combine takes one adapter"):
        fxlora.combine([both], [1.0])
    with pytest.raises(ConfigError, match="activate them first"):
        fxlora.fold(both, adapter="a", inplace=True)


def test_reports_name_the_adapters() -> None:
    _, _, _, both = two()
    assert "up (b)" in fxlora.report(both)
    assert "up (b)" in str(plan_of(both))
    sites = json.loads(fxlora.report(both, "json"))["sites"]
    assert [(site["site"], site["adapter"]) for site in sites] == [
        ("up", "a"),
        ("down", "a"),
        ("up", "b"),
    ]
    assert fxlora.report(both, adapter="b") == fxlora.report(fxlora.activate(both, "b"))
    with pytest.raises(InjectError, match="no adapter 'c'"):
        fxlora.report(both, adapter="c")


def test_a_file_of_some_adapters_has_no_tensors_of_the_others(tmp_path: Path) -> None:
    gm = captured(Mlp(), X)
    both = drawn(drawn(gm, config(2), "a", 1), config(3), "b", 2)
    for active in ([], ["a"]):
        module = fxlora.activate(both, active)
        for way in ("folded", "constants"):
            file = fxlora.export(module, tmp_path / "m.pt2", X, adapters=way)
            held = [n for n in torch.export.load(file).state_dict if "lora_" in n]
            assert {name.split(".")[-2] for name in held} == set(active if way != "folded" else [])
    with pytest.raises(AdapterError, match=r"none is active: name one, .*adapter='a'\)"):
        fxlora.save_adapter(fxlora.activate(both, []), tmp_path / "none")
    fxlora.save_adapter(fxlora.activate(both, []), tmp_path / "a", adapter="a")  # the advice
