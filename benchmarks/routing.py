"""Measure a mixed batch over many adapters: a routed graph, PEFT's adapter_names, and the base.

A batch of 32 samples is spread over N adapters on every linear layer of an MLP. PEFT computes each
adapter on the samples that name it, one after the other; the routed graph gathers A and B.

A second table has one layer in the forms that a mixed batch can take, by multiplications and memory
(numbers per sample of n tokens, with N slots): gathering A and B costs r·(in + out) copied numbers
and n·r·(in + out) multiplications; one product with the A of all slots, where a mask leaves the
sample's own, N·n·r·(in + out) multiplications; sorting the samples into a product for each adapter
2·n·(in + out) copied numbers, in n·r·(in + out) multiplications.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from common import Report, Side, error, interleave, parser, start
from peft import LoraConfig, get_peft_model
from torch import nn

import fxlora

R, SAMPLES = 8, 32
BASE, ROUTED, COMPILED, PEFT = "base", "routed", "routed, compiled", "PEFT"

Call = Callable[[], torch.Tensor]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--hidden", type=int, default=1024)
    options_parser.add_argument("--layers", type=int, default=4)
    options_parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    options_parser.add_argument("--tokens", type=int, nargs="+", default=[4, 64])
    options_parser.add_argument("--train", action="store_true", help="forward and backward")
    options_parser.add_argument("--forms", action="store_true", help="only the forms of one layer")
    options_parser.add_argument("--compile", action="store_true", help="also a compiled graph")
    options = start(options_parser, rounds=15)
    if options.quick:
        options.hidden, options.layers, options.adapters, options.tokens = 128, 2, [1, 4], [4]
    report = Report(options)
    compare_forms(options, report)
    if not options.forms:
        compare_sides(options, report)


def compare_sides(options: argparse.Namespace, report: Report) -> None:
    """Time the base, the routed graph and PEFT on the same mixed batches."""
    rows = []
    timings = {}
    for tokens in options.tokens:
        x = torch.randn(SAMPLES, tokens, options.hidden, device=options.device)
        for adapters in options.adapters:
            calls = prepared(model(options.hidden, options.layers, options.device), x, adapters)
            if not options.compile:
                del calls[COMPILED]
            check(calls)
            sides = {
                name: Side(lambda call: call(), lambda run=run: step(run, options.train))
                for name, run in calls.items()
            }
            times = interleave(sides, options.rounds, options.device, warmup=3)
            timings |= {f"{tokens} tokens, {adapters}, {n}": t for n, t in times.items()}
            rows.append(
                {
                    "tokens": str(tokens),
                    "adapters": str(adapters),
                    **{f"{name}, ms": str(timing) for name, timing in times.items()},
                    "routed / base": f"{times[ROUTED].over(times[BASE]):.2f}",
                    "PEFT / routed": f"{times[PEFT].over(times[ROUTED]):.2f}",
                }
            )
    what = "forward and backward" if options.train else "forward"
    title = (
        f"A mixed batch of {SAMPLES}, {what}: {options.layers} layers {options.hidden} x "
        f"{options.hidden}, r={R}"
    )
    report.add(title, rows, timings)


# ---- the forms of one layer ---------------------------------------------------------------------


def compare_forms(options: argparse.Namespace, report: Report) -> None:
    """Time one layer of a mixed batch in every form."""
    rows = []
    timings = {}
    for tokens in (4, 64, 256):
        for adapters in (1, 8, 64):
            calls = forms(options.hidden, tokens, adapters, options.device)
            expected = calls["gathered"]()
            for form in ("all slots, masked", "sorted"):
                assert error(calls[form](), expected) < 1e-4, form
            sides = {n: Side(lambda call: call(), lambda run=run: run) for n, run in calls.items()}
            times = interleave(sides, options.rounds, options.device, warmup=2)
            timings |= {f"forms, {tokens} tokens, {adapters}, {n}": t for n, t in times.items()}
            ratios = {f"{n} / base": f"{times[n].over(times[BASE]):.2f}" for n in list(calls)[1:]}
            row = {"tokens": str(tokens), "adapters": str(adapters), "base, ms": str(times[BASE])}
            rows.append(row | ratios)
    title = f"Forms of one layer {options.hidden} x {options.hidden}, batch {SAMPLES}, r={R}"
    report.add(title, rows, timings)


def forms(hidden: int, tokens: int, adapters: int, device: str) -> dict[str, Call]:
    """Return the same adapted layer in every form."""
    x = torch.randn(SAMPLES, tokens, hidden, device=device)
    weight = torch.randn(hidden, hidden, device=device) / hidden**0.5
    down = torch.randn(adapters, R, hidden, device=device) / hidden**0.5
    up = torch.randn(adapters, hidden, R, device=device)
    ids = torch.arange(SAMPLES, device=device) % adapters
    own = (ids[:, None] == torch.arange(adapters, device=device)).repeat_interleave(R, 1)

    def base() -> torch.Tensor:
        return nn.functional.linear(x, weight)

    def gathered() -> torch.Tensor:
        return torch.baddbmm(base(), x @ down[ids].mT, up[ids].mT)

    def masked() -> torch.Tensor:
        wide = nn.functional.linear(x, down.flatten(0, 1)) * own[:, None]
        return base() + wide @ up.mT.flatten(0, 1)

    def in_order() -> torch.Tensor:
        order = ids.argsort()
        parts = x[order].split(torch.bincount(ids, minlength=adapters).tolist())
        outputs = [part @ a.T @ b.T for part, a, b in zip(parts, down, up, strict=True)]
        return base() + torch.cat(outputs)[order.argsort()]

    return {BASE: base, "gathered": gathered, "all slots, masked": masked, "sorted": in_order}


# ---- the sides ----------------------------------------------------------------------------------


def model(hidden: int, layers: int, device: str) -> nn.Sequential:
    """Return linear layers with activations in between."""
    parts = [part for _ in range(layers) for part in (nn.Linear(hidden, hidden), nn.GELU())]
    return nn.Sequential(*parts).to(device).eval()


def prepared(base: nn.Sequential, x: torch.Tensor, adapters: int) -> dict[str, Call]:
    """Return the same mixed batch for each side, with equal adapters."""
    names = [str(number) for number in range(len(base)) if isinstance(base[number], nn.Linear)]
    gm = fxlora.capture(base, x).eval()
    config = fxlora.LoraConfig(r=R, target_modules=names, init_lora_weights=False)
    loras = [fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(adapters)]
    routed = fxlora.route(loras).eval()
    theirs = peft_model(base, names, loras)
    slots = [sample % adapters for sample in range(SAMPLES)]
    ids = torch.tensor(slots, device=x.device)
    compiled = torch.compile(routed)
    frozen = copy.deepcopy(base).requires_grad_(False)
    given = x.clone().requires_grad_(True)  # so that the base has a backward, too
    return {
        BASE: lambda: frozen(given),
        ROUTED: lambda: routed(given, adapter_ids=ids),
        COMPILED: lambda: compiled(given, adapter_ids=ids),
        PEFT: lambda: theirs(given, adapter_names=[f"a{slot}" for slot in slots]),
    }


def peft_model(base: nn.Module, names: list[str], loras: list[fxlora.CapturedModule]) -> nn.Module:
    """Return PEFT's module with the values of each of our adapters."""
    config = LoraConfig(r=R, target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a second adapter
        theirs = get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
        for number in range(1, len(loras)):
            theirs.add_adapter(f"a{number}", config)
    with torch.no_grad():
        for number, lora in enumerate(loras):
            for name in lora.adapter_parameters():
                own = name.replace(".default.", f".a{number}.")
                theirs.get_parameter(f"base_model.model.{own}").copy_(lora.get_parameter(name))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return theirs.eval()


def step(call: Call, train: bool) -> Callable[[], object]:
    def run() -> object:
        if train:
            return call().square().mean().backward()
        with torch.inference_mode():
            return call()

    return run


def check(calls: dict[str, Call]) -> None:
    """Assert that the sides agree, and that the adapters change the output."""
    with torch.no_grad():
        base, routed, theirs = (calls[side]() for side in (BASE, ROUTED, PEFT))
    gap, effect = error(routed, theirs), error(routed, base)
    assert gap < 1e-4, f"PEFT's output differs by {gap:.1e}"
    assert effect > 10 * gap, f"the adapters change the output by {effect:.1e} only"


if __name__ == "__main__":
    main()
