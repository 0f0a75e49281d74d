"""Write a folded file, piece by piece: sums on all threads, while earlier pieces are written."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ...errors import ConfigError, ExportError
from ...module.folded_weight import Observer, Scratch, folded_weight
from .budget import Budget
from .pieces import ROWS, Copied, Piece, Replaced, Rows
from .trained_over import hashed_span, hashes

_THREADS = 8  # each has some 15 MiB
_STEP = 2**26  # bytes that are copied at a time, between two signs of progress
_NO_MEMORY = "allocate", "start new thread"
_of_thread = threading.local()
Progress = Callable[[int], object]
Done = Callable[[Rows | Replaced, Budget], object]


@contextmanager
def enough_memory(what: str) -> Generator[None]:
    """Raise an ExportError in place of the errors for memory and threads that cannot be had."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch raises the latter
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _NO_MEMORY):
            raise
        raise ExportError(f"not enough memory to {what}.") from error


def write_pieces(
    source: int, target: int, pieces: Iterable[Piece], done: Done, progress: Progress
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
        ExportError: there is not enough memory.
    """
    with threads() as pool, _Writer() as writer:
        memory = _Memory(4 * pool._max_workers * ROWS)
        total = Budget()
        for piece in pieces:
            if isinstance(piece, Copied):
                writer.submit(_copy, source, target, piece, progress)
                continue
            budget = Budget()
            buffer = memory.take(piece.stop - piece.start)
            if isinstance(piece, Rows):
                content = pool.submit(read_and_fold, source, piece, buffer, budget)
            else:
                content = pool.submit(piece.write, buffer)
            writer.submit(
                _write, target, content, progress, after=lambda b=buffer: memory.give_back(b)
            )
            writer.submit(total.add, budget)
            if piece.stop == piece.tensor.stop:
                writer.submit(done, piece, total)
                total = Budget()


@contextmanager
def one_thread() -> Generator[int]:
    """Within the context, torch's functions use one thread each; yield how many they used before.

    On short tensors, several threads wait for each other for longer than they compute.
    """
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield number
    finally:
        torch.set_num_threads(number)


@contextmanager
def threads() -> Generator[ThreadPoolExecutor]:
    """Yield as many threads as torch has, which sum pieces of their own.

    More than a few would sum faster than one thread can write.
    """
    with one_thread() as number, ThreadPoolExecutor(min(number, _THREADS), "fold") as pool:
        yield pool


def read_and_fold(
    source: int, piece: Rows, buffer: torch.Tensor, budget: Budget | None = None
) -> torch.Tensor:
    """Read rows of a weight into a buffer, fold them there, and return their bytes.

    Raises:
        ExportError: there is not enough memory.
    """
    rows = _rows(source, piece, buffer)
    with enough_memory(f"fold '{piece.tensor.name}'"), torch.no_grad():
        if budget and piece.fold.base and piece.fold.base.comparable(piece.tensor.dtype):
            budget.hashes.append(hashes(piece, _span(source, piece, buffer)))
        _fold(piece, rows, budget.observe if budget and piece.measured else None)
        if budget is not None and not bool(rows.sum().isfinite()):
            budget.overflows |= _overflows(source, piece, buffer)
    return buffer


def _rows(source: int, piece: Rows, buffer: torch.Tensor) -> torch.Tensor:
    assert piece.tensor.dtype is not None
    return read_into(source, piece.start, buffer).view(piece.tensor.dtype).view(piece.shape)


def _overflows(source: int, piece: Rows, buffer: torch.Tensor) -> bool:
    """Whether an entry is not finite where the weight's is."""
    assert piece.tensor.dtype is not None
    for start in range(0, len(buffer), ROWS):
        folded = buffer[start : start + ROWS]
        before = read_into(source, piece.start + start, torch.empty_like(folded))
        folded, before = (held.view(piece.tensor.dtype) for held in (folded, before))
        if bool((~folded.isfinite() & before.isfinite()).any()):
            return True
    return False


def _span(source: int, piece: Rows, buffer: torch.Tensor) -> torch.Tensor:
    """Return the bytes of which a piece has the hashes: with some of the next piece's."""
    start, stop = hashed_span(piece)
    mine = buffer[start - piece.start : max(0, stop - piece.start)]
    if stop <= piece.stop or start == stop:
        return mine
    first = max(start, piece.stop)
    rest = read_into(source, first, torch.empty(stop - first, dtype=torch.uint8))
    return torch.cat([mine, rest])


def _fold(piece: Rows, rows: torch.Tensor, observe: Observer | None) -> None:
    """Fold rows in place, in memory that this thread uses again unless there are many."""
    scratch = Scratch()
    if piece.stop - piece.start <= ROWS:
        scratch = _of_thread.__dict__.setdefault("scratch", scratch)
    fold = piece.fold
    folded_weight(fold.entries, rows, fold.values, rows, piece.first, observe, scratch)


# ---- reading ------------------------------------------------------------------------------------


class _Memory:
    """Buffers for rows, which are used again: fresh memory costs as much as a copy of it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.free: list[torch.Tensor] = []
        self.used = 0
        self.changed = threading.Condition()

    def take(self, size: int) -> torch.Tensor:
        """Return a buffer, when there is room for one."""
        with self.changed:
            while self.used and self.used + size > self.limit:
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


def read_into(source: int, start: int, buffer: torch.Tensor) -> torch.Tensor:
    """Fill a buffer with a file's bytes from `start` on, and return it."""
    view = _bytes(buffer)
    while view:
        count = os.preadv(source, [view], start)
        if not count:
            raise ConfigError("the checkpoint became shorter while it was read.")
        view, start = view[count:], start + count
    return buffer


def _bytes(buffer: torch.Tensor) -> memoryview:
    array: Any = buffer.numpy()
    return memoryview(array)


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
        after: Callable[[], object] | None = None,
    ) -> None:
        """Queue a call, and another one for after it; raise what an earlier one raised."""
        self.waiting.append(self.thread.submit(self._run, run, arguments, after))
        while self.waiting and self.waiting[0].done():
            self.waiting.popleft().result()

    def _run(
        self,
        run: Callable[..., object],
        arguments: tuple[Any, ...],
        after: Callable[[], object] | None,
    ) -> None:
        try:
            if not self.failed:
                run(*arguments)
        except BaseException:
            self.failed = True
            raise
        finally:
            if after is not None:
                after()


def _write(target: int, future: Future[torch.Tensor], progress: Progress) -> None:
    content = future.result()
    view = _bytes(content)
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
