"""The modules to adapt by default, by architecture: PEFT's choice.

The table is that of PEFT 0.21, `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING` in
peft/utils/constants.py. The architecture is what transformers calls `config.model_type`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..config import ARCHITECTURE, LoraConfig, Rule
from ..errors import ConfigError, NoMatchError
from ..module import CapturedModule
from ..reads.sites import Site
from ..tables import some
from .fused_experts import has_fused_experts, with_fused_experts
from .targets import is_suffix

# (the default target_modules, the architectures that have them)
_DEFAULTS: tuple[tuple[tuple[str, ...] | str, str], ...] = (
    (("q", "v"), "t5 mt5"),
    (("q_proj", "v_proj"), "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm"),
    (("q_proj", "v_proj"), "gemma gemma2 gemma3_text qwen2 qwen3"),
    (("c_attn",), "gpt2 gpt_bigcode"),
    (("query_key_value",), "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon"),
    (("q", "v", "q_proj", "v_proj"), "blip-2"),
    (("query", "value"), "bert roberta xlm-roberta electra layoutlm"),
    (("query_proj", "value_proj"), "deberta-v2"),
    (("in_proj",), "deberta"),
    (("Wqkv",), "mpt"),
    (("c_proj", "c_attn"), "btlm"),
    (("qkv_proj",), "codegen"),
    (("q_proj", "v_proj", "fc1", "fc2"), "phi"),
    (r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
    (("q_proj", "k_proj", "v_proj", "o_proj"), "nemotron_h"),
    (("key", "value", "receptance", "output"), "rwkv"),
    (("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"), "rwkv7"),
)
TARGETS = {name: targets for targets, names in _DEFAULTS for name in names.split()}


def with_architecture(
    rules: Sequence[Rule], module: CapturedModule, sites: tuple[Site, ...]
) -> tuple[Rule, ...]:
    """Return the rules with the names that PEFT takes for the model's architecture.

    These stand for `target_modules="auto"`, and for names of experts that the model holds fused.

    Raises:
        ConfigError: the model has no known architecture, and the rule no target_parameters.
        NoMatchError: the model has none of the modules of its architecture.
    """
    found: list[Rule] = []
    for rule in rules:
        lora = rule.lora
        if lora is not None and lora.target_modules == ARCHITECTURE:
            lora = _resolved(lora, module, sites)
        if lora is not None and lora.target_modules is not None:
            lora = with_fused_experts(lora, module, sites)
        found.append(dataclasses.replace(rule, lora=lora))
    return tuple(found)


def _resolved(config: LoraConfig, module: CapturedModule, sites: tuple[Site, ...]) -> LoraConfig:
    defaults = TARGETS.get(module.known.model_type)
    if config.target_parameters and (defaults is None or has_fused_experts(module, sites)):
        return dataclasses.replace(config, target_modules=())
    if defaults is None:
        raise ConfigError(_no_defaults(module.known.model_type, sites))
    if isinstance(defaults, str):
        return dataclasses.replace(config, target_modules=defaults)
    modules = {path for site in sites for path in site.modules}
    found = tuple(n for n in defaults if any(is_suffix(n, path) for path in modules))
    if not found:
        raise NoMatchError(
            f"target_modules: the defaults of {module.known.model_type}, {some(defaults)}, match "
            f"none of {len(sites)} sites. {_advice(sites)}"
        )
    return dataclasses.replace(config, target_modules=found)


def _no_defaults(model_type: str, sites: Sequence[Site]) -> str:
    known = f"of the architecture '{model_type}'" if model_type else "without config.model_type"
    return (
        "a LoraConfig on its own needs target_modules (or target_parameters): there are no "
        f"defaults for a model {known}. {_advice(sites)}"
    )


def _advice(sites: Sequence[Site]) -> str:
    names = dict.fromkeys(_last_name(site.name) for site in sites)
    return f'Take target_modules="all-linear", or names such as {some(names)}.'


def _last_name(name: str) -> str:
    """Return the last part of a name, with the one before it if it is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
