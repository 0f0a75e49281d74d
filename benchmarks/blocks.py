"""Measure the cost of outlined layers at capture, and their gain for torch.compile, by depth.

A small random Llama is captured as one graph, and with its layers as modules that are called
(`modules="model.layers.*"`). Then each is compiled: the flat one as a whole, the outlined one layer
by layer (`layer.compile()`), where layers of equal code are compiled once. Compilation includes the
first call and its backward. Every round starts with empty caches of torch.compile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from common import Report, Side, Timing, error, interleave, parser, randomise_b, start
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxlora

LAYERS = [4, 8, 16, 32, 64]
PATHS = "model.layers.*"
RULES = fxlora.LoraConfig(r=8, target_modules="all-linear")
FLAT, OUTLINED = "one graph", "layers called"


def main() -> None:
    torch._inductor.config.force_disable_caches = True  # on disk, too
    options_parser = parser(__doc__)
    options_parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, metavar="N")
    options_parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = start(options_parser, rounds=3)
    options.layers = options.layers[:2] if options.quick else options.layers
    report = Report(options)
    ids = torch.randint(1000, (2, 32), device=options.device)
    captures: list[tuple[int, dict[str, Timing]]] = []
    compiles: list[tuple[int, dict[str, Timing]]] = []
    for layers in options.layers:
        model = llama(layers).to(options.device)
        captures.append((layers, capture_times(model, ids, options)))
        compiles.append((layers, compile_times(model, ids, options)))
        print(f"{layers} layers: {captures[-1][1]}, {compiles[-1][1]}", flush=True)
    add(report, "Capture + match + inject", captures)
    add(report, "torch.compile: the first training step", compiles)


def llama(layers: int) -> nn.Module:
    """Return a random Llama of this depth, width 128, in eval mode."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def adapted(model: nn.Module, ids: torch.Tensor, modules: str | None) -> fxlora.CapturedModule:
    gm = fxlora.capture(model, (), {"input_ids": ids}, modules=modules)
    return fxlora.inject(gm, fxlora.match(gm, RULES))


def rounds_of(layers: int, options: argparse.Namespace) -> tuple[int, int]:
    """Return the rounds to time and to warm up: deep models take minutes."""
    return (options.rounds, 1) if layers <= 8 else (1, 0)


def capture_times(
    model: nn.Module, ids: torch.Tensor, options: argparse.Namespace
) -> dict[str, Timing]:
    sides = {
        FLAT: Side(lambda _: adapted(model, ids, None)),
        OUTLINED: Side(lambda _: adapted(model, ids, PATHS)),
    }
    return interleave(sides, *_around(options, len(model.get_submodule("model.layers")._modules)))


def compile_times(
    model: nn.Module, ids: torch.Tensor, options: argparse.Namespace
) -> dict[str, Timing]:
    flat, outlined = adapted(model, ids, None), adapted(model, ids, PATHS)
    randomise_b(flat)
    outlined.load_state_dict(flat.state_dict())
    layers = list(outlined.get_submodule("model.layers").children())
    expected = flat(input_ids=ids).logits
    assert error(outlined(input_ids=ids).logits, expected) < 1e-4

    def compile_flat() -> Callable[..., Any]:
        flat.compile(backend=options.backend)
        return flat

    def compile_layers() -> Callable[..., Any]:
        for layer in layers:
            layer.compile(backend=options.backend)
        return outlined

    def step(module: Any) -> None:
        logits = module(input_ids=ids).logits
        assert error(logits, expected) < 1e-3
        logits.square().mean().backward()

    def fresh(make: Callable[[], Any]) -> Callable[[], Any]:
        def prepare() -> Any:
            torch.compiler.reset()
            return make()

        return prepare

    sides = {
        FLAT: Side(step, fresh(compile_flat)),
        OUTLINED: Side(step, fresh(compile_layers)),
    }
    return interleave(sides, *_around(options, len(layers)))


def _around(options: argparse.Namespace, layers: int) -> tuple[int, str, int]:
    rounds, warmup = rounds_of(layers, options)
    return rounds, options.device, warmup


def add(report: Report, title: str, times: list[tuple[int, dict[str, Timing]]]) -> None:
    rows = [
        {
            "layers": str(layers),
            **{f"{side}, ms": str(timing) for side, timing in found.items()},
            f"{OUTLINED} / {FLAT}": f"{found[OUTLINED].over(found[FLAT]):.2f}",
        }
        for layers, found in times
    ]
    timings = {f"{n} layers, {side}": t for n, found in times for side, t in found.items()}
    report.add(f"{title}, by number of layers", rows, timings)


if __name__ == "__main__":
    main()
