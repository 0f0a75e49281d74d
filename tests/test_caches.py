"""A capture leaves no tensor of its trace in the caches of the model's Python code."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
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


ORDERED: collections.OrderedDict[int, torch.Tensor] = collections.OrderedDict()
ENTRIES: dict[int, Any] = {}


LATE: dict[str, dict[int, torch.Tensor]] = {}


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


def in_a_late_dict(size: int) -> torch.Tensor:
    """Of the first call, only an empty cache stays; the next one fills it."""
    if "gains" not in LATE:
        LATE["gains"] = {}
        return made(size)
    return LATE["gains"].setdefault(size, made(size))


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


def in_ordered_dict(size: int) -> torch.Tensor:
    return ORDERED.setdefault(size, made(size))


def on_function(size: int) -> torch.Tensor:
    if not hasattr(on_function, "kept"):
        on_function.kept = made(size)  # pyright: ignore[reportFunctionMemberAccess]
    return on_function.kept  # pyright: ignore[reportFunctionMemberAccess]


def in_entry(size: int) -> torch.Tensor:
    if size not in ENTRIES:
        ENTRIES[size] = SimpleNamespace(gains=made(size))
    return ENTRIES[size].gains


@dataclass(frozen=True)
class Frozen:
    """Keeps its gains past its own `__setattr__`, which raises."""

    size: int

    @functools.cached_property
    def gains(self) -> torch.Tensor:
        return made(self.size)


FROZEN = Frozen(5)


def on_frozen(size: int) -> torch.Tensor:
    return FROZEN.gains


@functools.cache
def of_operator(size: int) -> torch.Tensor:
    return made(size)


class Sizes:
    """Has an operator, the only code that names the cache, and that no code names itself."""

    def __and__(self, size: int) -> torch.Tensor:
        return of_operator(size)


SIZES = Sizes()


def on_operator(size: int) -> torch.Tensor:
    return SIZES & size


NAMESPACE = SimpleNamespace(held=None)
USER_DICT: Any = collections.UserDict()


def in_namespace(size: int) -> torch.Tensor:
    NAMESPACE.held = made(size) if NAMESPACE.held is None else NAMESPACE.held
    return NAMESPACE.held


def in_user_dict(size: int) -> torch.Tensor:
    return USER_DICT.setdefault(size, made(size))


class Meta(type):
    """Keeps its gains in the method of a metaclass, which only a partialmethod reaches."""

    def gains(cls, size: int) -> torch.Tensor:
        return of_metaclass(size)


@functools.cache
def of_metaclass(size: int) -> torch.Tensor:
    return made(size)


class WithMeta(metaclass=Meta):
    def chosen(self, size: int) -> torch.Tensor:
        return type(self).gains(size)

    five = functools.partialmethod(chosen, 5)


WITH_META = WithMeta()


def of_partialmethod(_size: int) -> torch.Tensor:
    return WITH_META.five()


class LazyTable(dict[str, Any]):
    """Loads its entries when somebody looks through them, as tables of optional models do."""

    def items(self) -> Any:
        raise AssertionError

    values = __iter__ = __reduce_ex__ = items  # pyright: ignore[reportAssignmentType]


LAZY = LazyTable(known=1)


class Proxy:
    """Stands for an object that does not exist now, as in web frameworks."""

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError

    @property
    def __dict__(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise AssertionError


ABSENT = Proxy()


def with_proxy(size: int) -> torch.Tensor:
    if size < 0:
        return LAZY["gains"]
    return ABSENT.gains if size < 1 else made(size)  # pyright: ignore[reportAttributeAccessIssue]


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
    in_a_late_dict,
    in_list,
    in_global,
    in_default,
    in_ordered_dict,
    in_entry,
    on_function,
    on_frozen,
    on_operator,
    in_namespace,
    in_user_dict,
    of_partialmethod,
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


def test_a_cache_that_is_only_read_stays() -> None:
    """The user's own setting, in an object that an lru_cache makes once."""
    settings = functools.cache(lambda: {"scale": 1.0})
    settings()["scale"] = 3.0
    model, x = Gained(lambda size: made(size) * settings()["scale"]), torch.randn(4, 3)
    expected = model(x)
    gm = fxlora.capture(model, x)
    assert torch.equal(model(x), expected) and torch.equal(gm(x), expected)


class Slotted:
    __slots__ = ("gains",)


def test_a_place_that_cannot_be_put_back_is_named_and_the_advice_works() -> None:
    kept = Slotted()

    def gains(size: int) -> torch.Tensor:
        if not hasattr(kept, "gains"):
            kept.gains = made(size)
        return kept.gains

    model, x = Gained(gains), torch.randn(4, 3)
    with pytest.raises(fxlora.CaptureError, match=r"holds a tensor of the trace now: clear it"):
        fxlora.capture(model, x)
    del kept.gains
    expected = model(x)
    assert torch.equal(fxlora.capture(model, x)(x), expected)


def test_no_code_of_the_users_runs() -> None:
    model, x = Gained(with_proxy), torch.randn(4, 3)
    assert torch.equal(fxlora.capture(model, x)(x), model(x))


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
