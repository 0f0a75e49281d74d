"""Read an adapter folder: its configuration, its plan and its tensors. Nothing in it runs code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..config import DESCRIPTIONS, REFUSED, LoraConfig
from ..data import parsed, read_text
from ..errors import AdapterError, ConfigError, NoMatchError, UnsupportedOpError
from ..lora.inits import FILLS, STARTS
from ..matching import match
from ..module import CapturedModule
from ..names import shown
from ..plan import Entry, Plan
from ..tables import some
from .keys import CONFIG, INFORMATION, OURS, VERSION, WEIGHTS, WHY
from .peft import configuration, has_embedding_keys, is_bare

# Inits that leave the base weight unchanged. For an adapter from a file, they do not matter.
_INITS_KEEPING_BASE = (*FILLS, "eva", "mica")


# ---- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The content of an adapter folder.

    Attributes:
        path: of the folder.
        config: the content of adapter_config.json.
        header: fxlora's plan, from the metadata of the safetensors file; None if there is none.
        tensors: the tensors of the safetensors file, by key.
    """

    path: Path
    config: dict[str, Any]
    header: dict[str, Any] | None
    tensors: dict[str, torch.Tensor]


def read_folder(path: Path) -> Folder:
    """Read an adapter folder.

    Raises:
        AdapterError: the folder or one of its files is missing or damaged.
    """
    try:
        found, weights = path.is_dir(), (path / WEIGHTS).is_file()
        pickled = (path / "adapter_model.bin").is_file()
    except OSError as error:
        raise AdapterError(f"no adapter folder at {path}: {error.strerror or error}.") from error
    if not found:
        raise AdapterError(f"no adapter folder at {path}.")
    if not weights:
        why = (
            "; its adapter_model.bin is a pickle, which can run code when it is read: save the "
            "adapter again with safetensors"
            if pickled
            else ""
        )
        raise AdapterError(f"{path} has no {WEIGHTS}{why}.")
    if not (path / CONFIG).is_file():
        raise AdapterError(f"{path} has no {CONFIG}.")
    what = f"{path} is damaged or not an adapter: {CONFIG}"
    config = parsed(read_text(path / CONFIG, what, AdapterError), what, AdapterError)
    if not isinstance(config, dict):
        raise AdapterError(f"{path / CONFIG} is not a configuration: expected an object.")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            text = (file.metadata() or {}).get("fxlora")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise AdapterError(f"{path} is damaged or not an adapter: {error}.") from error
    if text is None:
        return Folder(path, config, None, {_as_saved(key): t for key, t in tensors.items()})
    header = parsed(text, f"{path / WEIGHTS}: its plan is damaged: it", AdapterError)
    if not isinstance(header, dict):
        raise AdapterError(f"{path / WEIGHTS}: its plan is damaged: expected an object.")
    return Folder(path, config, header, tensors)


def _as_saved(key: str) -> str:
    """Return a key as PEFT saves it: it also loads DoRA's magnitudes as its modules name them."""
    end = "lora_magnitude_vector"
    return key.removesuffix(".weight") if key.endswith(f".{end}.weight") else key


def plan_from_header(header: dict[str, Any], path: Path, adapter_name: str) -> tuple[Plan, bool]:
    """Return the plan in a header, and whether the file is in PEFT's layout.

    Raises:
        AdapterError: the header is damaged, or of another version.
    """
    version = header.get("version")
    if version != VERSION:
        raise AdapterError(
            f"{path} was written in version {shown(version)} of the layout; this fxlora "
            f"reads version {VERSION}. "
            + (
                "Without its header (the safetensors metadata), it can be read as a PEFT adapter."
                if version == 1
                else "Use a newer fxlora."
            )
        )
    lists = [header.get(key) for key in ("entries", "trained", "modules_to_save")]
    pefts = header.get("peft")
    try:
        if not all(isinstance(held, list) for held in lists) or not isinstance(pefts, bool):
            raise ConfigError("entries, trained and modules_to_save must be lists, peft a boolean")
        entries, trained, saved = (tuple(held or ()) for held in lists)
        named = (
            {**data, "adapter": adapter_name} if isinstance(data, dict) else data
            for data in entries
        )
        dtypes = header.get("trained_dtypes", {})
        plan = Plan(
            tuple(map(Entry.from_data, named)),
            trained,
            modules_to_save=saved,
            trained_dtypes=dtypes,
        )
        return plan, pefts
    except ConfigError as error:
        raise AdapterError(f"{path / WEIGHTS}: its plan is damaged: {error}") from error


def plan_from_peft(module: CapturedModule, content: Folder, adapter_name: str) -> Plan:
    """Return the plan that PEFT's configuration describes for a module.

    Raises:
        AdapterError: the configuration is not for LoRA, uses something that fxlora does not
            support, or does not fit the module.
    """
    config = content.config
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{content.path / CONFIG} is for {shown(config.get('peft_type'))}, not for LORA."
        )
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    known -= {*REFUSED, *INFORMATION}
    unknown = [k for k, v in config.items() if v and k not in known and k not in INFORMATION]
    if unknown:
        why = f" {unknown[0]}: {REFUSED[unknown[0]]}." if unknown[0] in REFUSED else ""
        raise AdapterError(
            f"{content.path / CONFIG} uses {some(unknown)}, which fxlora does not support.{why}"
        )
    values = {key: value for key, value in config.items() if key in known and value is not None}
    if values.get("target_modules") is None:
        values["target_modules"] = []  # PEFT's defaults are in the file, if it used them
    values |= descriptions_in(content)
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
    return dataclasses.replace(plan, entries=tuple(map(_as_peft_starts, plan)))


def descriptions_in(content: Folder) -> dict[str, Any]:
    """Return what a folder's configuration says of the adapter and its base model.

    Raises:
        AdapterError: it is not what PEFT writes.
    """
    said = {key: content.config[key] for key in DESCRIPTIONS if key in content.config}
    try:
        return LoraConfig(**said).descriptions
    except ConfigError as error:
        raise AdapterError(f"{content.path / CONFIG}: {error}") from error


def _as_peft_starts(entry: Entry) -> Entry:
    """Return an entry with PEFT's init, which for embeddings is never PiSSA or OLoRA."""
    if not has_embedding_keys(entry) or entry.init not in STARTS:
        return entry
    variants = tuple(name for name in entry.variants if name != "from_weight")
    return dataclasses.replace(entry, init=True, variants=variants)


def _init_from_peft(config: dict[str, Any], path: Path) -> bool | str:
    """Return the init by which PEFT changes the base weights, or True where it leaves them as is.

    Raises:
        AdapterError: it changes them by an init that fxlora does not have.
    """
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init in STARTS:
        return init
    if not isinstance(init, bool | str) or init not in _INITS_KEEPING_BASE:
        raise AdapterError(
            f"{path / CONFIG} has init_lora_weights={shown(init)}, which changes the weights "
            "that the adapter is added to. Convert it with PEFT's save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)."
        )
    return True


def check_config(module: CapturedModule, plan: Plan, content: Folder) -> None:
    """Raise if the configuration, which PEFT reads, contradicts the plan, which fxlora reads."""
    ours = content.header is not None and not content.header["peft"]
    expected = {"peft_type": OURS} if ours else configuration(module, plan)
    for key in (*DESCRIPTIONS, "inference_mode"):
        expected.pop(key, None)
    says = content.config
    differ = [key for key, value in expected.items() if says.get(key) != value]
    differ += [k for k, v in says.items() if v and k not in {*expected, *INFORMATION, WHY}]
    if differ:
        said = some(
            f"{key}={shown(says.get(key))} for {shown(expected.get(key))}" for key in differ
        )
        raise AdapterError(
            f"{content.path / CONFIG} contradicts {WEIGHTS}, which was saved with it: {said}. "
            "Save the adapter again instead of editing it."
        )
