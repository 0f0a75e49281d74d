"""save_adapter: save adapters in PEFT's layout (adapter_config.json, adapter_model.safetensors).

The header of the safetensors file also contains the exact plan, so a folder from fxlora is applied
without matching again. A folder from PEFT has no plan: its configuration is matched.

If PEFT would compute a different result from the same tensors (see `limits.why_not`), the folder is
in fxlora's own layout. Then each tensor is under its own name, and the configuration has the reason
and the peft_type "FXLORA", with which PEFT raises an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..data import as_path
from ..errors import AdapterError, warn
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.fingerprints import differing_copies
from ..module.fsdp import mesh_of
from ..module.sharded import is_first, is_sharded, once, whole
from ..passes import chosen
from ..plan import Plan
from ..tables import some
from .files import whole_file
from .keys import CONFIG, OURS, VERSION, WEIGHTS, WHY, FileLayout, layout_of
from .limits import unadapted, why_not
from .peft_config import configuration
from .saved import Saved
from .trained_over import base_data
from .values import not_finite, same, tensor_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# ---- saving -------------------------------------------------------------------------------------


@no_ambient_modes()
def save_adapter(module: CapturedModule, folder: str | Path, *, adapter: str | None = None) -> None:
    """Save the tensors that training changed: adapters, parameters trained in full, and buffers.

    PEFT can read the folder if it can represent the adapters: those of layers and bare parameters
    that their own modules' forwards read, with plain LoRA or (for layers) DoRA. PiSSA and OLoRA
    become plain LoRA of twice the rank, and the parts of a packed weight one block-diagonal pair.
    Otherwise the peft_type is "FXLORA", with which PEFT raises an error, and the configuration
    gives the reason as `why_not_peft`.

    Where parameters are sharded over processes (FSDP2, tensor parallelism), every process calls
    this: their shards are gathered, and the first process writes the folder. Where they are not
    (DDP), one process calls it.

    Args:
        module: an adapted module.
        folder: the folder to write to; it is made if missing.
        adapter: the name of the adapter, if the module has several; by default the active one.

    Raises:
        InjectError: the module has no adapter of this name.
        AdapterError: the module has no adapters, or several are active and none is named; a
            parameter outside of the plan requires gradients; the module is on the meta device; a
            value is NaN or infinite, which `load_adapter` would refuse (an earlier adapter stays
            in the folder); or the folder cannot be written.

    Warns:
        FxLoraWarning: PEFT cannot read the folder; says why.

    Example:
        >>> import tempfile, torch, fxlora
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(3, 6)
        >>> gm = fxlora.capture(model, x)
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.inject(gm, fxlora.match(gm, config)).eval()
        >>> folder = tempfile.mkdtemp()
        >>> fxlora.save_adapter(lora, folder)
        >>> torch.equal(fxlora.load_adapter(gm, folder).eval()(x), lora(x))
        True
    """
    check_captured(module, "save_adapter")
    module = chosen(module, adapter)
    if len(active := module.known.active) > 1:
        raise AdapterError(
            f"a folder holds one adapter, and {some(active)} are active: name one, "
            f"save_adapter(module, folder, adapter='{active[0]}'), or make one of them all with "
            "fxlora.combine."
        )
    if module.plan is None and module.known.adapters:
        name = next(iter(module.known.adapters))
        raise AdapterError(
            "a folder holds one adapter, and none is active: name one, "
            f"save_adapter(module, folder, adapter={name!r})."
        )
    if module.plan is None:
        raise AdapterError("nothing to save: the module has no adapters (before fold, not after).")
    if stray := module.unplanned():
        raise AdapterError(
            f"{some(stray)} requires gradients but is not in the plan, so it would be lost. Put "
            "its module into modules_to_save and train again."
        )
    folder = as_path(folder, AdapterError)
    mesh = mesh_of(module)
    base = unadapted(module)
    saved = Saved.of(base, module.plan)
    why = why_not(base, module.plan, saved)
    layout = layout_of(module, module.plan, why is None)
    changed = _changed(module, layout)
    beside = {} if why else _beside(module, layout, saved)
    config = {"peft_type": OURS, WHY: why} if why else configuration(base, module.plan, saved)
    with once(mesh, AdapterError) as first:
        _check_copies(module, mesh)
        if first:
            _check_worth_saving(module, layout, changed)
            header = {**_plan_data(module.plan, why is None), "base": base_data(module)}
            _write(folder, {**beside, **changed}, header, config)
    if why and is_first(mesh):
        warn(f"PEFT cannot read {folder}, which fxlora can: {why}.")


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], plan: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write the two files of an adapter folder."""
    tensors = {key: _plain(tensor) for key, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror or error}.") from error
    # A single key: safetensors writes several in random order, and files should be reproducible.
    header = {"fxlora": json.dumps(plan)}
    with (
        whole_file(folder / CONFIG, AdapterError) as config_file,
        whole_file(folder / WEIGHTS, AdapterError) as weights,
    ):
        try:
            save_file(tensors, weights, metadata=header)
        except SafetensorError as error:  # raised for a full disk
            raise AdapterError(f"cannot write {folder / WEIGHTS}: {error}.") from error
        config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _check_copies(module: CapturedModule, mesh: DeviceMesh | None) -> None:
    """Raise unless copied tensors have the same values on all processes."""
    names = sorted({*module.adapter_parameters(), *module.trained})
    held = {name: module.get_parameter(name) for name in names}
    if mesh is not None and (differing := differing_copies(mesh, held)):
        raise AdapterError(
            f"{some(differing)} is another in each process, which should have copies of it, as "
            "after training on other data in each process of a tensor-parallel group. Nothing was "
            "written."
        )


def _check_worth_saving(
    module: CapturedModule, layout: FileLayout, tensors: dict[str, torch.Tensor]
) -> None:
    """Raise if the tensors have no values, or values that training left NaN or infinite."""
    if any(tensor.is_meta for tensor in tensors.values()):
        raise AdapterError("nothing to save: the module is on the meta device, without values.")
    before = {
        layout.key(name): t for name, t in module.known.originals.items() if not is_sharded(t)
    }
    diverged = [key for key, t in tensors.items() if not_finite(t, before.get(key))]
    if diverged:
        raise AdapterError(
            f"{some(diverged)}: NaN or infinity, as after a training that diverged. Nothing was "
            "written. Train again with a lower learning rate."
        )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to a contiguous one on the CPU, with memory of its own."""
    return tensor.detach().cpu().contiguous().clone()


@torch.no_grad()
def _changed(module: CapturedModule, layout: FileLayout) -> dict[str, torch.Tensor]:
    """Return the tensors that differ from the base, whole, by their keys in the file."""
    names = [name for entry in layout.plan for name in entry.tensors]
    tensors = layout.adapters({name: whole(module.get_parameter(name)) for name in names})
    for name in sorted(module.trained):  # in one order, as gathering is collective
        tensors[layout.key(name)] = whole(module.get_parameter(name))
    for name, buffer in module.named_buffers():
        before = module.known.originals.get(name)
        if not same(buffer := whole(buffer), None if before is None else whole(before)):
            tensors[layout.key(name)] = buffer
    return tensors


def _beside(module: CapturedModule, layout: FileLayout, saved: Saved) -> dict[str, torch.Tensor]:
    """Return the tensors that only PEFT needs: all those of the modules that it wraps.

    It also needs a parameter trained in full under every name.
    """
    return {layout.key(name): whole(tensor_of(module, name)) for name in saved.tensors}


def _plan_data(plan: Plan, pefts: bool) -> dict[str, Any]:
    """Return a plan as data for the header; `pefts` says whether the file is in PEFT's layout."""
    return {
        "version": VERSION,
        "peft": pefts,
        "entries": [entry.to_data() for entry in plan],
        "trained": list(plan.trained),
        "modules_to_save": list(plan.modules_to_save),
        "model_parameters": plan.model_parameters,
        "trained_parameters": plan.trained_parameters,
        "trained_dtypes": dict(plan.trained_dtypes),
        "untied": {name: list(others) for name, others in plan.untied.items()},
    }
