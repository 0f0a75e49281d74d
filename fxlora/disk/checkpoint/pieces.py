"""A file in pieces: bytes that are copied, rows of weights that are folded, tensors replaced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...lora.dtypes import correctly_rounded
from ...module.folded_weight import Box, cut_dims
from ...plan import Entry
from .changes import Changes, Fold
from .weights_file import REPLACED, TensorAt, WeightsFile

ROWS = 2**21  # bytes of a tensor that are a piece, if they can be folded without the others
_MEASURED = 4  # of so many pieces of a weight, one is measured


@dataclass(frozen=True)
class Copied:
    """Bytes that are copied, from `start` to before `stop`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Rows:
    """Consecutive bytes of a weight that is folded: rows of it, or of a matrix in a stack.

    They are all its bytes if it cannot be folded in such blocks.

    Attributes:
        tensor: the weight.
        fold: its adapters.
        first: the first index in each dimension.
        shape: the numbers of indices.
        start, stop: their bytes.
        measured: whether the error of the rounding is measured on some of them.
    """

    tensor: TensorAt
    fold: Fold
    first: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int
    measured: bool


@dataclass(frozen=True)
class Replaced:
    """Bytes of a tensor that come from the adapter's file.

    Attributes:
        tensor: the tensor.
        value: its value in the adapter's file.
        start, stop: the bytes.
    """

    tensor: TensorAt
    value: torch.Tensor
    start: int
    stop: int

    def write(self, buffer: torch.Tensor) -> torch.Tensor:
        """Write them into a buffer, in the checkpoint's dtype: rounded once, if it is narrower."""
        dtype = REPLACED[self.tensor.code]
        first, last = ((at - self.tensor.start) // dtype.itemsize for at in (self.start, self.stop))
        value = self.value.detach().flatten()[first:last]
        if value.dtype == torch.float64 and dtype.is_floating_point:
            value = correctly_rounded(value, dtype)
        buffer.view(dtype).copy_(value)
        return buffer


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
            yield from _replaced(tensor, changes.replaced[tensor.name])
        at = tensor.stop
    if at < file.size:
        yield Copied(at, file.size)


def _rows(tensor: TensorAt, fold: Fold) -> Iterator[Rows]:
    itemsize = (tensor.stop - tensor.start) // math.prod(tensor.shape)
    # PEFT has the index in a stack fastest in B: each matrix would read all of B.
    fold = replace(fold, values={n: value.contiguous() for n, value in fold.values.items()})
    start = tensor.start
    boxes = Box.whole(tensor.shape).split(_outer_dims(fold.entries), max(1, ROWS // itemsize))
    for number, box in enumerate(boxes):
        stop = start + math.prod(box.shape) * itemsize
        yield Rows(tensor, fold, box.first, box.shape, start, stop, number % _MEASURED == 0)
        start = stop


def _outer_dims(entries: Sequence[Entry]) -> list[int]:
    """Return the outermost dimensions, in which blocks that can be folded are consecutive bytes."""
    cut, shape = cut_dims(entries), entries[0].shape
    return list(itertools.takewhile(lambda d: d in cut or shape[d] == 1, range(len(shape))))


def _replaced(tensor: TensorAt, value: torch.Tensor) -> Iterator[Replaced]:
    entries = max(1, ROWS // max(value.itemsize, REPLACED[tensor.code].itemsize))
    step = entries * REPLACED[tensor.code].itemsize
    for start in range(tensor.start, tensor.stop, step):
        yield Replaced(tensor, value, start, min(start + step, tensor.stop))


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
