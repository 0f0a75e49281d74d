"""no_ambient_modes: make fxlora's results independent of the torch modes that the caller is in.

Otherwise torch.autocast would fold a float32 weight in bfloat16, a default device would place new
tensors on a device other than the model's, and parameters made in inference mode could not be
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch
from torch.utils._device import DeviceContext

from ..fx.autocast import current_autocast


class _Setting(NamedTuple):
    """A global setting of torch: its getter, its setter, and its value while fxlora runs."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    neutral: Any


@contextmanager
def no_ambient_modes(*, defaults: bool = True) -> Generator[None]:
    """Turn off every torch mode that changes results, and restore all of them on exit.

    These are autocast, autograd's modes (no_grad, inference_mode, anomaly detection), function and
    dispatch modes, deterministic algorithms, and reduced precision in matrix products,
    convolutions and RNNs.

    Args:
        defaults: whether to reset the default dtype (to float32) and the default device (to the
            CPU) too. Pass False around a run of a captured graph: `torch.zeros(3)` in a graph
            needs the defaults of the process.
    """
    with ExitStack() as stack:
        # First: an active function mode could intercept the calls that turn the others off.
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
    """Return the device types for which autocast is enabled."""
    return [device for device, _ in current_autocast()]


@contextmanager
def _no_function_modes(*, devices: bool) -> Generator[None]:
    """Turn off function modes; a default device is one, and is turned off only if `devices`."""
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
    """Set the settings to their neutral values, and restore them on exit."""
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
    """Return a setting's value, or None where torch raises.

    torch raises for the legacy name of a precision setting once its replacement (`fp32_precision`)
    was set. The replacements, which are in `_PRECISION` too, then take effect.
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
    """Return the setting of whether cuBLAS may reduce in half precision, and split reductions."""
    owner: Any = torch.backends.cuda.matmul
    name = f"allow_{dtype}_reduced_precision_reduction"

    def get() -> tuple[bool, bool]:
        return getattr(owner, name), getattr(owner, f"{name}_split_k", True)

    def put(value: tuple[bool, bool]) -> None:
        setattr(owner, name, value[0] if value[1] else value)

    return _Setting(get, put, (False, True))


_DTYPE = _Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32)
# The order matters: a legacy name sets several newer settings, which are then restored one by one.
_PRECISION = [
    _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    _attribute(torch.backends.cudnn, "allow_tf32", False),
    *(
        _attribute(op, "fp32_precision", "ieee")
        for backend in (torch.backends.cudnn, torch.backends.mkldnn)
        for op in (backend.conv, backend.rnn)
    ),
    _attribute(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    _attribute(torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),  # pyright: ignore[reportAttributeAccessIssue]
    _reduction("fp16"),
    _reduction("bf16"),
    _attribute(torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
]
