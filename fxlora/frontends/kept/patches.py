"""Patches of torch and Python that hold for the capturing thread alone.

An attribute of a module or class is one object for the whole process. While a capture replaces it,
what is in its place looks at the thread that asks: the capturing one gets the replacement, every
other one gets what was there before.
"""

from __future__ import annotations

import builtins
import functools
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch.fx._symbolic_trace import _Patcher

_LOCK = threading.Lock()
_ABSENT = object()


@contextmanager
def patched(obj: Any, **names: Any) -> Generator[Callable[[], int]]:
    """Within, attributes of a class or module have other values for this thread.

    Args:
        names: the values. A class takes them as its body would (functions, static and class
            methods); a module, or an instance, takes functions.

    Yields:
        a count of the calls, through a module or instance, that other threads have made.
    """
    thread = threading.get_ident()
    places: list[_Place] = []
    for name, value in names.items():
        with _LOCK:
            places.append(_place(obj, name))
            places[-1].values.setdefault(thread, []).append(value)
    try:
        yield lambda: sum(place.elsewhere for place in places)
    finally:
        for place in places:
            with _LOCK:
                place.values[thread].pop()
                if not place.values[thread]:
                    del place.values[thread]
                if not place.values:
                    _restore(place)


@contextmanager
def torchs_own_patches_here() -> Generator[None]:
    """Within, what torch.fx puts on nn.Module while it traces (`__call__`, `__getattr__`) holds for
    this thread alone, too: a tracer refuses modules that are not its root's."""
    thread = threading.get_ident()
    patch_method = _Patcher.patch_method

    def patch_here(self: Any, cls: type, name: str, new: Any, deduplicate: bool = True) -> None:
        before: Any = getattr(cls, name)

        @functools.wraps(new)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (new if threading.get_ident() == thread else before)(*args, **kwargs)

        patch_method(self, cls, name, chosen, deduplicate)

    with patched(_Patcher, patch_method=patch_here):
        yield


class _Place:
    """An attribute with its value before any patch, and the values that threads see instead."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name, _ABSENT)
        self.values: dict[int, list[Any]] = {}
        self.elsewhere = 0

    def value(self) -> Any:
        """What the current thread sees."""
        mine = self.values.get(threading.get_ident())
        return mine[-1] if mine else self.before


class _OfClass:
    """Binds what the current thread sees as the class itself would."""

    def __init__(self, place: _Place) -> None:
        self.place = place

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        value = self.place.value()
        if value is _ABSENT:  # inherited
            bound: Any = super(self.place.owner, owner if instance is None else instance)
            return getattr(bound, self.place.name)
        bind = getattr(type(value), "__get__", None)
        return bind(value, instance, owner) if bind else value


def _of_module(place: _Place) -> Callable[..., Any]:
    """A function that calls what the current thread sees."""

    def call(*args: Any, **kwargs: Any) -> Any:
        value = place.value()
        place.elsewhere += value is place.before
        if value is _ABSENT:
            inherited = getattr(type(place.owner), place.name, None)
            value = inherited.__get__(place.owner) if inherited else getattr(builtins, place.name)
        return value(*args, **kwargs)

    return call


_PLACES: dict[tuple[int, str], _Place] = {}


def _place(obj: Any, name: str) -> _Place:
    """The patch of an attribute, which is put there if there is none yet."""
    if (id(obj), name) not in _PLACES:
        place = _PLACES[id(obj), name] = _Place(obj, name)
        setattr(obj, name, _OfClass(place) if isinstance(obj, type) else _of_module(place))
    return _PLACES[id(obj), name]


def _restore(place: _Place) -> None:
    del _PLACES[id(place.owner), place.name]
    if place.before is _ABSENT:
        delattr(place.owner, place.name)
    else:
        setattr(place.owner, place.name, place.before)
