from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlora
from fxlora import ConfigError, ExportError, InputError, LoraConfig, NotCapturedError, Rule

from .laws import randomise, run
from .models import Mlp, Normed, Tied
from .typed import untyped

R = LoraConfig(r=2, lora_alpha=3)


@pytest.mark.slow  # in the quick run, the demo does the same (test_examples.py)
def test_a_fresh_process_needs_no_fxlora(tmp_path: Path) -> None:
    lora = fxlora.adapt(Normed(), torch.randn(2, 3, 9, 7), rules=Rule(op="linear", lora=R))
    randomise(lora)
    folded = fxlora.fold(lora).train()
    x = torch.randn(5, 3, 9, 7)
    assert fxlora.export(folded, tmp_path / "model.pt2", x) == tmp_path / "model.pt2"
    assert folded.training
    torch.save({"x": x, "y": run(folded.eval(), (x,), {})[0]}, tmp_path / "io.pt")
    script = f"""
import sys
sys.modules["fxlora"] = None  # importing it fails
import torch
program = torch.export.load("{tmp_path}/model.pt2").module()
io = torch.load("{tmp_path}/io.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(program(io["x"])["logits"], io["y"])
    assert program(io["x"][:2])["logits"].shape == (2, 4)  # the batch is dynamic
print("same")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("adapted", [False, True])
def test_every_state_exports(tmp_path: Path, adapted: bool) -> None:
    ids = torch.tensor([[1, 2, 3]])
    module = fxlora.capture(Tied(), ids)
    if adapted:
        module = fxlora.inject(module, fxlora.match(module, Rule("mix", lora=R)))
        randomise(module)
    path = fxlora.export(module, tmp_path / "m.pt2", (ids,))
    program = torch.export.load(path)
    keys = set(program.state_dict)
    assert ("mix.lora_A.default.weight" in keys) is adapted
    found = program.module()(torch.cat([ids, ids]))
    assert torch.equal(found, module.eval()(torch.cat([ids, ids])))


def test_keyword_arguments_and_traced_modules(tmp_path: Path) -> None:
    gm = fxlora.capture(Mlp(), None, {"x": torch.randn(2, 5)})
    path = fxlora.export(gm, tmp_path / "m.pt2", kwargs={"x": torch.randn(3, 5)})
    x = torch.randn(4, 5)
    assert torch.equal(torch.export.load(path).module()(x=x), gm.eval()(x))
    traced = fxlora.capture(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    path = fxlora.export(traced, tmp_path / "t.pt2", torch.randn(1, 5))
    assert torch.equal(torch.export.load(path).module()(x), traced.eval()(x))


def test_what_was_captured_dynamic_is_exported_dynamic(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    auto = torch.export.Dim.AUTO
    gm = fxlora.capture(Tied(), ids, dynamic_shapes={"ids": {0: auto, 1: auto}}).eval()
    program = torch.export.load(fxlora.export(gm, tmp_path / "m.pt2", ids[:1, :1])).module()
    for shape in ((1, 1), (3, 5)):
        other = torch.randint(0, 17, shape)
        assert torch.equal(program(other), gm(other))
    static = fxlora.capture(Tied(), ids, dynamic_shapes={"ids": None}).eval()
    program = torch.export.load(fxlora.export(static, tmp_path / "s.pt2", ids)).module()
    with pytest.raises(AssertionError, match=r"ids\.size\(\)\[0\] == 2"):
        program(ids[:1])


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    with pytest.raises(ConfigError, match="format must be one of"):
        fxlora.export(gm, tmp_path / "m", torch.randn(2, 5), format="onxx")
    with pytest.raises(ConfigError, match="a path must be"):
        fxlora.export(gm, untyped(torch.randn(2, 5)), untyped(tmp_path / "m.pt2"))
    with pytest.raises(ExportError, match="cannot write"):
        fxlora.export(gm, tmp_path / "none" / "m.pt2", torch.randn(2, 5))
    with pytest.raises(InputError, match="dimension 1"):
        fxlora.export(gm, tmp_path / "m.pt2", torch.randn(2, 4))
    with pytest.raises(NotCapturedError, match="captured module, not Mlp"):
        fxlora.export(untyped(Mlp()), tmp_path / "m.pt2", torch.randn(2, 5))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    path = tmp_path / "m.pt2"
    path.write_text("before")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(ExportError, match="No space left"):
        fxlora.export(gm, path, torch.randn(2, 5))
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
