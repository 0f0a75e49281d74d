"""The caller's autocast in a graph: what it is, and constants that depend on it."""

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


def by_autocast(device: str, usual: Any, *others: tuple[torch.dtype, Any]) -> Any:
    """Return the value for the caller's autocast: a dtype, a number or a tensor.

    A node with this target stands where the source reads a dtype that depends on autocast.

    Args:
        device: the device type of the autocast.
        usual: the value without autocast.
        others: for each dtype of autocast, the value under it.
    """
    if torch.is_autocast_enabled(device):
        given = torch.get_autocast_dtype(device)
        for dtype, value in others:
            if dtype == given:
                return value
    return usual


def described(context: Context) -> str:
    """Return a context in words: "torch.autocast('cpu', torch.bfloat16)"."""
    return " and ".join(f"torch.autocast('{device}', {dtype})" for device, dtype in context)
