"""Enter the modes of a caller in which a graph must compute the same as its source.

They are autocast, for each device and dtype that a caller may use, and autograd's modes.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.amp.autocast_mode import is_autocast_available

from ..fx.autocast import Context, current_autocast
from ..module.autocasts import GradientMode
from .kept.asked_modes import answered

_HALF = (torch.bfloat16, torch.float16)  # any other dtype of autocast is refused at the call
_caller: list[Context] = []  # a stack: the capture in progress is last


@contextmanager
def callers_autocast() -> Generator[None]:
    """Within the context, remember the caller's autocast, which a capture suspends."""
    _caller.append(current_autocast())
    try:
        yield
    finally:
        _caller.pop()


def wanted() -> Context:
    """Return the autocast that the caller of the capture is in, or ()."""
    return _caller[-1] if _caller else ()


def contexts(devices: Iterable[str]) -> list[Context]:
    """Return the autocasts to prove for some types of device."""
    usable = [device for device in devices if is_autocast_available(device)]
    return [((device, dtype),) for device in usable for dtype in _HALF]


def accelerator() -> torch.device | None:
    """Return the device that weights may be moved to from the CPU, if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else torch.device(found.type, 0)


@contextmanager
def under(context: Context) -> Generator[None]:
    """Enable the autocast of a context, even where this machine lacks the device."""
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d, _ in context]
    cached = torch.is_autocast_cache_enabled()
    torch.autocast_increment_nesting()
    try:
        torch.set_autocast_cache_enabled(False)
        for device, dtype in context:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
        yield
    finally:
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


# Autograd's modes besides that of a capture. In the last, torch.is_grad_enabled() is true, and yet
# no tensor has a gradient: no run can be made that is like it.
NO_GRADIENTS = GradientMode(enabled=False, inference=False)
INFERENCE = GradientMode(enabled=False, inference=True)
UNTRIED = GradientMode(enabled=True, inference=True)


@contextmanager
def in_gradient_mode(mode: GradientMode) -> Generator[None]:
    """Within the context, gradients are enabled or not, and queries of the mode are answered so.

    Inference mode itself is not entered: it would make tensors that no other run can use.
    """
    told = answered({"is_inference_mode_enabled": lambda _: mode.inference})
    with torch.set_grad_enabled(mode.enabled), told:
        yield


@contextmanager
def inside_autocast(model: nn.Module, context: Context) -> Generator[None]:
    """Within the context, a model's forward runs under an autocast, as a region of its graph."""
    forward = model.forward
    own = model.__dict__.get("forward")

    @functools.wraps(forward)
    def region(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for device, dtype in context:
                stack.enter_context(torch.autocast(device, dtype))
            return forward(*args, **kwargs)

    model.__dict__["forward"] = region
    try:
        with under(context):
            yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
