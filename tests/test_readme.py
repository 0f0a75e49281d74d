"""The README's code blocks and commands run, and print the output that the README shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlora
from fxlora import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number: int, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision is optional")
    code = blocks("python")[number]
    if "import peft" in code:
        pytest.importorskip("peft", reason="peft is optional")
    if "transformers" in code:
        pytest.importorskip("transformers", reason="transformers is optional")
    script = tmp_path / "block.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "[None, None, None]" in code:
        assert done.stdout.strip() == "[None, None, None]"


def test_the_table() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    plan = fxlora.match(fxlora.capture(model), fxlora.LoraConfig(r=8, target_modules=["0"]))
    assert fxlora.report(plan) in README


def test_the_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision", reason="torchvision is optional")
    monkeypatch.chdir(tmp_path)
    (shell,) = (block for block in blocks("sh") if "fxlora plan" in block)
    commands = [line.split()[1:] for line in shell.splitlines() if "torchvision:" in line]
    assert [command[0] for command in commands] == ["plan", "adapt", "fold", "verify", "export"]
    for command in commands:
        assert cli.main(command) == 0, command
    assert (tmp_path / "model.pt2").is_file()


def test_make_targets_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
