"""Measure how each step grows with the number of layers: CPU seconds for N, and the exponent.

Each N runs in a separate process, on one thread. The exponent is the slope of log(seconds) over
log(N): between the last two N, and fitted through all of them; 1 is linear.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Report, start, untimed_parser
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora import LoraConfig, Rule

WIDTH = 16


class Block(nn.Module):
    """A pre-norm linear layer with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(F.layer_norm(x, (WIDTH,)))


class Bare(nn.Module):
    """Functional linears on bare parameters of `rows` rows, of which the first WIDTH are read."""

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(rows, WIDTH) / 4) for _ in range(layers)]
        self.ws = nn.ParameterList(weights)
        self.sliced = rows > WIDTH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.ws:
            x = F.linear(x, weight[:WIDTH] if self.sliced else weight)
        return x


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "preln": lambda n: nn.Sequential(*(Block() for _ in range(n))),
    "bare": lambda n: Bare(n, WIDTH),
    "weight": lambda n: Bare(n, WIDTH + 4),
    "traced": lambda n: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(n))),
}


# ---- one N --------------------------------------------------------------------------------------


class Steps:
    """Runs steps, and keeps the CPU seconds of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        begin = time.process_time()
        result = step()
        self.seconds[name] = time.process_time() - begin
        return result


def measure(kind: str, layers: int) -> dict[str, float]:
    """Return the CPU seconds of every step for one model."""
    torch.manual_seed(0)
    model, x, steps = KINDS[kind](layers), torch.randn(2, WIDTH), Steps()
    config = LoraConfig(r=2)
    rules = [Rule("ws.*" if kind in ("bare", "weight") else "*", lora=config)]
    args = None if kind == "traced" else (x,)
    gm = steps("capture", lambda: fxlora.capture(model, args))
    plan = steps("match", lambda: fxlora.match(gm, rules))
    steps("match with a budget", lambda: fxlora.match(gm, rules, budget="40%"))
    lora = steps("inject", lambda: fxlora.inject(gm, plan)).eval()
    with torch.no_grad():
        for name in lora.adapter_parameters():
            lora.get_parameter(name).normal_(std=0.1)
    steps("report", lambda: fxlora.report(lora))
    folded = steps("fold", lambda: fxlora.fold(lora))
    steps("remove", lambda: fxlora.remove(lora))
    with tempfile.TemporaryDirectory() as folder:
        steps("save", lambda: fxlora.save_adapter(lora, folder))
        steps("load", lambda: fxlora.load_adapter(gm, folder))
        steps("deepcopy", lambda: copy.deepcopy(lora))
        steps("verify", lambda: fxlora.verify(lora, x, folded=folded))
        path = Path(folder) / "model.pt2"
        steps("export", lambda: fxlora.export(folded, path, x))
    steps("torch.export only", lambda: torch.export.export(model, (x,), strict=False))
    return steps.seconds


# ---- all of them --------------------------------------------------------------------------------


def in_a_process(kind: str, layers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", "--kind", kind, "--layers", str(layers)]
    done = subprocess.run([*command, "--threads", "1"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def slope(points: list[tuple[int, float]]) -> float:
    """Return the slope of the least-squares line through (log N, log seconds)."""
    logs = [(math.log(n), math.log(max(seconds, 1e-6))) for n, seconds in points]
    mean_n, mean_s = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    return sum((n - mean_n) * (s - mean_s) for n, s in logs) / sum(
        (n - mean_n) ** 2 for n, _ in logs
    )


def rows_of(found: dict[int, dict[str, float]]) -> list[dict[str, str]]:
    """Return a row for each step: its seconds for each N, and its exponents."""
    rows: list[dict[str, str]] = []
    for step in next(iter(found.values())):
        points = [(n, seconds[step]) for n, seconds in found.items()]
        row = {"step": step} | {f"N = {n}": f"{seconds:.2f}" for n, seconds in points}
        if len(points) > 1:
            row["last two"] = f"{slope(points[-2:]):.2f}"
            row["all"] = f"{slope(points):.2f}"
        rows.append(row)
    return rows


def main() -> None:
    options_parser = untimed_parser(__doc__)
    options_parser.add_argument("--kind", nargs="+", choices=KINDS, default=["preln"])
    options_parser.add_argument("--layers", nargs="+", type=int, default=[250, 500, 1000, 2000])
    options_parser.add_argument("--one", action="store_true", help="print one N as JSON")
    options_parser.set_defaults(threads=1)
    options = start(options_parser)
    if options.one:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.kind[0], options.layers[0])))
        return
    report = Report(options)
    for kind in options.kind:
        found = {layers: in_a_process(kind, layers) for layers in options.layers}
        report.add(f"{kind}: CPU seconds for N layers, and exponents", rows_of(found))


if __name__ == "__main__":
    main()
