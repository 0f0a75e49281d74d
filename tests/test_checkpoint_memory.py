"""The memory that fold_checkpoint and verify_checkpoint take, on weights of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from .checkpoints import Tensors, write_adapter

ROOT = Path(__file__).parent.parent
BF16 = torch.bfloat16


def matrix(out: int, into: int) -> Tensors:
    return {"fc.lora_A.weight": torch.randn(4, into), "fc.lora_B.weight": torch.randn(out, 4)}


def stack(number: int, into: int, out: int) -> Tensors:
    """Return PEFT's A and B of a stack of (in, out), for which it takes each matrix."""
    a, b = torch.randn(number * 4, out), torch.randn(into, 4 * number)
    return {"e.lora_A.weight": a, "e.lora_B.weight": b}


def case(kind: str, n: int) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return a checkpoint with one tensor of about 64·n² bytes, an adapter and its settings."""
    weight: Any = lambda *shape: torch.empty(shape, dtype=BF16).uniform_(-1, 1)  # noqa: E731
    if kind == "two experts (out, in)":
        return (
            {"e.w": weight(2, 2 * n, 8 * n)},
            stack(2, 2 * n, 8 * n),
            {"target_parameters": ["e.w"]},
        )
    if kind == "one expert (in, out)":
        a, b = torch.randn(4, 4 * n), torch.randn(8 * n, 4)
        held = {"e.lora_A.weight": a, "e.lora_B.weight": b}
        return {"e.w": weight(1, 4 * n, 8 * n)}, held, {"target_parameters": ["e.w"]}
    if kind == "experts with a large adapter":
        return {"e.w": weight(n, 32, n)}, stack(n, 32, n), {"target_parameters": ["e.w"]}
    if kind == "long rows":
        return {"fc.weight": weight(16, 2 * n * n)}, matrix(16, 2 * n * n), {}
    if kind == "embedding":
        held = {
            "fc.lora_embedding_A": torch.randn(4, 32 * n),
            "fc.lora_embedding_B": torch.randn(n, 4),
        }
        return {"fc.weight": weight(32 * n, n), "head": weight(32 * n, n)}, held, {}
    if kind == "DoRA on an embedding":
        state, held, _ = case("embedding", n)
        held["fc.lora_magnitude_vector"] = torch.rand(n) + 1
        return state, held, {"use_dora": True}
    if kind == "DoRA":
        held = matrix(8 * n, 4 * n) | {"fc.lora_magnitude_vector": torch.rand(8 * n) + 1}
        return {"fc.weight": weight(8 * n, 4 * n)}, held, {"use_dora": True}
    if kind == "replaced":
        value = torch.randn(8 * n, 4 * n, dtype=torch.float64)
        base = {"fc.weight": weight(8 * n, 4 * n), "fc.bias": weight(8 * n)}
        return base, {"fc.weight": value}, {"modules_to_save": ["fc"]}
    raise KeyError(kind)


def write(made: tuple[Tensors, Tensors, dict[str, Any]], folder: Path) -> None:
    state, tensors, config = made
    write_adapter(folder / "adapter", tensors, r=4, lora_alpha=8, **config)
    save_file(state, folder / "base.safetensors")


KINDS = (
    *("two experts (out, in)", "one expert (in, out)", "experts with a large adapter"),
    *("long rows", "embedding", "DoRA on an embedding", "DoRA", "replaced"),
)


@pytest.mark.parametrize(
    ("n", "kinds"),
    [
        (700, ("two experts (out, in)", "DoRA on an embedding")),
        pytest.param(1500, KINDS, marks=pytest.mark.slow),
    ],
)
def test_memory_is_twice_the_largest_tensor_and_the_adapter(
    n: int, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    """Also of experts, rows and embeddings that are a checkpoint's only large tensor."""
    bounds: dict[str, int] = {}
    write(case(kinds[0], 40), tmp_path / "small")
    for kind in kinds:
        folder = tmp_path / kind
        state, tensors, config = case(kind, n)
        write((state, tensors, config), folder)
        largest = max(tensor.nbytes for tensor in state.values())
        bounds[str(folder)] = 2 * largest + sum(tensor.nbytes for tensor in tensors.values())
    run = subprocess.run(
        [sys.executable, "-m", "tests.peak", str(tmp_path / "small"), *bounds],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    over = {
        Path(folder).name: [f"{peak / bound:.2f}" for peak in found[folder]]
        for folder, bound in bounds.items()
    }
    assert all(len(found[f]) == 2 and max(found[f]) <= bound for f, bound in bounds.items()), over
