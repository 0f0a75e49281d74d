"""The passes, one a file: only they rewrite captured graphs.

A pass is a frozen dataclass and a function: it takes a CapturedModule, and returns a new one that
shares what it did not touch.
"""

from .base import Chain, Pass, as_pass
from .fold_constants import FoldConstants
from .inject import Inject
from .remove import Remove
from .to_weight_form import ToWeightForm

__all__ = ["Chain", "FoldConstants", "Inject", "Pass", "Remove", "ToWeightForm", "as_pass"]
