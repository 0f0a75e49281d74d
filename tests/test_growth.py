"""Every step grows linearly with the number of layers, counted in function calls."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora import LoraConfig, Rule

pytestmark = pytest.mark.usefixtures("small_heap")

LAYERS = (4, 8, 16)
RULE = Rule(op="linear", lora=LoraConfig(r=2, bias="lora_only"))
X = torch.randn(3, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # a nested graph for each layer
            y = self.up(F.layer_norm(x, (6,)))
        return x + self.down(y.float())


class InOneRegion(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # one nested graph for all layers
            return super().forward(input)


@functools.cache
def model_of(kind: Callable[..., nn.Module], layers: int) -> nn.Module:
    torch.manual_seed(0)
    return kind(*(Block() for _ in range(layers))).eval()


@functools.cache
def captured(kind: Callable[..., nn.Module], layers: int) -> fxlora.CapturedModule:
    return fxlora.capture(model_of(kind, layers), X)


@functools.cache
def adapted(kind: Callable[..., nn.Module], layers: int) -> fxlora.CapturedModule:
    gm = captured(kind, layers)
    return fxlora.inject(gm, fxlora.match(gm, RULE))


def match(kind: Any, layers: int, folder: Path) -> Any:
    return fxlora.match(captured(kind, layers), RULE)


def inject(kind: Any, layers: int, folder: Path) -> Any:
    return fxlora.inject(captured(kind, layers), plan_of(kind, layers))


@functools.cache
def plan_of(kind: Any, layers: int) -> fxlora.Plan:
    return fxlora.match(captured(kind, layers), RULE)


def fold(kind: Any, layers: int, folder: Path) -> Any:
    return fxlora.fold(adapted(kind, layers))


def remove(kind: Any, layers: int, folder: Path) -> Any:
    return fxlora.remove(adapted(kind, layers))


def save_and_load(kind: Any, layers: int, folder: Path) -> Any:
    saved = folder / f"{kind.__name__}{layers}"
    fxlora.save_adapter(adapted(kind, layers), saved)
    return fxlora.load_adapter(captured(kind, layers), saved)


def verify(kind: Any, layers: int, folder: Path) -> Any:
    return fxlora.verify(adapted(kind, layers), X)


def optimize(kind: Any, layers: int, folder: Path) -> Any:
    return fxlora.optimize(adapted(kind, layers), recompute=True)


def calls_in(work: Callable[[], Any]) -> int:
    """Return the number of calls, of Python functions and of built-in ones."""
    count = 0

    def counted(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what it calls has nothing to do with the work
    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *((nn.Sequential, step) for step in (match, inject, fold, verify)),
        *((InOneRegion, step) for step in (match, optimize)),
        # what these walk, those above walk, too
        *(
            pytest.param(nn.Sequential, step, marks=pytest.mark.slow)
            for step in (remove, save_and_load, optimize)
        ),
        *(
            pytest.param(InOneRegion, step, marks=pytest.mark.slow)
            for step in (inject, fold, remove, save_and_load, verify)
        ),
    ],
)
def test_twice_the_layers_take_twice_the_calls(kind: Any, step: Any, tmp_path: Path) -> None:
    for layers in LAYERS:
        step(kind, layers, tmp_path / "before")  # fills caches, and captures
    few, more, most = (
        calls_in(functools.partial(step, kind, n, tmp_path / "counted")) for n in LAYERS
    )
    growth = (most - more) / (more - few)  # 2 if the calls are linear, 4 if they are quadratic
    assert growth < 2.08, (few, more, most)  # a walk of the whole graph per weight: 2.16
