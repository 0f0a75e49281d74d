"""A capture leaves no tensor of its trace in the caches of the model's Python code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxlora

BY_SIZE: dict[int, torch.Tensor] = {}
BY_NAME: dict[str, dict[int, torch.Tensor]] = {"gains": {}}
IN_LIST: list[torch.Tensor | None] = [None]
GLOBAL: torch.Tensor | None = None
CALLS: list[int] = []


class OnClass:
    """Keeps its gains in an attribute that it does not have at first."""


class Table:
    """Keeps its gains in an attribute of the only instance, TABLE."""

    def __init__(self) -> None:
        self.held: torch.Tensor | None = None

    def gains(self, size: int) -> torch.Tensor:
        self.held = made(size) if self.held is None else self.held
        return self.held


TABLE = Table()


def made(size: int) -> torch.Tensor:
    CALLS.append(size)
    return torch.arange(2.0, 2.0 + size)


@functools.lru_cache(maxsize=8)
def by_lru_cache(size: int) -> torch.Tensor:
    return made(size)


@functools.cache
def by_cache(size: int) -> torch.Tensor:
    return made(size)


def by_size(size: int) -> torch.Tensor:
    if size not in BY_SIZE:
        BY_SIZE[size] = made(size)
    return BY_SIZE[size]


def by_name(size: int) -> torch.Tensor:
    return BY_NAME["gains"].setdefault(size, made(size))


def in_list(size: int) -> torch.Tensor:
    IN_LIST[0] = made(size) if IN_LIST[0] is None else IN_LIST[0]
    return IN_LIST[0]


def in_global(size: int) -> torch.Tensor:
    global GLOBAL
    GLOBAL = made(size) if GLOBAL is None else GLOBAL
    return GLOBAL


def in_default(size: int, kept: dict[int, torch.Tensor] = {}) -> torch.Tensor:  # noqa: B006
    if size not in kept:
        kept[size] = made(size)
    return kept[size]


def on_class(size: int) -> torch.Tensor:
    if not hasattr(OnClass, "gains"):
        OnClass.gains = made(size)  # pyright: ignore[reportAttributeAccessIssue]
    return OnClass.gains  # pyright: ignore[reportAttributeAccessIssue]


def on_instance(size: int) -> torch.Tensor:
    return TABLE.gains(size)


def remembered(function: Callable[[int], torch.Tensor]) -> Callable[[int], torch.Tensor]:
    kept: dict[int, torch.Tensor] = {}
    last: torch.Tensor | None = None

    def chosen(size: int) -> torch.Tensor:
        nonlocal last
        if size not in kept:
            kept[size] = function(size)
        last = kept[size] if last is None else last
        return last

    return chosen


in_closure = remembered(made)
KINDS = (
    by_lru_cache,
    by_cache,
    by_size,
    by_name,
    in_list,
    in_global,
    in_default,
    on_class,
    on_instance,
    in_closure,
)


class Gained(nn.Module):
    """A linear layer whose outputs are scaled by gains that some Python code keeps."""

    def __init__(self, gains: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 5)
        self.gains = gains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * self.gains(5)


@pytest.mark.parametrize("gains", KINDS, ids=lambda kind: kind.__name__)
def test_the_source_is_as_before(gains: Callable[[int], torch.Tensor]) -> None:
    model, x = Gained(gains), torch.randn(4, 3)
    gm = fxlora.capture(model, x)
    assert gm.regions == ("",)  # one graph, so that both modes were traced
    assert type(gains(5)) is torch.Tensor
    assert torch.equal(gains(5), torch.arange(2.0, 7.0))
    assert torch.equal(gm(x), model(x))
    again = fxlora.capture(model, x)  # now that the cache holds a tensor
    assert torch.equal(again(x), model(x))
    assert gains(5) is gains(5)


@pytest.mark.parametrize("bounded", [False, True])
def test_a_cache_that_the_forward_clears(bounded: bool) -> None:
    """The counts of the cache are then as they were, but what it holds is another."""
    table = functools.lru_cache(maxsize=4 if bounded else None)(made)

    def gains(size: int) -> torch.Tensor:
        table.cache_clear()
        return table(size)

    model, x = Gained(gains), torch.randn(4, 3)
    model(x)
    before = table.cache_info()
    assert fxlora.capture(model, x).regions == ("",)
    assert type(table(5)) is torch.Tensor and before.misses == 1


def test_what_a_call_keeps_besides_tensors_stays() -> None:
    CALLS.clear()
    fxlora.capture(Gained(made), torch.randn(4, 3))
    assert set(CALLS) == {5}


def test_only_what_the_forward_can_reach_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lazy attribute elsewhere in the model's package is not touched."""

    class Lazy:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    monkeypatch.setitem(globals(), "LAZY", Lazy())
    fxlora.capture(Gained(made), torch.randn(4, 3))
