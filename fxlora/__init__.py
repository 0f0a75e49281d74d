"""fxlora: LoRA on any weight of any PyTorch model, as a rewrite of its torch.fx graph."""

from .api import adapt, fold, inject, lora_parameters, remove
from .config import LoraConfig, Rule, load_rules
from .costs import report
from .disk.load import load_adapter
from .disk.pt2 import export
from .disk.save import save_adapter
from .errors import (
    AdapterError,
    CaptureError,
    ConfigError,
    ExportError,
    FxLoraError,
    FxLoraWarning,
    InjectError,
    InputError,
    NoMatchError,
    UnsupportedOpError,
    VerificationError,
)
from .frontends import capture
from .matching import match
from .module import CapturedModule
from .module.host import hosted, recorded_calls
from .passes.eva import Initialized, initialize_from
from .plan import Plan
from .proof import Verification, verify
from .reads.sites import Site

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CaptureError",
    "CapturedModule",
    "ConfigError",
    "ExportError",
    "FxLoraError",
    "FxLoraWarning",
    "Initialized",
    "InjectError",
    "InputError",
    "LoraConfig",
    "NoMatchError",
    "Plan",
    "Rule",
    "Site",
    "UnsupportedOpError",
    "Verification",
    "VerificationError",
    "adapt",
    "capture",
    "export",
    "fold",
    "hosted",
    "initialize_from",
    "inject",
    "load_adapter",
    "load_rules",
    "lora_parameters",
    "match",
    "recorded_calls",
    "remove",
    "report",
    "save_adapter",
    "verify",
]
