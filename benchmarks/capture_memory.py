"""Measure the memory that capture, match and inject take in addition to the model.

    python benchmarks/capture_memory.py [--quick] [--gigabytes 2]

They share the model's weights. Each model is built, captured and adapted in a separate process.
The result is the peak of the process's resident memory after the model was built (VmHWM) minus
the resident memory at that time (VmRSS), also relative to the model's weights. Linux only: it
reads /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Report, parser, start
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

MEBI = 2**20
WIDTH = 2048


def linears(gigabytes: float) -> tuple[nn.Module, torch.Tensor]:
    """Return a stack of square linear layers, and its input."""
    count = max(1, round(gigabytes * 2**30 / (4 * WIDTH * WIDTH)))
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count))), torch.randn(2, WIDTH)


def transformer(gigabytes: float) -> tuple[nn.Module, torch.Tensor]:
    """Return an nn.TransformerEncoder, which has 12 d² weights per layer, and its input."""
    count = max(1, round(gigabytes * 2**30 / (4 * 12 * WIDTH * WIDTH)))
    layer = nn.TransformerEncoderLayer(WIDTH, 16, 4 * WIDTH, batch_first=True)
    encoder = nn.TransformerEncoder(layer, count, enable_nested_tensor=False)
    return encoder, torch.randn(1, 8, WIDTH)


MODELS: dict[str, Callable[[float], tuple[nn.Module, torch.Tensor]]] = {
    "linears": linears,
    "transformer": transformer,
}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--gigabytes", type=float, help="weights (2; 0.5 with --quick)")
    options_parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = start(options_parser, rounds=1)
    options.gigabytes = options.gigabytes or (0.5 if options.quick else 2.0)
    if options.child:
        print(json.dumps(measured(*MODELS[options.child](options.gigabytes))))
        return
    report = Report(options)
    report.add(
        "Peak resident memory in addition to the model's, float32",
        [row(name, in_a_process(name, options)) for name in MODELS],
        note="The numbers include the memory of tracing, which does not depend on weight sizes.",
    )


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", name, "--gigabytes", str(options.gigabytes)]
    words += ["--threads", str(options.threads)]
    result = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measured(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Return the MiB of the weights, of A and B, and of the additional peak after each step."""
    found: dict[str, Any] = {"weights": sum(p.nbytes for p in model.parameters()) / MEBI}
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM: building the model may peak, too
    before = memory("VmRSS")
    gm = fxlora.capture(model, x)
    found["capture"] = memory("VmHWM") - before
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(op="linear", lora=LoraConfig(r=8))))
    found["capture, match, inject"] = memory("VmHWM") - before
    found["A and B"] = sum(p.nbytes for p in fxlora.lora_parameters(lora)) / MEBI
    return found


def memory(name: str) -> float:
    """Return a value of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def row(name: str, found: dict[str, Any]) -> dict[str, str]:
    weights = found["weights"]
    cells = {
        "model": name,
        "weights": f"{weights:.0f} MiB",
        "A and B": f"{found['A and B']:.1f} MiB",
    }
    for step in ("capture", "capture, match, inject"):
        cells[f"peak after {step}"] = f"{found[step]:.1f} MiB ({found[step] / weights:.1%})"
    return cells


if __name__ == "__main__":
    main()
