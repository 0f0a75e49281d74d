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
from ..data import as_path, parsed, read_text
from ..errors import (
    AdapterError,
    ConfigError,
    InjectError,
    NoMatchError,
    UnsupportedOpError,
    warn,
)
from ..lora.inits import FILLS, STARTS
from ..matching import match
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..names import ADAPTER_RULE, is_adapter, shown
from ..passes.inject import check_fits
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
WHY = "why_not_peft"

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
    layout = _layout(module, module.plan, why is None)
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
    module: CapturedModule, layout: _Layout, tensors: dict[str, torch.Tensor]
) -> None:
    if any(tensor.is_meta for tensor in tensors.values()):
        raise AdapterError("nothing to save: the module is on the meta device, without values.")
    before = {layout.key(name): tensor for name, tensor in module.known.originals.items()}
    diverged = [key for key, t in tensors.items() if _not_finite(t, before.get(key))]
    if diverged:
        raise AdapterError(
            f"{some(diverged)}: NaN or infinity, as where training diverged. Nothing was written. "
            "Train again, with a lower learning rate."
        )


def _not_finite(tensor: torch.Tensor, before: torch.Tensor | None) -> bool:
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
    if module.plan is not None:
        raise AdapterError("the module has adapters already: fold or remove them first.")
    if not is_adapter(adapter_name):
        raise ConfigError(f"adapter_name must be {ADAPTER_RULE}, not {shown(adapter_name)}.")
    content = _read(as_path(folder, AdapterError))
    if content.header is not None:
        plan, pefts = _plan_from(content.header, content.path, adapter_name)
        held = plan
    else:
        plan, pefts = _plan_from_peft(module, content, adapter_name), True
        held = _as_peft_has(plan)
    _check_weights(module, plan, content)
    layout = _layout(module, held, pefts)
    _check_tensors(module, layout, content)
    if content.header is not None:
        plan = _counted(module, plan)
        _check_config(module, plan, content)
    starts, stored = _values(module, layout, content)
    try:
        result = inject(module, plan, starts=starts)
    except (ConfigError, InjectError) as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error
    with torch.no_grad():
        for name, value in stored.items():
            _own(result, name).copy_(value)
    return result


def _counted(module: CapturedModule, plan: Plan) -> Plan:
    """The plan with the counts of this module: a file's are no matter of faith."""
    sizes = {name: p.numel() for name, p in module.named_parameters(remove_duplicate=False)}
    return dataclasses.replace(
        plan,
        model_parameters=sum(p.numel() for p in module.parameters()),
        trained_parameters=sum(sizes[name] for name in plan.trained),
    )


def _as_peft_has(plan: Plan) -> Plan:
    """The plan of the pairs in PEFT's file: what they start from it leaves to the weight."""
    entries = tuple(
        dataclasses.replace(e, variants=tuple(v for v in e.variants if v != "from_weight"))
        for e in plan
    )
    return dataclasses.replace(plan, entries=entries)


def _read(path: Path) -> _Folder:
    try:
        found, weights = path.is_dir(), (path / WEIGHTS).is_file()
        pickled = (path / "adapter_model.bin").is_file()
    except OSError as error:
        raise AdapterError(f"no adapter folder at {path}: {error.strerror or error}.") from error
    if not found:
        raise AdapterError(f"no adapter folder at {path}.")
    if not weights:
        why = (
            "; its adapter_model.bin is a pickle, which runs code when it is read: save it again "
            "with safetensors"
            if pickled
            else ""
        )
        raise AdapterError(f"{path} has no {WEIGHTS}{why}.")
    if not (path / CONFIG).is_file():
        raise AdapterError(f"{path} has no {CONFIG}.")
    what = f"{path} is damaged or no adapter: {CONFIG}"
    config = parsed(read_text(path / CONFIG, what, AdapterError), what, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"{path / CONFIG} is not a configuration: expected an object.")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            text = (file.metadata() or {}).get("fxlora")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:
        raise AdapterError(f"{path} is damaged or no adapter: {error}.") from error
    if text is None:
        return _Folder(path, config, None, tensors)
    header = parsed(text, f"{path / WEIGHTS}: its plan is damaged: it", AdapterError)
    if not isinstance(header, dict):
        raise AdapterError(f"{path / WEIGHTS}: its plan is damaged: expected an object.")
    return _Folder(path, config, header, tensors)


def _plan_from(header: dict[str, Any], path: Path, adapter_name: str) -> tuple[Plan, bool]:
    """The plan of a header, and whether the file is in PEFT's layout."""
    version = header.get("version")
    if version != VERSION:
        raise AdapterError(
            f"{path} was written in version {shown(version)} of the layout; this fxlora "
            f"reads version {VERSION}. "
            + (
                "Without its header (safetensors' metadata) PEFT's part of it can be read."
                if version == 1
                else "Use a newer fxlora."
            )
        )
    lists = [header.get(key) for key in ("entries", "trained", "modules_to_save")]
    pefts = header.get("peft")
    try:
        if not all(isinstance(held, list) for held in lists) or not isinstance(pefts, bool):
            raise ConfigError("entries, trained and modules_to_save are lists, peft is a flag")
        entries, trained, saved = (tuple(held or ()) for held in lists)
        named = (
            {**data, "adapter": adapter_name} if isinstance(data, dict) else data
            for data in entries
        )
        return Plan(tuple(map(Entry.from_data, named)), trained, modules_to_save=saved), pefts
    except ConfigError as error:
        raise AdapterError(f"{path / WEIGHTS}: its plan is damaged: {error}") from error


def _plan_from_peft(module: CapturedModule, content: _Folder, adapter_name: str) -> Plan:
    config = content.config
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{content.path / CONFIG} is for {shown(config.get('peft_type'))}, not for LORA."
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = [k for k, v in config.items() if v and k not in known and k not in _INFORMATION]
    if unknown:
        raise AdapterError(
            f"{content.path / CONFIG} uses {some(unknown)}, which fxlora does not know."
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
    if isinstance(init, str) and init in STARTS:
        return init
    if not isinstance(init, bool | str) or init not in _BESIDE:
        raise AdapterError(
            f"{path / CONFIG} has init_lora_weights={shown(init)}, which changes the weights "
            "beside the adapter. Convert it with PEFT's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)."
        )
    return True


def _check_config(module: CapturedModule, plan: Plan, content: _Folder) -> None:
    """Raise where the configuration, which PEFT reads, says another thing than the plan."""
    ours = content.header is not None and not content.header["peft"]
    expected = {"peft_type": OURS} if ours else configuration(module, plan)
    for key in ("task_type", "base_model_name_or_path", "inference_mode"):
        expected.pop(key, None)
    says = content.config
    differ = [key for key, value in expected.items() if says.get(key) != value]
    differ += [k for k, v in says.items() if v and k not in {*expected, *_INFORMATION, WHY}]
    if differ:
        said = some(
            f"{key}={shown(says.get(key))} for {shown(expected.get(key))}" for key in differ
        )
        raise AdapterError(
            f"{content.path / CONFIG} contradicts {WEIGHTS}, which was saved with it: {said}. "
            "Save the adapter again instead of editing it."
        )


def _check_weights(module: CapturedModule, plan: Plan, content: _Folder) -> None:
    """Raise unless all that the plan names is the module's, and what the plan says of it holds."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    needed = [name for e in plan for name in (*e.names, *e.tied)] + list(plan.trained)
    missing = [name for name in dict.fromkeys(needed) if name not in parameters]
    held = {*parameters, *(path for path, _ in module.named_modules(remove_duplicate=False))}
    missing += [name for name in plan.modules_to_save if name not in held]
    if missing:
        raise AdapterError(
            f"{content.path} does not fit the module; the module has no {some(missing)}."
        )
    shapes = {e.parameter: e.shape for e in plan if e.shape != tuple(parameters[e.parameter].shape)}
    if shapes:
        raise AdapterError(
            f"{content.path} does not fit the module; it was made for "
            f"{some(f'{name} {shape}' for name, shape in shapes.items())}."
        )
    try:
        check_fits(module, plan)
    except InjectError as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error


def _check_tensors(module: CapturedModule, layout: _Layout, content: _Folder) -> None:
    """Raise unless the file's keys and shapes are the plan's and the module's."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    plan = layout.plan
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


def _values(
    module: CapturedModule, layout: _Layout, content: _Folder
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
        for now in (_own(module, name),)
    }
    return starts, kept


def _own(module: CapturedModule, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), last)


def _held(
    content: _Folder, name: str, value: torch.Tensor, dtype: torch.dtype, now: torch.Tensor | None
) -> torch.Tensor:
    """A file's value in the dtype that the module holds it in."""
    if not torch.can_cast(value.dtype, dtype):
        raise AdapterError(
            f"{content.path}: '{name}' is {value.dtype}, which is no {dtype}, as the module has it."
        )
    value = value.to(dtype)
    if _not_finite(value, now):
        raise AdapterError(
            f"{content.path}: '{name}' has NaN or infinities as {dtype}, as where training "
            "diverged. Take an earlier checkpoint of the adapter."
        )
    return value
