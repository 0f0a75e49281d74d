from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import AdapterError, FxLoraWarning, LoraConfig, Rule
from fxlora.plan import Entry

from .laws import assert_close, assert_same, randomise, run, snapshot
from .models import Mlp, Normed, Readers, Tied
from .typed import plan_of

CONFIG = LoraConfig(r=2, lora_alpha=6, target_modules=["conv", "twice"], modules_to_save=["fc"])


def trained(model: nn.Module, config: LoraConfig = CONFIG) -> fxlora.CapturedModule:
    """Adapt and train for a few steps: A, B, the head and the batch norm's statistics change."""
    lora = fxlora.adapt(model, torch.randn(4, 3, 9, 7), rules=config).train()
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        lora(torch.randn(4, 3, 9, 7))["logits"].square().sum().backward()
        optimizer.step()
    return lora


@functools.cache
def normed() -> tuple[fxlora.CapturedModule, fxlora.CapturedModule]:
    """Return an adapted and trained module, and the captured one: for tests that change neither."""
    torch.manual_seed(0)
    lora = trained(Normed())
    return lora, fxlora.remove(lora)


def test_round_trip_is_bit_identical(tmp_path: Path) -> None:
    model = Normed()
    before = snapshot(model)
    lora = trained(model)
    fxlora.save_adapter(lora, tmp_path / "a" / "b")
    gm = fxlora.capture(model, torch.randn(4, 3, 9, 7))
    again = fxlora.load_adapter(gm, tmp_path / "a" / "b", adapter_name="other")
    x = torch.randn(5, 3, 9, 7)
    assert not torch.equal(run(lora.eval(), (x,), {})[0], run(gm.eval(), (x,), {})[0])
    for training in (False, True):
        assert_same(run(again.train(training), (x,), {}), run(lora.train(training), (x,), {}))
    tensors = dict(again.state_dict())
    for name, tensor in lora.state_dict().items():
        assert torch.equal(tensors[name.replace("default", "other")], tensor), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before["state"][name]), name
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n.replace("default", "other") for n, p in lora.named_parameters() if p.requires_grad
    }


def test_only_what_changed_is_saved(tmp_path: Path) -> None:
    fxlora.save_adapter(normed()[0], tmp_path)
    keys = {
        k.removeprefix("base_model.model.")
        for k in load_file(tmp_path / "adapter_model.safetensors")
    }
    pairs = {f"{site}.lora_{x}.weight" for site in ("conv", "twice") for x in "AB"}
    statistics = {f"bn.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert keys == pairs | statistics | {"fc.weight", "fc.bias"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_fresh_process(tmp_path: Path) -> None:
    """It gives the same outputs, and imports no library that the model does not use."""
    torch.manual_seed(7)
    model = Normed()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    lora = trained(model).eval()
    fxlora.save_adapter(lora, tmp_path / "adapter")
    x = torch.randn(2, 3, 9, 7)
    torch.save({"x": x, "y": run(lora, (x,), {})[0]}, tmp_path / "io.pt")
    script = f"""
import sys, torch, fxlora
from tests.models import Normed
model = Normed(); model.offset = torch.load("{tmp_path}/offset.pt", weights_only=True)
model.load_state_dict(torch.load("{tmp_path}/base.pt", weights_only=True))
io = torch.load("{tmp_path}/io.pt", weights_only=True)
gm = fxlora.capture(model, io["x"])
lora = fxlora.load_adapter(gm, "{tmp_path}/adapter").eval()
torch.backends.mha.set_fastpath_enabled(False)
with torch.no_grad():
    assert torch.equal(lora(io["x"])["logits"], io["y"])
assert "transformers" not in sys.modules
print("same")
"""
    torch.save(model.offset, tmp_path / "offset.pt")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_every_kind_of_site(tmp_path: Path) -> None:
    model, args = Readers(), (torch.randn(3, 5), torch.tensor([[1, 2, 3, 4]] * 3))
    gm = fxlora.capture(model, args)
    config = LoraConfig(r=2, init_lora_weights=False, bias="lora_only")
    rules = [Rule("emb", lora=LoraConfig(r=3, lora_alpha=5, use_rslora=True)), Rule(lora=config)]
    lora = fxlora.inject(gm, fxlora.match(gm, rules))
    fxlora.save_adapter(lora, tmp_path)
    again = fxlora.load_adapter(gm, tmp_path)
    assert [e.to_data() for e in plan_of(again)] == [e.to_data() for e in plan_of(lora)]
    assert_same(run(again, args, {}), run(lora, args, {}))


def test_saving_again_replaces_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    lora = copy.deepcopy(normed()[0])
    fxlora.save_adapter(lora, tmp_path)
    with torch.no_grad():
        lora.get_parameter("twice.lora_B.default.weight").fill_(0.5)
    fxlora.save_adapter(lora, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert (saved["base_model.model.twice.lora_B.weight"] == 0.5).all()
    assert (tmp_path / "README.md").read_text() == "mine"


# ---- PEFT ---------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Layers that PEFT can adapt (linear, convolution, embedding), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6)
        self.conv = nn.Conv1d(6, 9, 3)
        self.fc = nn.Linear(9, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv(self.emb(ids).transpose(1, 2))).mean(2)
        return self.head(torch.tanh(self.fc(x)))


IDS = torch.tensor([[1, 2, 3, 4, 5], [12, 0, 7, 7, 2]])
PLAIN = {
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["emb", "conv", "fc"],
    "rank_pattern": {"fc": 3},
    "alpha_pattern": {"conv": 5},
    "modules_to_save": ["head"],
}


@functools.cache
def plain_layers() -> tuple[nn.Module, fxlora.CapturedModule]:
    model = Plain()
    return model, fxlora.capture(model, IDS).eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_ours(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model, gm = plain_layers()
    config = LoraConfig(**PLAIN, use_rslora=rslora, init_lora_weights=False)
    lora = fxlora.inject(gm, fxlora.match(gm, config)).eval()
    with torch.no_grad():
        lora.get_parameter("head.weight").mul_(1.5)
    fxlora.save_adapter(lora, tmp_path)
    base = model(IDS).detach()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert (theirs(IDS) - base).abs().max() > 1e-3
    assert torch.allclose(theirs(IDS), lora(IDS), atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_ours_reads_pefts(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model, gm = plain_layers()
    config = peft.LoraConfig(**PLAIN, use_rslora=rslora, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path)
    lora = fxlora.load_adapter(gm, tmp_path)
    assert (lora(IDS) - gm(IDS)).abs().max() > 1e-3
    assert torch.allclose(lora(IDS), theirs(IDS), atol=1e-6)


class Experts(nn.Module):
    """Stacks of matrices in both orders, as the experts of transformers and PEFT; and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 6) / 3)  # (e, in, out)
        self.mix = nn.Parameter(torch.randn(4, 9) / 3)  # x @ W: (in, out)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 3)  # (e, out, in)
        self.bias = nn.Parameter(torch.randn(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.bmm(torch.tanh(x).expand(3, -1, -1), self.up)
        x = torch.bmm(torch.tanh(x), self.down.transpose(1, 2)).sum(0)
        return x @ self.mix + self.bias


class Mixture(nn.Module):
    """Layers around experts, a packed projection, a convolution; takes (N, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.experts = Experts()
        self.qkv = nn.Linear(9, 12)
        self.conv = nn.Conv2d(1, 4, (2, 3), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.experts(torch.tanh(self.first(x)))
        q, k, v = self.qkv(x).split([6, 3, 3], -1)
        x = torch.tanh(q * torch.cat([k, v], -1)).reshape(-1, 1, 2, 3)
        return self.conv(x).flatten(1)


def plain(**keys: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, **keys})


PARTS = {"parts": {"q": 6, "k": 3, "v": 3}, "enable": ["q", "v"]}
STACKS = ["experts.up", "experts.down", "experts.mix"]
MIXTURES: dict[str, list[Rule]] = {
    "DoRA": [Rule(["first", "qkv", "conv"], lora=plain(use_dora=True))],
    "PiSSA": [Rule(["first", "conv"], lora=plain(init_lora_weights="pissa"))],
    "OLoRA, rsLoRA": [Rule("first", lora=plain(init_lora_weights="olora", use_rslora=True))],
    "DoRA+PiSSA": [Rule("qkv", lora=plain(init_lora_weights="pissa", use_dora=True))],
    "PiSSA beside plain": [
        Rule("first", lora=plain(init_lora_weights="pissa")),
        Rule("conv", lora=plain(lora_alpha=5, r=1)),
    ],
    "orthogonal": [Rule("first", lora=plain(init_lora_weights="orthogonal"))],
    "parts": [Rule("qkv", lora=plain(), **PARTS), Rule("first", lora=plain(r=3))],
    "parts, PiSSA": [Rule("qkv", lora=plain(init_lora_weights="pissa"), **PARTS)],
    "stacks": [Rule(STACKS, lora=plain()), Rule("first", lora=plain(r=3))],
    "stacks alone": [Rule(STACKS[:2], lora=plain())],
    "a stack": [Rule("experts.down", lora=plain(r=3, use_rslora=True))],
    "parts of a stack's": [Rule("experts.mix", lora=plain(), parts=3, enable=[True, False, True])],
    "biases": [Rule(["first", "conv"], lora=plain(bias="all"))],
    "biases of stacks": [Rule(STACKS, lora=plain(bias="lora_only"))],
}


@functools.cache
def captured(model: nn.Module, args: Any) -> fxlora.CapturedModule:
    """Capture a model of one input once: no verb changes its argument. The size is fixed."""
    return fxlora.capture(model, args, dynamic_shapes=(None,))


@functools.cache
def mixture(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    return Mixture().to(dtype), (torch.randn(4, 7).to(dtype),)


@functools.cache
def odd() -> tuple[nn.Module, Any]:
    return Odd().double().eval(), (torch.randn(2, 3, 4, 4).double(),)


def saved(model: nn.Module, args: Any, rules: Any, folder: Path) -> fxlora.CapturedModule:
    """Adapt, draw all trained tensors at random, check that they have an effect, and save."""
    gm = captured(model, args)
    lora = fxlora.inject(gm, fxlora.match(gm, rules)).eval()
    randomise(lora)
    with torch.no_grad():
        for name in lora.trained:
            lora.get_parameter(name).normal_()
    found, base = run(lora, args, {}), run(gm.eval(), args, {})
    assert (found[0] - base[0]).abs().max() > 1e-4
    fxlora.save_adapter(lora, folder)
    return lora


def assert_loads(model: nn.Module, args: Any, folder: Path, lora: fxlora.CapturedModule) -> None:
    """Assert that the loaded adapter is bit for bit the saved one."""
    again = fxlora.load_adapter(captured(model, args), folder).eval()
    assert [e.to_data() for e in plan_of(again)] == [e.to_data() for e in plan_of(lora)]
    state = again.state_dict()
    for name, tensor in lora.state_dict().items():
        assert torch.equal(state[name], tensor), name
    grads = {n: p.requires_grad for n, p in lora.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == grads
    assert_same(run(again, args, {}), run(lora, args, {}))


def peft_type(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("what", MIXTURES)
def test_peft_reads_every_variant(tmp_path: Path, what: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model, args = mixture()
    lora = saved(model, args, MIXTURES[what], tmp_path)
    assert peft_type(tmp_path) == "LORA"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert_close([theirs(*args)], run(lora, args, {}))
    assert_loads(model, args, tmp_path, lora)


class Odd(nn.Module):
    """Layers that PEFT would compute wrongly or cannot express; takes (N, 3, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.dilated = nn.Conv2d(6, 6, 3, padding="same", dilation=2)
        self.turned = nn.ConvTranspose2d(6, 5, 2)
        self.scaled = Doubled(5, 7)
        self.functional = nn.Linear(7, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.root = nn.Parameter(torch.randn(4, 3))
        self.square = Square()
        self.layer = nn.TransformerEncoderLayer(3, 1, 5, batch_first=True)
        self.shared = self.again = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.turned(torch.tanh(self.dilated(self.grouped(torch.tanh(self.reflect(x))))))
        x = self.scaled(x.flatten(2).transpose(1, 2))
        x = F.linear(torch.tanh(x), self.functional.weight)
        x = self.square(torch.tanh(self.lstm(x)[0] @ self.root))
        return self.again(self.shared(self.layer(x)))


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x.unsqueeze(1), self.w).sum(1)


ODD: dict[str, tuple[list[Rule], str]] = {
    "reflect": ([Rule("reflect", lora=plain())], "padding by another op"),
    "grouped": ([Rule("grouped", lora=plain())], "a grouped convolution"),
    "dilated": ([Rule("dilated", lora=plain())], "with dilation"),
    "turned": ([Rule("turned", lora=plain(use_dora=True))], "DoRA of a bare parameter"),
    "scaled": ([Rule("scaled", lora=plain())], "Doubled"),
    "functional": ([Rule("functional", lora=plain())], "outside of the forward"),
    "lstm": ([Rule("lstm", lora=plain(init_lora_weights="pissa"))], "read by lstm"),
    "root": ([Rule("root", lora=plain())], "the model itself"),
    "square": ([Rule("square.w", lora=plain())], "square matrices"),
    "fused": ([Rule("layer.linear1", lora=plain())], "TransformerEncoderLayer"),
    "out_proj": ([Rule("*.out_proj", lora=plain())], "outside of the forward"),
    "twice": ([Rule("shared", lora=plain())], "one module under several names"),
    "some DoRA": (
        [Rule("scaled", lora=plain(use_dora=True)), Rule("root", lora=plain())],
        "DoRA only at some sites",
    ),
    "DoRA of parts": ([Rule("scaled", lora=plain(use_dora=True, r=1), parts=7)], "DoRA of a part"),
}


@pytest.mark.parametrize("what", ODD)
def test_where_peft_would_be_wrong_it_stops(tmp_path: Path, what: str) -> None:
    model, args = odd()
    rules, why = ODD[what]
    with pytest.warns(FxLoraWarning, match=f"PEFT cannot read .*{re.escape(why)}"):
        lora = saved(model, args, rules, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "FXLORA" and why in config["why_not_peft"]
    assert_loads(model, args, tmp_path, lora)
    peft = pytest.importorskip("peft", reason="peft is optional")
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)


@pytest.mark.parametrize("names", [["emb"], ["head"], ["emb", "head"]])
def test_tied(tmp_path: Path, names: list[str]) -> None:
    """PEFT can read an adapter for one name of a tied weight, but not one for both names."""
    model, args = Tied().double(), (torch.tensor([[1, 2, 3], [5, 0, 16]]),)
    lora = saved(model, args, LoraConfig(r=2, target_modules=names), tmp_path)
    assert len(plan_of(lora)) == 1 and len(plan_of(lora).entries[0].names) == len(names)
    assert_loads(model, args, tmp_path, lora)
    assert peft_type(tmp_path) == ("LORA" if len(names) == 1 else "FXLORA")
    if len(names) == 1:
        peft = pytest.importorskip("peft", reason="peft is optional")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        assert_close([theirs(*args)], run(lora, args, {}))


THEIRS: dict[str, dict[str, Any]] = {
    "DoRA": {"target_modules": ["first", "qkv", "conv"], "use_dora": True},
    "stacks": {"target_modules": ["first"], "target_parameters": STACKS},
    "stacks alone": {"target_parameters": [STACKS[1], STACKS[0]], "target_modules": []},
    "PiSSA": {"target_modules": ["first", "qkv"], "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": ["first", "qkv"], "init_lora_weights": "olora"},
    "orthogonal": {"target_modules": ["first"], "init_lora_weights": "orthogonal"},
    "biases": {"target_modules": ["first", "qkv"], "bias": "lora_only"},
    "all biases": {"target_modules": ["first", "conv"], "bias": "all"},
}


@pytest.mark.parametrize("what", THEIRS)
def test_every_variant_of_pefts_is_read(tmp_path: Path, what: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model, args = mixture(torch.float32)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, **THEIRS[what])
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path)
    gm = captured(model, args).eval()
    lora = fxlora.load_adapter(gm, tmp_path).eval()
    assert (theirs(*args) - gm(*args)).abs().max() > 1e-3
    assert_close(run(lora, args, {}), [theirs(*args)], 1e-5)
    assert_close(run(fxlora.fold(lora), args, {}), [theirs(*args)], 1e-5)


def test_pefts_conversion_is_ours(tmp_path: Path) -> None:
    """fxlora reads PEFT's own conversion of PiSSA to a plain LoRA of twice the rank."""
    peft = pytest.importorskip("peft", reason="peft is optional")
    model, args = Mixture(), (torch.randn(4, 7),)
    keys = {"r": 2, "lora_alpha": 3, "target_modules": ["first"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**keys)).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    expected = theirs(*args).detach()
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    lora = fxlora.load_adapter(fxlora.capture(model, args), tmp_path / "plain").eval()
    assert plan_of(lora).entries[0].r == 4
    assert_close(run(lora, args, {}), [expected], 1e-5)


def test_pefts_that_changed_the_weights_beside(tmp_path: Path) -> None:
    lora, gm = normed()
    fxlora.save_adapter(lora, tmp_path)
    without_header(tmp_path, init_lora_weights="corda")
    with pytest.raises(AdapterError, match="'corda', which changes the weights"):
        fxlora.load_adapter(gm, tmp_path)


def without_header(folder: Path, **changes: Any) -> None:
    """Remove the plan from a saved adapter, so that it is as PEFT writes it."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(weights), weights)
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))


# ---- damaged and mismatched folders -------------------------------------------------------------


def damaged(folder: Path, what: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-20])
    elif what == "not safetensors":
        weights.write_bytes(b"\x80\x04pickle")
    elif what == "no weights":
        weights.rename(folder / "adapter_model.bin")
    elif what == "no config":
        config.unlink()
    elif what == "edited config":
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "lora_alpha": 40}))
    elif what == "edited plan":
        with safe_open(weights, "pt") as file:
            plan = json.loads(file.metadata()["fxlora"])
        plan["entries"][0]["form"] = "brunch"
        save_file(load_file(weights), weights, {"fxlora": json.dumps(plan)})
    elif what == "bad config":
        config.write_text("{")
    elif what == "config is a list":
        config.write_text("[]")
    elif what in ("another method", "unknown option"):
        save_file(load_file(weights), weights)  # without the plan, as PEFT writes it
        values = json.loads(config.read_text())
        values |= {"peft_type": "IA3"} if what == "another method" else {"use_qalora": True}
        config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "damaged"),
        ("not safetensors", "damaged"),
        ("no weights", "is a pickle"),
        ("no config", r"has no adapter_config\.json"),
        ("bad config", "damaged"),
        ("config is a list", "expected an object"),
        ("another method", "'IA3'; of PEFT's methods"),
        ("unknown option", "uses use_qalora"),
        ("edited config", "contradicts adapter_model"),
        ("edited plan", "its plan is damaged"),
    ],
)
def test_damaged_folders(tmp_path: Path, what: str, message: str) -> None:
    lora, gm = normed()
    fxlora.save_adapter(lora, tmp_path)
    damaged(tmp_path, what)
    keys = list(gm.state_dict())
    with pytest.raises(AdapterError, match=message):
        fxlora.load_adapter(gm, tmp_path)
    assert list(gm.state_dict()) == keys
    assert gm.plan is None


def with_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fxlora"])
    changed = change(header)
    header = header if changed is None else changed
    save_file(load_file(path), path, {"fxlora": json.dumps(header)})


def test_a_folder_of_the_first_version(tmp_path: Path) -> None:
    model, args = mixture()
    saved(model, args, MIXTURES["DoRA"], tmp_path)
    for version, advice in ((1, "without its header"), (3, "newer fxlora"), ("x", "newer")):
        with_header(tmp_path, lambda header, v=version: header.update(version=v))
        with pytest.raises(AdapterError, match=f"(?i)version {version!r} of the layout.*{advice}"):
            fxlora.load_adapter(captured(model, args), tmp_path)


WRONG = [None, -1, 0, 10**9, 0.5, "", "x", "ioioio", [], [None], ["x", 2], [-3, 4], {}, {"a": 1}]
FIELDS = [field.name for field in dataclasses.fields(Entry)]
KEYS = ["version", "peft", "entries", "trained", "modules_to_save", "model_parameters"]


@pytest.mark.parametrize("field", [*FIELDS, *KEYS, "nothing"])
def test_damaged_headers(tmp_path: Path, field: str) -> None:
    """A changed or missing field raises a typed error or makes no difference."""
    model, args = mixture()
    lora = saved(model, args, MIXTURES["parts, PiSSA"], tmp_path)
    gm = captured(model, args)
    expected = run(lora, args, {})
    path = tmp_path / "adapter_model.safetensors"
    before = path.read_bytes()

    def put(value: Any) -> Callable[[dict[str, Any]], Any]:
        def change(header: dict[str, Any]) -> Any:
            if field == "nothing":
                return value
            place = header["entries"][0] if field in FIELDS else header
            place[field] = value
            if value is ...:
                del place[field]
            return header

        return change

    refused = 0
    for value in [*WRONG, *([] if field == "nothing" else [...])]:
        path.write_bytes(before)
        with_header(tmp_path, put(value))
        try:
            again = fxlora.load_adapter(gm, tmp_path).eval()
        except AdapterError:
            refused += 1
        else:
            assert_same(run(again, args, {}), expected)
            lora_parameters = fxlora.lora_parameters(again)
            assert [p.shape for p in lora_parameters] == [
                p.shape for p in fxlora.lora_parameters(lora)
            ]
    assert refused > len(WRONG) / 2 or field in INERT


# Fields that have no effect on the loaded module, or that may have any value.
INERT = ("reason", "op", "rule", "dropout", "alpha", "model_parameters", "adapter", "padding_idx")


def test_a_mismatch_names_the_keys(tmp_path: Path) -> None:
    lora, gm = normed()
    fxlora.save_adapter(lora, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["base_model.model.extra.weight"] = torch.ones(2)
    tensors["base_model.model.twice.lora_A.weight"] = torch.ones(3, 6)
    del tensors["base_model.model.conv.lora_B.weight"]
    save_file(tensors, path, metadata)
    with pytest.raises(AdapterError) as error:
        fxlora.load_adapter(gm, tmp_path)
    text = str(error.value)
    assert "missing in the file: base_model.model.conv.lora_B.weight" in text
    assert "unexpected in the file: base_model.model.extra.weight" in text
    assert "twice.lora_A.weight ((3, 6) in the file, (2, 6) here)" in text
    with pytest.raises(AdapterError, match=r"the module has no conv\.weight"):
        fxlora.load_adapter(fxlora.capture(Mlp(), torch.randn(2, 5)), tmp_path)


def test_a_file_never_overwrites_frozen_weights(tmp_path: Path) -> None:
    lora, gm = normed()
    fxlora.save_adapter(lora, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(
        {**load_file(path), "base_model.model.first.weight": torch.ones(5, 6)}, path, metadata
    )
    before = gm.get_parameter("first.weight").clone()
    with pytest.raises(AdapterError, match="unexpected in the file"):
        fxlora.load_adapter(gm, tmp_path)
    assert torch.equal(gm.get_parameter("first.weight"), before)


def test_nowhere_to_write_and_nothing_to_save(tmp_path: Path) -> None:
    lora, _ = normed()
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot write"):
        fxlora.save_adapter(lora, tmp_path / "file")
    with pytest.raises(AdapterError, match="no adapter folder"):
        fxlora.load_adapter(fxlora.remove(lora), tmp_path / "none")
    with pytest.raises(AdapterError, match="nothing to save"):
        fxlora.save_adapter(fxlora.fold(lora), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_parts_of_modules_that_are_called_by_numbers(tmp_path: Path) -> None:
    gm = fxlora.capture(
        nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)), torch.ones(2, 12)
    ).eval()
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("0", parts=3, lora=LoraConfig(r=2)))).eval()
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path)
    assert torch.equal(
        fxlora.load_adapter(gm, tmp_path)(torch.ones(2, 12)), lora(torch.ones(2, 12))
    )


# ---- invalid values -----------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conv.lora_A.weight", r"conv\.lora_A\.default\.weight"),
        ("twice.lora_B.weight", r"twice\.lora_B\.default\.weight"),
        ("fc.bias", r"fc\.bias"),
        ("bn.running_var", r"bn\.running_var"),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path: Path, key: str, name: str, value: float) -> None:
    lora, gm = copy.deepcopy(normed())
    fxlora.save_adapter(lora, tmp_path)
    rewritten(tmp_path, lambda t: t[f"base_model.model.{key}"].view(-1)[0:1].fill_(value))
    with pytest.raises(AdapterError, match=f"'{name}' has NaN or infinities"):
        fxlora.load_adapter(gm, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    tensors = {**dict(lora.named_parameters()), **dict(lora.named_buffers())}
    with torch.no_grad():
        tensors[name.replace("\\", "")].view(-1)[0] = value
    with pytest.raises(AdapterError, match=r"NaN or infinity.*Nothing was written"):
        fxlora.save_adapter(lora, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_the_modules_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    gm = fxlora.capture(model, torch.randn(2, 5))
    fxlora.save_adapter(fxlora.inject(gm, fxlora.match(gm, Rule("0", lora=plain()))), tmp_path)
    key = "base_model.model.0.lora_B.weight"
    for made, why in (
        (torch.full((6, 2), 1e300, dtype=torch.float64), "infinities as torch.float32"),
        (torch.ones(6, 2, dtype=torch.complex64), "which is no torch.float32"),
    ):
        rewritten(tmp_path, lambda t, made=made: t.update({key: made}))
        with pytest.raises(AdapterError, match=why):
            fxlora.load_adapter(gm, tmp_path)


class Masked(nn.Module):
    """A model whose mask, a buffer, holds an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 6)
        self.register_buffer("mask", torch.tensor([0.0, 1, 2, 3, 4, -torch.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x) + self.mask).softmax(-1)


def test_infinities_of_the_models_own_are_kept(tmp_path: Path) -> None:
    gm = fxlora.capture(Masked(), torch.randn(2, 5))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("lin", lora=plain())))
    randomise(lora)
    lora.get_buffer("mask")[0] = 7
    fxlora.save_adapter(lora, tmp_path)
    again = fxlora.load_adapter(gm, tmp_path)
    mask = again.get_buffer("mask")
    assert torch.equal(mask, lora.get_buffer("mask")) and float(mask[0]) == 7


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    model, args = mixture()
    saved(model, args, MIXTURES["PiSSA"], tmp_path)
    gm, before = captured(model, args), torch.get_rng_state()
    fxlora.load_adapter(gm, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, 5, None, b"x"])
def test_what_is_no_path(path: Any) -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(5, 6)), torch.randn(2, 5))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("0", lora=plain())))
    with pytest.raises(AdapterError):
        fxlora.load_adapter(gm, path)
    with pytest.raises(AdapterError):
        fxlora.save_adapter(lora, path)
    with pytest.raises(fxlora.FxLoraError):
        fxlora.export(gm, path, torch.randn(2, 5))


def test_a_module_on_meta_has_nothing_to_save(tmp_path: Path) -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(5, 6, device="meta")))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("0", lora=plain())))
    with pytest.raises(AdapterError, match="on the meta device"):
        fxlora.save_adapter(lora, tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe\x00", b"\x80\x04pickle"])
def test_files_of_any_bytes_are_typed(tmp_path: Path, file: str, content: bytes) -> None:
    model, args = mixture()
    saved(model, args, MIXTURES["PiSSA"], tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(AdapterError, match="damaged"):
        fxlora.load_adapter(captured(model, args), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_peft_starts_embeddings_at_zero_whatever_the_init(init: str, tmp_path: Path) -> None:
    """PEFT's PiSSA and OLoRA change the weights of linear layers only."""
    peft = pytest.importorskip("peft", reason="peft is optional")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin = nn.Embedding(11, 6), nn.Linear(6, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lin(self.emb(ids))

    model, ids = Model(), torch.randint(11, (3, 5))
    config = peft.LoraConfig(r=2, target_modules=["emb", "lin"], init_lora_weights=init)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    expected = theirs(ids)
    assert not torch.allclose(expected, model(ids), atol=1e-2)
    lora = fxlora.load_adapter(fxlora.capture(model, ids), tmp_path)
    assert torch.allclose(lora(ids), expected, atol=1e-5)
