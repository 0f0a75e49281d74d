"""The caller's autocast, and the constants in a graph that depend on it."""

from __future__ import annotations

from typing import Any

import torch

Context = tuple[tuple[str, torch.dtype], ...]  # the device types with autocast, and its dtypes

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "privateuseone")


def current_autocast() -> Context:
    """Return the caller's autocast, () if there is none. torch.compile traces this, as a guard."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(
        [(d, torch.get_autocast_dtype(d)) for d in DEVICES if torch.is_autocast_enabled(d)]
    )


def by_autocast(usual: Any, *others: tuple[str, torch.dtype, Any]) -> Any:
    """Return the value for the caller's autocast: a dtype, a number or a tensor.

    A node with this target replaces a constant for which the source has another under autocast.

    Args:
        usual: the value without autocast.
        others: device type and dtype of an autocast, and the value under it.
    """
    for device, dtype, value in others:
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype:
            return value
    return usual


def described(context: Context) -> str:
    """Return a context in words: "torch.autocast('cpu', torch.bfloat16)"."""
    return " and ".join(f"torch.autocast('{device}', {dtype})" for device, dtype in context)
