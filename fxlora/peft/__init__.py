"""PEFT's names over fxlora's functions: a script written for PEFT changes its import.

    from fxlora.peft import LoraConfig, TaskType, get_peft_model

The one thing that is new is an example of the call to capture: `get_peft_model(model, config,
input_ids=…)`. Whatever fxlora does not do raises a `ConfigError` that says what to do instead.
"""

from ..config import LoraConfig
from .entry import get_peft_model
from .model import PeftModel
from .status import LayerStatus, ModelStatus
from .tasks import TaskType

__all__ = [
    "LayerStatus",
    "LoraConfig",
    "ModelStatus",
    "PeftModel",
    "TaskType",
    "get_peft_model",
]
