"""Trace a method of a model, or a call of a submodule, as torch.export traces its forward."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as torchs

from ..errors import CaptureError
from ..module.sealed_dicts import HOOKS
from ..names import shown

# Attributes of a module that a call of it reads, and a call of one of its methods does not.
_OF_A_CALL = ("forward", *HOOKS)


def method_of(model: nn.Module, name: object) -> Callable[..., Any]:
    """Return the method of this name, or the submodule of this path.

    Raises:
        CaptureError: the model's class has no such method, and the model no such submodule.
    """
    if isinstance(name, str) and name:
        try:
            return model.get_submodule(name)
        except AttributeError:
            if inspect.isroutine(getattr(type(model), name, None)):
                return getattr(model, name)
    raise CaptureError(
        f"{type(model).__name__} has no method or submodule {shown(name)}. For a method of a "
        "submodule, capture a method of the model that calls it."
    )


def own_name(model: nn.Module, name: str) -> str:
    """Return the first path of a submodule that has several; the name of a method as it is."""
    called = method_of(model, name)
    return next((path for path, part in model.named_modules() if part is called), name)


def signature_of(model: nn.Module, name: str = "forward") -> inspect.Signature:
    """Return the signature of a method, or of a submodule's forward."""
    called = method_of(model, name)
    return inspect.signature(called.forward if isinstance(called, nn.Module) else called)


@contextmanager
def called_by(model: nn.Module, method: str) -> Generator[None]:
    """Within the context, a call of the model runs one of its methods or submodules.

    Inside the method, the model has its own forward and hooks, so that the method may call it.

    Raises:
        CaptureError: a call of the model runs more than its forward and hooks.
    """
    if method == "forward":
        yield
        return
    _refuse_other_code(model, method)
    attributes = model.__dict__
    original = method_of(model, method)

    def exchange(others: dict[str, Any]) -> dict[str, Any]:
        held = {name: attributes.pop(name) for name in _OF_A_CALL if name in attributes}
        attributes.update(others)
        return held

    @functools.wraps(original.forward if isinstance(original, nn.Module) else original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        of_the_trace = exchange({name: copy.copy(held) for name, held in own.items()})
        try:
            return original(*args, **kwargs)
        finally:
            exchange(of_the_trace)

    own = exchange({})
    attributes |= {name: type(hooks)() for name, hooks in own.items() if name != "forward"}
    attributes["forward"] = forward
    try:
        yield
    finally:
        exchange(own)


def _refuse_other_code(model: nn.Module, method: str) -> None:
    kind = type(model)
    if kind.__call__ is not nn.Module.__call__:
        raise CaptureError(
            f"{kind.__name__}.{method} cannot be captured, because {kind.__name__} has a __call__ "
            "of its own, which torch.export would run around it. Move its code to forward."
        )
    if torchs._has_any_global_hook():
        raise CaptureError(
            f"{kind.__name__}.{method} cannot be captured while hooks for all modules are "
            "registered, which a call of the method does not run. Remove them first."
        )
