"""The functions that turn one module into another."""

from .adapting import activate, adapt, inject, match
from .folding import fold, remove, unfold
from .more_calls import capture_more
from .training import explicit, lora_parameters, merge_aware, optimize

__all__ = [
    "activate",
    "adapt",
    "capture_more",
    "explicit",
    "fold",
    "inject",
    "lora_parameters",
    "match",
    "merge_aware",
    "optimize",
    "remove",
    "unfold",
]
