"""Captured modules: their graphs, input contract and state, and the Python around regions."""

from .captured import CapturedModule
from .checked import check_captured

__all__ = ["CapturedModule", "check_captured"]
