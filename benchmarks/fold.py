"""Compare the fold with PEFT's merge, and with only reading and writing the weights once.

Every side is a complete call on the same A and B. fxlora.fold allocates the folded weights and
builds a new graph, unless inplace=True. PEFT's merge writes to the weights in place.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    DTYPES,
    Report,
    Side,
    copy_adapters,
    error,
    interleave,
    is_adapter,
    parser,
    randomise_b,
    start,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

import fxlora

R, ALPHA = 16, 32
S = ALPHA / R
FOLD, MERGE = "fxlora.fold(lora)", "PEFT merge_adapter()"
FOLD_IN_PLACE = "fxlora.fold(lora, inplace=True)"
IN_PLACE, NEW = "W.add_(1)", "torch.add(W, 1)"


class Linear(nn.Module):
    """One projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class Block(nn.Module):
    """The seven projections of a Llama block with grouped queries, without attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow, wide = width // 4, width * 11 // 4
        self.width = width
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, narrow, bias=False)
        self.v_proj = nn.Linear(width, narrow, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, wide, bias=False)
        self.up_proj = nn.Linear(width, wide, bias=False)
        self.down_proj = nn.Linear(wide, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = (self.k_proj(x) * self.v_proj(x)).repeat(1, 4)
        x = x + self.o_proj(self.q_proj(x) * values)
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    options = start(options_parser, rounds=9)
    report = Report(options)
    scale = 4 if options.quick else 1
    accuracy: list[dict[str, Any]] = []
    for name, model in (
        (f"linear {4096 // scale}x{4096 // scale}", Linear(4096 // scale)),
        (f"block of seven projections, width {2048 // scale}", Block(2048 // scale)),
    ):
        for dtype in options.dtypes:
            case = f"{name}, {dtype}, r={R}"
            lora, pefts = adapted(model.to(options.device, DTYPES[dtype]))
            accuracy += rounding(case, lora, pefts)
            compare(case, lora, pefts, options, report)
    report.add("Folded weights against W0 + s·BA in float64, rounded once", accuracy)


Pefts = dict[str, Any]  # dtype of the adapters → PEFT's model


def adapted(model: Linear | Block) -> tuple[fxlora.CapturedModule, Pefts]:
    """Return fxlora's module and PEFT's models with equal A and B.

    By default both libraries keep the adapters of a bfloat16 model in float32. PEFT's merge is
    compared in both dtypes, so A and B have values that both can hold.
    """
    names = [name for name, _ in model.named_children()]
    example = torch.randn(2, model.width).to(next(model.parameters()))
    rules = fxlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=names)
    lora = fxlora.adapt(model, example, rules=rules)
    randomise_b(lora)
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.copy_(parameter.to(example.dtype))
    pefts: Pefts = {}
    for upcast in (False, True):
        config = PeftConfig(r=R, lora_alpha=ALPHA, target_modules=names)
        peft = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=upcast)
        copy_adapters(lora, peft.get_base_model())
        (dtype,) = {str(p.dtype)[6:] for n, p in peft.named_parameters() if is_adapter(n)}
        pefts.setdefault(dtype, peft)
    return lora, pefts


def compare(
    case: str,
    lora: fxlora.CapturedModule,
    pefts: Pefts,
    options: argparse.Namespace,
    report: Report,
) -> None:
    sides = memory_sides(lora) | fxlora_sides(lora) | peft_sides(pefts)
    includes = {name: text for name, (text, _) in sides.items()}
    timings = interleave(
        {name: side for name, (_, side) in sides.items()}, options.rounds, options.device
    )
    rows = [
        {
            "side": name,
            "includes": includes[name],
            "ms: median (min–max)": str(timing),
            f"× {IN_PLACE}": f"{timing.over(timings[IN_PLACE]):.2f}",
            f"× {NEW}": f"{timing.over(timings[NEW]):.2f}",
            "PEFT merge / this": f"{timings[MERGE].over(timing):.1f}",
        }
        for name, timing in timings.items()
    ]
    report.add(case, rows, timings)


Sides = dict[str, tuple[str, Side]]  # name → the work that it includes, and how to run it


def memory_sides(lora: fxlora.CapturedModule) -> Sides:
    """Return sides that only read and write every adapted weight once: the limit of any fold."""

    def weights() -> list[torch.Tensor]:
        return [w.clone() for w, _, _ in factors(lora)]

    return {
        "W.clone()": ("new weights", Side(lambda ws: [w.clone() for w in ws], weights)),
        IN_PLACE: ("in place", Side(lambda ws: [w.add_(1) for w in ws], weights)),
        NEW: ("new weights", Side(lambda ws: [torch.add(w, 1) for w in ws], weights)),
    }


def fxlora_sides(lora: fxlora.CapturedModule) -> Sides:
    meta = copy.deepcopy(lora).to("meta")

    def triples() -> list[tuple[torch.Tensor, ...]]:
        return [(w.clone(), a.to(w.dtype), b.to(w.dtype)) for w, a, b in factors(lora)]

    def in_place(given: Any) -> object:
        return [w.addmm_(b, a, alpha=S) for w, a, b in given]

    def new(given: Any) -> object:
        return [torch.addmm(w, b, a, alpha=S) for w, a, b in given]

    return {
        "W.addmm_(B, A)": ("in place; arithmetic only", Side(in_place, triples)),
        "torch.addmm(W, B, A)": ("new weights; arithmetic only", Side(new, triples)),
        FOLD: ("new weights, new graph", Side(fxlora.fold, lambda: copy.deepcopy(lora))),
        FOLD_IN_PLACE: (
            "in place, the module itself",
            Side(lambda given: fxlora.fold(given, inplace=True), lambda: copy.deepcopy(lora)),
        ),
        f"{FOLD}, meta device": ("new graph only", Side(lambda _: fxlora.fold(meta))),
        f"{FOLD_IN_PLACE}, meta device": (
            "graph only, in place",
            Side(lambda given: fxlora.fold(given, inplace=True), lambda: copy.deepcopy(meta)),
        ),
    }


def peft_sides(pefts: Pefts) -> Sides:
    same, *upcast = pefts.values()

    def merge(peft: Any, **how: bool) -> Side:
        return Side(lambda model: model.merge_adapter(**how), lambda: copy.deepcopy(peft))

    def unload(peft: Any) -> Side:
        return Side(
            lambda model: model.merge_and_unload(progressbar=False), lambda: copy.deepcopy(peft)
        )

    return {
        MERGE: ("in place", merge(same)),
        "PEFT merge_adapter(safe_merge=True)": ("new weights", merge(same, safe_merge=True)),
        "PEFT merge_and_unload()": ("in place, PEFT's modules removed", unload(same)),
    } | {f"{MERGE}, float32 adapters": ("in place", merge(peft)) for peft in upcast}


def entries_of(lora: fxlora.CapturedModule) -> tuple[fxlora.Entry, ...]:
    assert lora.plan is not None
    return lora.plan.entries


def factors(lora: fxlora.CapturedModule) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return W, A and B of every site."""
    return [
        (
            lora.get_parameter(entry.parameter).detach(),
            lora.get_parameter(entry.name_a).detach(),
            lora.get_parameter(entry.name_b).detach(),
        )
        for entry in entries_of(lora)
    ]


# ---- rounding -----------------------------------------------------------------------------------


def rounding(case: str, lora: fxlora.CapturedModule, pefts: Pefts) -> list[dict[str, Any]]:
    """Count the entries of each side's folded weights that are not the exact sum, rounded once."""
    folded: dict[str, nn.Module] = {"fxlora.fold": fxlora.fold(lora)}
    for dtype, peft in pefts.items():
        merged = copy.deepcopy(peft).merge_and_unload(progressbar=False)
        folded[f"PEFT merge, {dtype} adapters"] = merged
    wrong = dict.fromkeys(folded, 0)
    entries, change, size = 0, 0.0, 0.0
    for entry, (weight, a, b) in zip(entries_of(lora), factors(lora), strict=True):
        delta = S * (b.double() @ a.double())
        exact = weight.double() + delta
        nearest = rounded(exact, weight.dtype)
        eps = torch.finfo(weight.dtype).eps
        assert error(nearest, weight) > 10 * eps, "the adapter has no effect"
        for side, model in folded.items():
            found = model.get_parameter(entry.parameter)
            assert error(found, exact) < 2 * eps, f"{side}: {entry.site} is not W0 + s·BA"
            wrong[side] += int((found != nearest).sum())
        entries += weight.numel()
        change += float(delta.square().sum())
        size += float(weight.double().square().sum())
    return [
        {
            "case": case,
            "‖s·BA‖ / ‖W0‖": f"{(change / size) ** 0.5:.1%}",
            "side": side,
            "not correctly rounded": f"{count / entries:.4%}",
        }
        for side, count in wrong.items()
    ]


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to a narrower dtype, once.

    torch converts to bfloat16 via float32, which rounds twice. Rounding to odd in the first step
    (Boldo and Melquiond 2008) gives the same result as one rounding.
    """
    if dtype == torch.float32:
        return exact.float()
    single = exact.float()
    rest = exact - single.double()
    even = (single.view(torch.int32) & 1) == 0
    towards = torch.where(rest > 0, torch.inf, -torch.inf)
    odd = torch.where(even & (rest != 0), torch.nextafter(single, towards.float()), single)
    return odd.to(dtype)


if __name__ == "__main__":
    main()
