"""What made a module smaller for inference."""

from __future__ import annotations

from dataclasses import dataclass

from ..tables import render


@dataclass(frozen=True)
class Step:
    """One pass of `fxlora.simplify`.

    Attributes:
        name: the pass.
        ops: how many calls of ops it removed from the graphs.
        size: how many bytes of parameters and buffers it removed.
        error: the largest difference in what the module returns and writes, relative to the number
            or to the usual size in its tensor; inf if integers, shapes or writes differ.
        kept: whether it was equal, and so is part of the result.
    """

    name: str
    ops: int
    size: int
    error: float
    kept: bool


@dataclass(frozen=True)
class Simplification:
    """The passes that made a module smaller; print it for a table."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        header = ("pass", "ops removed", "bytes removed", "largest error", "")
        rows = [
            (s.name, f"{s.ops:,}", f"{s.size:,}", f"{s.error:.1e}", "" if s.kept else "left out")
            for s in self.steps
        ]
        return render(header, rows)
