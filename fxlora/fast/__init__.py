"""Fast graphs: derived from the explicit ones, equal to them, and run in their place."""

from .graph import fast_graph

__all__ = ["fast_graph"]
