"""Checks of an adapter file's values: they must be finite, and fit the module's dtypes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ..errors import AdapterError, warn
from ..lora.dtypes import name_of, rounds
from ..module import CapturedModule
from ..module.sharded import whole
from ..tables import count, some
from .reading import Reading


def not_finite(tensor: torch.Tensor, before: torch.Tensor | None = None) -> bool:
    """Whether there are NaN or infinities, other than where `before` has them (as a mask may)."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    bad = ~_wide(tensor).isfinite()
    if before is not None and before.shape == tensor.shape and not before.is_meta:
        bad &= _wide(before).isfinite().to(bad.device)
    return bool(bad.any())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in a dtype that isfinite and equal support: they do not support float8."""
    return tensor if tensor.is_complex() or tensor.itemsize > 1 else tensor.float()


def same(tensor: torch.Tensor, original: torch.Tensor | None) -> bool:
    """Whether a tensor equals its original; on the meta device, whether there is an original."""
    if tensor.is_meta or original is None:
        return original is not None
    return tensor.shape == original.shape and torch.equal(_wide(tensor), _wide(original))


def fitted(
    module: CapturedModule, reading: Reading, path: Path, allow_nonfinite: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a file's values in the dtypes of the plan: those of adapters, and the others.

    Warns:
        FxLoraWarning: values of the file are rounded to these dtypes.

    Raises:
        AdapterError: a value is NaN or infinite (unless `allow_nonfinite`), or has a dtype that the
            module's cannot hold.
    """
    held = partial(_held, path, allow_nonfinite)
    plan = reading.plan
    dtypes = {
        name: entry.dtype_over(module.get_parameter(entry.parameter).dtype)
        for entry in plan
        for name in entry.tensors
    }
    starts = {n: held(n, t, dtypes[n], None) for n, t in reading.starts.items()}
    now = {name: whole(tensor_of(module, name)) for name in reading.stored}
    for name in reading.stored:
        trained = plan.trained_dtype(name, now[name].dtype) if name in plan.trained else None
        dtypes[name] = trained or now[name].dtype
    stored = {n: held(n, t, dtypes[n], now[n]) for n, t in reading.stored.items()}
    _warn_of_rounding(path, reading.starts | reading.stored, dtypes)
    return starts, stored


def _warn_of_rounding(
    path: Path, values: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> None:
    """Warn if a value of the file is not the same number in its dtype here."""
    found = {n: v.dtype for n, v in values.items() if n in dtypes and rounds(v, dtypes[n])}
    if not found:
        return
    pairs = {f"{name_of(dtype)} to {name_of(dtypes[name])}" for name, dtype in found.items()}
    wider = max(found.values(), key=lambda dtype: torch.finfo(dtype).bits)
    warn(
        f"{path}: {count(len(found), 'tensor')} rounded from {', '.join(sorted(pairs))}: "
        f"{some(found)}. To keep the values of adapters and of what trains in full, load with "
        f"adapter_dtype={wider}."
    )


def tensor_of(module: CapturedModule, name: str) -> torch.Tensor:
    """Return a parameter or buffer by name."""
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _held(
    path: Path,
    allow_nonfinite: bool,
    name: str,
    value: torch.Tensor,
    dtype: torch.dtype,
    now: torch.Tensor | None,
) -> torch.Tensor:
    """Return a value of the file in the module's dtype, or raise if it does not fit.

    Args:
        path: of the folder, for the message.
        allow_nonfinite: whether it may be NaN or infinite.
        name: the tensor's name in the module.
        value: the value in the file.
        dtype: the module's dtype.
        now: the module's present value, if it has one.
    """
    if not torch.can_cast(value.dtype, dtype) or (
        dtype.is_floating_point and not value.is_floating_point()
    ):
        raise AdapterError(
            f"{path}: '{name}' is {value.dtype}, which is no {dtype}, the module's dtype."
        )
    value = value.to(dtype)
    if not allow_nonfinite and not_finite(value, now):
        raise AdapterError(
            f"{path}: '{name}' has NaN or infinities as {dtype}, as after a training that "
            "diverged. Use an earlier checkpoint of the adapter, or allow_nonfinite=True "
            "(--allow-nonfinite) to go on nevertheless."
        )
    return value
