"""Read a file of tensors: safetensors, or one of torch.save that holds nothing but tensors."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...errors import AdapterError
from ...names import shown
from ...tables import some
from ..keys import CONFIG, WEIGHTS

SAVED = (".pt", ".pth", ".bin", ".ckpt")  # by torch.save


@dataclass(frozen=True)
class TensorFile:
    """The content of a file: its tensors by key, and its metadata, which are texts."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def foreign_file(path: Path) -> Path | None:
    """Return the file of another library that a path leads to; None for an adapter folder.

    A folder without adapter_config.json counts if it holds one safetensors file.
    """
    try:
        if path.is_file():
            ours = path.name == WEIGHTS and (path.parent / CONFIG).is_file()
            return None if ours else path
        if path.is_dir() and not any((path / name).exists() for name in (CONFIG, WEIGHTS)):
            files = sorted(path.glob("*.safetensors"))
            return files[0] if len(files) == 1 else None
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error.strerror or error}.") from error
    return None


def read_tensors(path: Path) -> TensorFile:
    """Read a file of tensors. Nothing in it runs code.

    Raises:
        AdapterError: it cannot be read, is damaged, or holds other things than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
                return TensorFile(path, tensors, dict(file.metadata() or {}))
        except Exception as error:
            raise AdapterError(f"{path} is damaged or not an adapter: {error}.") from error
    if path.suffix not in SAVED:
        raise AdapterError(
            f"{path} is no adapter: its name should end in .safetensors or {', '.join(SAVED)}."
        )
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{path} holds more than tensors, which could run code when it is read. Save its "
            "tensors with safetensors where you trust it."
        ) from error
    except Exception as error:
        raise AdapterError(f"{path} is damaged or not an adapter: {error}.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path} holds {shown(type(found).__name__)}, not tensors by name.")
    other = [str(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if other or not all(isinstance(key, str) for key in found):
        raise AdapterError(
            f"{path} must hold tensors by name, and {some(other or map(str, found))} is none. Save "
            "the dict that holds the adapter's tensors."
        )
    return TensorFile(path, {k: v.detach() for k, v in found.items()}, {})
