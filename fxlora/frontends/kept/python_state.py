"""Find attributes that a model's Python code reads, and those that it keeps for the next call."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...module.host_attributes import ALL, TRAINING, is_own
from .asked_modes import is_torchs
from .containers import items, unchanged
from .patches import patched

Attribute = tuple[str, str]  # the path of a module, and the name of its attribute

_ABSENT = object()
_OF_EVERY_MODULE = {*vars(nn.Module()), "forward"}


class Unknown:
    """A placeholder for a value that another call leaves; any use of it raises."""

    def _refused(self, *_: Any) -> Any:
        raise TypeError("a call reads an attribute that another call assigns")

    __bool__ = __eq__ = __len__ = __iter__ = __call__ = __getattr__ = _refused
    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(eq=False)
class Changes:
    """The attributes that traces of a model changed.

    Attributes:
        names: all of them: assigned, or a list, dict or set that was written to.
        plain: the new values of those that are plain values, or lists, dicts and sets.
        counts: the new values of those that are numbers, and were before. (Of a flag one cannot
            say the same: other state may go with it, which a trace does not leave.)
    """

    names: set[Attribute] = field(default_factory=set[Attribute])
    plain: dict[Attribute, Any] = field(default_factory=dict[Attribute, Any])
    counts: dict[Attribute, int | float] = field(default_factory=dict[Attribute, Any])

    def add(self, attribute: Attribute, old: Any, new: Any, content: list[Any]) -> None:
        """Add an attribute if it changed.

        Args:
            attribute: the attribute.
            old, new: its values before and after a forward.
            content: the `_content` of the old value, before the forward.
        """
        if not unchanged(_content(new), content):
            self.names.add(attribute)
            if _is_plain(new):
                self.plain[attribute] = copy.copy(new)
            if type(new) is type(old) and type(new) in (int, float):
                self.counts[attribute] = new


def _is_plain(value: Any) -> bool:
    """Whether a value, and all that it contains, is the same in a trace as in a call."""
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return type(value) in (type(None), bool, int, float, str)


def _content(value: Any) -> list[Any]:
    """Return a value and, if it is a list, dict, set or tuple, all that it contains."""
    content: list[Any] = []
    containers: set[int] = set()

    def visit(item: Any) -> None:
        content.append(item)
        if type(item) in (list, dict, set, tuple) and id(item) not in containers:
            containers.add(id(item))
            for inner in items(item):
                visit(inner)
            content.append(None)  # its end

    visit(value)
    return content


@contextmanager
def noted(model: nn.Module, changes: Changes) -> Generator[None]:
    """Within the context, trace a model, and add the attributes that its forward changes.

    torch.export puts attributes back after a forward, some of them as copies.
    """
    modules = dict(model.named_modules())
    before: dict[Attribute, tuple[Any, list[Any]]] = {}

    def remember(*_: Any) -> None:
        before.clear()
        for attribute, value in _attributes(modules):
            before[attribute] = value, _content(value)

    def compare(*_: Any) -> None:
        after = dict(_attributes(modules))
        for attribute in {*before, *after}:
            old, content = before.get(attribute, (_ABSENT, [_ABSENT]))
            changes.add(attribute, old, after.get(attribute, _ABSENT), content)

    handles = (
        model.register_forward_pre_hook(remember),
        model.register_forward_hook(compare),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noted_reads(model: nn.Module, reads: set[Attribute]) -> Generator[None]:
    """Within the context, note which attributes of its modules a model's forward reads.

    Python finds an attribute in the module's dict before it asks any code, so that the question
    itself is patched. A module's `training` is noted if code of another module reads it. Code that
    torch.compile's tracer reads instead of running (the branches of a `torch.cond`) is not noted.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    depth = 0

    def read(self: nn.Module, name: str) -> Any:
        whole = name == ALL and _is_models(sys._getframe(1))
        inherited = super(nn.Module, self).__getattribute__
        if depth and name == TRAINING and id(self) in paths and _is_others(sys._getframe(1), self):
            reads.add((paths[id(self)], name))
        if depth and id(self) in paths and (whole or is_own(name, inherited("__dict__"))):
            reads.add((paths[id(self)], name))
        return inherited(name)

    def begin(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def end(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = (
        model.register_forward_pre_hook(begin, prepend=True),
        model.register_forward_hook(end, always_call=True),
    )
    try:
        with patched(nn.Module, __getattribute__=read):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _is_models(frame: types.FrameType) -> bool:
    """Whether code is neither torch's, which looks for tensors and hooks, nor fxlora's."""
    name = str(frame.f_globals.get("__name__", ""))
    return not is_torchs(name) and name.partition(".")[0] != __name__.partition(".")[0]


def _is_others(frame: types.FrameType | None, module: nn.Module) -> bool:
    """Whether a read is made by code of another module than this one, and not by torch's."""
    if frame is None or not _is_models(frame):
        return False
    while frame is not None and not isinstance(frame.f_locals.get("self"), nn.Module):
        frame = frame.f_back  # a function, called by a method of a module
    return frame is not None and frame.f_locals["self"] is not module


def _attributes(modules: Mapping[str, nn.Module]) -> Iterator[tuple[Attribute, Any]]:
    for path, module in modules.items():
        for name, value in module.__dict__.items():
            if name not in _OF_EVERY_MODULE:
                yield (path, name), value


@contextmanager
def holding(model: nn.Module, values: Mapping[Attribute, Any]) -> Generator[None]:
    """Within the context, attributes of a model have other values."""
    before: dict[Attribute, Any] = {}
    for (path, name), value in values.items():
        attributes = model.get_submodule(path).__dict__
        before[path, name] = attributes.get(name, _ABSENT)
        attributes[name] = value
    try:
        yield
    finally:
        for (path, name), value in before.items():
            attributes = model.get_submodule(path).__dict__
            attributes.pop(name, None)
            if value is not _ABSENT:
                attributes[name] = value
