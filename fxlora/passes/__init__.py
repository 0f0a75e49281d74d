"""Passes: rewrites of captured graphs, one per file.

A pass is a frozen dataclass that is called like a function. It takes a CapturedModule and returns a
new one, which shares the storage of frozen parameters with it. Only passes rewrite captured graphs,
except for `module/retarget.py` and `module/casts.py`, which follow a module's `.to()`.
"""

from .active import Activate, chosen
from .base import Pass, as_pass
from .fold_constants import FoldConstants
from .inject import Inject
from .merge_aware import MergeAware
from .optimize import Optimize
from .remove import Remove
from .route import Route
from .to_weight_form import ToWeightForm
from .unroute import Unroute

__all__ = [
    "Activate",
    "FoldConstants",
    "Inject",
    "MergeAware",
    "Optimize",
    "Pass",
    "Remove",
    "Route",
    "ToWeightForm",
    "Unroute",
    "as_pass",
    "chosen",
]
