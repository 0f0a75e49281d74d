"""The parameters of a captured module, by dotted names: ties, additions and removals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from .submodules import container

if TYPE_CHECKING:
    from .captured import CapturedModule


def aliases(module: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter, keyed by the first; tied weights have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def set_parameter(module: CapturedModule, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, creating containers as needed."""
    owner, _, attribute = name.rpartition(".")
    parent: nn.Module = module
    with module.editing():
        for part in owner.split(".") if owner else []:
            if part not in parent._modules:
                parent.add_module(part, container())
            parent = parent.get_submodule(part)
        parent.register_parameter(attribute, parameter)


def remove_parameter(module: CapturedModule, name: str) -> None:
    """Remove a parameter, and the containers that this leaves empty."""
    owner, _, attribute = name.rpartition(".")
    del module.get_submodule(owner)._parameters[attribute]
    with module.editing():
        while owner and next(_contents(module.get_submodule(owner)), None) is None:
            owner, _, attribute = owner.rpartition(".")
            del module.get_submodule(owner)._modules[attribute]


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module._parameters.values()
    yield from module._buffers.values()
