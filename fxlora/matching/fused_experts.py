"""Names that experts had in transformers 4, for models that hold them fused since 5.

PEFT rewrites a configuration for such a model (peft/utils/transformers_weight_conversion.py,
`_convert_peft_config_moe`): the names of projections that are now parts of a stack become
`target_parameters`, with the rank and alpha of all parts together, and "all-linear" has them too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from ..config import ALL_LINEAR, LoraConfig
from ..errors import ConfigError
from ..module import CapturedModule
from ..reads.sites import Site
from ..tables import some
from .targets import Targets, is_suffix

# For each family of architectures, the parameter that holds each former projection.
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {
    "gate": "gate.weight",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
_FAMILIES = (
    (_MIXTRAL, "minimax minimax_m2 mixtral"),
    (_QWEN, "qwen3_moe qwen3_next qwen3_omni_moe qwen3_omni_moe_thinker"),
    (_QWEN, "qwen3_omni_moe_text deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite"),
    (_QWEN, "glm4v_moe glm_moe_dsa olmoe flex_olmo ernie4_5_moe hunyuan_v1_moe dots1 afmoe"),
    (_QWEN, "longcat_flash solar_open mellum beam sarvam_mla exaone_moe cohere2_moe"),
    (_QWEN, "Dots3NoteTextModel UnlimitedOcrTextModel"),
)
FORMER = {name: former for former, names in _FAMILIES for name in names.split()}


def has_fused_experts(module: CapturedModule, sites: Iterable[Site]) -> bool:
    """Whether a model holds what were projections of experts as parts of a stack."""
    stacks = {*FORMER.get(module.known.model_type, {}).values()}
    names = [site.parameter for site in sites if len(site.shape) == 3]
    return any(is_suffix(stack, name) for stack in stacks for name in names)


def with_fused_experts(
    config: LoraConfig, module: CapturedModule, sites: tuple[Site, ...]
) -> LoraConfig:
    """Return the configuration that PEFT makes of one for a model with fused experts.

    Raises:
        ConfigError: it names only some of the projections that are fused, or has an expression
            that PEFT would take for other modules than it matches.
    """
    if not has_fused_experts(module, sites):
        return config
    family = FORMER[module.known.model_type]
    targets = config.target_modules or ()
    if targets == ALL_LINEAR:
        return _all_linear(config, family, module, sites)
    if isinstance(targets, str):
        _check_expression(config, family, module, sites)
        return config
    return _renamed(config, targets, family)


def _renamed(config: LoraConfig, targets: Iterable[str], family: Mapping[str, str]) -> LoraConfig:
    """Return a configuration with the names of former projections as parameters."""
    old = {target: next((o for o in family if is_suffix(o, target)), None) for target in targets}
    found = {name for name in old.values() if name is not None}
    if not found:
        return config
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for new in dict.fromkeys(family[name] for name in found):
        parts = [name for name in family if family[name] == new]
        if missing := [name for name in parts if name not in found]:
            raise ConfigError(
                f"target_modules: {some(sorted(found & {*parts}))} cannot be adapted without "
                f"{some(missing)}: the model holds them fused, in {new}. Name both, or put {new} "
                "into target_parameters."
            )
        if len(parts) > 1:
            ranks[rf".*\.{re.escape(new)}"] = config.rank * len(parts)
            alphas[rf".*\.{re.escape(new)}"] = config.lora_alpha * len(parts)
    parameters = [*(config.target_parameters or ()), *(family[name] for name in found)]
    return dataclasses.replace(
        config,
        target_modules=[target for target, name in old.items() if name is None],
        target_parameters=sorted(dict.fromkeys(parameters)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _all_linear(
    config: LoraConfig,
    family: Mapping[str, str],
    module: CapturedModule,
    sites: tuple[Site, ...],
) -> LoraConfig:
    """Return the configuration with the last names of all linear layers and former ones."""
    linear = Targets(config, module, sites).linear
    layers = [site for site in sites if not linear.isdisjoint(site.names)]
    held = [name for site in sites for name in site.names]
    former = [old for old, new in family.items() if any(is_suffix(new, name) for name in held)]
    names = [site.name.rpartition(".")[2] for site in layers]
    return _renamed(config, dict.fromkeys([*names, *former]), family)


def _check_expression(
    config: LoraConfig,
    family: Mapping[str, str],
    module: CapturedModule,
    sites: tuple[Site, ...],
) -> None:
    """Raise for an expression that PEFT, which takes the last names it finds, would widen."""
    mine = Targets(config, module, sites).by_module
    names = sorted({key.rpartition(".")[2] for key in mine.values()})
    listed = dataclasses.replace(config, target_modules=names) if names else config
    pattern = str(config.target_modules)
    stacks = [name for site in sites for name in site.names if len(site.shape) == 3]
    former = [f"{stack.rpartition('.')[0]}.{old}" for stack in stacks for old in family]
    experts = any(re.fullmatch(pattern, name) for name in (*stacks, *former))
    if (
        experts
        or not {*names}.isdisjoint(family)
        or Targets(listed, module, sites).by_module != mine
    ):
        raise ConfigError(
            f"target_modules={pattern!r}: in a model with fused experts, PEFT takes the last names "
            f"of what an expression matches, wherever they are. Give a list of names, and the "
            "experts in target_parameters."
        )
