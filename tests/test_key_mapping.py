"""Adapter files under other names: wrapped, of an inner or outer model, of fused layers."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import AdapterError, ConfigError, FxLoraWarning, LoraConfig

from .laws import assert_close, assert_same, randomise, run
from .test_peft_folders import theirs
from .typed import plan_of

pytest.importorskip("peft", reason="peft is optional")
D = torch.float64
X = (torch.randn(3, 6, dtype=D),)


class Inner(nn.Module):
    """Two layers; takes (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Outer(nn.Module):
    """The inner model under a name, and a head."""

    def __init__(self, name: str = "model", inner: nn.Module | None = None) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, inner or Inner())
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.get_submodule(self.name)(x)))


def keys(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path, metadata)


ROOT = "base_model.model."
WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda key: ROOT + "_orig_mod." + key.removeprefix(ROOT),
    "compiled blocks": lambda key: key.replace("model.first", "model._orig_mod.first._orig_mod"),
    "compiled around": lambda key: "_orig_mod." + key,
    "DDP": lambda key: "module." + key,
    "DDP inside": lambda key: ROOT + "module." + key.removeprefix(ROOT),
    "the adapter's name": lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key),
    "a state_dict": lambda key: re.sub(
        r"head\.", "head.modules_to_save.some.", re.sub(r"(lora_[AB])\.", r"\1.some.", key)
    ),
    "no root": lambda key: key.removeprefix(ROOT),
    "two roots": lambda key: ROOT + key,
    "FSDP": lambda key: key.replace("model.second", "model._fsdp_wrapped_module.second"),
}


@pytest.mark.parametrize("what", WRAPPED)
def test_names_of_wrapped_models(tmp_path: Path, what: str) -> None:
    model = Outer().to(D).eval()
    config = {"target_modules": ["first", "second"], "rank_pattern": {"^model.first": 3}}
    made = theirs(model, tmp_path, r=2, modules_to_save=["head"], **config)
    gm = fxlora.capture(model, *X)
    keys(tmp_path, WRAPPED[what])
    with pytest.warns(FxLoraWarning, match="names are of a wrapped model"):
        lora = fxlora.load_adapter(gm, tmp_path).eval()
    assert_close(run(lora, X, {}), run(made, X, {}))
    assert [entry.r for entry in plan_of(lora)] == [3, 2]


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize(("old", "new"), [("model", "language_model"), ("", "m"), ("m", "")])
def test_other_beginnings(tmp_path: Path, old: str, new: str, ours: bool) -> None:
    """Of an inner, an outer, and another model around the same layers; also under parametrised
    ranks, which PEFT's configuration gives by the file's names."""
    inner = Inner().to(D).eval()

    def around(name: str) -> nn.Module:
        return Outer(name, inner).to(D).eval() if name else inner

    trained, model = around(old), around(new)
    dots = f"{old}." if old else ""
    config = {"r": 2, "target_modules": ["first", "second"], "rank_pattern": {f"{dots}first": 3}}
    made = theirs(trained, tmp_path, **config)
    if ours:
        lora = fxlora.load_adapter(fxlora.capture(trained, *X), tmp_path)
        fxlora.save_adapter(lora, tmp_path)
    mapping = {f"^{old}\\." if old else "^": f"{new}." if new else ""}
    with pytest.warns(FxLoraWarning, match=re.escape(f"key_mapping={mapping!r}")):
        lora = fxlora.load_adapter(fxlora.capture(model, *X), tmp_path).eval()
    same = fxlora.load_adapter(fxlora.capture(model, *X), tmp_path, key_mapping=mapping).eval()
    assert_same(run(same, X, {}), run(lora, X, {}))
    copied: Any = copy.deepcopy(made)
    merged = copied.merge_and_unload().get_submodule(old)
    expected = copy.deepcopy(model)
    expected.get_submodule(new).load_state_dict(merged.state_dict())
    assert (expected(*X) - model(*X)).abs().max() > 1e-3
    assert_close(run(lora, X, {}), run(expected, X, {}))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Inner(), Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x) + self.image(x).square()


class Chain(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[-1](x)


def test_another_layer_is_not_guessed(tmp_path: Path) -> None:
    trained = Chain(Inner(), Inner()).to(D).eval()
    theirs(trained, tmp_path, r=2, target_modules=[f"layers.1.{n}" for n in ("first", "second")])
    gm = fxlora.capture(Chain(trained.layers[1]).eval(), *X)
    with pytest.raises(AdapterError, match="only in another layer") as error:
        fxlora.load_adapter(gm, tmp_path)
    advised = str(error.value).partition("key_mapping=")[2].rstrip(").")
    lora = fxlora.load_adapter(gm, tmp_path, key_mapping=ast.literal_eval(advised)).eval()
    expected = fxlora.load_adapter(fxlora.capture(trained, *X), tmp_path).eval()
    assert_close(run(lora, X, {}), run(expected, X, {}))


@pytest.mark.parametrize(
    ("old", "new"),
    [("head.bias", "heal.bias"), ("model.second.bias", "modem.second.bias")],
)
def test_a_damaged_name_is_not_another_name(tmp_path: Path, old: str, new: str) -> None:
    """A flipped bit in one name of a module, which has others under its own name."""
    torch.manual_seed(0)
    gm = fxlora.capture(Outer().to(D), *X)
    config = LoraConfig(r=1, target_modules="all-linear", bias="lora_only")
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path)
    assert_same(run(fxlora.load_adapter(gm, tmp_path), X, {}), run(lora, X, {}))
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(old.encode(), new.encode()))
    assert path.read_bytes() != whole
    with pytest.raises(AdapterError, match=re.escape(f"the module has no {new}")):
        fxlora.load_adapter(gm, tmp_path)


@pytest.mark.parametrize("damaged", ["model.first.lora_A.weight", "head.bias"])
def test_one_module_under_two_names_is_not_guessed(tmp_path: Path, damaged: str) -> None:
    """One key of a module lacks the root, and its others have it."""
    model = Outer().to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules=["first"], modules_to_save=["head"])
    gm = fxlora.capture(model, *X)
    keys(tmp_path, lambda key: damaged if key == ROOT + damaged else key)
    with pytest.raises(AdapterError, match="under several names") as error:
        fxlora.load_adapter(gm, tmp_path)
    assert "key_mapping={}" in str(error.value)
    lora = fxlora.load_adapter(gm, tmp_path, key_mapping={}).eval()  # the advice
    assert_close(run(lora, X, {}), run(made, X, {}))


def test_two_ways_that_fit_are_named(tmp_path: Path) -> None:
    model = Towers().to(D).eval()
    made = theirs(model.text, tmp_path, r=2, target_modules=["first", "second"])
    gm = fxlora.capture(model, *X)
    with pytest.raises(AdapterError, match="fits the module in several ways") as error:
        fxlora.load_adapter(gm, tmp_path)
    advised = [ast.literal_eval(m) for m in re.findall(r"key_mapping=(\{.*?\})", str(error.value))]
    assert advised == [{"^": "text."}, {"^": "image."}]
    lora = fxlora.load_adapter(gm, tmp_path, key_mapping=advised[0]).eval()
    assert_close(run(lora, X, {}), [made(*X) + model.image(*X).square()])


def test_a_name_with_no_place(tmp_path: Path) -> None:
    """An adapter of the head has no place in the inner model; nothing is left out silently."""
    outer = Outer().to(D).eval()
    theirs(outer, tmp_path, r=2, target_modules=["first", "head"])
    with pytest.raises(AdapterError, match=r"head\.lora_A.*key_mapping={regular expression"):
        fxlora.load_adapter(fxlora.capture(outer.get_submodule("model"), *X), tmp_path)


class Split(nn.Module):
    """q, k, v, and the two halves of an MLP, as layers of their own; takes (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 4), nn.Linear(6, 2)
        self.v_proj = nn.Linear(6, 2)
        self.gate_proj, self.up_proj = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.q_proj(x), self.k_proj(x).sin(), self.v_proj(x)], -1)
        return torch.tanh(self.gate_proj(x)) * self.up_proj(x)


class Fused(nn.Module):
    """The same function with fused weights."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.qkv_proj, self.gate_up_proj = nn.Linear(6, 8), nn.Linear(8, 10)
        for fused, parts in (("qkv", "qkv"), ("gate_up", ("gate", "up"))):
            for kind in ("weight", "bias"):
                held: Any = [split.get_parameter(f"{part}_proj.{kind}") for part in parts]
                self.get_parameter(f"{fused}_proj.{kind}").data = torch.cat(held).data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).split([4, 2, 2], -1)
        gate, up = self.gate_up_proj(torch.cat([q, k.sin(), v], -1)).chunk(2, -1)
        return torch.tanh(gate) * up


ALL = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "other ranks": {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"up_proj": 5}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"v_proj": 1}},
    "biases": {"lora_bias": True},
}


@pytest.mark.parametrize("what", KINDS)
def test_fused_layers(tmp_path: Path, what: str) -> None:
    """The error says which mapping to give; equal parts stay parts, with a pair each."""
    split = Split().to(D).eval()
    made = theirs(split, tmp_path, r=2, lora_alpha=3, target_modules=ALL, **KINDS[what])
    model = Fused(split).to(D).eval()
    assert_close(run(model, X, {}), run(split, X, {}))
    gm = fxlora.capture(model, *X)
    with pytest.raises(AdapterError, match="has these weights fused") as error:
        fxlora.load_adapter(gm, tmp_path)
    (said,) = re.findall(r"key_mapping=(\{.*\})", str(error.value))
    lora = fxlora.load_adapter(gm, tmp_path, key_mapping=ast.literal_eval(said)).eval()
    assert (made(*X) - split(*X)).abs().max() > 1e-3
    assert_close(run(lora, X, {}), run(made, X, {}))
    if what == "plain":
        assert [entry.part for entry in plan_of(lora)] == ALL


class Stack(nn.Module):
    """Experts as a stack of (e, out, in) or (e, in, out)."""

    def __init__(self, experts: Any, in_first: bool) -> None:
        super().__init__()
        pairs = [torch.cat([e.gate_proj.weight, e.up_proj.weight]).detach() for e in experts]
        weight = torch.stack(pairs)
        self.gate_up_proj = nn.Parameter(weight.mT.contiguous() if in_first else weight)
        self.in_first = in_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.gate_up_proj if self.in_first else self.gate_up_proj.transpose(1, 2)
        gate, up = torch.bmm(x.expand(3, -1, -1), weight).chunk(2, -1)
        return (torch.tanh(gate) * up).sum(0)


class Expert(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(6, out, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.gate_proj(x)) * self.up_proj(x)


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.experts, Stack):
            return self.experts(x)
        return torch.stack([expert(x) for expert in self.experts.children()]).sum(0)


@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("out", [5, 3])  # 3: the stack's matrices are square
def test_experts_become_a_stack(tmp_path: Path, in_first: bool, out: int) -> None:
    experts = nn.ModuleList(Expert(out) for _ in range(3))
    split = Mixture(experts).to(D).eval()
    made = theirs(split, tmp_path, r=2, target_modules=["gate_proj", "up_proj"], use_rslora=True)
    model = Mixture(Stack(experts, in_first)).to(D).eval()
    gm = fxlora.capture(model, *X)
    with pytest.raises(AdapterError, match="has these weights fused") as error:
        fxlora.load_adapter(gm, tmp_path)
    (said,) = re.findall(r"key_mapping=(\{.*\})", str(error.value))
    mapping = ast.literal_eval(said)
    if in_first and out == 3:  # PEFT's own conversion would turn it
        with pytest.warns(FxLoraWarning, match="a stack of square matrices"):
            lora = fxlora.load_adapter(gm, tmp_path, key_mapping=mapping, as_formula=True).eval()
    else:
        lora = fxlora.load_adapter(gm, tmp_path, key_mapping=mapping).eval()
    assert (made(*X) - split(*X)).abs().max() > 1e-3
    assert_close(run(lora, X, {}), run(made, X, {}))


def test_parts_that_do_not_add_up(tmp_path: Path) -> None:
    split = Split().to(D).eval()
    theirs(split, tmp_path, r=2, target_modules=["q_proj", "k_proj"])
    gm = fxlora.capture(Fused(split).to(D), *X)
    mapping = {"q_proj": "qkv_proj", "k_proj": "qkv_proj"}
    with pytest.raises(AdapterError, match=r"q_proj, k_proj do not add up to 'qkv_proj'"):
        fxlora.load_adapter(gm, tmp_path, key_mapping=mapping)


@pytest.mark.parametrize("mapping", [["a"], {"(": ""}, {"a": 1}, {1: "a"}, {"a": r"\1"}, "a"])
def test_what_is_no_mapping(tmp_path: Path, mapping: Any) -> None:
    gm = fxlora.capture(Inner().to(D), *X)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["first"])))
    fxlora.save_adapter(lora, tmp_path)
    with pytest.raises(ConfigError, match="key_mapping"):
        fxlora.load_adapter(gm, tmp_path, key_mapping=mapping)


def test_our_own_layout_is_renamed_too(tmp_path: Path) -> None:
    """An FXLORA folder: PEFT has no DoRA at some sites only."""
    inner = Inner().to(D).eval()
    gm = fxlora.capture(inner, *X)
    rules = [
        fxlora.Rule("first", lora=LoraConfig(r=2, use_dora=True)),
        fxlora.Rule("second", lora=LoraConfig(r=3)),
    ]
    lora = fxlora.inject(gm, fxlora.match(gm, rules)).eval()
    randomise(lora)
    with pytest.warns(FxLoraWarning, match="PEFT cannot read"):
        fxlora.save_adapter(lora, tmp_path)
    outer = Outer("m", inner).to(D).eval()
    captured = fxlora.capture(outer, *X)
    with pytest.warns(FxLoraWarning, match="read as by"):
        loaded = fxlora.load_adapter(captured, tmp_path).eval()
    assert_close(run(loaded, X, {}), [outer.head(torch.tanh(lora(*X)))])
    with pytest.raises(AdapterError, match="several tensors one name"):
        fxlora.load_adapter(captured, tmp_path, key_mapping={"^(first|second)": "m.first"})
