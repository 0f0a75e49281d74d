"""LoraConfig and Rule: the rules by which weights are adapted, as data checked on creation."""

from .checks import MAX_RANK, MAX_SIZE, is_finite, is_whole
from .files import as_rules, config_to_data, load_rules, rule_to_data, rules_from_data
from .lora_config import ALL_LINEAR, ARCHITECTURE, LoraConfig, Names
from .peft_fields import DESCRIPTIONS, REFUSED, TASKS
from .rule import Rule, Rules

__all__ = [
    "ALL_LINEAR",
    "ARCHITECTURE",
    "DESCRIPTIONS",
    "MAX_RANK",
    "MAX_SIZE",
    "REFUSED",
    "TASKS",
    "LoraConfig",
    "Names",
    "Rule",
    "Rules",
    "as_rules",
    "config_to_data",
    "is_finite",
    "is_whole",
    "load_rules",
    "rule_to_data",
    "rules_from_data",
]
