"""Keep the tensors of a trace out of the caches of the model's Python code.

A forward may keep results in an lru_cache, a global, a closure or an attribute of a class. A trace
computes on fake tensors, which would stay there, and every later call of the model would find them.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from .containers import items, put_back, unchanged

_TRACED = (FakeTensor, fx.Proxy, torch.SymInt, torch.SymFloat, torch.SymBool)
_ABSENT = object()
_MOST_ENTRIES = 1000  # a larger container is data, not a cache: it is neither copied nor searched
# They keep no tensors of a model.
_LIBRARIES = {"torch", "numpy", __name__.partition(".")[0], *sys.stdlib_module_names}


@contextmanager
def no_traces_in_caches(model: nn.Module) -> Generator[None]:
    """Within the context, trace a model; afterwards, remove the tensors of the trace from caches.

    These are the caches that the code of the model's classes can reach. An lru_cache is emptied if
    it was used. A variable or a container gets back its earlier value if it holds a
    tensor of the trace. Everything else that a call leaves there stays.
    """
    reach = _Reach(model)
    used = [(cache, cache.cache_info()) for cache in reach.lru_caches]
    containers = [(container, copy.copy(container)) for container in reach.containers]
    variables = [(owner, dict(_variables(owner))) for owner in reach.owners.values()]
    try:
        yield
    finally:
        for cache, before in used:
            # equal counts, if the forward clears the cache and fills it again
            if cache.cache_info() != before or any(map(_holds_traced, _results(cache))):
                cache.cache_clear()
        for container, before in containers:
            if not unchanged(container, before) and any(map(_holds_traced, items(container))):
                put_back(container, before)
        for owner, before in variables:
            _put_variables_back(owner, before)


class _Reach:
    """The objects that the code of a model's classes reaches by name, closure and default.

    An attribute of a class or instance is reached if code that is reached contains its name.

    Attributes:
        lru_caches: functions that keep their results.
        containers: dicts, lists and sets.
        owners: the objects with variables: namespaces of modules, classes, instances, closures.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lru_caches: list[Any] = []
        self.containers: list[Any] = []
        self.owners: dict[int, Any] = {}  # by id
        self._seen: dict[int, Any] = {}  # by id, which no other object can take while it is held
        self._left: list[Any] = []
        self._names: set[str] = set()
        self._waiting: dict[str, list[Any]] = {}  # attributes that no code has named so far
        self._add_names({"forward", "__call__", "__getattr__", "__getitem__", "__torch_function__"})
        for module in model.modules():
            self._left.append(type(module))
            self._left += filter(callable, vars(module).values())
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
            found = self._left if name in self._names else self._waiting.setdefault(name, [])
            found.append(value)

    def _visit(self, value: Any) -> None:
        if isinstance(value, functools._lru_cache_wrapper):
            self.lru_caches.append(value)
            self._left.append(value.__wrapped__)
        elif isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, staticmethod | classmethod | MethodType):
            self._left += [value.__func__, getattr(value, "__self__", None)]
        elif isinstance(value, property):
            self._left.append(value.fget)
        elif isinstance(value, functools.partial):
            self._left += [value.func, *value.args, *value.keywords.values()]
        elif type(value) in (dict, list, set, tuple):
            self._visit_container(value)
        elif not isinstance(value, ModuleType | torch.Tensor) and hasattr(value, "__dict__"):
            self._visit_owner(value)

    def _visit_function(self, function: FunctionType) -> None:
        if _in_a_library(function):
            return
        self._left += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for cell in function.__closure__ or ():
            self.owners[id(cell)] = cell
            self._left += _variables(cell).values()
        names = set(_names_in(function.__code__))
        self._add_names(names)
        modules = [
            function.__globals__
        ]  # and those that it reads variables of, as in `module.name`
        for namespace in modules:
            self.owners[id(namespace)] = namespace
            values = [namespace[name] for name in names & namespace.keys()]
            self._left += [value for value in values if not isinstance(value, ModuleType)]
            more = [m for m in values if isinstance(m, ModuleType) and not _in_a_library(m)]
            modules += [vars(m) for m in more if not any(vars(m) is known for known in modules)]

    def _visit_owner(self, owner: Any) -> None:
        kind = owner if isinstance(owner, type) else type(owner)
        if not _in_a_library(kind):
            self.owners[id(owner)] = owner
            self._add_attributes(vars(owner))
            self._left += kind.__mro__

    def _visit_container(self, container: Any) -> None:
        if len(container) <= _MOST_ENTRIES:
            self.containers += [] if isinstance(container, tuple) else [container]
            self._left += items(container)


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's code, and in functions inside."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _in_a_library(thing: Any) -> bool:
    """Whether a function, class or Python module is of torch, numpy or the standard library."""
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    return (name or "").partition(".")[0] in _LIBRARIES


def _results(lru_cache: Any) -> list[Any]:
    """Return the results that an lru_cache holds, with the objects that it holds them in."""
    held = gc.get_referents(lru_cache)
    entries = [entry for part in held if isinstance(part, dict) for entry in part.values()]
    return [*held, *entries, *gc.get_referents(*entries)]


def _variables(owner: Any) -> Mapping[str, Any]:
    """Return the variables of a Python module (given as its dict), a class, instance or closure."""
    if isinstance(owner, dict):
        return owner
    if isinstance(owner, CellType):
        try:
            return {"cell_contents": owner.cell_contents}
        except ValueError:  # an empty cell
            return {}
    return {n: v for n, v in list(vars(owner).items()) if not n.startswith("__")}


def _put_variables_back(owner: Any, before: dict[str, Any]) -> None:
    in_dict = isinstance(owner, dict)
    put = owner.__setitem__ if in_dict else functools.partial(setattr, owner)
    drop = owner.__delitem__ if in_dict else functools.partial(delattr, owner)
    for name, value in list(_variables(owner).items()):
        old = before.get(name, _ABSENT)
        if value is not old and _holds_traced(value):
            drop(name) if old is _ABSENT else put(name, old)


def _holds_traced(value: Any) -> bool:
    return any(isinstance(leaf, _TRACED) for leaf in pytree.tree_leaves(value))
