"""Write or check a folded file, piece by piece: reading, summing and writing at the same time."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from ...errors import ConfigError, ExportError
from ...module.adapted_weight import folded_weight
from .budget import Budget
from .pieces import ROWS, Copied, Piece, Replaced, Rows

_STEP = 2**26  # bytes that are copied at a time, between two signs of progress
_AHEAD = 2  # pieces that are read before they are needed
Progress = Callable[[int], object]


def write_pieces(
    source: int,
    target: int,
    pieces: Iterable[Piece],
    done: Callable[[Rows | Replaced, Budget], object],
    progress: Progress,
) -> None:
    """Write pieces of a file one after the other, at the end of the target.

    Args:
        source: descriptor of the base's file.
        target: descriptor of the file to write.
        pieces: consecutive pieces.
        done: called after the last piece of each tensor that changes is written.
        progress: called with numbers of bytes that are written.

    Raises:
        OSError: the file cannot be read or written.
        ConfigError: the file has become shorter.
    """
    memory = _Memory()
    budget = Budget()
    with _Writer() as writer:
        for piece, content in _read_ahead(source, pieces, memory):
            if isinstance(piece, Copied):
                writer.submit(_copy, source, target, piece, progress)
                continue
            if isinstance(piece, Rows):
                assert content is not None
                fold_rows(piece, content, budget)
                writer.submit(_write, target, content, progress, after=memory.give_back)
            else:
                writer.submit(_write, target, piece.content(), progress)
            if piece.stop == piece.tensor.stop:
                writer.submit(done, piece, budget)
                budget = Budget()


def fold_rows(piece: Rows, content: torch.Tensor, budget: Budget) -> None:
    """Fold rows of a weight in place, given their bytes.

    Raises:
        ExportError: there is not enough memory.
    """
    assert piece.tensor.dtype is not None
    rows = content.view(piece.tensor.dtype).view(piece.shape)
    try:
        with torch.no_grad():
            folded_weight(
                piece.fold.entries, rows, piece.fold.values, rows, piece.first, budget.observe
            )
    except (MemoryError, RuntimeError) as error:  # torch raises the latter when memory is short
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise ExportError(f"not enough memory to fold '{piece.tensor.name}'.") from error


# ---- reading ------------------------------------------------------------------------------------


class _Memory:
    """Buffers for rows, which are used again: fresh memory costs as much as a copy of it."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []
        self.used = 0
        self.changed = threading.Condition()

    def take(self, size: int, *, wait: bool) -> torch.Tensor | None:
        """Return a buffer; without `wait`, None unless there is room for one."""
        with self.changed:
            while self.used and self.used + size > (_AHEAD + 2) * ROWS:
                if not wait:
                    return None
                self.changed.wait()
            self.used += size
            if size <= ROWS and self.free:
                return self.free.pop()[:size]
        return torch.empty(max(size, ROWS), dtype=torch.uint8)[:size]

    def give_back(self, buffer: torch.Tensor) -> None:
        with self.changed:
            self.used -= len(buffer)
            whole = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
            if len(whole) == ROWS:
                self.free.append(whole)
            self.changed.notify_all()


def _read_ahead(
    source: int, pieces: Iterable[Piece], memory: _Memory
) -> Iterator[tuple[Piece, torch.Tensor | None]]:
    """Yield pieces, rows with their bytes, of which the next are read meanwhile."""
    waiting: deque[tuple[Piece, Future[torch.Tensor] | None]] = deque()
    rest = iter(pieces)
    held: Piece | None = None
    with ThreadPoolExecutor(1) as reader:
        while True:
            while len(waiting) <= _AHEAD:
                piece = held or next(rest, None)
                held = None
                if piece is None:
                    break
                future = None
                if isinstance(piece, Rows):
                    buffer = memory.take(piece.stop - piece.start, wait=not waiting)
                    if buffer is None:
                        held = piece
                        break
                    future = reader.submit(read_into, source, piece.start, buffer)
                waiting.append((piece, future))
            if not waiting:
                return
            piece, future = waiting.popleft()
            yield piece, future.result() if future else None


def read_into(source: int, start: int, buffer: torch.Tensor) -> torch.Tensor:
    """Fill a buffer with a file's bytes from `start` on, and return it."""
    view = memoryview(buffer.numpy())
    while view:
        count = os.preadv(source, [view], start)
        if not count:
            raise ConfigError("the checkpoint became shorter while it was read.")
        view, start = view[count:], start + count
    return buffer


# ---- writing ------------------------------------------------------------------------------------


class _Writer:
    """A thread that does one thing after the other, and nothing more after one that failed."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()
        self.failed = False

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.failed |= error[0] is not None
        self.thread.shutdown()
        for future in () if error[0] else self.waiting:
            future.result()

    def submit(
        self,
        run: Callable[..., object],
        *arguments: Any,
        after: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        """Queue a call, and `after` with its second argument; raise what an earlier one raised."""
        self.waiting.append(self.thread.submit(self._run, run, arguments, after))
        while self.waiting[0].done() or len(self.waiting) > 4 * _AHEAD:
            self.waiting.popleft().result()
            if not self.waiting:
                return

    def _run(
        self,
        run: Callable[..., object],
        arguments: tuple[Any, ...],
        after: Callable[[torch.Tensor], object] | None,
    ) -> None:
        try:
            if not self.failed:
                run(*arguments)
        except BaseException:
            self.failed = True
            raise
        finally:
            if after is not None:
                after(arguments[1])


def _write(target: int, content: torch.Tensor, progress: Progress) -> None:
    view = memoryview(content.numpy())
    while view:
        view = view[os.write(target, view) :]
    progress(len(content))


def _copy(source: int, target: int, piece: Copied, progress: Progress) -> None:
    at = piece.start
    while at < piece.stop:
        count = _copy_some(source, target, at, min(_STEP, piece.stop - at))
        if not count:
            raise ConfigError("the checkpoint became shorter while it was read.")
        at += count
        progress(count)


def _copy_some(source: int, target: int, start: int, count: int) -> int:
    """Copy bytes to the end of the target, inside of the kernel where it can; return how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
    content = os.pread(source, min(count, 2**22), start)
    view = memoryview(content)
    while view:
        view = view[os.write(target, view) :]
    return len(content)


def sequential(descriptor: int) -> None:
    """Tell the kernel that a file is read from its beginning to its end."""
    with suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
