"""Every example runs as a user would run it, and prints the results that it is meant to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_demo(tmp_path):
    for package in ("torchvision", "sklearn", "tqdm"):
        pytest.importorskip(package)
    said = run("demo.py", "--quick", "--out", str(tmp_path))
    for graph in ("base", "unfolded", "folded"):
        assert re.search(rf"^{graph} +[\d.]+ +[\d.]+$", said, re.M)
    for row in ("before: new head, untrained", "new head only", "LoRA, new head"):
        assert re.search(rf"^{row} +[\d.]+%$", said, re.M)
    assert "all 20 adapters change the output" in said
    assert re.search(r"checked: a process without fxlora loaded .*/model\.pt2: 224 held-out", said)
    assert re.search(r"checked: base \+ .*/adapter is the trained module: .* bit for bit", said)
    assert "has kept every tensor, bit for bit" in said
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    adapter = {"adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert written == {"model.pt2"} | adapter


def test_quickstart():
    assert len((EXAMPLES / "quickstart.py").read_text(encoding="utf-8").splitlines()) < 40
    said = run("quickstart.py")
    assert_loss_goes_down(said)
    assert "2 sites adapted with 768 parameters" in said
    assert "folded graphs are the captured ones, node for node" in said


def test_rules_by_shape():
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


def test_from_peft():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    said = run("from_peft.py")
    assert_loss_goes_down(said)
    error = re.search(r"PEFT loads the folder: its logits differ from ours by (\S+)", said)
    assert float(error.group(1)) < 1e-5


def test_transformer():
    pytest.importorskip("transformers")
    said = run("transformer.py")
    assert_loss_goes_down(said)
    assert "learning rates: {'lora_A': 0.002, 'lora_B': 0.016}" in said
    assert "folded graphs are the captured ones, node for node" in said
    assert "the same logits bit for bit: True" in said


def run(name: str, *arguments: str) -> str:
    """Run an example and return its output; on one thread, as other tests run in parallel."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_loss_goes_down(said: str) -> None:
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", said, re.M)]
    assert len(losses) >= 3
    assert losses[-1] < 0.7 * losses[0]
    assert losses == sorted(losses, reverse=True)
