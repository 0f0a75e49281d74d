from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import AdapterError, LoraConfig, Rule

from .laws import assert_same, run, snapshot
from .models import Mlp, Normed, Readers

CONFIG = LoraConfig(r=2, lora_alpha=6, target_modules=["conv", "twice"], modules_to_save=["fc"])


def trained(model: nn.Module, config: LoraConfig = CONFIG) -> fxlora.CapturedModule:
    """Some steps, so that A, B, the head and the statistics of the batch norm move."""
    lora = fxlora.adapt(model, torch.randn(4, 3, 9, 7), rules=config).train()
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        lora(torch.randn(4, 3, 9, 7))["logits"].square().sum().backward()
        optimizer.step()
    return lora


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
    fxlora.save_adapter(trained(Normed()), tmp_path)
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
    torch.manual_seed(7)
    model = Normed()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    lora = trained(model).eval()
    fxlora.save_adapter(lora, tmp_path / "adapter")
    x = torch.randn(2, 3, 9, 7)
    torch.save({"x": x, "y": run(lora, (x,), {})[0]}, tmp_path / "io.pt")
    script = f"""
import torch, fxlora
from tests.models import Normed
model = Normed(); model.offset = torch.load("{tmp_path}/offset.pt", weights_only=True)
model.load_state_dict(torch.load("{tmp_path}/base.pt", weights_only=True))
io = torch.load("{tmp_path}/io.pt", weights_only=True)
gm = fxlora.capture(model, io["x"])
lora = fxlora.load_adapter(gm, "{tmp_path}/adapter").eval()
torch.backends.mha.set_fastpath_enabled(False)
with torch.no_grad():
    assert torch.equal(lora(io["x"])["logits"], io["y"])
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
    assert [e.to_data() for e in again.plan] == [e.to_data() for e in lora.plan]
    assert_same(run(again, args, {}), run(lora, args, {}))


def test_saving_again_replaces_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    lora = trained(Normed())
    fxlora.save_adapter(lora, tmp_path)
    with torch.no_grad():
        lora.get_parameter("twice.lora_B.default.weight").fill_(0.5)
    fxlora.save_adapter(lora, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert (saved["base_model.model.twice.lora_B.weight"] == 0.5).all()
    assert (tmp_path / "README.md").read_text() == "mine"


# ---- PEFT ---------------------------------------------------------------------------------------


class Plain(nn.Module):
    """What PEFT can adapt: linear, convolution, embedding, and a head."""

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


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_ours(tmp_path: Path, rslora: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model = Plain()
    config = LoraConfig(**PLAIN, use_rslora=rslora, init_lora_weights=False)
    lora = fxlora.adapt(model, IDS, rules=config).eval()
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
    model = Plain()
    config = peft.LoraConfig(**PLAIN, use_rslora=rslora, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path)
    gm = fxlora.capture(model, IDS).eval()
    lora = fxlora.load_adapter(gm, tmp_path)
    assert (lora(IDS) - gm(IDS)).abs().max() > 1e-3
    assert torch.allclose(lora(IDS), theirs(IDS), atol=1e-6)


# ---- what is wrong ------------------------------------------------------------------------------


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
        save_file(load_file(weights), weights)  # as PEFT writes it, without the plan
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
        ("another method", "'IA3', not for LORA"),
        ("unknown option", "uses use_qalora"),
        ("edited config", "contradicts adapter_model"),
        ("edited plan", "its plan is damaged"),
    ],
)
def test_damaged_folders(tmp_path: Path, what: str, message: str) -> None:
    model = Normed()
    fxlora.save_adapter(trained(model), tmp_path)
    damaged(tmp_path, what)
    gm = fxlora.capture(model, torch.randn(4, 3, 9, 7))
    keys = list(gm.state_dict())
    with pytest.raises(AdapterError, match=message):
        fxlora.load_adapter(gm, tmp_path)
    assert list(gm.state_dict()) == keys
    assert gm.plan is None


def test_a_mismatch_names_the_keys(tmp_path: Path) -> None:
    model = Normed()
    fxlora.save_adapter(trained(model), tmp_path)
    gm = fxlora.capture(model, torch.randn(4, 3, 9, 7))
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
    assert "not what it trains: base_model.model.extra.weight" in text
    assert "twice.lora_A.weight ((3, 6) in the file, (2, 6) here)" in text
    with pytest.raises(AdapterError, match=r"the module has no conv\.weight"):
        fxlora.load_adapter(fxlora.capture(Mlp(), torch.randn(2, 5)), tmp_path)


def test_a_file_never_overwrites_frozen_weights(tmp_path: Path) -> None:
    model = Normed()
    fxlora.save_adapter(trained(model), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(
        {**load_file(path), "base_model.model.first.weight": torch.ones(5, 6)}, path, metadata
    )
    before = snapshot(model)
    with pytest.raises(AdapterError, match="not what it trains"):
        fxlora.load_adapter(fxlora.capture(model, torch.randn(4, 3, 9, 7)), tmp_path)
    assert torch.equal(model.first.weight, before["state"]["first.weight"])


def test_nowhere_to_write_and_nothing_to_save(tmp_path: Path) -> None:
    lora = trained(Normed())
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot write"):
        fxlora.save_adapter(lora, tmp_path / "file")
    with pytest.raises(AdapterError, match="no adapter folder"):
        fxlora.load_adapter(fxlora.remove(lora), tmp_path / "none")
    with pytest.raises(AdapterError, match="nothing to save"):
        fxlora.save_adapter(fxlora.fold(lora), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
