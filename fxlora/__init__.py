"""fxlora: LoRA on any weight of any PyTorch model, as a rewrite of its torch.fx graph."""

from .capture import capture
from .config import LoraConfig, Rule, load_rules
from .module import CapturedModule
from .plan import Plan
from .rules import match
from .verbs import adapt, fold, inject, lora_parameters, remove
