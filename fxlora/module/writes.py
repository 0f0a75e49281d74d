"""Which functions of torch write to their arguments, as far as their names and versions tell."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from .memory import memory_id

_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - typed nowhere


def is_writer(name: str) -> bool:
    """Whether a function or method of torch writes to its first argument, or hooks it."""
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITERS


# Methods that write to a tensor or hook it, and whose names do not end with one underscore.
_WRITERS = frozenset(
    (
        *("__setitem__", "__set__", "__delete__", "__iadd__", "__isub__", "__imul__", "__idiv__"),
        *("__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__"),
        *("__ixor__", "__ilshift__", "__irshift__"),
        *("register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    )
)


def written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the tensors among its arguments that a function writes to, by its name."""
    targets = [kwargs.get("out")]
    if is_writer(name) or kwargs.get("inplace"):
        targets += [*args, *kwargs.values()][:1]
    return [leaf for target in targets for leaf in leaves(target)]


def leaves(value: Any) -> Collection[Any]:
    """Return the items of a list or tuple, or the value itself as the only one."""
    return value if isinstance(value, list | tuple) else (value,)


def version(tensor: torch.Tensor) -> int:
    """Return the number of writes to a tensor, 0 where torch does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def storage_of(tensor: torch.Tensor) -> int | None:
    """Return an id of a tensor's storage, or None for one inside a transform of torch.func."""
    return None if _functorch.is_functorch_wrapped_tensor(tensor) else memory_id(tensor)
