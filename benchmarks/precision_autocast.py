"""Autocast over the zoo: does each captured model follow the caller's torch.autocast?

Every float32 model is captured and called under autocast in bfloat16 and float16, in both modes,
with the same seed as the source. A run is equal (dtypes and bits), refused (a typed error), or
different: a failure.

    python benchmarks/precision_autocast.py --library transformers --only 'bert|llama'
"""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import torch
from sweep import Record, add_failures, grouped, options_given, reason, sweep_parser, swept
from torch import nn
from torch.utils import _pytree as pytree
from zoo import Case

import fxlora

HALF = (torch.bfloat16, torch.float16)


def main() -> None:
    report, records = swept(options_given(sweep_parser(__doc__)), work, line)
    for library, mine in grouped(records, "library").items():
        report.add(library, [row(str(dtype), mine) for dtype in HALF])
    refused = [
        {"model": f"{r['library']} {r['name']}", "reason": why[:200]}
        for r in records
        for why in dict.fromkeys(r.get("refusals", ()))
    ]
    if refused:
        report.add("Refused", refused)
    add_failures(report, records)


def work(build: Callable[[], Case], device: str, record: Record) -> None:
    # Fused inference kernels round differently from the ops that they replace.
    torch.backends.mha.get_fastpath_enabled = lambda: False
    case = build()
    model = case.model.float().to(device)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(device), (case.args, case.kwargs)
    )
    begin = time.perf_counter()
    try:
        gm = fxlora.capture(model, args, kwargs)
    except fxlora.CaptureError as error:
        record["failures"].append(reason("capture", error))
        return
    record["seconds"]["capture"] = round(time.perf_counter() - begin, 1)
    record["road"] = "whole" if gm.regions == ("",) else "regions"
    record["runs"], record["refusals"] = {}, []
    for dtype in HALF:
        for training in (False, True):
            key = f"{dtype} {'train' if training else 'eval'}"
            record["runs"][key] = compare(gm, model, (args, kwargs), dtype, training, record)


def compare(
    gm: fxlora.CapturedModule,
    model: nn.Module,
    given: Any,
    dtype: torch.dtype,
    training: bool,
    record: Record,
) -> str:
    try:
        expected = outputs(copy.deepcopy(model).train(training), given, dtype)
    except Exception:  # noqa: BLE001 - the source may raise anything
        return "source raises"
    try:
        found = outputs(copy.deepcopy(gm).train(training), given, dtype)
    except fxlora.InputError as error:
        record["refusals"].append(reason("call", error))
        return "refused"
    except Exception as error:  # noqa: BLE001 - an untyped error is a failure
        record["failures"].append(reason("call", error))
        return "different"
    if [t.dtype for t in found] != [t.dtype for t in expected]:
        record["failures"].append(f"{dtype}: other dtypes")
        return "different"
    difference = max(map(distance, found, expected), default=0.0)
    if difference:
        record["failures"].append(f"{dtype}, training={training}: difference {difference:.1e}")
        return "different"
    return "equal"


def outputs(module: nn.Module, given: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    args, kwargs = copy.deepcopy(given)
    device = next(module.parameters()).device.type
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):  # masks drawn by NumPy
        seed(1)
    with torch.no_grad(), torch.autocast(device, dtype):
        results = pytree.tree_leaves(module(*args, **kwargs))
    return [leaf for leaf in results if isinstance(leaf, torch.Tensor)]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest entry; NaN equals NaN."""
    if found.shape != expected.shape:
        return float("inf")
    a, b = (t.double().nan_to_num() for t in (found, expected))
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def row(dtype: str, records: list[Record]) -> dict[str, str]:
    runs = [
        result
        for record in records
        for key, result in record.get("runs", {}).items()
        if key.startswith(dtype)
    ]
    counts = Counter(runs)
    kinds = ("equal", "refused", "different", "source raises")
    return {
        "autocast": dtype,
        "models": str(len(records)),
        "runs": str(len(runs)),
        **{kind: str(counts[kind]) for kind in kinds},
    }


def line(record: Record) -> str:
    runs = ", ".join(f"{key}: {result}" for key, result in record.get("runs", {}).items())
    why = " | ".join([*record["failures"], *dict.fromkeys(record.get("refusals", ()))])
    seconds = record["seconds"].get("capture", 0.0)
    return f"{record['name']} {record.get('road', '')} capture {seconds:.0f}s: {runs} {why}"


if __name__ == "__main__":
    main()
