"""no_ambient_modes: what fxlora computes does not depend on the modes that the caller is in.

Under torch.autocast a float32 weight would be folded in bfloat16, under a default device the
start of an adapter would be somewhere else, under no_grad nothing made would train.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch
from torch.utils._device import DeviceContext


class _Setting(NamedTuple):
    """A global of torch: how it is read and set, and its value while a verb runs."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    neutral: Any


@contextmanager
def no_ambient_modes(*, defaults: bool = True) -> Generator[None]:
    """Every mode of torch that changes results is off, and comes back as it was.

    Those are autocast, the modes of autograd (no_grad, inference_mode, anomaly detection), modes
    that intercept functions, deterministic algorithms, and products in reduced precision.

    Args:
        defaults: also the default dtype (float32) and device (the CPU). Not for what runs a
            captured graph: one with `torch.zeros(3)` asks for those of the process.
    """
    with ExitStack() as stack:
        # First of all: a mode may intercept what turns the others off.
        stack.enter_context(_no_function_modes(devices=defaults))
        stack.enter_context(dispatch._disable_current_modes())
        for device in _autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_neutral([*_PRECISION, *([_DTYPE] if defaults else [])]))
        yield


def _autocast_devices() -> list[str]:
    """The kinds of device that autocast is on for."""
    return [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]


@contextmanager
def _no_function_modes(*, devices: bool) -> Generator[None]:
    """No TorchFunctionMode is active; a default device is one, too."""
    before: list[Any] = overrides._get_current_function_mode_stack()
    kept = [mode for mode in before if isinstance(mode, DeviceContext) and not devices]
    _replace_function_modes(kept)
    try:
        yield
    finally:
        _replace_function_modes(before)


def _replace_function_modes(modes: list[Any]) -> None:
    for _ in range(overrides._len_torch_function_stack()):
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)


@contextmanager
def _neutral(settings: list[_Setting]) -> Generator[None]:
    """Settings at their neutral values."""
    before = [(setting, value) for setting in settings if (value := _read(setting)) is not None]
    changed = [(setting, value) for setting, value in before if value != setting.neutral]
    try:
        for setting, _ in changed:
            setting.set(setting.neutral)
        yield
    finally:
        for setting, value in changed:
            setting.set(value)


def _read(setting: _Setting) -> Any:
    """A setting's value, or None where torch does not say.

    torch raises for the old names of a precision once a new one (`fp32_precision`) was set; then
    the new ones, which are among the settings, decide.
    """
    try:
        return setting.get()
    except RuntimeError:
        return None


# ---- the settings -------------------------------------------------------------------------------


def _attribute(owner: Any, name: str, neutral: Any) -> _Setting:
    def put(value: Any) -> None:
        setattr(owner, name, value)

    return _Setting(lambda: getattr(owner, name), put, neutral)


def _reduction(dtype: str) -> _Setting:
    """Whether cuBLAS may add up in half precision, and whether it may split sums."""
    owner: Any = torch.backends.cuda.matmul
    name = f"allow_{dtype}_reduced_precision_reduction"

    def get() -> tuple[bool, bool]:
        return getattr(owner, name), getattr(owner, f"{name}_split_k", True)

    def put(value: tuple[bool, bool]) -> None:
        setattr(owner, name, value[0] if value[1] else value)

    return _Setting(get, put, (False, True))


_AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "privateuseone")
_DTYPE = _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32)
# In this order: an old name sets several new ones, which are then set back one by one.
_PRECISION = [
    _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    _attribute(torch.backends.cudnn, "allow_tf32", False),
    *(
        _attribute(op, "fp32_precision", "ieee")
        for backend in (torch.backends.cudnn, torch.backends.mkldnn)
        for op in (backend.conv, backend.rnn)  # pyright: ignore
    ),
    _attribute(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    _attribute(torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),  # pyright: ignore
    _reduction("fp16"),
    _reduction("bf16"),
    _attribute(torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
]
