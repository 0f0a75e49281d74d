"""fxlora: LoRA on any weight of any PyTorch model, as a rewrite of its torch.fx graph."""

from . import peft as peft
from .api import (
    activate,
    adapt,
    capture_more,
    explicit,
    fold,
    inject,
    lora_parameters,
    match,
    merge_aware,
    optimize,
    remove,
    unfold,
)
from .arithmetic.combine import combine
from .arithmetic.extract import extract
from .arithmetic.scale import scale_adapter
from .config import LoraConfig, Rule, load_rules
from .costs import report
from .delivery import export, export_adapter
from .disk.checkpoint.fold import fold_checkpoint
from .disk.checkpoint.report import CheckpointReport, FoldedTensor
from .disk.checkpoint.verify import verify_checkpoint
from .disk.load import load_adapter
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
    MisfitError,
    NoMatchError,
    NotCapturedError,
    QuantisedError,
    SubmoduleError,
    UnsupportedOpError,
    VerificationError,
)
from .frontends import capture
from .hosts.host import hosted, recorded_calls
from .hosts.merged_source import merged
from .hosts.pushed_weights import fold_into
from .lora.layout import Layout
from .lora.ops import register_op
from .lora.row import Op, Read
from .lora.variants import Variant, register_variant
from .module import CapturedModule
from .passes.eva import Initialized, initialize_from
from .passes.shard_adapters import ShardedTensor, ShardPlan, shard_plan
from .pictures import draw
from .plan import Entry, Plan
from .proof import AdaptedRead, SiteCheck, Verification, verify
from .proof.simplify import simplify
from .reads.readers import Reader
from .reads.sites import Site
from .routed import route, swap_adapter, take_adapter

__version__ = "0.1.0"

__all__ = [
    "AdaptedRead",
    "AdapterError",
    "CaptureError",
    "CapturedModule",
    "CheckpointReport",
    "ConfigError",
    "Entry",
    "ExportError",
    "FoldedTensor",
    "FxLoraError",
    "FxLoraWarning",
    "Initialized",
    "InjectError",
    "InputError",
    "Layout",
    "LoraConfig",
    "MisfitError",
    "NoMatchError",
    "NotCapturedError",
    "Op",
    "Plan",
    "QuantisedError",
    "Read",
    "Reader",
    "Rule",
    "ShardPlan",
    "ShardedTensor",
    "Site",
    "SiteCheck",
    "SubmoduleError",
    "UnsupportedOpError",
    "Variant",
    "Verification",
    "VerificationError",
    "activate",
    "adapt",
    "capture",
    "capture_more",
    "combine",
    "draw",
    "explicit",
    "export",
    "export_adapter",
    "extract",
    "fold",
    "fold_checkpoint",
    "fold_into",
    "hosted",
    "initialize_from",
    "inject",
    "load_adapter",
    "load_rules",
    "lora_parameters",
    "match",
    "merge_aware",
    "merged",
    "optimize",
    "recorded_calls",
    "register_op",
    "register_variant",
    "remove",
    "report",
    "route",
    "save_adapter",
    "scale_adapter",
    "shard_plan",
    "simplify",
    "swap_adapter",
    "take_adapter",
    "unfold",
    "verify",
    "verify_checkpoint",
]
