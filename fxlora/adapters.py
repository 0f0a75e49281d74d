"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The safetensors header also carries the exact plan, so that a folder that fxlora wrote is
applied without matching again; a folder that PEFT wrote is matched from its configuration.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import LoraConfig
from .errors import AdapterError, ConfigError, InjectError, NoMatchError
from .files import whole_file
from .module import CapturedModule
from .plan import Entry, Plan
from .rules import match
from .tables import some
from .verbs import inject

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ROOT = "base_model.model."

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


# ---- saving -------------------------------------------------------------------------------------


def save_adapter(module: CapturedModule, folder: str | Path) -> None:
    """Write what training changed: A, B, what was trained in full, and buffers that moved.

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
    tensors = {key: _plain(tensor) for key, tensor in _changed(module).items()}
    # One key: safetensors writes several in any order, and a file should be reproducible.
    header = {"fxlora": json.dumps(_plan_data(module.plan))}
    with (
        whole_file(folder / CONFIG, AdapterError) as config,
        whole_file(folder / WEIGHTS, AdapterError) as weights,
    ):
        try:
            save_file(tensors, weights, metadata=header)
        except SafetensorError as error:  # its word for a full disk
            raise AdapterError(f"cannot write {folder / WEIGHTS}: {error}.") from error
        config.write_text(json.dumps(_peft_config(module, module.plan), indent=2), encoding="utf-8")


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _changed(module: CapturedModule) -> dict[str, torch.Tensor]:
    """What differs from the base, by its key in the file."""
    assert module.plan is not None
    tensors: dict[str, torch.Tensor] = {}
    for entry in module.plan:
        key_a, key_b = _keys(entry)
        tensors[key_a] = module.get_parameter(entry.name_a)
        tensors[key_b] = module.get_parameter(entry.name_b)
    for name in module.trained:
        tensors[_full_key(module.plan, name)] = module.get_parameter(name)
    for name, buffer in module.named_buffers():
        if not _same(buffer, module.originals.get(name)):
            tensors[ROOT + name] = buffer
    return tensors


def _same(tensor: torch.Tensor, original: torch.Tensor | None) -> bool:
    if tensor.is_meta or original is None:
        return original is not None
    return tensor.shape == original.shape and torch.equal(tensor, original)


def _keys(entry: Entry) -> tuple[str, str]:
    """PEFT's names of A and B in a file."""
    if entry.op == "embedding":
        return f"{ROOT}{entry.site}.lora_embedding_A", f"{ROOT}{entry.site}.lora_embedding_B"
    return f"{ROOT}{entry.site}.lora_A.weight", f"{ROOT}{entry.site}.lora_B.weight"


def _full_key(plan: Plan, name: str) -> str:
    """PEFT's name of a parameter trained in full; it wraps adapted layers as `base_layer`."""
    owner, _, last = name.rpartition(".")
    wrapped = any(entry.prefix == owner for entry in plan)
    return f"{ROOT}{owner}.base_layer.{last}" if wrapped else ROOT + name


def _plan_data(plan: Plan) -> dict[str, Any]:
    return {
        "version": 1,
        "entries": [entry.to_data() for entry in plan],
        "trained": list(plan.trained),
        "modules_to_save": list(plan.modules_to_save),
        "model_parameters": plan.model_parameters,
        "trained_parameters": plan.trained_parameters,
    }


def _peft_config(module: CapturedModule, plan: Plan) -> dict[str, Any]:
    """The configuration under which PEFT reads the same adapter."""
    # One flag for all in PEFT: where sites differ, an alpha that gives the same scaling.
    rslora = bool(plan) and all(_is_rslora(entry) for entry in plan)
    alphas = {e.site: _whole(e.scaling * (math.sqrt(e.r) if rslora else e.r)) for e in plan}
    ranks = {entry.site: entry.r for entry in plan}
    r, alpha = (_commonest(ranks.values()), _commonest(alphas.values())) if plan else (8, 8)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max((entry.dropout for entry in plan), default=0.0),
        "target_modules": _targets(module, plan),
        "rank_pattern": {_exactly(site): n for site, n in ranks.items() if n != r},
        "alpha_pattern": {_exactly(site): n for site, n in alphas.items() if n != alpha},
        "modules_to_save": list(plan.modules_to_save) or None,
        "bias": "none",
        "use_rslora": rslora,
        "use_dora": False,
        "fan_in_fan_out": any(entry.op == "addmm" for entry in plan),
        "init_lora_weights": True,
    }


def _is_rslora(entry: Entry) -> bool:
    return entry.r > 1 and math.isclose(entry.scaling, entry.alpha / math.sqrt(entry.r))


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float:
    near = round(value, 9)  # alpha / r * r
    return int(near) if near.is_integer() else near


def _targets(module: CapturedModule, plan: Plan) -> list[str] | str:
    """The sites by name, or as one expression where a name is the end of another's."""
    sites = [entry.site for entry in plan]
    paths = [path for path, _ in module.named_modules()]
    if any(path.endswith(f".{site}") for site in sites for path in paths):
        return "|".join(re.escape(site) for site in sites)
    return sites


def _exactly(site: str) -> str:
    return f"^{re.escape(site)}"


# ---- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """What an adapter folder holds."""

    path: Path
    config: dict[str, Any]
    header: dict[str, Any] | None
    tensors: dict[str, torch.Tensor]


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
        plan = _plan_from(content.header, content.path, adapter_name)
    else:
        plan = _plan_from_peft(module, content, adapter_name)
    _check_entries(module, plan, content)
    if content.header is not None:
        _check_config(module, plan, content)
    try:
        result = inject(module, plan)
    except InjectError as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error
    _fill(result, plan, content)
    return result


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
        header = json.loads(metadata["fxlora"]) if "fxlora" in metadata else None
    except FileNotFoundError as error:
        raise AdapterError(f"{path} has no {Path(str(error.filename)).name}.") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged or no adapter: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path / CONFIG} is not a configuration: expected an object.")
    return _Folder(path, config, header, tensors)


def _plan_from(header: dict[str, Any], path: Path, adapter_name: str) -> Plan:
    try:
        if header["version"] != 1:
            raise AdapterError(
                f"{path} was written in version {header['version']} of the layout; this fxlora "
                "reads version 1. Use a newer fxlora."
            )
        entries = [Entry.from_data({**data, "adapter": adapter_name}) for data in header["entries"]]
        return Plan(
            entries=tuple(entries),
            trained=tuple(header["trained"]),
            modules_to_save=tuple(header["modules_to_save"]),
            model_parameters=header["model_parameters"],
            trained_parameters=header["trained_parameters"],
        )
    except (KeyError, TypeError, ValueError) as error:
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
    values["init_lora_weights"] = True  # the values come from the file
    try:
        return match(module, LoraConfig(**values), adapter_name=adapter_name)
    except (ConfigError, NoMatchError) as error:
        raise AdapterError(f"{content.path} does not fit the module: {error}") from error


def _check_config(module: CapturedModule, plan: Plan, content: _Folder) -> None:
    """Raise where the configuration, which PEFT reads, says another thing than the plan."""
    expected = _peft_config(module, plan)
    for key in ("task_type", "base_model_name_or_path", "inference_mode"):
        expected.pop(key)
    differ = [key for key, value in expected.items() if content.config.get(key) != value]
    if differ:
        said = ", ".join(
            f"{key}={content.config.get(key)!r} for {expected[key]!r}" for key in differ
        )
        raise AdapterError(
            f"{content.path / CONFIG} contradicts {WEIGHTS}, which was saved with it: {said}. "
            "Save the adapter again instead of editing it."
        )


def _check_entries(module: CapturedModule, plan: Plan, content: _Folder) -> None:
    """Raise unless the file's keys and shapes are the plan's and the module's."""
    parameters = {n: tuple(p.shape) for n, p in module.named_parameters(remove_duplicate=False)}
    buffers = {f"{ROOT}{n}": tuple(b.shape) for n, b in module.named_buffers()}
    needed = [entry.parameter for entry in plan] + list(plan.trained)
    expected: dict[str, tuple[int, ...]] = {}
    for entry in plan:
        expected |= dict(zip(_keys(entry), entry.shapes, strict=True))
    for name in plan.trained:
        expected[_full_key(plan, name)] = parameters.get(name, ())
    allowed = {**buffers, **expected}
    problems = [
        ("the module has no", [name for name in needed if name not in parameters]),
        ("missing in the file:", [key for key in expected if key not in content.tensors]),
        ("not what it trains:", [key for key in content.tensors if key not in allowed]),
        ("of another shape:", _misshapen(content.tensors, allowed)),
    ]
    said = [f"{what} {some(names)}" for what, names in problems if names]
    if said:
        raise AdapterError(f"{content.path} does not fit the module; {'; '.join(said)}.")


def _misshapen(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        f"{key} ({tuple(tensor.shape)} in the file, {shapes[key]} here)"
        for key, tensor in tensors.items()
        if key in shapes and tuple(tensor.shape) != shapes[key]
    ]


def _fill(module: CapturedModule, plan: Plan, content: _Folder) -> None:
    targets: dict[str, torch.Tensor] = {ROOT + n: b for n, b in module.named_buffers()}
    for name in plan.trained:
        targets[_full_key(plan, name)] = module.get_parameter(name)
    for entry in plan:
        for key, name in zip(_keys(entry), (entry.name_a, entry.name_b), strict=True):
            targets[key] = module.get_parameter(name)
    with torch.no_grad():
        for key, tensor in content.tensors.items():
            targets[key].copy_(tensor)
