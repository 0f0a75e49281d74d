"""Keep the tensors of a trace out of the caches of the model's Python code.

A forward may keep results in an lru_cache, a global, a closure or an attribute of a class. A trace
computes on fake tensors, which would stay there, and every later call of the model would find them.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import operator
import sys
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from types import (
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from .containers import items, put_back, unchanged

_TRACED = (FakeTensor, fx.Proxy, torch.SymInt, torch.SymFloat, torch.SymBool)
_ABSENT = object()
# A subclass of these may run the user's code when it is copied or iterated over.
_CONTAINERS = (dict, list, set, deque, OrderedDict, defaultdict, Counter)
_MOST_ENTRIES = 1000  # a larger container is data, not a cache: it is neither copied nor searched
# They keep no tensors of a model.
_LIBRARIES = {"torch", "numpy", __name__.partition(".")[0], *sys.stdlib_module_names}


@contextmanager
def searched_once() -> Generator[None]:
    """Within the context, what a model's code reaches is searched again only after it changed."""
    outer, _known.reaches = _known.reaches, {}
    try:
        yield
    finally:
        _known.reaches = outer


@contextmanager
def no_traces_in_caches(model: nn.Module) -> Generator[None]:
    """Within the context, trace a model; afterwards, remove the tensors of the trace from caches.

    These are the caches that the code of the model's classes can reach. An lru_cache is emptied if
    any result was added to it. A variable or a container gets back its earlier value if it holds a
    tensor of the trace. Everything else that a call leaves there stays.
    """
    reach = _reach_of(model)
    used = [(cache, cache.cache_info()) for cache in reach.lru_caches]
    containers = [(container, copy.copy(container)) for container in reach.containers]
    variables = [(owner, dict(_variables(owner))) for owner in reach.owners.values()]
    try:
        yield
    finally:
        for cache, before in used:
            now = cache.cache_info()
            more = (now.misses, now.currsize) != (before.misses, before.currsize)
            # equal counts, if the forward clears the cache and fills it again
            if more or any(_holds_traced(held, attributes=False) for held in _results(cache)):
                cache.cache_clear()
        same = [_put_container_back(container, before) for container, before in containers]
        same += [_put_variables_back(owner, before) for owner, before in variables]
        if not all(same) and _known.reaches:  # what stays may reach more
            _known.reaches.pop(id(model), None)


class _Known(threading.local):
    """The last search of each model, by id, where the thread searches once."""

    reaches: dict[int, _Reach] | None = None


def _reach_of(model: nn.Module) -> _Reach:
    start, reaches = _start_of(model), _known.reaches
    if reaches is None:
        return _Reach(start)
    known = reaches.get(id(model))
    same = known and len(known.start) == len(start) and all(map(operator.is_, known.start, start))
    if not (known and same):
        known = reaches[id(model)] = _Reach(start)
    return known


def _start_of(model: nn.Module) -> list[Any]:
    """Return the classes of a model's modules, and the callables that these hold."""
    return [
        value
        for module in model.modules()
        for value in (type(module), *filter(callable, vars(module).values()))
    ]


_known = _Known()


class _Reach:
    """The objects that the code of a model's classes reaches by name, closure and default.

    An attribute of a class or instance is reached if code that is reached contains its name.

    Attributes:
        start: where the search starts.
        lru_caches: functions that keep their results.
        containers: dicts, lists and sets.
        owners: the objects with variables: namespaces of modules, classes, instances, closures.
    """

    def __init__(self, start: list[Any]) -> None:
        self.start = start
        self.lru_caches: list[Any] = []
        self.containers: list[Any] = []
        self.owners: dict[int, Any] = {}  # by id
        self._seen: dict[int, Any] = {}  # by id, which no other object can take while it is held
        self._left: list[Any] = list(start)
        self._names: set[str] = set()
        self._waiting: dict[str, list[Any]] = {}  # attributes that no code has named so far
        self._add_names({"forward"})
        while self._left:
            value = self._left.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                self._visit(value)

    def _add_names(self, names: set[str]) -> None:
        for name in names - self._names:
            self._left += self._waiting.pop(name, ())
        self._names |= names

    def _add_attributes(self, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            reached = name in self._names or _is_called_by_python(name)
            (self._left if reached else self._waiting.setdefault(name, [])).append(value)

    def _visit(self, value: Any) -> None:
        kind = type(value)  # `__class__` may be a property that runs the user's code
        if issubclass(kind, functools._lru_cache_wrapper):
            self.lru_caches.append(value)
            self._left.append(value.__wrapped__)
        elif kind is FunctionType:
            self._visit_function(value)
        elif kind in (staticmethod, classmethod, MethodType):
            self._left += [value.__func__, getattr(value, "__self__", None)]
        elif kind is property:
            self._left.append(value.fget)
        elif kind in (functools.cached_property, functools.partialmethod):
            self._left.append(value.func)
        elif kind is functools.partial:
            self._left += [value.func, *value.args, *value.keywords.values()]
        elif kind in _CONTAINERS or issubclass(kind, tuple):
            self._visit_container(value)
        elif not issubclass(kind, (ModuleType, torch.Tensor, logging.Logger)):
            self._visit_owner(value)

    def _visit_function(self, function: FunctionType) -> None:
        if _in_a_library(function):
            return
        self.owners[id(function)] = function
        self._left += function.__dict__.values()
        self._left += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            self.owners[id(cell)] = cell
            self._left += _variables(cell).values()
        names = set(_names_in(function.__code__))
        self._add_names(names)
        modules = [function.__globals__]  # and those of which it reads a variable: `module.name`
        for namespace in modules:
            self.owners[id(namespace)] = namespace
            values = [namespace[name] for name in names & namespace.keys()]
            found = [value for value in values if issubclass(type(value), ModuleType)]
            self._left += [value for value in values if not issubclass(type(value), ModuleType)]
            more = [module for module in found if not _in_a_library(module)]
            modules += [vars(m) for m in more if not any(vars(m) is known for known in modules)]

    def _visit_owner(self, owner: Any) -> None:
        kind: Any = owner if issubclass(type(owner), type) else type(owner)
        if kind is not owner and _of_python(kind):  # its class's code is not the user's
            self.owners[id(owner)] = owner
            self._left += _attributes(owner).values()
        elif not _in_a_library(kind):
            self.owners[id(owner)] = owner
            self._add_attributes(_attributes(owner))
            if not issubclass(kind, nn.Module):  # whose forward makes no other module
                self._left.append(_attributes(kind).get("__init__"))
            self._left += type.mro(kind) if kind is not type else []
            self._left.append(type(kind))  # the class of a class may have methods, too

    def _visit_container(self, container: Any) -> None:
        if len(container) <= _MOST_ENTRIES:
            self.containers += [] if issubclass(type(container), tuple) else [container]
            self._left += items(container)


def _is_called_by_python(name: object) -> bool:
    """Whether Python may call a method without its name in any code, as it does `__add__`.

    `__init__` is not among these: a forward makes objects, but no modules.
    """
    return str(name).startswith("__") and str(name).endswith("__") and name != "__init__"


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's code, and in functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _in_a_library(thing: Any) -> bool:
    """Whether a function, class or Python module is of torch, numpy or the standard library."""
    name = thing.__name__ if issubclass(type(thing), ModuleType) else thing.__module__
    return str(name).partition(".")[0] in _LIBRARIES


def _of_python(kind: Any) -> bool:
    """Whether a class is of the standard library, and no builtin one, which has no attributes."""
    package = str(kind.__module__).partition(".")[0]
    return package in sys.stdlib_module_names and package != "builtins"


def _attributes(owner: Any) -> Mapping[str, Any]:
    """Return the attributes that a class or an instance holds itself, past any code of the user."""
    if issubclass(type(owner), type):
        return type.__dict__["__dict__"].__get__(owner)
    for kind in type.mro(type(owner)):
        held = _attributes(kind).get("__dict__")
        if type(held) in (GetSetDescriptorType, MemberDescriptorType):  # no property of the user's
            return held.__get__(owner)  # pyright: ignore[reportOptionalMemberAccess]
    return {}  # it has slots only


def _results(lru_cache: Any) -> Iterator[Any]:
    """Yield the results that an lru_cache holds, among its other parts.

    Where the cache is bounded, CPython keeps them in a list of its own. Depending on the release,
    the cache itself refers to them, or the items of that list do.
    """
    for held in gc.get_referents(lru_cache):
        entries = held.values() if type(held) is dict else (held,)
        for entry in entries:
            in_list = type(entry).__name__ == "_lru_list_elem"
            yield from gc.get_referents(entry) if in_list else (entry,)


def _variables(owner: Any) -> Mapping[str, Any]:
    """Return the variables of a Python module (given as its dict), a class, instance or closure."""
    if type(owner) is dict:
        return owner
    if type(owner) is CellType:
        try:
            return {"cell_contents": owner.cell_contents}
        except ValueError:  # an empty cell
            return {}
    return {n: v for n, v in list(_attributes(owner).items()) if not str(n).startswith("__")}


def _put_container_back(container: Any, before: Any) -> bool:
    """Put items back if one holds a tensor of the trace; return whether all are as before."""
    if unchanged(container, before):
        return True
    if any(map(_holds_traced, items(container))):
        put_back(container, before)
        return True
    return False


def _put_variables_back(owner: Any, before: dict[str, Any]) -> bool:
    """Put back each that holds a tensor of the trace; return whether all are as before."""
    now = dict(_variables(owner))
    same = now.keys() >= before.keys()
    for name, value in now.items():
        old = before.get(name, _ABSENT)
        if value is not old:
            traced = _holds_traced(value)
            same = same and traced
            if traced:
                _set(owner, name, old)
    return same


def _set(owner: Any, name: str, value: Any) -> None:
    """Set or delete a variable, past any code of the user's that setting an attribute runs."""
    absent = value is _ABSENT
    if type(owner) is CellType:
        owner.cell_contents = value
    elif issubclass(type(owner), type):
        type.__delattr__(owner, name) if absent else type.__setattr__(owner, name, value)
    else:
        held: Any = owner if type(owner) is dict else _attributes(owner)
        held.pop(name) if absent else held.update({name: value})


def _holds_traced(value: Any, attributes: bool = True) -> bool:
    """Whether a value is of a trace, or holds one in containers (and attributes)."""
    seen: dict[int, Any] = {}
    left = [value]
    while left and len(seen) <= _MOST_ENTRIES:
        value = left.pop()
        kind = type(value)
        if issubclass(kind, _TRACED):
            return True
        if id(value) in seen or issubclass(kind, (str, int, float, torch.Tensor, ModuleType, type)):
            continue
        seen[id(value)] = value
        if kind in _CONTAINERS or issubclass(kind, tuple):
            left += items(value)
        elif attributes and not issubclass(kind, (FunctionType, nn.Module)):
            left += _attributes(value).values()
    return False
