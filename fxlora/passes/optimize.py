"""Optimize: run graphs that are faster than the explicit ones, and equal to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..fast import Fast
from ..module import CapturedModule
from ..module.state import State
from .base import Pass


@dataclass(frozen=True)
class Optimize(Pass):
    """Choose what a module's calls run; the graphs themselves, which other passes read, stay.

    Attributes:
        fast: how the fast graphs that run are derived (see fast/), or None to run these.
    """

    fast: Fast | None

    def rewrite(self, module: CapturedModule) -> State:
        return replace(module.known, optimized=self.fast, merge_aware={})
