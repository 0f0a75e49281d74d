"""Every example runs as a user would run it, and prints the results that it is meant to show."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ("--quick", "--batch", "8", "--pretrain-steps", "2", "--steps", "3", "--rounds", "1")
SMALL = "resnet_of_two_blocks"


@pytest.fixture(autouse=True)
def _no_fused_attention() -> None:
    """Override the fixture of conftest.py: as for users, fused kernels are on."""


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as the main module of this process, and return its output."""

    def call(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else the demo sets it
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ResNet of two of the eight blocks of the demo's own."""
    for package in ("torchvision", "sklearn", "tqdm"):
        pytest.importorskip(package)
    from torchvision.models import _api, resnet

    def small(weights: None = None) -> torch.nn.Module:
        model: Any = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
        model.layer3 = model.layer4 = torch.nn.Identity()  # wider, and like layer2
        model.fc = torch.nn.Linear(128, 1000)
        return model

    monkeypatch.setitem(_api.BUILTIN_MODELS, SMALL, small)
    said = run("demo.py", *QUICK, "--model", SMALL, "--out", str(tmp_path))
    for graph in ("base", "unfolded", "folded"):
        assert re.search(rf"^{graph} +[\d.]+ +[\d.]+$", said, re.M)
    for row in ("before: new head, untrained", "new head only", "LoRA, new head"):
        assert re.search(rf"^{row} +[\d.]+%$", said, re.M)
    assert "all 6 adapters change the output" in said
    assert re.search(r"checked: a process without fxlora loaded .*/model\.pt2: 224 held-out", said)
    assert re.search(r"checked: base \+ .*/adapter is the trained module: .* bit for bit", said)
    assert "has kept every tensor, bit for bit" in said
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    adapter = {"adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert written == {"model.pt2"} | adapter


def test_quickstart(run: Run) -> None:
    assert len((EXAMPLES / "quickstart.py").read_text(encoding="utf-8").splitlines()) < 40
    said = run("quickstart.py")
    assert_loss_goes_down(said)
    assert "2 sites adapted with 768 parameters" in said
    assert "folded graphs are the captured ones, node for node" in said


def test_rules_by_shape(run: Run) -> None:
    said = run("rules_by_shape.py")
    taken = re.findall(r"^(\S+) .* branch +(\d+) +\d+ +[\d,]+ +(\d+)$", said, re.M)
    assert taken == [  # site, r, the first rule that matches
        ("embed", "3", "5"),
        ("blocks.0", "4", "4"),
        ("blocks.2", "2", "3"),
        ("blocks.4", "4", "4"),
        ("mix.0", "8", "6"),
    ]
    assert "NoMatchError: rule 2 ('stem')" in said
    assert "the plan read back from TOML is the same: True" in said


def test_from_peft(run: Run) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    said = run("from_peft.py")
    assert_loss_goes_down(said)
    error = re.search(r"PEFT loads the folder: its logits differ from ours by (\S+)", said)
    assert error and float(error.group(1)) < 1e-5


def test_serve(run: Run) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is optional")
    assert "320 of 320 answers right, 4 swaps" in run("serve.py")


@pytest.mark.slow
def test_transformer(run: Run) -> None:
    pytest.importorskip("transformers")
    said = run("transformer.py")
    assert_loss_goes_down(said)
    assert "learning rates: {'lora_A': 0.002, 'lora_B': 0.016}" in said
    assert "folded graphs are the captured ones, node for node" in said
    assert "the same logits bit for bit: True" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_as_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    """Run an example as a user does; on one thread, as other tests run in parallel."""
    for package in ("torchvision", "sklearn", "tqdm", "transformers", "peft", "aiohttp"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *(["--quick"] if name == "demo.py" else [])],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def assert_loss_goes_down(said: str) -> None:
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", said, re.M)]
    assert len(losses) >= 3
    assert losses[-1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)
