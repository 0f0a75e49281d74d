"""Which of PEFT's configurations are read: one with a field that is not is refused by its name."""

from __future__ import annotations

from ..config import REFUSED, LoraConfig
from ..errors import AdapterError, ConfigError
from ..names import shown
from ..tables import some
from .folder import Folder
from .keys import CONFIG, INFORMATION

# The fields of PEFT's configuration that are read in `peft_folder`, `peft_rest`, `peft_tensors` and
# `token_rows`.
_READ = frozenset(
    [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "init_lora_weights",
        "lora_bias",
        "eva_config",
        "ensure_weight_tying",
        "trainable_token_indices",
    ]
)
_CHECKED = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "bias"),
    *(
        "trainable_token_indices",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
    ),
)


def check_config(content: Folder) -> None:
    """Raise AdapterError unless a folder's configuration is PEFT's, for LoRA that fxlora has."""
    config = content.config
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{content.path / CONFIG} is for {shown(config.get('peft_type'))}; of PEFT's "
            "methods, LORA, VERA and LOKR are read: for another, merge it in PEFT."
        )
    unknown = [k for k, v in config.items() if v and k not in _READ and k not in INFORMATION]
    if unknown:
        why = f" {unknown[0]}: {REFUSED[unknown[0]]}." if unknown[0] in REFUSED else ""
        raise AdapterError(
            f"{content.path / CONFIG} uses {some(unknown)}, which fxlora does not support.{why}"
        )
    try:
        LoraConfig(**{k: config[k] for k in _CHECKED if config.get(k) not in (None, [], {})})
    except (ConfigError, TypeError) as error:
        raise AdapterError(f"{content.path / CONFIG}: {error}") from error
