"""CapturedModule, the contract on its inputs, and the Python around it."""

from .captured import CapturedModule

__all__ = ["CapturedModule"]
