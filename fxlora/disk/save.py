"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The safetensors header also carries the exact plan, so that a folder that fxlora wrote is
applied without matching again; a folder that PEFT wrote is matched from its configuration.

Where PEFT would compute another thing from the same tensors (`peft.why_not`) the folder
is fxlora's alone: each tensor under its own name, and a configuration of peft_type "FXLORA" with
the reason, on which PEFT stops.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..data import as_path
from ..errors import AdapterError, warn
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..plan import Plan
from ..tables import some
from .files import whole_file
from .keys import CONFIG, OURS, VERSION, WEIGHTS, WHY, FileLayout, layout_of
from .peft import configuration, why_not
from .values import not_finite, same

# ---- saving -------------------------------------------------------------------------------------


@no_ambient_modes()
def save_adapter(module: CapturedModule, folder: str | Path) -> None:
    """Write what training changed: A, B, what was trained in full, and buffers that moved.

    PEFT reads the folder where it has the same thing: layers and bare parameters that their own
    modules' forwards read; with DoRA; PiSSA and OLoRA as plain LoRA of twice the rank; the parts
    of a packed weight as one block-diagonal pair. Else its peft_type is "FXLORA", on which PEFT
    stops, and `why_not_peft` in the configuration says what PEFT cannot do.

    Raises:
        AdapterError: the module has no adapters, they hold NaN or infinities (`load_adapter`
            would refuse them: an earlier adapter stays in the folder), or the folder cannot be
            written.

    Warns:
        FxLoraWarning: PEFT cannot read the folder.
    """
    if not isinstance(module, CapturedModule) or module.plan is None:
        raise AdapterError("nothing to save: the module has no adapters (before fold, not after).")
    if stray := module.unplanned():
        raise AdapterError(
            f"{some(stray)} requires gradients but is not in the plan, so it would be lost. Put "
            "its module into modules_to_save and train again."
        )
    folder = as_path(folder, AdapterError)
    why = why_not(module, module.plan)
    layout = layout_of(module, module.plan, why is None)
    changed = _changed(module, layout)
    _check_worth_saving(module, layout, changed)
    tensors = {key: _plain(tensor) for key, tensor in changed.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror or error}.") from error
    # One key: safetensors writes several in any order, and a file should be reproducible.
    header = {"fxlora": json.dumps(_plan_data(module.plan, why is None))}
    config = {"peft_type": OURS, WHY: why} if why else configuration(module, module.plan)
    with (
        whole_file(folder / CONFIG, AdapterError) as config_file,
        whole_file(folder / WEIGHTS, AdapterError) as weights,
    ):
        try:
            save_file(tensors, weights, metadata=header)
        except SafetensorError as error:  # its word for a full disk
            raise AdapterError(f"cannot write {folder / WEIGHTS}: {error}.") from error
        config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    if why:
        warn(f"PEFT cannot read {folder}, which fxlora can: {why}.")


def _check_worth_saving(
    module: CapturedModule, layout: FileLayout, tensors: dict[str, torch.Tensor]
) -> None:
    if any(tensor.is_meta for tensor in tensors.values()):
        raise AdapterError("nothing to save: the module is on the meta device, without values.")
    before = {layout.key(name): tensor for name, tensor in module.known.originals.items()}
    diverged = [key for key, t in tensors.items() if not_finite(t, before.get(key))]
    if diverged:
        raise AdapterError(
            f"{some(diverged)}: NaN or infinity, as where training diverged. Nothing was written. "
            "Train again, with a lower learning rate."
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


@torch.no_grad()
def _changed(module: CapturedModule, layout: FileLayout) -> dict[str, torch.Tensor]:
    """What differs from the base, by its key in the file."""
    names = [name for entry in layout.plan for name in entry.tensors]
    tensors = layout.adapters({name: module.get_parameter(name) for name in names})
    for name in module.trained:
        tensors[layout.key(name)] = module.get_parameter(name)
    for name, buffer in module.named_buffers():
        if not same(buffer, module.known.originals.get(name)):
            tensors[layout.key(name)] = buffer
    return tensors


def _plan_data(plan: Plan, pefts: bool) -> dict[str, Any]:
    return {
        "version": VERSION,
        "peft": pefts,
        "entries": [entry.to_data() for entry in plan],
        "trained": list(plan.trained),
        "modules_to_save": list(plan.modules_to_save),
        "model_parameters": plan.model_parameters,
        "trained_parameters": plan.trained_parameters,
    }
