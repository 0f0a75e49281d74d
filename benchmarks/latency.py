"""Measure inference latency: of the source model, with adapters (unfolded), and folded.

The folded graph is the captured one, node for node, so that folded / base is 1 except for
differences between the source and its capture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from common import DTYPES, Report, Side, error, gpt2, interleave, parser, randomise_b, start
from torch import nn

import fxlora

R, ALPHA = 16, 32
BASE, UNFOLDED, FOLDED = "base", "unfolded", "folded"
# Relative to the largest output: rounding differences between two orders of summation.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}

Call = Callable[[], torch.Tensor]


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options_parser.add_argument("--compile", action="store_true", help="torch.compile every side")
    options_parser.add_argument(
        "--models", nargs="+", default=["resnet18", "gpt2"], choices=[*VISION, "gpt2"]
    )
    options_parser.add_argument("--text", type=int, nargs=2, default=[1, 128], help="batch, tokens")
    options_parser.add_argument("--images", type=int, nargs=2, default=[1, 224], help="batch, size")
    options = start(options_parser, rounds=25)
    report = Report(options)
    rows = []
    timings = {}
    for name in options.models:
        build = text if name == "gpt2" else vision
        title, model, example, rule = build(name, options)
        calls = prepared(model, example, rule, options.compile)
        check(calls, TOLERANCES[DTYPES[options.dtype]])
        times = interleave(
            {
                side: Side(lambda call: call(), lambda call=call: call)
                for side, call in calls.items()
            },
            options.rounds,
            options.device,
        )
        timings |= {f"{title}, {side}": timing for side, timing in times.items()}
        rows.append(
            {
                "model": title,
                **{f"{side}, ms": str(timing) for side, timing in times.items()},
                "unfolded / base": f"{times[UNFOLDED].over(times[BASE]):.3f}",
                "folded / base": f"{times[FOLDED].over(times[BASE]):.3f}",
            }
        )
    mode = "compiled" if options.compile else "eager"
    report.add(f"Latency, {options.dtype}, r={R} on every layer, {mode}", rows, timings)


def prepared(
    model: nn.Module, example: dict[str, torch.Tensor], rule: fxlora.Rule, compiled: bool
) -> dict[str, Call]:
    lora = fxlora.adapt(model, (), example, rules=rule).eval()
    randomise_b(lora)
    modules = {BASE: model.eval(), UNFOLDED: lora, FOLDED: fxlora.fold(lora)}

    def call(module: Any) -> Call:
        run = torch.compile(module, dynamic=False) if compiled else module

        def outputs() -> torch.Tensor:
            with torch.inference_mode():
                found = run(**example)
            return found if isinstance(found, torch.Tensor) else found.logits

        return outputs

    return {side: call(module) for side, module in modules.items()}


def check(calls: dict[str, Call], tolerance: float) -> None:
    """Assert that folded and unfolded agree, and that the adapters change the output."""
    base, unfolded, folded = (calls[side]() for side in (BASE, UNFOLDED, FOLDED))
    gap, effect = error(folded, unfolded), error(unfolded, base)
    assert gap < tolerance, f"folded and unfolded differ by {gap:.1e}"
    assert effect > 10 * gap, f"the adapters change the output by {effect:.1e} only"


# ---- the models ---------------------------------------------------------------------------------

VISION: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet50": torchvision.models.resnet50,
    "vit_b_16": torchvision.models.vit_b_16,
}

Model = tuple[str, nn.Module, dict[str, torch.Tensor], fxlora.Rule]


def vision(name: str, options: argparse.Namespace) -> Model:
    """Return a torchvision model, with a rule for every linear and convolution."""
    batch, size = options.images
    sized = {"image_size": size} if name.startswith("vit") else {}
    model = VISION[name](**sized).to(options.device, DTYPES[options.dtype]).eval()
    images = torch.randn(batch, 3, size, size).to(next(model.parameters()))
    rule = fxlora.Rule(op=["linear", "conv2d"], lora=fxlora.LoraConfig(r=R, lora_alpha=ALPHA))
    return f"{name}, {batch}x3x{size}x{size}", model, {"x": images}, rule


def text(name: str, options: argparse.Namespace) -> Model:
    """Return GPT-2 small, with a rule for every Conv1D."""
    batch, tokens = options.text
    layers = 2 if options.quick else 12
    model = gpt2(layers).to(options.device, DTYPES[options.dtype]).eval()
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=options.device)
    rule = fxlora.Rule(op="addmm", lora=fxlora.LoraConfig(r=R, lora_alpha=ALPHA))
    return f"{name}, {layers} layers, {batch}x{tokens} tokens", model, {"input_ids": ids}, rule


if __name__ == "__main__":
    main()
