"""What folding a checkpoint did, or would do, as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ...plan import Entry
from ...tables import count, render

HEADER = ("tensor", "weight", "dtype", "as", "r", "scaling", "error / update", "update survives")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class FoldedTensor:
    """A weight into which an adapter was folded.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape.
        dtype: its dtype, as the header has it ("BF16").
        layout: the roles of its dimensions (see `Layout`).
        r: the rank; of parts of a packed weight, the sum.
        scaling: the scaling factor s.
        relative_error: the largest rounding error, relative to the largest entry of the update;
            None if nothing was written. Measured on a 32nd of its rows, and eight at least.
        survives: the share of the update that the rounded weight has: with d the exact update,
            ⟨folded - W0, d⟩ / ‖d‖². 1 is all of it. None if nothing was written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    r: int
    scaling: float
    relative_error: float | None = None
    survives: float | None = None

    @classmethod
    def of(
        cls, name: str, dtype: str, entries: tuple[Entry, ...], measured: dict[str, Any] | None
    ) -> FoldedTensor:
        first = entries[0]
        return cls(
            name,
            first.shape,
            dtype,
            first.layout.roles,
            sum(entry.r for entry in entries),
            first.scaling,
            **(measured or {}),
        )

    @property
    def cells(self) -> list[object]:
        measured = self.relative_error is not None and self.survives is not None
        return [
            self.name,
            "x".join(map(str, self.shape)),
            self.dtype,
            self.layout,
            self.r,
            f"{self.scaling:g}",
            *((f"{self.relative_error:.1e}", f"{self.survives:.2%}") if measured else ("", "")),
        ]


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `fold_checkpoint` or `verify_checkpoint`.

    Attributes:
        folded: the weights into which the adapter was folded.
        replaced: names of the tensors that came from the adapter's file as they are.
        copied: the number of tensors that were copied.
        size: bytes of all weights.
        names: how the adapter's names became the checkpoint's.
        left: files beside the checkpoint that were not copied, because they may hold weights.
        resumed: whether an earlier call, which was killed, had begun.
    """

    folded: tuple[FoldedTensor, ...]
    replaced: tuple[str, ...]
    copied: int
    size: int
    names: str
    left: tuple[str, ...] = ()
    resumed: bool = False

    def __str__(self) -> str:
        lines = [render(HEADER, [tensor.cells for tensor in self.folded])] if self.folded else []
        lines.append(
            f"{count(len(self.folded), 'tensor')} folded, {len(self.replaced)} replaced, "
            f"{self.copied:,} copied: {readable(self.size)}, by {self.names}."
        )
        if self.replaced:
            lines.append(f"Replaced: {', '.join(self.replaced)}.")
        if self.left:
            lines.append(f"Not copied, as they may hold other weights: {', '.join(self.left)}.")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(asdict(self), indent=2)


def readable(size: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError
