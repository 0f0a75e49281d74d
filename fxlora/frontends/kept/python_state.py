"""Find what a model's Python code keeps in attributes from one call to the next."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .containers import unchanged

Attribute = tuple[str, str]  # the path of a module, and the name of its attribute

_ABSENT = object()
_OF_EVERY_MODULE = {*vars(nn.Module()), "forward"}


class Unknown:
    """A value that no code can compute with: it stands for what another call leaves."""


@dataclass(eq=False)
class Changes:
    """The attributes that traces of a model changed.

    Attributes:
        names: all of them: assigned, or a list, dict or set that was written to.
        counts: the new values of those that are plain numbers, and were before.
    """

    names: set[Attribute] = field(default_factory=set[Attribute])
    counts: dict[Attribute, int | float] = field(default_factory=dict[Attribute, Any])

    def add(self, attribute: Attribute, old: Any, new: Any, content: Any) -> None:
        """Add an attribute if it changed.

        Args:
            attribute: the attribute.
            old, new: its values before and after a forward.
            content: a copy of the old value if that is a list, dict or set, else None.
        """
        if new is not old or (content is not None and not unchanged(new, content)):
            self.names.add(attribute)
            if type(new) is type(old) and type(new) in (int, float) and new != old:
                self.counts[attribute] = new


@contextmanager
def noted(model: nn.Module, changes: Changes) -> Generator[None]:
    """Within the context, trace a model, and add the attributes that its forward changes."""
    modules = dict(model.named_modules())
    before = {path: dict(module.__dict__) for path, module in modules.items()}
    contents = {
        (path, name): copy.copy(value)
        for path, held in before.items()
        for name, value in held.items()
        if type(value) in (list, dict, set) and name not in _OF_EVERY_MODULE
    }

    def compare(*_: Any) -> None:  # torch.export restores attributes after the forward
        for path, module in modules.items():
            for name in {*before[path], *module.__dict__} - _OF_EVERY_MODULE:
                old, new = before[path].get(name, _ABSENT), module.__dict__.get(name, _ABSENT)
                changes.add((path, name), old, new, contents.get((path, name)))

    handle = model.register_forward_hook(compare)
    try:
        yield
    finally:
        handle.remove()


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
