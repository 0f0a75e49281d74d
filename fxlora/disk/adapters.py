"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The safetensors header also carries the exact plan, so that a folder that fxlora wrote is
applied without matching again; a folder that PEFT wrote is matched from its configuration.

Where PEFT would compute another thing from the same tensors (`peft_layout.why_not`) the folder
is fxlora's alone: each tensor under its own name, and a configuration of peft_type "FXLORA" with
the reason, on which PEFT stops.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..api import inject
from ..config import LoraConfig
from ..errors import AdapterError, ConfigError, InjectError, NoMatchError, UnsupportedOpError
from ..lora.inits import FILLS, STARTS
from ..matching import match
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..plan import Entry, Plan
from ..tables import some
from .files import whole_file
from .peft import (
    ROOT,
    Wrappers,
    configuration,
    decoded,
    encoded,
    groups_of,
    is_bare,
    shapes_of,
    why_not,
)

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
VERSION = 2
OURS = "FXLORA"  # the peft_type of a folder that PEFT cannot read

# Keys of PEFT's configuration that say nothing about the mathematics.
_INFORMATION = frozenset(
    {
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "fan_in_fan_out",
        "runtime_config",
        "ephemeral_gpu_offload",
        "megatron_core",
        "qalora_group_size",  # of use_qalora, which is refused
    }
)


# What a site starts with does not matter where its tensors come from a file; these do not change
# the weight beside it.
_BESIDE = (*FILLS, "eva", "mica")


# ---- the layout of a file -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Which tensor of a module is where in a file.

    Attributes:
        plan: whose adapters they are, as the file has them.
        wrappers: of PEFT's layout, or None in fxlora's own.
    """

    plan: Plan
    wrappers: Wrappers | None

    def adapters(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of all entries, by key."""
        if not self.wrappers:
            return {_own_key(e, name): values[name] for e in self.plan for name in e.tensors}
        return {
            f"{ROOT}{self.wrappers.site(group[0])}.{end}": tensor
            for group in groups_of(self.plan)
            for end, tensor in encoded(group, values).items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of these."""
        if not self.wrappers:
            return {_own_key(e, n): shape for e in self.plan for n, shape in e.tensors.items()}
        return {
            f"{ROOT}{self.wrappers.site(group[0])}.{end}": shape
            for group in groups_of(self.plan)
            for end, shape in shapes_of(group).items()
        }

    def values(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of all entries by name, from a file's."""
        if not self.wrappers:
            return {name: tensors[_own_key(e, name)] for e in self.plan for name in e.tensors}
        found: dict[str, torch.Tensor] = {}
        for group in groups_of(self.plan):
            site = f"{ROOT}{self.wrappers.site(group[0])}."
            found |= decoded(group, {end: tensors[site + end] for end in shapes_of(group)})
        return found

    def key(self, name: str) -> str:
        """Key of a tensor of the model's own: trained in full, or a buffer."""
        return ROOT + (self.wrappers.inside(name) if self.wrappers else name)


def _layout(module: CapturedModule, plan: Plan, pefts: bool) -> _Layout:
    return _Layout(plan, Wrappers.of(module, plan) if pefts else None)


def _own_key(entry: Entry, name: str) -> str:
    return f"{ROOT}{name.removesuffix(f'.{entry.adapter}.weight')}.weight"


# ---- saving -------------------------------------------------------------------------------------


@no_ambient_modes()
def save_adapter(module: CapturedModule, folder: str | Path) -> None:
    """Write what training changed: A, B, what was trained in full, and buffers that moved.

    PEFT reads the folder where it has the same thing: layers and bare parameters that their own
    modules' forwards read; with DoRA; PiSSA and OLoRA as plain LoRA of twice the rank; the parts
    of a packed weight as one block-diagonal pair. Else its peft_type is "FXLORA", on which PEFT
    stops, and `why_not_peft` in the configuration says what PEFT cannot do.

    Raises:
        AdapterError: the module has no adapters, or the folder cannot be written.
    """
    if not isinstance(module, CapturedModule) or module.plan is None:
        raise AdapterError("nothing to save: the module has no adapters (before fold, not after).")
    if stray := module.unplanned():
        raise AdapterError(
            f"{some(stray)} requires gradients but is not in the plan, so it would be lost. Put "
            "its module into modules_to_save and train again."
        )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"cannot write {folder}: {error.strerror or error}.") from error
    why = why_not(module, module.plan)
    layout = _layout(module, module.plan, why is None)
    tensors = {key: _plain(tensor) for key, tensor in _changed(module, layout).items()}
    # One key: safetensors writes several in any order, and a file should be reproducible.
    header = {"fxlora": json.dumps(_plan_data(module.plan, why is None))}
    config = {"peft_type": OURS, "why_not_peft": why} if why else configuration(module, module.plan)
    with (
        whole_file(folder / CONFIG, AdapterError) as config_file,
        whole_file(folder / WEIGHTS, AdapterError) as weights,
    ):
        try:
            save_file(tensors, weights, metadata=header)
        except SafetensorError as error:  # its word for a full disk
            raise AdapterError(f"cannot write {folder / WEIGHTS}: {error}.") from error
        config_file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


@torch.no_grad()
def _changed(module: CapturedModule, layout: _Layout) -> dict[str, torch.Tensor]:
    """What differs from the base, by its key in the file."""
    names = [name for entry in layout.plan for name in entry.tensors]
    tensors = layout.adapters({name: module.get_parameter(name) for name in names})
    for name in module.trained:
        tensors[layout.key(name)] = module.get_parameter(name)
    for name, buffer in module.named_buffers():
        if not _same(buffer, module.known.originals.get(name)):
            tensors[layout.key(name)] = buffer
    return tensors


def _same(tensor: torch.Tensor, original: torch.Tensor | None) -> bool:
    if tensor.is_meta or original is None:
        return original is not None
    return tensor.shape == original.shape and torch.equal(tensor, original)


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


# ---- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """What an adapter folder holds."""

    path: Path
    config: dict[str, Any]
    header: dict[str, Any] | None
    tensors: dict[str, torch.Tensor]


@no_ambient_modes()
def load_adapter(
    module: CapturedModule, folder: str | Path, *, adapter_name: str = "default"
) -> CapturedModule:
    """A new module: the captured one with a saved adapter, fxlora's or PEFT's.

    With the same base it is bit for bit the module that was saved.

    Raises:
        AdapterError: the folder is missing, damaged or foreign, or does not fit the module;
            names the keys.
    """
    if not isinstance(module, CapturedModule):
        raise AdapterError("load_adapter takes a captured module: fxlora.capture(model, args).")
    content = _read(Path(folder))
    if content.header is not None:
        plan, pefts = _plan_from(content.header, content.path, adapter_name)
        layout = _layout(module, plan, pefts)
    else:
        plan = _plan_from_peft(module, content, adapter_name)
        layout = _layout(module, _as_peft_has(plan), True)
    _check_entries(module, layout, content)
    if content.header is not None:
        _check_config(module, plan, content)
    # What it starts with comes from the file, unless PEFT leaves that to the weight.
    started = plan if content.header is None else _without_init(plan)
    try:
        result = inject(module, started)
    except (ConfigError, InjectError) as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error
    result.update_state(plan=plan)
    _fill(result, layout, content)
    return result


def _without_init(plan: Plan) -> Plan:
    entries = tuple(dataclasses.replace(entry, init=True) for entry in plan)
    return dataclasses.replace(plan, entries=entries)


def _as_peft_has(plan: Plan) -> Plan:
    """The plan of the pairs in PEFT's file: what they start from it leaves to the weight."""
    entries = tuple(
        dataclasses.replace(e, variants=tuple(v for v in e.variants if v != "from_weight"))
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)


def _read(path: Path) -> _Folder:
    if not path.is_dir():
        raise AdapterError(f"no adapter folder at {path}.")
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        why = (
            "; its adapter_model.bin is a pickle, which runs code when it is read: save it again "
            "with safetensors"
            if pickled
            else ""
        )
        raise AdapterError(f"{path} has no {WEIGHTS}{why}.")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        with safe_open(path / WEIGHTS, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        header = json.loads(metadata["fxlora"]) or {} if "fxlora" in metadata else None
    except FileNotFoundError as error:
        raise AdapterError(f"{path} has no {Path(str(error.filename)).name}.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged or no adapter: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path / CONFIG} is not a configuration: expected an object.")
    return _Folder(path, config, header, tensors)


def _plan_from(header: Any, path: Path, adapter_name: str) -> tuple[Plan, bool]:
    """The plan of a header, and whether the file is in PEFT's layout."""
    try:
        if header["version"] != VERSION:
            raise AdapterError(
                f"{path} was written in version {header['version']!r} of the layout; this fxlora "
                f"reads version {VERSION}. "
                + (
                    "Without its header (safetensors' metadata) PEFT's part of it can be read."
                    if header["version"] == 1
                    else "Use a newer fxlora."
                )
            )
        entries = [Entry.from_data({**data, "adapter": adapter_name}) for data in header["entries"]]
        plan = Plan(
            entries=tuple(entries),
            trained=tuple(header["trained"]),
            modules_to_save=tuple(header["modules_to_save"]),
            model_parameters=int(header["model_parameters"]),
            trained_parameters=int(header["trained_parameters"]),
        )
        if not all(isinstance(name, str) for name in (*plan.trained, *plan.modules_to_save)):
            raise TypeError("trained and modules_to_save must be names")
        return plan, header["peft"] is True
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AdapterError(f"{path / WEIGHTS}: its plan is damaged: {error!r}.") from error


def _plan_from_peft(module: CapturedModule, content: _Folder, adapter_name: str) -> Plan:
    config = content.config
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{content.path / CONFIG} is for {config.get('peft_type')!r}, not for LORA."
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = [k for k, v in config.items() if v and k not in known and k not in _INFORMATION]
    if unknown:
        raise AdapterError(
            f"{content.path / CONFIG} uses {', '.join(unknown)}, which fxlora does not know."
        )
    values = {key: value for key, value in config.items() if key in known and value is not None}
    if values.get("target_modules") == []:  # PEFT's word for target_parameters alone
        del values["target_modules"]
    values["init_lora_weights"] = _init_from_peft(config, content.path)
    try:
        plan = match(module, LoraConfig(**values), adapter_name=adapter_name)
    except (ConfigError, NoMatchError, UnsupportedOpError) as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error
    for entry in plan:
        layer = not is_bare(entry) and entry.layout.in_first
        if layer and entry.parameter in (config.get("target_parameters") or ()):
            raise AdapterError(
                f"{content.path / CONFIG}: target_parameters has '{entry.parameter}', a layer's "
                "weight (in, out), which PEFT takes for (out, in). Target the module instead."
            )
    return plan


def _init_from_peft(config: dict[str, Any], path: Path) -> bool | str:
    """How the sites start, where PEFT takes the weight that it stands beside from that."""
    init = config.get("init_lora_weights", True)
    if init in STARTS:
        return init
    if init not in _BESIDE:
        raise AdapterError(
            f"{path / CONFIG} has init_lora_weights={init!r}, which changes the weights beside the "
            "adapter. Convert it with PEFT's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)."
        )
    return True


def _check_config(module: CapturedModule, plan: Plan, content: _Folder) -> None:
    """Raise where the configuration, which PEFT reads, says another thing than the plan."""
    ours = content.header is not None and not content.header["peft"]
    expected = {"peft_type": OURS} if ours else configuration(module, plan)
    for key in ("task_type", "base_model_name_or_path", "inference_mode"):
        expected.pop(key, None)
    differ = [key for key, value in expected.items() if content.config.get(key) != value]
    if differ:
        said = ", ".join(
            f"{key}={content.config.get(key)!r} for {expected[key]!r}" for key in differ
        )
        raise AdapterError(
            f"{content.path / CONFIG} contradicts {WEIGHTS}, which was saved with it: {said}. "
            "Save the adapter again instead of editing it."
        )


def _check_entries(module: CapturedModule, layout: _Layout, content: _Folder) -> None:
    """Raise unless the file's keys and shapes are the plan's and the module's."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    plan = layout.plan
    needed = [entry.parameter for entry in plan] + list(plan.trained)
    if missing := [name for name in needed if name not in parameters]:
        raise AdapterError(
            f"{content.path} does not fit the module; the module has no {some(missing)}."
        )
    shapes = {e.parameter: e.shape for e in plan if e.shape != tuple(parameters[e.parameter].shape)}
    if shapes:
        raise AdapterError(
            f"{content.path} does not fit the module; it was made for "
            f"{some(f'{name} {shape}' for name, shape in shapes.items())}."
        )
    expected = layout.shapes()
    expected |= {layout.key(name): tuple(parameters[name].shape) for name in plan.trained}
    buffers = {layout.key(n): tuple(b.shape) for n, b in module.named_buffers()}
    allowed = {**buffers, **expected}
    # (PEFT saves the weights of embeddings with it, frozen or not)
    same = {layout.key(n) for n, p in parameters.items() if _same_there(content, layout.key(n), p)}
    extra = [key for key in content.tensors if key not in allowed and key not in same]
    problems = [
        ("missing in the file:", [key for key in expected if key not in content.tensors]),
        ("not what it trains:", extra),
        ("of another shape:", _misshapen(content.tensors, allowed)),
    ]
    said = [f"{what} {some(names)}" for what, names in problems if names]
    if tied := _of_other_names(plan, extra):
        said.append(
            f"it has a pair for each name of the tied weight '{tied}', and fxlora one for all"
        )
    if said:
        raise AdapterError(f"{content.path} does not fit the module; {'; '.join(said)}.")


def _same_there(content: _Folder, key: str, parameter: torch.Tensor) -> bool:
    found = content.tensors.get(key)
    return found is not None and _same(parameter.detach().cpu(), found.to(parameter.dtype))


def _of_other_names(plan: Plan, keys: list[str]) -> str | None:
    """The tied weight that pairs in the file belong to, under a name that its entry has too."""
    for entry in plan:
        owners = [ROOT + name.rpartition(".")[0] for name in entry.names[1:]]
        if any(key.startswith(f"{owner}.lora_") for key in keys for owner in owners):
            return entry.parameter
    return None


def _misshapen(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{key} ({tuple(tensor.shape)} in the file, {shapes[key]} here)"
        for key, tensor in tensors.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]


def _fill(module: CapturedModule, layout: _Layout, content: _Folder) -> None:
    stored = {layout.key(name): buffer for name, buffer in module.named_buffers()}
    stored |= {layout.key(name): module.get_parameter(name) for name in layout.plan.trained}
    with torch.no_grad():
        for name, tensor in layout.values(content.tensors).items():
            module.get_parameter(name).copy_(tensor)
        for key, tensor in stored.items():
            if key in content.tensors:
                tensor.copy_(content.tensors[key])
