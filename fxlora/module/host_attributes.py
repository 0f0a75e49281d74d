"""Python attributes of a host, which graphs neither read nor set.

A graph has the attributes that the source's forward reads as they were in the capture, and sets
none. So after code of a host has set one, the calls that read it are refused; and one that the
forward sets is unknown after a call, until the host's own code sets it.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import nn

from ..errors import SubmoduleError
from ..fx.literals import same_literal

TRAINING = "training"  # noted as read where code of another module reads it
ALL = "__dict__"  # stands for all attributes of a module, whose dict a call reads
MISSING = object()
PLAIN = (bool, int, float, str, type(None))
# What every nn.Module has: the attributes of its own, and all that its class has, too.
MACHINERY = frozenset(vars(nn.Module()))
OF_EVERY_MODULE = frozenset(dir(nn.Module()))

# Kinds of values that a forward may compute with; other private attributes are notes of frameworks.
DATA = (torch.Tensor, list, tuple, dict, set, *PLAIN)

_IMMUTABLE = (torch.dtype, torch.device, types.FunctionType, types.MethodType, type)


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def dotted(attributes: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Return the names of attributes that are given as a module's path and a name."""
    return frozenset(joined(path, name) for path, name in attributes)


def plain_values(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return those of a model's attributes, by dotted name, that are numbers, strings or flags.

    The mode of its modules is none of them. No property is asked, which may run code.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    owned = ((name, *name.rpartition(".")[::2]) for name in names)
    held = {n: getattr_static(parts[path], own, MISSING) for n, path, own in owned if path in parts}
    held = {name: value for name, value in held.items() if name.rpartition(".")[2] != TRAINING}
    return {name: value for name, value in held.items() if isinstance(value, PLAIN)}


def is_private(name: str) -> bool:
    """Whether an attribute is a note of the framework that sets it (FSDP's, accelerate's)."""
    return name.startswith("_") and not name.startswith("__") and name not in MACHINERY


def is_same(value: object, other: object) -> bool:
    """Whether setting an attribute to a value instead of another changes nothing.

    A mutable object may have been changed before it is set again, as by `part.items += […]`.
    """
    if isinstance(value, PLAIN):
        return same_literal(value, other)
    return value is other and isinstance(value, _IMMUTABLE)


def is_own(name: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a module's attribute is not one of every nn.Module: it may cover a method of it."""
    return name not in OF_EVERY_MODULE or (name not in MACHINERY and name in attributes)


def _is_plain(part: nn.Module, name: str) -> bool:
    """Whether a name is of no tensor, child or attribute that every module has."""
    held = (part._parameters, part._buffers, part._modules)
    return is_own(name, part.__dict__) and not any(name in group for group in held)


class Attributes:
    """What became of the Python attributes of a host since the capture.

    Attributes:
        reads: names of those that captured calls read, or None where that is not known.
        before: the values in the capture of those that code of the host has set since.
        changing: whether the source changes any in captured calls.
        left: names of those that it would have changed in the calls so far.
    """

    def __init__(self, reads: frozenset[str] | None, changing: bool = False) -> None:
        self.reads, self.changing = reads, changing
        self.before: dict[str, Any] = {}
        self.left: set[str] = set()

    def take(self, other: Attributes) -> None:
        """Start from the attributes of the host that this one is a copy of."""
        self.before.update(other.before)
        self.left.update(other.left)

    def knows(self, part: nn.Module, name: str) -> bool:
        """Whether it is known which calls read a plain attribute, so that anyone may set it."""
        return self.reads is not None and _is_plain(part, name)

    def check_host(self, host: nn.Module, name: str, value: Any) -> None:
        """Raise SubmoduleError for a host's own attribute that a call may read, for all we know."""
        held = getattr(host, name, MISSING)
        note = is_private(name) and not isinstance(held, DATA)
        unknown = self.reads is None and _is_plain(host, name) and not note
        if unknown and held is not MISSING and not is_same(value, held):
            raise SubmoduleError(
                f"'{name}' of the host cannot be set: its graphs have the value of the capture, "
                "and it is not known which calls read it. Set it on the source model, and capture "
                "that."
            )

    def note(self, part: nn.Module, path: str, name: str, value: Any) -> None:
        """Note that code of the host is about to set an attribute, or to delete it (MISSING)."""
        if not self.knows(part, name):
            return
        full = joined(path, name)
        read = not (self.reads or frozenset()).isdisjoint((full, joined(path, ALL)))
        if is_private(name) and not (read or isinstance(value, DATA) or value is MISSING):
            return  # a note of a framework
        if full not in self.before:
            held = part.__dict__.get(name, MISSING)
            left = held is not MISSING or full in self.left
            self.before[full] = held if left else getattr(part, name, MISSING)
        if is_same(value, self.before[full]):
            del self.before[full]

    def called(self, reads: frozenset[str] | None, changes: frozenset[str]) -> None:
        """Note a call, given the attributes that the source reads and changes in such a call.

        Raises:
            SubmoduleError: the call reads an attribute that code of the host has set.
        """
        owners = {name: joined(name.rpartition(".")[0], ALL) for name in self.before}
        for name, every in owners.items():
            if reads is not None and not reads.isdisjoint((name, every)):
                raise _refusal(name, self.before[name])
        self.left |= changes


def _refusal(name: str, before: object) -> SubmoduleError:
    back = f"Set it back (host.{name} = {before!r}). " if isinstance(before, PLAIN) else ""
    return SubmoduleError(
        f"'{name}' of the host was set, and this call reads it: its graph has the value of the "
        f"capture. {back}Or set it on the source model, and capture that; or make it an argument "
        "of the forward, and capture a call for each of its values."
    )


class SetByCalls:
    """An attribute that captured calls set in the source: reading it after one of them raises.

    The error is no AttributeError, so that `hasattr` and `getattr` with a default raise, too.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, part: Any, owner: Any = None) -> Any:
        if part is None:
            return self._of_class(owner, None)
        name = joined(part.__dict__.get("_path", ""), self.name)
        if name in self._left(part):
            raise SubmoduleError(
                f"'{name}' is set by the source's forward, but not by its graph, which this host "
                f"has run. Set it on the host (host.{name} = …) before it is read; or return the "
                "value from the forward, and capture that."
            )
        held = part.__dict__.get(self.name, MISSING)
        return self._of_class(type(part), part) if held is MISSING else held

    def __set__(self, part: Any, value: Any) -> None:
        part.__dict__[self.name] = value
        self._left(part).discard(joined(part.__dict__.get("_path", ""), self.name))

    def __delete__(self, part: Any) -> None:
        self._left(part).discard(joined(part.__dict__.get("_path", ""), self.name))
        if part.__dict__.pop(self.name, MISSING) is MISSING:
            raise AttributeError(self.name)

    def _left(self, part: Any) -> set[str]:
        seal = part.__dict__.get("_seal")
        return set() if seal is None else seal.attributes.left

    def _of_class(self, owner: Any, part: Any) -> Any:
        """Return what the source's class has under this name."""
        for kind in owner.__mro__:
            value = vars(kind).get(self.name, self)
            if not isinstance(value, SetByCalls):
                bind = getattr(type(value), "__get__", None)
                return bind(value, part, owner) if bind else value
        raise AttributeError(f"'{owner.__name__}' object has no attribute '{self.name}'")


def set_by_calls(kind: type[nn.Module], path: str, changes: Iterable[str]) -> frozenset[str]:
    """Return the attributes of a module at a path that calls change and a class is to guard.

    What a property computes and keeps is the same on a host.
    """
    names = {n.rpartition(".")[2] for n in changes if n.rpartition(".")[0] == path}
    return frozenset(n for n in names if not hasattr(getattr(kind, n, None), "__get__"))
