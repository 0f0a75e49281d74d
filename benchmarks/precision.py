"""Compare adapters in float32 and in bfloat16 over a bfloat16 base: fxlora's and PEFT's.

Two questions: the loss over steps of AdamW from equal A and B on equal batches, and the bytes that
one step saves for its backward besides the module's own tensors.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Report, copy_adapters, is_adapter, start, step_memory, untimed_parser
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

import fxlora

R, ALPHA = 16, 32
BATCHES = 6
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SIDES = {
    "fxlora, float32": ("fxlora", True),
    "fxlora, bfloat16": ("fxlora", False),
    "PEFT, float32": ("PEFT", True),
    "PEFT, bfloat16": ("PEFT", False),
}


class Block(nn.Module):
    """A transformer block of separate projections, with a residual around each half."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm_1(x)
        q, k, v = (
            project(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm_2(x))))


def main() -> None:
    options_parser = untimed_parser(__doc__)
    options_parser.add_argument("--steps", type=int, default=300, help="steps of AdamW")
    options_parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    options_parser.add_argument("--quick", action="store_true", help="a small block, few steps")
    options = start(options_parser)
    options.steps = min(options.steps, 24) if options.quick else options.steps
    report = Report(options)
    losses(options, report)
    memory(options, report)


def losses(options: argparse.Namespace, report: Report) -> None:
    width, batch, tokens = (32, 2, 8) if options.quick else (64, 4, 16)
    model = nn.Sequential(Block(width, 4), Block(width, 4)).to(options.device, torch.bfloat16)
    x = torch.randn(BATCHES, batch, tokens, width, device=options.device).bfloat16()
    y = torch.randn(BATCHES, batch, tokens, width, device=options.device)
    curves = {name: curve(module, x, y, options) for name, module in made(model, x[0]).items()}
    expected = curves["PEFT, float32"]
    rows = []
    for name, found in curves.items():
        gaps = [abs(a - b) / b for a, b in zip(found, expected, strict=True)]
        points = {f"round {n + 1}": f"{found[n]:.5f}" for n in range(0, len(found), 12)}
        fall = (found[0] - found[-1]) / (expected[0] - expected[-1])
        rows.append(
            {
                "side": name,
                **points,
                "last": f"{found[-1]:.5f}",
                "fall, × PEFT's in float32": f"{fall:.3f}",
                "largest gap to PEFT in float32": f"{max(gaps):.3%}",
            }
        )
    report.add(
        f"Mean loss of each round over {BATCHES} batches, bfloat16 base of width {width}, r={R}, "
        f"{options.steps} steps of AdamW at {options.lr:g}",
        rows,
    )


def curve(
    module: nn.Module, x: torch.Tensor, y: torch.Tensor, options: argparse.Namespace
) -> list[float]:
    """Return the mean loss of each round over all batches; each step takes one batch."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0)
    found: list[float] = []
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x[step % BATCHES]).float(), y[step % BATCHES])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    rounds = range(0, options.steps - BATCHES + 1, BATCHES)
    return [sum(found[first : first + BATCHES]) / BATCHES for first in rounds]


def memory(options: argparse.Namespace, report: Report) -> None:
    width, batch, tokens = (64, 8, 128) if options.quick else (512, 4, 256)
    model = Block(width, 8).to(options.device, torch.bfloat16)
    x = torch.randn(batch, tokens, width, device=options.device).bfloat16()
    saved = {"frozen base": step_memory(stepped(frozen(model), x), frozen(model), options.device)}
    for name, module in made(model, x).items():
        saved[name] = step_memory(stepped(module, x), module, options.device)
    for name, module in with_frozen_a(model, x).items():
        saved[name] = step_memory(stepped(module, x), module, options.device)
    lean = saved["fxlora, bfloat16"]
    rows = [
        {
            "side": name,
            "MB saved": f"{size / 1e6:.2f}",
            "× frozen base": f"{size / saved['frozen base']:.2f}",
            "× fxlora, bfloat16": f"{size / lean:.2f}",
        }
        for name, size in saved.items()
    ]
    assert saved["fxlora, float32"] <= 1.1 * lean
    assert saved["fxlora, LoRA-FA"] < saved["fxlora, float32"]
    report.add(
        f"Bytes for the backward, one block of width {width}, {batch}x{tokens} tokens, r={R}", rows
    )


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def stepped(module: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: module(x.clone().requires_grad_()).float().square().mean()


def with_frozen_a(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """Return the module with a frozen A (LoRA-FA), and with and without one in its fast graphs."""
    captured = fxlora.capture(model, x)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    plain, fixed = (
        fxlora.inject(
            captured,
            fxlora.match(captured, fxlora.LoraConfig(r=R, target_modules=names, variant=variant)),
        ).train()
        for variant in (None, "fa")
    )
    return {
        "fxlora, LoRA-FA": fixed,
        "fxlora, float32, optimize": fxlora.optimize(plain),
        "fxlora, LoRA-FA, optimize": fxlora.optimize(fixed),
    }


def made(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """Return the sides with equal A and B, the latter zero; A has bfloat16 values in all."""
    captured = fxlora.capture(model, x)
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in TARGETS]
    plan = fxlora.match(captured, fxlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=names))
    torch.manual_seed(1)
    first = fxlora.inject(captured, plan, adapter_dtype=False)
    found: dict[str, nn.Module] = {}
    for side, (library, wide) in SIDES.items():
        if library == "fxlora":
            module: nn.Module = fxlora.inject(captured, plan, adapter_dtype=wide)
            copy_adapters(first, module)
        else:
            config = PeftConfig(r=R, lora_alpha=ALPHA, target_modules=names)
            theirs = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=wide)
            module = theirs.get_base_model()
            copy_adapters(first, module)
        (dtype,) = {p.dtype for n, p in module.named_parameters() if is_adapter(n)}
        assert dtype == (torch.float32 if wide else torch.bfloat16)
        found[side] = module.train()
    return found


if __name__ == "__main__":
    main()
