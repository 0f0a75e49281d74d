"""Measure quantised bases on scikit-learn's digits: what each way to ship the adapters keeps.

A small network learns the digits, is quantised, and learns digits of another look by LoRA on the
quantised base. Then its adapters are kept, folded into plain weights, folded into weights that are
quantised anew, and folded so after some steps of merge-aware training.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Report, start, untimed_parser
from sklearn.datasets import load_digits
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

import fxlora
from fxlora.module.quantised import stored_bytes

Data = tuple[torch.Tensor, torch.Tensor]
STEPS, AWARE_STEPS, R = 300, 200, 8


def main() -> None:
    options_parser = untimed_parser(__doc__)
    options_parser.add_argument("--seeds", type=int, default=5)
    options_parser.add_argument("--lr", type=float, default=1e-3, help="of the adapters")
    options = start(options_parser)
    report = Report(options)
    rows = []
    for kind, quantise in KINDS.items():
        found = [measured(seed, quantise, options) for seed in range(options.seeds)]
        for name in found[0]:
            values = [one[name] for one in found]
            cells = zip(*values, strict=True)
            accuracy, retention, size = (statistics.mean(column) for column in cells)
            spread = statistics.pstdev(value[0] for value in values)
            rows.append(
                {
                    "base": kind,
                    "shipped": name,
                    "accuracy, %": f"{100 * accuracy:.1f} ± {100 * spread:.1f}",
                    "least retention": f"{retention:.3f}" if retention else "",
                    "bytes of weights": f"{size:,.0f}",
                }
            )
    title = f"Digits, {options.seeds} seeds, r={R}, {STEPS} steps + {AWARE_STEPS} for the last rows"
    report.add(title, rows)


def measured(
    seed: int, quantise: Callable[[nn.Module], None], options: argparse.Namespace
) -> dict[str, tuple[float, float, float]]:
    """Return accuracy, least retention (0 if none) and bytes of each way to ship."""
    torch.manual_seed(seed)
    base, (train, test) = trained_base(seed)
    quantised = copy.deepcopy(base)
    quantise(quantised)
    config = fxlora.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
    lora = fxlora.adapt(quantised, train[0][:8], rules=config)
    fit(lora, train, STEPS, options.lr)
    longer = copy.deepcopy(lora)
    fit(longer, train, AWARE_STEPS, options.lr)
    aware = fxlora.merge_aware(lora)
    fit(aware, train, AWARE_STEPS, options.lr)
    ways = {
        "float base": base,
        "quantised base": quantised,
        "branches kept": longer,
        "dequantised": fxlora.fold(longer.eval(), quantised="dequantise"),
        "requantised": fxlora.fold(longer.eval(), quantised="requantise", min_retention=-1e9),
        "requantised, merge-aware": fxlora.fold(aware.eval(), quantised="requantise"),
    }
    return {name: (accuracy(m, test), least(m), weights(m)) for name, m in ways.items()}


def least(module: nn.Module) -> float:
    kept = module.retention if isinstance(module, fxlora.CapturedModule) else {}
    return min(kept.values(), default=0.0)


def weights(module: nn.Module) -> int:
    return sum(map(stored_bytes, module.parameters()))


# ---- the task -----------------------------------------------------------------------------------


def trained_base(seed: int) -> tuple[nn.Module, tuple[Data, Data]]:
    """Return a network that knows the digits, and digits moved by a pixel, with noise."""
    digits: Any = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, second, test = order[:700], order[700:1200], order[1200:]
    base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    base.append(nn.Linear(64, 10))
    fit(base, (images[first], labels[first]), 400, 3e-3)
    moved = images.unflatten(1, (8, 8)).roll(1, 2).flatten(1) + 0.3 * torch.randn(images.shape)
    return base, ((moved[second], labels[second]), (moved[test], labels[test]))


def fit(model: nn.Module, data: Data, steps: int, lr: float) -> None:
    model.train()
    captured = isinstance(model, fxlora.CapturedModule)
    parameters = fxlora.lora_parameters(model) if captured else list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        chosen = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


def in_nf4(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            values = layer.weight.detach()
            layer.weight = nn.Parameter(to_nf4(values, 32, 4), requires_grad=False)


def in_int(bits: str) -> Callable[[nn.Module], None]:
    dtype: torch.dtype = vars(torch)[bits]
    config = IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(32))
    return lambda model: quantize_(model, config)


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "int8": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "int4, groups of 32": in_int("int4"),
    "int2, groups of 32": in_int("int2"),
    "NF4, blocks of 32": in_nf4,
}


if __name__ == "__main__":
    main()
