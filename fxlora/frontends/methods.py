"""Trace a method of a model as torch.export traces its forward."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..module.submodules import HOOKS

# Attributes of a module that a call of it reads, and a call of one of its methods does not.
_OF_A_CALL = ("forward", *HOOKS)


def with_forward(model: nn.Module, method: str) -> nn.Module:
    """Return a module over the same submodules and tensors that runs a method when it is called.

    Inside the method, the module has its own forward and hooks, so that the method may call it.
    """
    if method == "forward":
        return model
    result: nn.Module = nn.Module.__new__(type(model))
    attributes = result.__dict__
    attributes.update(model.__dict__)
    own = {name: attributes[name] for name in _OF_A_CALL if name in attributes}

    def exchange(others: dict[str, Any]) -> dict[str, Any]:
        held = {name: attributes.pop(name) for name in _OF_A_CALL if name in attributes}
        attributes.update(others)
        return held

    @functools.wraps(getattr(result, method))
    def forward(*args: Any, **kwargs: Any) -> Any:
        of_the_trace = exchange(own)
        try:
            return getattr(result, method)(*args, **kwargs)
        finally:
            exchange(of_the_trace)

    exchange({name: type(hooks)() for name, hooks in own.items() if name != "forward"})
    attributes["forward"] = forward
    return result
