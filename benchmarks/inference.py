"""Measure unfolded serving: a forward with adapters, of fxlora and PEFT, over the base model's.

Each number of tokens is one batch without a cache, under torch.inference_mode.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from common import (
    DTYPES,
    Report,
    Side,
    copy_adapters,
    error,
    interleave,
    parser,
    randomise_b,
    start,
)
from torch import nn
from train_step import ALPHA, TASKS, R, Task, with_peft

import fxlora

BASE, EXPLICIT, FAST, PEFT, FOLDED = "base", "explicit", "optimized", "PEFT", "folded"
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}

Call = Callable[[], torch.Tensor]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options_parser.add_argument("--compile", action="store_true", help="torch.compile every side")
    names = ["gpt2", "llama", "mixtral"]
    options_parser.add_argument("--models", nargs="+", default=names[:2], choices=names)
    options_parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    options = start(options_parser, rounds=25)
    report = Report(options)
    for name in options.models:
        task = TASKS[name](argparse.Namespace(**{**vars(options), "text": [1, 16]}))
        rows = []
        timings = {}
        for tokens in options.tokens:
            calls = prepared(task, tokens, options)
            check(calls, TOLERANCES[DTYPES[options.dtype]])
            sides = {side: Side(lambda run: run(), lambda c=c: c) for side, c in calls.items()}
            times = interleave(sides, options.rounds, options.device)
            timings |= {f"{tokens} tokens, {side}": timing for side, timing in times.items()}
            others = {s: f"{t.over(times[BASE]):.3f}" for s, t in times.items() if s != BASE}
            rows.append({"tokens": str(tokens), "base, ms": str(times[BASE]), **others})
        mode = "compiled" if options.compile else "eager"
        title = task.title.partition(",")[0]
        report.add(f"{title}, {options.dtype}, r={R}, {mode}: times over the base", rows, timings)


def prepared(task: Task, tokens: int, options: argparse.Namespace) -> dict[str, Call]:
    (vocabulary, _) = task.model.get_parameter(f"{task.stem}.weight").shape
    ids = torch.randint(0, vocabulary, (1, tokens), device=options.device)
    model = task.model.eval()
    rules = fxlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=task.targets)
    lora = fxlora.adapt(model, (), {"input_ids": ids}, rules=rules).eval()
    randomise_b(lora)
    peft = with_peft(task, upcast=True)
    copy_adapters(lora, peft)
    modules: dict[str, nn.Module] = {
        BASE: copy.deepcopy(model),
        EXPLICIT: lora,
        FAST: fxlora.optimize(lora),
        PEFT: peft.eval(),
        FOLDED: fxlora.fold(lora),
    }

    def call(module: Any) -> Call:
        run = torch.compile(module, dynamic=False) if options.compile else module

        def outputs() -> torch.Tensor:
            with torch.inference_mode():
                return run(input_ids=ids).logits

        return outputs

    return {side: call(module.eval()) for side, module in modules.items()}


def check(calls: dict[str, Call], tolerance: float) -> None:
    """Assert that all sides with adapters agree, and that the adapters change the output."""
    outputs = {side: call() for side, call in calls.items()}
    effect = error(outputs[EXPLICIT], outputs[BASE])
    for side in (FAST, PEFT, FOLDED):
        gap = error(outputs[side], outputs[EXPLICIT])
        assert gap < tolerance, f"{side} and explicit differ by {gap:.1e}"
        assert effect > 10 * gap, f"the adapters change the output by {effect:.1e} only"


if __name__ == "__main__":
    main()
