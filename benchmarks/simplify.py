"""Measure what simplify buys: a folded ResNet-50, before and after, over the captured base."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import Report, Side, interleave, parser, start
from torch import nn
from torchvision import models

import fxlora

BASE, FOLDED, SMALL, SOURCE = "captured base", "folded", "simplified", "source, eager"


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options_parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    options = start(options_parser, rounds=15)
    report = Report(options)
    model = with_statistics(models.resnet18() if options.quick else models.resnet50())
    model = model.to(options.device)
    x = torch.randn(max(2, *options.batch), 3, options.size, options.size, device=options.device)
    base = fxlora.capture(model, x[:2]).eval()
    config = fxlora.LoraConfig(r=8, target_modules=r".*conv\d", init_lora_weights=False)
    lora = fxlora.inject(base, fxlora.match(base, config)).eval()
    folded = fxlora.fold(lora)
    small = fxlora.simplify(folded, x[:2])
    print(f"\n{small.simplified}")
    with torch.inference_mode():
        error = (small(x) - folded(x)).abs().max() / folded(x).abs().max()
        print(f"\nlargest error over the largest output: {float(error):.1e}")
        for batch in options.batch:
            times = interleave(
                sides(model, base, folded, small, x[:batch]), options.rounds, options.device
            )
            rows = [
                {"": side, "time": str(timing), "over the base": f"{timing.over(times[BASE]):.3f}"}
                for side, timing in times.items()
            ]
            title = f"{type(model).__name__}, batch {batch}, {options.size}x{options.size}, float32"
            report.add(title, rows, times)


def sides(
    model: nn.Module,
    base: nn.Module,
    folded: nn.Module,
    small: nn.Module,
    x: torch.Tensor,
) -> dict[str, Side]:
    calls: dict[str, Callable[[], torch.Tensor]] = {
        SOURCE: lambda: model(x),
        BASE: lambda: base(x),
        FOLDED: lambda: folded(x),
        SMALL: lambda: small(x),
    }
    return {name: Side(lambda run: run(), lambda c=c: c) for name, c in calls.items()}


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms statistics that are not their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.25)
    return model.eval()


if __name__ == "__main__":
    main()
