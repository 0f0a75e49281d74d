"""PEFT → fxlora → PEFT over the zoo, in float64: the largest difference of the outputs.

PEFT adapts every layer of one kind (linear, embedding, convolution) of each model, with A and B
drawn at random, and saves a folder. fxlora loads it and saves another, which PEFT loads. A folder
is equal, refused with a reason, or different: a failure. For refused ones, the table says whether
the formula W0 + s·BA differs from PEFT's outputs.

    python benchmarks/interop.py --library transformers --only 'bert|llama'
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from sweep import Record, add_failures, grouped, options_given, reason, sweep_parser, swept
from torch import nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D
from zoo import Case

import fxlora

KINDS = {
    "linear": (nn.Linear, Conv1D),
    "embedding": (nn.Embedding,),
    "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
}
LIMIT = 1e-10


def main() -> None:
    report, records = swept(options_given(sweep_parser(__doc__)), work, line)
    for library, mine in grouped(records, "library").items():
        report.add(library, [row(kind, mine) for kind in KINDS])
    refused = [
        {"model": f"{r['library']} {r['name']}", "layers": kind, **found["refused"]}
        for r in records
        for kind, found in r.get("kinds", {}).items()
        if "refused" in found
    ]
    if refused:
        report.add("Refused", refused)
    add_failures(report, records)


RESULTS = ("equal", "refused", "different", "PEFT refuses")


def row(kind: str, records: list[Record]) -> dict[str, str]:
    found = [r["kinds"][kind] for r in records if kind in r.get("kinds", {})]
    counts = Counter(f["result"] for f in found)
    to = [f["PEFT to fxlora"] for f in found if "PEFT to fxlora" in f]
    back = [f["fxlora to PEFT"] for f in found if "fxlora to PEFT" in f]
    return {
        "layers": kind,
        "folders": str(len(found)),
        **{result: str(counts[result]) for result in RESULTS},
        "PEFT → fxlora": f"{max(to, default=0):.1e}",
        "fxlora → PEFT": f"{max(back, default=0):.1e}",
        "of folders": str(len(back)),
    }


def line(record: Record) -> str:
    said = [f"{kind} {found['result']}" for kind, found in record.get("kinds", {}).items()]
    said += record["failures"]
    return f"{record['library']} {record['name']}: {', '.join(said)} ({record['seconds']['all']} s)"


def work(build: Callable[[], Case], device: str, record: Record) -> None:
    # Fused inference kernels bypass PEFT's layers.
    torch.backends.mha.get_fastpath_enabled = lambda: False
    model, args, kwargs = doubled(build(), device)
    begin = time.perf_counter()
    try:
        gm = fxlora.capture(model, args, kwargs).eval()
    except fxlora.CaptureError as error:
        record["failures"].append(reason("capture", error))
        return
    record["seconds"]["capture"] = round(time.perf_counter() - begin, 1)
    record["kinds"] = {}

    def outputs(module: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            leaves = pytree.tree_leaves(module(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    for kind, classes in KINDS.items():
        names = [name for name, held in model.named_modules() if isinstance(held, classes)]
        with tempfile.TemporaryDirectory() as folder:
            if not names:
                continue
            try:
                made = theirs(model, names, Path(folder))
            except Exception as error:  # noqa: BLE001 - PEFT does not take every layer
                record["kinds"][kind] = {"result": "PEFT refuses", "refused": {"PEFT": str(error)}}
                continue
            found = record["kinds"][kind] = both_ways(model, gm, made, outputs, Path(folder))
            if found["result"] == "different":
                record["failures"].append(f"{kind}: {found}")


def doubled(case: Case, device: str) -> tuple[Any, Any, Any]:
    """Return a model and its inputs in float64."""
    model: Any = case.model.double().eval().to(device)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default has no float64
    args, kwargs = pytree.tree_map_only(torch.Tensor, _double(device), (case.args, case.kwargs))
    return model, args, kwargs


def _double(device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: (t.double() if t.is_floating_point() else t).to(device)


def theirs(model: nn.Module, names: list[str], folder: Path) -> nn.Module:
    """Return PEFT's module with random adapters, saved in a folder."""
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    made.save_pretrained(str(folder), save_embedding_layers=False)
    return made


def both_ways(
    model: nn.Module,
    gm: fxlora.CapturedModule,
    made: nn.Module,
    outputs: Callable[[nn.Module], list[torch.Tensor]],
    folder: Path,
) -> dict[str, Any]:
    try:
        expected, base = outputs(made), outputs(model)
    except Exception as error:  # noqa: BLE001 - PEFT's forward may raise on its own wrapping
        return {"result": "no result", "why": reason("PEFT", error)}
    try:
        lora = fxlora.load_adapter(gm, folder).eval()
    except fxlora.AdapterError as error:
        why = {"reason": str(error).replace(str(folder), "…")[:200]}
        return {"result": "refused", "refused": why | formula(gm, folder, outputs, expected)}
    found: dict[str, Any] = {"effect": distance(base, expected)}
    found["PEFT to fxlora"] = distance(outputs(lora), expected)
    fxlora.save_adapter(lora, folder / "ours")
    if "FXLORA" not in (folder / "ours/adapter_config.json").read_text():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder / "ours")).eval()
        found["fxlora to PEFT"] = distance(outputs(again), expected)
    worst = max(found[key] for key in ("PEFT to fxlora", "fxlora to PEFT") if key in found)
    return {"result": "equal" if worst < LIMIT else "different", **found}


def formula(
    gm: fxlora.CapturedModule,
    folder: Path,
    outputs: Callable[[nn.Module], list[torch.Tensor]],
    expected: list[torch.Tensor],
) -> dict[str, str]:
    """Return how far the formula is from PEFT's outputs."""
    try:
        lora = fxlora.load_adapter(gm, folder, as_formula=True).eval()
    except fxlora.AdapterError:
        return {"the formula differs by": ""}
    return {"the formula differs by": f"{distance(outputs(lora), expected):.1e}"}


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest entry."""
    worst = 0.0
    for ours, other in zip(found, expected, strict=True):
        if ours.is_floating_point() and ours.numel():
            scale = float(other.abs().max()) or 1.0
            worst = max(worst, float((ours - other).abs().max()) / scale)
    return worst


if __name__ == "__main__":
    main()
