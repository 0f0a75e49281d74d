"""Fast graphs: derived from the explicit ones, equal to them, and run in their place."""

from .chunks import NO_LOSS, ChunkedLoss
from .graph import Fast, fast_graph
from .measure import Shapes, seconds
from .nested import running_nodes
from .recompute import Recomputed

__all__ = [
    "NO_LOSS",
    "ChunkedLoss",
    "Fast",
    "Recomputed",
    "Shapes",
    "fast_graph",
    "running_nodes",
    "seconds",
]
