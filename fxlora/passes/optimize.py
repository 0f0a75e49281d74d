"""Optimize: run graphs that are faster than the explicit ones, and equal to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..module import CapturedModule
from ..module.state import State
from .base import Pass


@dataclass(frozen=True)
class Optimize(Pass):
    """Choose what a module's calls run; the graphs themselves, which other passes read, stay.

    Attributes:
        fast: whether calls run fast graphs, derived from the explicit ones (see fast/), or these.
    """

    fast: bool = True

    def rewrite(self, module: CapturedModule) -> State:
        return replace(module.known, optimized=self.fast)
