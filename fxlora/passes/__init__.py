"""The passes: one a file, each a frozen dataclass on torch.fx's PassBase. Only they change graphs.

A pass takes a CapturedModule and returns a new one that shares what it did not touch.
"""

from .distribute import Distribute
from .fold_constants import FoldConstants
from .inject import Inject
from .remove import Remove

__all__ = ["Distribute", "FoldConstants", "Inject", "Remove"]
