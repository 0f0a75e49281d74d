"""What a PeftModel is made from: configurations, captures, and adapters, new or from a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..api import inject
from ..config import LoraConfig
from ..disk.load import load_adapter
from ..errors import CaptureError, ConfigError
from ..frontends import capture
from ..frontends.methods import signature_of
from ..hosts.host import Host
from ..matching import match
from ..module import CapturedModule
from ..module.example_calls import Call
from ..names import shown
from ..tables import a, some
from .adapters import Adapters, set_trained


def as_config(config: Any) -> LoraConfig:
    """Return a configuration: fxlora's LoraConfig, or PEFT's as one.

    As in PEFT, each name of a tied weight has an adapter of its own, unless `tied` is "share".

    Raises:
        ConfigError: it is neither, or uses something that fxlora does not do.
    """
    if isinstance(config, LoraConfig):
        return config if config.tied == "share" else dataclasses.replace(config, tied="each")
    if isinstance(config, type) or not callable(to_dict := getattr(config, "to_dict", None)):
        raise ConfigError(f"peft_config must be a LoraConfig, not {shown(config)}.")
    fields: Any = to_dict()
    kind = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    if kind not in ("LORA", None):
        raise ConfigError(
            f"peft_config is {a(type(config).__name__)}, of the method {kind}, and fxlora has LoRA "
            "only: give a LoraConfig, or train this one in PEFT."
        )
    return LoraConfig(**fields, tied="each")


def captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    call: str,
    calls: Sequence[Call] | None,
    **options: Any,
) -> CapturedModule:
    """Return the module captured from a model.

    Args:
        call: the user's call, for the message that it lacks an example: "get_peft_model(model".

    Raises:
        ConfigError: an argument is no example, or the model has adapters.
        CaptureError: the model cannot be captured.
    """
    if args and isinstance(args[0], str):
        raise ConfigError(
            f"{shown(args[0])} is not an example input. Give the adapter's name by keyword: "
            "adapter_name=…."
        )
    if isinstance(model, Host) and "_peft" in vars(model):
        raise ConfigError("the model has adapters already: add_adapter adds another.")
    try:
        return capture(model, args or None, kwargs or None, calls=calls, **options)
    except CaptureError as error:
        if args or kwargs or calls is not None or not isinstance(model, nn.Module):
            raise
        first = next(iter(signature_of(model).parameters), "*args")
        example = f"{first}=…" if first.isidentifier() else first
        raise CaptureError(
            f"{str(error).rstrip('.')}; here: {call}, {example}), with the arguments that your "
            f"training gives: {call}, **batch), or calls=[(args, kwargs), …]."
        ) from error


def check_left_out(method: str, **options: Any) -> None:
    """Raise ConfigError if an option of PEFT's that has no meaning here is given."""
    if given := [
        name for name, value in options.items() if value is not None and value is not False
    ]:
        raise ConfigError(f"{method} does not support {some(given)}: leave it out.")


def name_of(model: nn.Module) -> str | None:
    """Return the name of the checkpoint that a model of transformers was loaded from."""
    name = model.__dict__.get("name_or_path")
    return name if isinstance(name, str) and name else None


def add(adapters: Adapters, name: str, config: LoraConfig, autocast: bool) -> None:
    """Add a new adapter; its configuration is the one that was matched, with its targets."""
    adapters.check_new(name)
    adapters.keep_buffers()
    plan = match(adapters.base, config, adapter_name=name)
    module = inject(adapters.base, plan, adapter_dtype=None if autocast else False)
    matched = plan.rules[0].lora or config
    rows = config.trainable_token_indices  # which became a rule of its own
    adapters.add(name, module, dataclasses.replace(matched, trainable_token_indices=rows))


def load(
    adapters: Adapters,
    folder: str | Path,
    name: str,
    is_trainable: bool,
    autocast: bool,
    key_mapping: Mapping[str, str] | None,
) -> None:
    """Add an adapter from a folder; its configuration is the one that it was matched with."""
    adapters.check_new(name)
    adapters.keep_buffers()
    module = load_adapter(
        adapters.base,
        folder,
        adapter_name=name,
        adapter_dtype=None if autocast else False,
        key_mapping=key_mapping,
    )
    set_trained(module, is_trainable)
    config = dataclasses.replace(_config_of(module), inference_mode=not is_trainable)
    adapters.add(name, module, config)


def _config_of(module: CapturedModule) -> LoraConfig:
    """Return the configuration that a loaded adapter was matched with, or one that describes it."""
    plan = module.plan
    assert plan is not None
    if plan.rules and plan.rules[0].lora is not None:
        return plan.rules[0].lora
    saved = [*plan.modules_to_save] or None
    if not plan.entries:
        return LoraConfig(modules_to_save=saved, **plan.descriptions)
    first = plan.entries[0]
    return LoraConfig(
        r=first.r,
        lora_alpha=first.alpha,
        target_modules=[entry.site for entry in plan],
        rank_pattern={entry.site: entry.r for entry in plan if entry.r != first.r},
        alpha_pattern={entry.site: entry.alpha for entry in plan if entry.alpha != first.alpha},
        modules_to_save=saved,
        use_dora="dora" in first.variants,
        **plan.descriptions,
    )
