"""torch.export's own files: `torch.export.load(path)` needs nothing but torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ExportError
from .compared import Run
from .delivery import Delivery, Format
from .metadata import plain


def write(delivery: Delivery, path: Path) -> None:
    program = delivery.made.program
    examples = program.example_inputs
    if pytree.tree_structure(plain(examples)) != pytree.tree_structure(examples):
        program.example_inputs = None  # torch.export would pickle them, and unpickle them to load
    # Saved to memory first, because torch's own writer aborts the process if the disk is full.
    content = io.BytesIO()
    try:
        torch.export.save(program, content)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot write the graph: {error} If it names a container of the inputs "
            "or outputs, plain=True has dicts and tuples in its place."
        ) from error
    path.write_bytes(content.getbuffer())


def load(delivery: Delivery, path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return run


FORMAT = Format(".pt2", write, load, flat=False, stateful=True, checks=True)
