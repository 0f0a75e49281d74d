"""Seeded mutants of the files that fxlora reads (`benchmarks/fuzz.py` makes more)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fxlora
from fxlora import LoraConfig, Rule

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fuzz")


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutants_are_refused_by_type_or_are_what_they_say(fuzz: ModuleType, count: int) -> None:
    found = fuzz.Fuzz(seed=1)
    found.run(count)
    assert not found.failures
    assert {outcome for _, outcome in found.counts} == {"accepted", "typed"}
    assert sum(found.counts.values()) == count
    for road in {road for road, _ in found.counts}:  # each has both kinds of outcome
        assert found.counts[road, "accepted"] and found.counts[road, "typed"], road


def another(module: fxlora.CapturedModule, *_: Any, **__: Any) -> fxlora.CapturedModule:
    rule = Rule(["emb", "conv", "fc"], lora=LoraConfig(r=2, init_lora_weights=False))
    return fxlora.inject(module, fxlora.match(module, rule))


LOADERS: dict[str, Callable[..., Any]] = {
    "executed": lambda *_, **__: Path("ran").touch(),
    "untyped": lambda *_, **__: json.loads("["),
    "wrong": another,
}


@pytest.mark.parametrize("outcome", LOADERS)
def test_the_fuzzer_sees_what_it_is_for(
    fuzz: ModuleType, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reports a loader that runs code from a file, crashes, or loads a wrong module."""
    found = fuzz.Fuzz(seed=1)
    monkeypatch.setattr(fxlora, "load_adapter", LOADERS[outcome])
    found.run(27)
    assert found.counts["a folder", outcome], found.failures
