"""A file in pieces: bytes that are copied, rows of weights that are folded, tensors replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...lora.dtypes import correctly_rounded
from ...module.adapted_weight import folds_by_rows
from .changes import Changes, Fold
from .weights_file import REPLACED, TensorAt, WeightsFile

ROWS = 2**21  # bytes of a weight that are a piece, if its rows can be folded alone
_MEASURED = 4  # of so many pieces of a weight, one is measured


@dataclass(frozen=True)
class Copied:
    """Bytes that are copied, from `start` to before `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """Rows of a weight that is folded; all, if they cannot be folded one by one.

    Attributes:
        tensor: the weight.
        fold: its adapters.
        first: the first row.
        shape: the shape of the rows.
        start, stop: their bytes.
        measured: whether the error of the rounding is measured on some of them.
    """

    tensor: TensorAt
    fold: Fold
    first: int
    shape: tuple[int, ...]
    start: int
    stop: int
    measured: bool


@dataclass(frozen=True)
class Replaced:
    """A tensor whose bytes come from the adapter's file."""

    tensor: TensorAt
    value: torch.Tensor
    start: int
    stop: int

    def content(self) -> torch.Tensor:
        """Return the tensor's bytes, in the checkpoint's dtype: rounded once, if it is narrower."""
        dtype = REPLACED[self.tensor.code]
        value = self.value.detach().cpu().contiguous()
        if value.dtype == torch.float64 and dtype.is_floating_point:
            value = correctly_rounded(value, dtype)
        return value.to(dtype).contiguous().flatten().view(torch.uint8)


Piece = Copied | Rows | Replaced


def pieces_of(
    file: WeightsFile, changes: Changes, start: int = 0, *, by_tensor: bool = False
) -> Iterator[Piece]:
    """Yield the pieces of a file from a byte on, in order.

    Args:
        file: the base's file.
        changes: what happens to its tensors.
        start: the first byte; inside of a tensor that changes, the pieces begin with that tensor.
        by_tensor: whether copied bytes of several tensors are pieces of their own.
    """
    at = start
    for tensor in file.tensors:
        changed = tensor.name in changes.folded or tensor.name in changes.replaced
        if tensor.stop <= at or tensor.start == tensor.stop or not (changed or by_tensor):
            continue
        if at < tensor.start:
            yield Copied(at, tensor.start)
        if not changed:
            yield Copied(max(at, tensor.start), tensor.stop)
        elif fold := changes.folded.get(tensor.name):
            yield from _rows(tensor, fold)
        else:
            value = changes.replaced[tensor.name]
            yield Replaced(tensor, value, tensor.start, tensor.stop)
        at = tensor.stop
    if at < file.size:
        yield Copied(at, file.size)


def _rows(tensor: TensorAt, fold: Fold) -> Iterator[Rows]:
    rows = tensor.shape[0]
    size = (tensor.stop - tensor.start) // rows
    step = max(1, ROWS // size) if folds_by_rows(fold.entries) else rows
    for first in range(0, rows, step):
        count = min(step, rows - first)
        start = tensor.start + first * size
        shape = (count, *tensor.shape[1:])
        measured = first // step % _MEASURED == 0
        yield Rows(tensor, fold, first, shape, start, start + count * size, measured)


def restart(file: WeightsFile, changes: Changes, written: int, recorded: set[str]) -> int:
    """Return the byte from which to go on with a file of which `written` bytes are there.

    Args:
        file: the base's file.
        changes: what happens to its tensors.
        written: the number of bytes.
        recorded: the names of folded tensors whose results are in the journal.
    """
    for tensor in file.tensors:
        changed = tensor.name in changes.folded or tensor.name in changes.replaced
        if not changed or written <= tensor.start:
            continue
        lost = tensor.name in changes.folded and tensor.name not in recorded
        if written < tensor.stop or lost:
            return tensor.start
    return written
