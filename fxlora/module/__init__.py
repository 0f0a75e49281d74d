"""Captured modules: their graphs, input contract and state, and the Python around regions."""

from .captured import CapturedModule
from .checked import check_captured, check_one_adapter

__all__ = ["CapturedModule", "check_captured", "check_one_adapter"]
