"""Parameters that share storage with another module's get their own when they first train."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .memory import memory_id
from .quantised import stored
from .shared_parameter import share, unshared

if TYPE_CHECKING:
    from .captured import CapturedModule


def copy_memory(parameters: Iterable[nn.Parameter], memory: Collection[int]) -> None:
    """Copy storage in place: the parameters stay the same, and those in one storage stay in one."""
    held = {id(p): p for p in parameters if memory_id(p) in memory}
    memo: dict[int, object] = {}
    for parameter in held.values():
        for part in stored(parameter):
            part.data = copy.deepcopy(part.data, memo)
        unshared(parameter)


def unshare(module: CapturedModule, names: Collection[str]) -> None:
    """Copy the storage of the named parameters; those that share storage share the copy."""
    held = list(module.named_parameters(remove_duplicate=False))
    own = module.known.written  # no module shares these
    memory = {memory_id(p) for name, p in held if name in names and name not in own}
    copy_memory((p for _, p in held), memory)


def copy_when_trained(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Copy the storage of shared parameters of a module when their first gradient arrives.

    This is early enough, because optimizers change only parameters that have a gradient. The
    Parameter objects stay the same, so an optimizer may be set up before. A parameter whose storage
    was copied in between is not copied again.
    """
    copy_first = functools.partial(_copy_with_others, weakref.ref(module))
    for parameter in parameters:
        share(parameter, copy_first)
        if _can_train(parameter) and not _is_watched(parameter, module):
            _CopyOnGradient(module, parameter)


def _copy_with_others(module: weakref.ref[Any], parameter: nn.Parameter) -> None:
    """Copy a parameter's storage, with all parameters of its module in this storage."""
    held = one.parameters() if (one := module()) is not None else ()
    copy_memory((parameter, *held), {memory_id(parameter)})


def is_shared(parameter: nn.Parameter) -> bool:
    """Whether a parameter is copied when it trains."""
    return any(hook.memory == memory_id(parameter) for hook in _hooks(parameter))


class _CopyOnGradient:
    """A hook of one parameter. It keeps neither the parameter nor its module alive."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter) -> None:
        self.module = weakref.ref(module)
        self.memory = memory_id(parameter)
        before = parameter.requires_grad
        # torch accepts the hook only while the parameter requires gradients, but keeps it then.
        parameter.requires_grad_(True)
        self.handle = parameter.register_post_accumulate_grad_hook(self)
        parameter.requires_grad_(before)

    def __call__(self, parameter: torch.Tensor) -> None:
        self.handle.remove()
        if memory_id(parameter) == self.memory:
            assert isinstance(parameter, nn.Parameter)
            _copy_with_others(self.module, parameter)


def _can_train(parameter: nn.Parameter) -> bool:
    trains = parameter.is_floating_point() or parameter.is_complex()
    return trains and parameter.is_leaf and not parameter.is_inference()


def _is_watched(parameter: nn.Parameter, module: nn.Module) -> bool:
    memory = memory_id(parameter)
    return any(h.memory == memory and h.module() is module for h in _hooks(parameter))


def _hooks(parameter: nn.Parameter) -> list[_CopyOnGradient]:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return [hook for hook in hooks.values() if isinstance(hook, _CopyOnGradient)]
