"""Measure the cost of a capture by depth: one torch.export against capture + match + inject.

The model has Llama-3-8B's shape and is on the meta device, so that only tracing and rewriting take
time; batch and sequence are dynamic on both sides. Two layers are also measured with real tensors,
for comparison with two on the meta device. A capture exports the model in both modes, and
proves each graph for a batch of 1 by runs on fake tensors.

With `--floor`, instead: the steps that grow with depth even if layers that are alike were exported
once, in CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Report, Side, Timing, interleave, parser, start
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

import fxlora

LAYERS = [2, 4, 8, 16, 32, 64]
SHAPES = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
RULES = fxlora.LoraConfig(r=16, target_modules="all-linear")


EXPORT, ADAPT, INJECT = "one export", "capture + match + inject", "of which match + inject"


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, metavar="N")
    options_parser.add_argument(
        "--floor", type=int, nargs="+", metavar="N", help="only the steps that every layer needs"
    )
    options = start(options_parser, rounds=3)
    options.layers = options.layers[:2] if options.quick else options.layers
    report = Report(options)
    if options.floor:
        for layers in options.floor:
            title = f"What every layer needs, {layers} layers on the meta device, CPU time"
            report.add(title, [floor(layers, options.rounds)])
        return
    shape = "Llama-3-8B's shape, batch and sequence dynamic"
    deep = [measured(layers, "meta", 128256, options) for layers in options.layers]
    add(report, f"{shape}, on the meta device (one round for 16 layers and more)", deep)
    pair = [measured(2, place, 1024, options) for place in ("meta", options.device)]
    add(report, f"{shape}, a vocabulary of 1,024, on meta and with real tensors", pair)


@dataclass(frozen=True)
class Measured:
    """The times of all sides on one model."""

    name: str
    layers: int
    nodes: int
    times: dict[str, Timing]

    def row(self) -> dict[str, str]:
        adapt, per = self.times[ADAPT], statistics.median(self.times[ADAPT].seconds) / self.layers
        return {
            "layers": self.name,
            "nodes": f"{self.nodes:,}",
            **{f"{side}, ms": str(timing) for side, timing in self.times.items()},
            "ms per layer": f"{1e3 * per:.0f}",
            "capture + match + inject / one export": f"{adapt.over(self.times[EXPORT]):.2f}",
        }


def measured(layers: int, place: str, vocabulary: int, options: argparse.Namespace) -> Measured:
    model = llama(layers, place, vocabulary)
    example = {"input_ids": torch.zeros(2, 64, dtype=torch.long, device=place)}
    captured = fxlora.capture(model, (), example, dynamic_shapes=SHAPES)

    def export(_: Any) -> object:
        return torch.export.export(model, (), example, dynamic_shapes=SHAPES, strict=False)

    def adapt(_: Any) -> object:
        return fxlora.adapt(model, (), example, rules=RULES, dynamic_shapes=SHAPES)

    def inject(_: Any) -> object:
        return fxlora.inject(captured, fxlora.match(captured, RULES))

    sides = {EXPORT: Side(export), ADAPT: Side(adapt), INJECT: Side(inject)}
    rounds, warmup = (options.rounds, 1) if layers <= 8 else (1, 0)
    times = interleave(sides, rounds, options.device, warmup)
    return Measured(f"{layers} ({place})", layers, len(captured.graph.nodes), times)


def floor(layers: int, rounds: int) -> dict[str, str]:
    """Return the CPU times of one export, and of what each layer needs if layers are shared.

    These are a copy of the graph's nodes, a run of the graph on fake tensors (to prove a layer that
    was copied), and match + inject; each once, where a capture has a graph for each mode.
    """
    model = llama(layers, "meta", 128256)
    example = {"input_ids": torch.zeros(2, 64, dtype=torch.long, device="meta")}
    begin = time.process_time()
    captured = fxlora.capture(model, (), example, dynamic_shapes=SHAPES)
    capture = time.process_time() - begin

    def run() -> None:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with fakes:
            captured(**{name: fakes.from_tensor(value) for name, value in example.items()})

    steps: dict[str, Callable[[], object]] = {
        EXPORT: lambda: torch.export.export(
            model, (), example, dynamic_shapes=SHAPES, strict=False
        ),
        "copy of the nodes": lambda: fx.Graph().graph_copy(captured.graph, {}),
        "run on fake tensors": run,
        "match + inject": lambda: fxlora.inject(captured, fxlora.match(captured, RULES)),
    }
    row = {"layers": str(layers), "capture, ms (once, the first)": f"{1e3 * capture:.0f}"}
    for name, step in steps.items():
        seconds = [cpu_time(step) for _ in range(rounds)]
        row[f"{name}, ms"] = f"{1e3 * statistics.median(seconds):.0f}"
    return row


def cpu_time(step: Callable[[], object]) -> float:
    begin = time.process_time()
    step()
    return time.process_time() - begin


def llama(layers: int, place: str, vocabulary: int) -> nn.Module:
    """Return a random Llama of this depth, in eval mode."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device(place):
        model: Any = LlamaForCausalLM(config)
        return model.to(torch.bfloat16).eval()


def add(report: Report, title: str, rows: list[Measured]) -> None:
    timings = {f"{m.name}, {side}": t for m in rows for side, t in m.times.items()}
    report.add(title, [m.row() for m in rows], timings)


if __name__ == "__main__":
    main()
