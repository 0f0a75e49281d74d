"""The values in an adapter file: finite, and in a dtype that the module can hold."""

from __future__ import annotations

import torch

from ..errors import AdapterError
from ..module import CapturedModule
from .folder import Folder
from .keys import FileLayout


def not_finite(tensor: torch.Tensor, before: torch.Tensor | None) -> bool:
    """Whether there are NaN or infinities, but where there were some before (as in a mask)."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    bad = ~_wide(tensor).isfinite()
    if before is not None and before.shape == tensor.shape and not before.is_meta:
        bad &= _wide(before).isfinite().to(bad.device)
    return bool(bad.any())


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In a dtype that has an isfinite: float8 has none."""
    return tensor if tensor.is_complex() or tensor.itemsize > 1 else tensor.float()


def same(tensor: torch.Tensor, original: torch.Tensor | None) -> bool:
    if tensor.is_meta or original is None:
        return original is not None
    return tensor.shape == original.shape and torch.equal(tensor, original)


def values_of(
    module: CapturedModule, layout: FileLayout, content: Folder
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The values of the adapters' tensors, and of the module's own that the file has, by name.

    Raises:
        AdapterError: a value is NaN or infinite, or of a kind that the module's dtype cannot hold.
    """
    decoded = layout.values(content.tensors)
    weights = {
        name: module.get_parameter(entry.parameter)
        for entry in layout.plan
        for name in entry.tensors
    }
    starts = {n: _held(content, n, t, weights[n].dtype, None) for n, t in decoded.items()}
    own = [name for name, _ in module.named_buffers()] + list(layout.plan.trained)
    stored = {name: layout.key(name) for name in own if layout.key(name) in content.tensors}
    kept = {
        name: _held(content, name, content.tensors[key], now.dtype, now)
        for name, key in stored.items()
        for now in (tensor_of(module, name),)
    }
    return starts, kept


def tensor_of(module: CapturedModule, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _held(
    content: Folder, name: str, value: torch.Tensor, dtype: torch.dtype, now: torch.Tensor | None
) -> torch.Tensor:
    """A file's value in the dtype that the module holds it in."""
    if not torch.can_cast(value.dtype, dtype) or (
        dtype.is_floating_point and not value.is_floating_point()
    ):
        raise AdapterError(
            f"{content.path}: '{name}' is {value.dtype}, which is no {dtype}, as the module has it."
        )
    value = value.to(dtype)
    if not_finite(value, now):
        raise AdapterError(
            f"{content.path}: '{name}' has NaN or infinities as {dtype}, as where training "
            "diverged. Take an earlier checkpoint of the adapter."
        )
    return value
