"""The adapter's names in a checkpoint, for tensors that it replaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...errors import AdapterError
from ...names import shown
from ..folder import Folder
from ..peft import ROOT
from .base import Checkpoint
from .model import Skeleton
from .prefix import Prefix, find_prefix

WITH_MODEL = (
    "Pass the model that the checkpoint is of (--model module:callable, model=…), or fold with "
    "the model itself: fxlora fold MODEL --adapter …"
)


def plain_name(key: str) -> str:
    """Return the name of a tensor of the base model, from its key in PEFT's layout."""
    if not key.startswith(ROOT):
        raise AdapterError(f"an adapter's keys begin with '{ROOT}': {shown(key)} does not.")
    return ".".join(part for part in key.removeprefix(ROOT).split(".") if part != "base_layer")


def misfit_of(tensors: Mapping[str, torch.Tensor], prefix: Prefix, base: Checkpoint) -> str | None:
    """Say which tensor of the base model the checkpoint does not have, in this shape."""
    found = {prefix(name): tensor for name, tensor in tensors.items()}
    for name, tensor in found.items():
        held = base.tensors.get(name)
        if held is None and _twin(name, found, base):
            continue
        if held is None:
            return f"the checkpoint has no '{name}'"
        if held.shape != tuple(tensor.shape):
            return f"'{held.name}' is {held.shape}, and {tuple(tensor.shape)} in the adapter"
    return None


def _twin(name: str, found: Mapping[str, torch.Tensor], base: Checkpoint) -> str | None:
    """Return the name of an equal tensor that the checkpoint has, of one that it has not.

    Equal numbers are a tie, unless they are one number: zeros and ones have no name.
    """
    mine = found[name]
    if not mine.numel() or torch.equal(mine, mine.flatten()[0].expand_as(mine)):
        return None
    others = ((n, t) for n, t in found.items() if n in base.tensors and t.dtype == mine.dtype)
    return next((n for n, t in others if torch.equal(t, mine)), None)


def held_in(
    found: Mapping[str, torch.Tensor], base: Checkpoint
) -> tuple[dict[str, torch.Tensor], dict[str, set[str]]]:
    """Return the tensors that the checkpoint has, and the names of those equal to one of them."""
    together: dict[str, set[str]] = {}
    for name in found.keys() - base.tensors.keys():
        twin = _twin(name, found, base)
        if twin is None:
            raise AdapterError(
                f"the checkpoint has no '{name}', and the tensor of the adapter that equals it is "
                f"trained where this one is not, or the other way round. {WITH_MODEL}."
            )
        together.setdefault(twin, set()).add(name)
    return {n: t for n, t in found.items() if n in base.tensors}, together


def misfit_of_model(model: Skeleton | None, base: Checkpoint, prefix: Prefix) -> str | None:
    if model is None or model.fits(base, prefix):
        return None
    return f"{type(model.module).__name__}, the given model, is not the checkpoint's"


def prefix_of(names: Iterable[str], misfit: Any, base: Checkpoint, content: Folder) -> Prefix:
    described = str(content.path), f"the checkpoint {base.path}"
    return find_prefix(list(names), base.tensors, misfit, *described, content.names)
