"""Kill or interrupt a process that folds a checkpoint, at random points, and go on: run by a test.

    python -m tests.killed FOLDER COUNT SEED

Each child folds FOLDER/base with FOLDER/adapter into FOLDER/out, and sends itself a signal
(SIGKILL, SIGTERM or SIGINT) at one of its calls to the operating system, in the middle of a write
if it is one. After some kills a last child goes on to the end. Prints one line of JSON for each
sequence: the number of kills, whether one of them left something half-written under its final name,
and the sizes that children found.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxlora
from fxlora.disk.checkpoint import pieces

CALLS = [
    *((os, name) for name in ("write", "copy_file_range", "truncate", "open", "mkdir", "close")),
    *((Path, name) for name in ("replace", "mkdir", "write_text", "open", "unlink")),
    *((shutil, name) for name in ("copyfile", "rmtree")),
]


def armed(at: int, sent: signal.Signals) -> list[int]:
    """Count the calls, and send the signal at the one with this number; return the counter."""
    counter = [0]

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            counter[0] += 1
            if counter[0] == at:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), sent)
                if name == "write":
                    return len(args[1]) // 2
            return call(*args, **kwargs)

        return run

    for owner, name in CALLS:
        if hasattr(owner, name):
            setattr(owner, name, counted(name, getattr(owner, name)))
    return counter


def child(folder: Path, at: int, sent: signal.Signals = signal.SIGKILL) -> tuple[int, int]:
    """Fold in a process of its own; return its exit status, and how many calls it made."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        counter = armed(at, sent)
        status = 1
        try:
            fxlora.fold_checkpoint(folder / "base", folder / "adapter", folder / "out")
            status = 0
        finally:
            os.write(writing, str(counter[0]).encode())
            os._exit(status)
    _, status = os.waitpid(process, 0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return status, int(file.read() or 0)


def whole(folder: Path) -> bool:
    """Whether the result is not there, or complete."""
    base, out = folder / "base", folder / "out"
    if not out.exists():
        return True
    names = [sorted(p.relative_to(d) for p in d.rglob("*")) for d in (base, out)]
    return names[0] == names[1] and all(
        (base / n).stat().st_size == (out / n).stat().st_size for n in names[0]
    )


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    pieces.ROWS = 2**10
    rng = random.Random(seed)
    status, total = child(folder, 0)
    assert status == 0 and total > 20, (status, total)
    reference = folder / "reference"
    (folder / "out").rename(reference)
    kills = 0
    while kills < count:
        found = {"kills": 0, "half": 0}
        for _ in range(rng.randint(1, 4)):
            sent = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            status, _ = child(folder, rng.randint(1, total), sent)
            found["kills"] += int(status != 0)
            found["half"] += int(not whole(folder))
        status, _ = child(folder, 0)
        same = status == 0 and all(
            path.read_bytes() == (folder / "out" / path.relative_to(reference)).read_bytes()
            for path in reference.rglob("*")
            if path.is_file()
        )
        left = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
        print(json.dumps({**found, "status": status, "same": same, "left": left}))
        kills += found["kills"]
        shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
