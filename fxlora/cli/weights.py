"""State dicts: reading a checkpoint into a model, writing folded weights for it."""

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
from ..tables import some


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a refusal is one line
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"checkpoint {path}: {error.strerror or error}.") from error
    except Exception as error:  # both readers raise whatever the bytes lead them to
        # torch's own words advise to run what is in the file
        raise ConfigError(
            f"checkpoint {path} is damaged or holds more than tensors; nothing in it was run. "
            "Save model.state_dict() again, best with safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        keys = f" with the keys {some(map(str, state))}" if isinstance(state, dict) else ""
        raise ConfigError(
            f"checkpoint {path} is no state dict but a {type(state).__name__}{keys}. "
            "Save model.state_dict() alone."
        )
    return state


def load_checkpoint(model: nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """load_state_dict, where one name of a tied weight stands for all of them."""
    refusal = f"checkpoint {path} does not fit {type(model).__name__}:"
    held = model.state_dict(keep_vars=True)
    # how many names of each weight the file has
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
    if lost := _lost(model, tied):
        raise ConfigError(
            f"{refusal} its values for {some(lost)} are overwritten by those for another name "
            "of the same weight."
        )


def write_weights(model: nn.Module, folded: CapturedModule, path: Path) -> None:
    """Write a state dict that the source model takes back: tried before the file is there."""
    with whole_file(path, ExportError) as temporary:
        try:
            save_file(_unshared(folded.state_dict()), temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its word for a full disk
            raise ExportError(f"cannot write {path}: {error}.") from error
        _check_loads(model, load_file(temporary))


def _check_loads(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    advice = "Use fxlora export, which needs no model class."
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"{type(model).__name__} does not load the folded weights: {error} {advice}"
        ) from error
    if lost := _lost(model, state):
        raise ExportError(
            f"{type(model).__name__} shares memory between {some(lost)} and other weights, "
            "which fold to different values: a tie that the adapter splits. Adapt every name of it "
            f'alike (tied="share" in its rule), or untie it in the model. {advice}'
        )


def _lost(model: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Names under which a model that loaded a state dict holds something else all the same."""
    held = model.state_dict()
    return [n for n, t in state.items() if n in held and not _equal(t.to(held[n].dtype), held[n])]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in memory of its own: safetensors refuses ties, `load_state_dict` wants all."""
    taken: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in taken else tensor.contiguous()
        taken.add(memory)
    return result
