"""PEFT's configuration: what it says about the pairs in a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...config import LoraConfig
from ...errors import AdapterError, ConfigError
from ...lora.inits import FILLS
from ...matching.choice import pattern_holds
from ...names import shown
from ...tables import some
from ..as_lora import METHODS
from ..folder import Folder
from ..keys import CONFIG, INFORMATION

# Fields of PEFT's configuration that say what trains, or how, but not what a trained pair computes.
_WITHOUT_EFFECT = frozenset(
    {
        *INFORMATION,
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("lora_dropout", "eva_config", "loftq_config"),
        *("autocast_adapter_dtype", "ensure_weight_tying"),
    }
)
_READ = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("target_parameters", "modules_to_save", "bias", "init_lora_weights"),
    }
)


# Inits that leave the base weight as it is.
_KEEP_BASE = (*FILLS, "eva", "mica")


@dataclass(frozen=True)
class Settings:
    """What PEFT's configuration says about the pairs.

    Attributes:
        config: ranks, alphas and what trains in full.
        transposed: PEFT's `fan_in_fan_out`.
    """

    config: LoraConfig
    transposed: bool

    @classmethod
    def of(cls, content: Folder) -> Settings:
        """Read the configuration of a folder.

        Raises:
            AdapterError: it is not for LoRA, or uses something else that changes the weights.
        """
        config, path = content.config, content.path / CONFIG
        if (kind := config.get("peft_type")) != "LORA":
            known = isinstance(kind, str) and kind in METHODS
            model = " Fold with the model: fxlora fold MODEL --adapter …" if known else ""
            raise AdapterError(f"{path} is for {shown(kind)}, not for LORA.{model}")
        if unknown := [k for k, v in config.items() if v and k not in _WITHOUT_EFFECT | _READ]:
            raise AdapterError(
                f"{path} uses {some(unknown)}, which fxlora cannot fold into a checkpoint."
            )
        init = config.get("init_lora_weights", True)
        if not isinstance(init, bool) and init not in _KEEP_BASE:
            raise AdapterError(
                f"{path} has init_lora_weights={shown(init)}, which changes the weights that the "
                "adapter is added to. Convert it with PEFT's save_pretrained(…, "
                "path_initial_model_for_weight_conversion=…), or fold with the model: "
                "fxlora fold MODEL --adapter …"
            )
        values = {k: v for k, v in config.items() if k in _READ and v is not None}
        values.pop("init_lora_weights", None)
        transposed = config.get("fan_in_fan_out", False)
        if not isinstance(transposed, bool):
            raise AdapterError(f"{path}: fan_in_fan_out must be true or false: {shown(transposed)}")
        try:
            return cls(LoraConfig(**values), transposed)
        except ConfigError as error:
            raise AdapterError(f"{path}: {error}") from error

    def rank(self, target: str) -> int:
        return int(_by_pattern(self.config.rank_pattern, target, self.config.r))

    def alpha(self, target: str) -> float:
        return _by_pattern(self.config.alpha_pattern, target, self.config.lora_alpha)

    def targets(self, parameter: str) -> bool:
        """Whether PEFT adapts a parameter by its own name."""
        named = self.config.target_parameters or ()
        return any(parameter == n or parameter.endswith(f".{n}") for n in named)

    def trains(self, name: str, adapted: set[str]) -> bool:
        """Whether PEFT trains a tensor of the base model in full.

        Args:
            name: its name.
            adapted: the paths of the adapted layers.
        """
        owner, _, last = name.rpartition(".")
        mode = self.config.bias
        if last == "bias" and (mode == "all" or (mode == "lora_only" and owner in adapted)):
            return True
        paths = itertools.accumulate(owner.split("."), "{}.{}".format)
        named = tuple(self.config.modules_to_save or ())
        return any(path.endswith(named) for path in paths) if named else False


def _by_pattern(patterns: Mapping[str, Any], target: str, default: Any) -> Any:
    return next((v for key, v in patterns.items() if pattern_holds(key, target)), default)
