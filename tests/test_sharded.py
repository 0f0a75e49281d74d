"""Several processes: DDP, FSDP2 and tensor parallelism train as one process does.

One run of tests/sharded.py on two processes makes what the tests compare.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fxlora

if not dist.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from . import sharded
from .laws import assert_close

SHARDED = [kind for kind in sharded.KINDS if kind != "ddp"]


def launch(processes: int, folder: Path, *kinds: str) -> None:
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    worker = ["-m", "tests.sharded", str(folder), *kinds]
    root = Path(fxlora.__file__).parents[1]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, *worker],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharded")
    launch(2, made, *sharded.KINDS, sharded.HALF)
    return made


@pytest.fixture(scope="module")
def single() -> Any:
    lora = sharded.adapted(sharded.captured())
    losses, gradients, _ = sharded.train(lora, lora, slice(None))
    return lora, losses, gradients


def made(folder: Path, kind: str) -> dict[str, Any]:
    return torch.load(folder / f"{kind}.pt")


def named(name: str) -> str:
    """Return the name of a parameter without that of a wrapper around its module."""
    return name.replace("_checkpoint_wrapped_module.", "")


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_losses_and_gradients_are_those_of_one_process(
    folder: Path, single: Any, kind: str
) -> None:
    lora, losses, gradients = single
    found = made(folder, kind)
    assert losses[0] - losses[-1] > 1e-2
    assert found["losses"] == pytest.approx(losses, rel=1e-12)  # float64
    theirs = {named(name): gradient for name, gradient in found["gradients"].items()}
    assert theirs.keys() == gradients.keys()  # and so no frozen weight has one
    assert gradients.keys() >= lora.adapter_parameters()
    for name, expected in gradients.items():
        assert float(expected.abs().max()) > 1e-6
        assert_close([theirs[name]], [expected], 1e-12)


def test_adapters_in_float32_over_a_base_in_bfloat16(folder: Path) -> None:
    lora = sharded.adapted(sharded.captured(dtype=torch.bfloat16))
    losses, gradients, _ = sharded.train(lora, lora, slice(None))
    found = made(folder, sharded.HALF)
    assert {p.dtype for p in fxlora.lora_parameters(lora)} == {torch.float32}
    assert found["losses"][0] == pytest.approx(losses[0], rel=1e-6)  # then gradients are rounded
    assert found["losses"] == pytest.approx(losses, rel=1e-2)
    assert found["gradients"].keys() == gradients.keys()
    assert all(g.dtype == torch.float32 for g in found["gradients"].values())
    assert found["verified"]["trainable"] == sum(p.numel() for p in fxlora.lora_parameters(lora))


@pytest.mark.parametrize("kind", SHARDED)
def test_a_process_holds_less_than_the_whole(folder: Path, single: Any, kind: str) -> None:
    whole = sum(parameter.numel() for parameter in single[0].parameters())
    held = made(folder, kind)["held"]
    assert held < (0.75 if kind == "tensor_parallel" else 0.6) * whole


@pytest.mark.parametrize("kind", ["blocks", "checkpointed"])
def test_a_layer_gives_its_whole_weights_up_after_its_forward(folder: Path, kind: str) -> None:
    assert made(folder, kind)["after a forward"]


@pytest.mark.parametrize("kind", sharded.KINDS)
def test_the_adapter_is_saved_once_and_loads_anywhere(folder: Path, single: Any, kind: str) -> None:
    trained = single[0]
    loaded = fxlora.load_adapter(sharded.captured(modules=None), folder / kind)
    ids = torch.arange(12).view(2, 6)
    base = sharded.captured(modules=None).eval()(ids)
    expected = trained.eval()(ids)
    assert float((expected - base).abs().max().detach()) > 1e-3
    assert_close([loaded.eval()(ids)], [expected])


@pytest.mark.parametrize("kind", SHARDED)
def test_verify_looks_at_the_shards(folder: Path, single: Any, kind: str) -> None:
    verified = made(folder, kind)["verified"]
    lora = single[0]
    assert [site["site"] for site in verified["sites"]] == [entry.site for entry in lora.plan]
    for site in verified["sites"]:
        assert min(site["effect"], site["gradient_a"], site["gradient_b"]) > 1e-6
        assert len(site["reads"]) == 2
    assert verified["trainable"] == sum(p.numel() for p in fxlora.lora_parameters(lora))
    assert verified["parameters"] == sum(p.numel() for p in lora.parameters())
    assert math.isnan(verified["output_error"])


@pytest.mark.parametrize("kind", SHARDED)
def test_verify_leaves_values_gradients_and_modes(folder: Path, kind: str) -> None:
    left = made(folder, kind)["left"]
    assert "another process failed" in left["told"]
    assert left["same"]
    assert left["modes"] == (True, False, True)
    if kind != "tensor_parallel":
        alone, with_verify = left["accumulated"]
        assert float(alone.abs().max()) > 1e-3
        assert torch.equal(alone, with_verify)


@pytest.mark.parametrize("kind", SHARDED)
def test_an_error_in_one_process_is_one_in_all(folder: Path, kind: str) -> None:
    told = made(folder, kind)["failed"]
    assert sum("ExportError: the module is sharded" in text for text in told) == 2
    assert sum("Capture it before, and shard" in text for text in told) == 2
    assert sum("cannot write" in text for text in told) == 1
    assert sum("another process failed" in text for text in told) == 1
    assert sum("'layers.1.up' was written to" in text for text in told) == 2


@pytest.mark.parametrize("kind", ["root", "blocks", "checkpointed"])
def test_fully_sharded_modules_are_folded_as_the_error_says(
    folder: Path, single: Any, kind: str
) -> None:
    found = made(folder, kind)
    assert sum("plain.load_state_dict(" in text for text in found["failed"]) == 2
    plain = sharded.adapted(sharded.captured())
    state = {named(name): tensor for name, tensor in found["state"].items()}
    plain.load_state_dict(state)
    expected = fxlora.fold(single[0]).state_dict()
    for name, tensor in fxlora.fold(plain).state_dict().items():
        assert_close([tensor], [expected[name]])


def test_tensor_parallel_modules_are_folded_where_they_are(folder: Path, single: Any) -> None:
    found = made(folder, "tensor_parallel")
    unfolded, folded = found["outputs"]
    assert float((unfolded - found["base"]).abs().max()) > 1e-3
    assert_close([folded], [unfolded])
    ids = torch.randint(17, (sharded.SAMPLES, 6), generator=torch.Generator().manual_seed(2))
    assert_close([unfolded], [single[0].eval()(ids)])
    assert_close([found["base"]], [sharded.captured(modules=None).eval()(ids)])


def test_copies_that_differ_are_told(folder: Path) -> None:
    told = made(folder, "tensor_parallel")["failed"]
    named = "diverged: {}: layers.0.up.lora_A.default.weight is another in each process"
    assert sum(text.startswith(named.format("VerificationError: processes")) for text in told) == 2
    assert sum(text.startswith(named.format("AdapterError")) for text in told) == 2
    assert sum("parallelize_module on the captured module before inject" in t for t in told) == 2


def test_adapters_are_sharded_as_their_weights_are(folder: Path) -> None:
    rows = made(folder, "tensor_parallel")["plan"].splitlines()[2:6]
    assert [row.split()[-2:] for row in rows] == [
        ["S(0)", "R"],  # up, by outputs: A, B
        ["S(0)", "S(0)"],
        ["S(1)", "S(1)"],  # down, by inputs
        ["S(1)", "R"],
    ]


@pytest.mark.slow
def test_fsdp_over_tensor_parallel_layers(folder: Path, single: Any) -> None:
    launch(4, folder, sharded.BOTH)
    found = made(folder, sharded.BOTH)
    assert found["losses"] == pytest.approx(single[1], rel=1e-12)
    assert_close([found["gradients"][name] for name in single[2]], list(single[2].values()))
    loaded = fxlora.load_adapter(sharded.captured(modules=None), folder / sharded.BOTH)
    ids = torch.arange(12).view(2, 6)
    assert_close([loaded.eval()(ids)], [single[0].eval()(ids)])


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_resumes_on_another_number_of_processes(
    folder: Path, single: Any, processes: int
) -> None:
    launch(processes, folder, "resumed")
    assert made(folder, "resumed")["losses"] == pytest.approx(single[1][-1:], rel=1e-12)
