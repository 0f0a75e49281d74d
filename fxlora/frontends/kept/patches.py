"""Patches of torch and Python that apply only to the capturing thread.

An attribute of a module or class is one object for the whole process. While a capture replaces it,
the attribute's value depends on the thread that reads or calls it: the capturing thread gets the
replacement, every other thread the original.
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
    """Within the context, attributes of a class or module have other values in this thread.

    Args:
        obj: the class, module or instance.
        names: the values. Those of a class are as in its body (functions, static and class
            methods); those of a module or an instance are functions.

    Yields:
        A function that returns how many calls other threads have made to the patched attributes
        of a module or an instance (calls through a class are not counted).
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
    """Within the context, limit torch.fx's own patches of nn.Module to this thread, too.

    torch.fx replaces `nn.Module.__call__` and `__getattr__` while it traces. In other threads these
    would fail, because a tracer refuses modules that are not under its root.
    """
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
    """A patched attribute: its value before any patch, and a stack of values for each thread."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name, _ABSENT)
        self.values: dict[int, list[Any]] = {}
        self.elsewhere = 0

    def value(self) -> Any:
        """Return the value for the current thread."""
        mine = self.values.get(threading.get_ident())
        return mine[-1] if mine else self.before


class _OfClass:
    """A descriptor that binds the current thread's value as the class itself would."""

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
    """Return a function that calls the current thread's value."""

    def call(*args: Any, **kwargs: Any) -> Any:
        value = place.value()
        place.elsewhere += value is place.before
        if value is _ABSENT:
            inherited = getattr(type(place.owner), place.name, None)
            value = inherited.__get__(place.owner) if inherited else getattr(builtins, place.name)
        return value(*args, **kwargs)

    call.__dict__["__wrapped__"] = place.before
    return call


_PLACES: dict[tuple[int, str], _Place] = {}


def _place(obj: Any, name: str) -> _Place:
    """Return the patched attribute, and install the patch if there is none yet."""
    if (id(obj), name) not in _PLACES:
        place = _PLACES[id(obj), name] = _Place(obj, name)
        setattr(obj, name, _OfClass(place) if isinstance(obj, type) else _of_module(place))
    return _PLACES[id(obj), name]


def _restore(place: _Place) -> None:
    """Remove a patch, and put the attribute's original value back."""
    del _PLACES[id(place.owner), place.name]
    if place.before is _ABSENT:
        delattr(place.owner, place.name)
    else:
        setattr(place.owner, place.name, place.before)
