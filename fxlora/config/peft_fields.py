"""The fields of PEFT's LoraConfig that fxlora does not apply: those that describe, and the refused.

The names, defaults and meanings are those of PEFT 0.21 (`peft.LoraConfig`, `peft.PeftConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from ..errors import ConfigError
from ..names import shown

# Fields that only describe the adapter or its base model. They are kept, and written to folders.
DESCRIPTIONS = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
)

# The heads that PEFT adds to `modules_to_save` by task: names end in these letters.
TASKS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

_FROM_DATA = (
    "leave it out, inject, and call fxlora.initialize_from(module, batches), which sets A from "
    "data (EVA)"
)
_FROM_WEIGHT = 'start from the weight itself instead: init_lora_weights="pissa" or "olora"'
_NO_QUANTISING = "fxlora does not quantise a base: adapt the model as it is, and leave it out"
_OTHER_METHOD = "it is another method than LoRA: leave it out, or train it in PEFT"

# What to do instead of each field whose only accepted value is its default.
REFUSED: Mapping[str, str] = {
    "lora_bias": 'the branch has no bias. Train the bias of the layer: bias="lora_only"',
    "megatron_config": "Megatron's parallel layers are not supported: shard a plain model instead "
    "(FSDP2, torch's tensor parallelism)",
    "megatron_core": "Megatron's parallel layers are not supported: leave it out",
    "loftq_config": _NO_QUANTISING,
    "eva_config": _FROM_DATA,
    "corda_config": _FROM_DATA,
    "lora_ga_config": _FROM_WEIGHT,
    "velora_config": "the backward saves x whole: leave it out (fxlora.optimize saves memory)",
    "alora_invocation_tokens": "an adapter applies to all tokens of a call: leave it out",
    "use_qalora": _NO_QUANTISING,
    "qalora_group_size": _NO_QUANTISING,
    "monteclora_config": _OTHER_METHOD,
    "layer_replication": "replicate the layers in the model before the capture, each with its own "
    "name over the same weights, and leave it out",
    "runtime_config": "tensors are computed where they are: move the model to the GPU, and leave "
    "it out",
    "use_bdlora": "a block-diagonal B is an adapter for each part of the weight: "
    "Rule(name, parts=nblocks)",
    "arrow_config": _OTHER_METHOD,
    "kasa_config": _OTHER_METHOD,
}

# What to do instead of each init that PEFT has and fxlora does not.
REFUSED_INITS: Mapping[str, str] = {
    "eva": _FROM_DATA,
    "corda": _FROM_DATA,
    "lora_ga": _FROM_WEIGHT,
    "loftq": f"{_NO_QUANTISING}, or {_FROM_WEIGHT}",
    "mica": _FROM_WEIGHT,
}


def check_refused(name: str, value: Any, default: Any) -> None:
    """Raise unless a field that fxlora does not have says nothing: its default, or nothing at all.

    Raises:
        ConfigError: names the field, the reason, and what to do instead.
    """
    if not _says_nothing(value, default):
        raise ConfigError(f"{name}={shown(value)} is not supported: {REFUSED[name]}.")


def _says_nothing(value: Any, default: Any) -> bool:
    if value is None or (type(value) is type(default) and value == default):
        return True
    if isinstance(value, bool | list | tuple | Mapping) and not value:
        return True
    held: Any = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return bool(held) and all(flag is False for flag in held.values())  # PEFT's runtime_config


def plain_task(task: Any) -> str | None:
    """Return a `task_type` as text, from PEFT's enumeration or a text.

    Raises:
        ConfigError: it is none of PEFT's.
    """
    name = plain_text("task_type", task)
    if name is not None and name not in TASKS:
        raise ConfigError(f"task_type must be one of {', '.join(TASKS)}, not {shown(task)}.")
    return name


def plain_text(field: str, value: Any) -> str | None:
    """Return a text, a member of an enumeration of texts as its value, or None.

    Raises:
        ConfigError: it is something else.
    """
    plain = value.value if isinstance(value, Enum) else value
    if plain is not None and not isinstance(plain, str):
        raise ConfigError(f"{field} must be a text or None, not {shown(value)}.")
    return plain


def check_description(mapping: Any) -> None:
    """Raise unless `auto_mapping` is None or plain data by name."""
    plain = (str, bool, int, float, type(None))
    if mapping is None or (
        isinstance(mapping, Mapping)
        and all(isinstance(key, str) and type(value) in plain for key, value in mapping.items())
    ):
        return
    raise ConfigError(f"auto_mapping must be a mapping of names, not {shown(mapping)}.")
