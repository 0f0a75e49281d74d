"""Read an adapter folder: its configuration, its plan and its tensors. Nothing in it runs code."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..config import DESCRIPTIONS, LoraConfig
from ..data import parsed, read_text
from ..errors import AdapterError, ConfigError
from ..module import CapturedModule
from ..names import shown
from ..plan import Entry, Plan
from ..tables import some
from .keys import CONFIG, INFORMATION, OURS, VERSION, WEIGHTS, WHY
from .peft_config import configuration
from .saved import Saved

# ---- loading ------------------------------------------------------------------------------------


def _same(name: str) -> str:
    return name


@dataclass(frozen=True)
class Names:
    """The module's names for those in a file, which are its keys without PEFT's root.

    Attributes:
        patterns: regular expressions, each with the text that replaces what it finds; the first
            that finds something counts.
        before: what is done to a name first.
    """

    patterns: tuple[tuple[re.Pattern[str], str], ...] = ()
    before: Callable[[str], str] = _same

    def __call__(self, name: str) -> str:
        """Return the module's name for one in the file."""
        name = self.before(name)
        number = self.number(name)
        if number == len(self.patterns):
            return name
        pattern, replacement = self.patterns[number]
        return pattern.sub(replacement, name)

    def number(self, name: str) -> int:
        """Return the number of the pattern that finds something, or that of all patterns."""
        found = (n for n, (pattern, _) in enumerate(self.patterns) if pattern.search(name))
        return next(found, len(self.patterns))

    def after(self, before: Callable[[str], str]) -> Names:
        return replace(self, before=before)

    def __bool__(self) -> bool:
        """Whether names may differ from the file's."""
        return bool(self.patterns) or self.before is not _same


@dataclass(frozen=True)
class Folder:
    """The content of an adapter folder.

    Attributes:
        path: of the folder.
        config: the content of adapter_config.json.
        header: fxlora's plan, from the metadata of the safetensors file; None if there is none.
        tensors: the tensors of the safetensors file, by key.
        names: the module's names for those in the file.
    """

    path: Path
    config: dict[str, Any]
    header: dict[str, Any] | None
    tensors: dict[str, torch.Tensor]
    names: Names = Names()

    def named(self, names: Names) -> Folder:
        return replace(self, names=names)


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
        dtypes, untied = header.get("trained_dtypes", {}), header.get("untied", {})
        if isinstance(untied, dict):  # else Plan raises
            untied = {k: tuple(v) if isinstance(v, list) else v for k, v in untied.items()}
        plan = Plan(
            tuple(map(Entry.from_data, named)),
            trained,
            modules_to_save=saved,
            trained_dtypes=dtypes,
            untied=untied,
        )
        return plan, pefts
    except ConfigError as error:
        raise AdapterError(f"{path / WEIGHTS}: its plan is damaged: {error}") from error


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


def check_config(module: CapturedModule, plan: Plan, content: Folder) -> None:
    """Raise if the configuration, which PEFT reads, contradicts the plan, which fxlora reads."""
    ours = content.header is not None and not content.header["peft"]
    saved = Saved.of(module, plan)
    expected = {"peft_type": OURS} if ours else configuration(module, plan, saved)
    for key in (*DESCRIPTIONS, "inference_mode", "bias"):  # these change no result
        expected.pop(key, None)
    says = content.config
    differ = [key for key, value in expected.items() if says.get(key) != value]
    free = {*expected, *INFORMATION, WHY, "bias"}
    differ += [key for key, value in says.items() if value and key not in free]
    if differ:
        said = some(
            f"{key}={shown(says.get(key))} for {shown(expected.get(key))}" for key in differ
        )
        raise AdapterError(
            f"{content.path / CONFIG} contradicts {WEIGHTS}, which was saved with it: {said}. "
            "Save the adapter again instead of editing it."
        )
