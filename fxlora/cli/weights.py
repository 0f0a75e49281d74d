"""State dicts: load a checkpoint into a model, and write its folded weights."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..disk.files import whole_file
from ..errors import ConfigError, ExportError
from ..module import CapturedModule
from ..tables import a, some


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict, without running code from the file.

    Raises:
        ConfigError: the file cannot be read, is damaged, or is not a state dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refusal is one line, the error below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror or error}.") from error
    except Exception as error:  # on damaged bytes, both readers may raise anything
        # (torch's own message advises a setting that runs code in the file)
        raise ConfigError(
            f"checkpoint {path} is damaged or holds more than tensors; nothing in it was run. "
            "Save model.state_dict() again, preferably with safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = f" with the keys {some(map(str, state))}" if isinstance(state, dict) else ""
        raise ConfigError(
            f"checkpoint {path} is not a state dict but {a(type(state).__name__)}{keys}. "
            "Save only model.state_dict()."
        )
    return state


def load_checkpoint(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Load a state dict into a model; for a tied weight, one of its names is enough.

    Raises:
        ConfigError: names are missing or unknown, a shape does not fit, or the file has different
            values for the names of one weight.
    """
    refusal = f"checkpoint {path} does not fit {type(model).__name__}:"
    held = model.state_dict(keep_vars=True)
    # the number of names in the file of each weight
    given = Counter(id(held[name]) for name in state if name in held)
    try:
        outcome = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{refusal} {error}") from error
    missing = [n for n in outcome.missing_keys if n not in held or id(held[n]) not in given]
    problems = {"missing in the file": missing, "not in the model": outcome.unexpected_keys}
    said = [f"{what}: {some(names)}" for what, names in problems.items() if names]
    if said:
        raise ConfigError(f"{refusal} {'; '.join(said)}.")
    tied = {n: t for n, t in state.items() if n in held and given[id(held[n])] > 1}
    if lost := _mismatched(model, tied):
        raise ConfigError(
            f"{refusal} its values for {some(lost)} are overwritten by those for another name "
            "of the same weight."
        )


def write_weights(model: nn.Module, folded: CapturedModule, path: Path) -> None:
    """Write a state dict of the folded weights for the source model.

    Before the file is put in place, the model loads it, as a check.

    Raises:
        ExportError: the file cannot be written, or the model does not load these values.
    """
    with whole_file(path, ExportError) as temporary:
        try:
            save_file(
                _without_shared_storage(folded.state_dict()), temporary, metadata={"format": "pt"}
            )
        except SafetensorError as error:  # raised when the disk is full
            raise ExportError(f"cannot write {path}: {error}.") from error
        _check_loads(model, load_file(temporary))


def _check_loads(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Raise if the model cannot load a state dict, or holds other values after it."""
    advice = "Use fxlora export, which needs no model class."
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"{type(model).__name__} does not load the folded weights: {error} {advice}"
        ) from error
    if lost := _mismatched(model, state):
        raise ExportError(
            f"{type(model).__name__} shares memory between {some(lost)} and other weights, "
            "which fold to different values: a tie that the adapter splits. Adapt all names of it "
            f'alike (tied="share" in its rule), or untie it in the model. {advice}'
        )


def _mismatched(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Return the names for which a model, after loading a state dict, holds other values."""
    held = model.state_dict()
    return [n for n, t in state.items() if n in held and not _equal(t.to(held[n].dtype), held[n])]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _without_shared_storage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tied tensors: safetensors refuses ties, and `load_state_dict` needs all their names."""
    taken: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in taken else tensor.contiguous()
        taken.add(memory)
    return result
