"""An adapter alone as safetensors, for runtimes that take tensors by name."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from .adapters import Tensors


def write_adapter(values: Tensors, path: Path) -> None:
    save_file({name: value.cpu().contiguous().clone() for name, value in values.items()}, path)
