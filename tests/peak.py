"""Measure the memory that folding and checking a checkpoint takes: run by a test.

    python -m tests.peak SMALL_CASE CASE…

Each case is a folder with base.safetensors and an adapter. A process of its own folds it and
verifies the result, after the small case, so that the code of libraries is in memory before.
Prints a line of JSON: by case, the peak of memory (VmHWM) above what was in memory before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import fxlora


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def run(folder: Path) -> list[int]:
    """Return the peaks of a fold and of its check."""
    paths = folder / "base.safetensors", folder / "adapter", folder / "out.safetensors"
    found: list[int] = []
    for call in (fxlora.fold_checkpoint, fxlora.verify_checkpoint):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what is there now
        before = peak()
        call(*paths)
        found.append(peak() - before)
    return found


def child(folder: Path, warm: Path) -> list[int]:
    """Fold and verify in a process of its own, after a small case."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            run(warm)
            os.write(writing, json.dumps(run(folder)).encode())
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return json.loads(file.read())


if __name__ == "__main__":
    torch.set_num_threads(2)
    warm, *folders = map(Path, sys.argv[1:])
    print(json.dumps({str(folder): child(folder, warm) for folder in folders}))
