"""The folder in which a checkpoint is written, until it is whole and takes its place.

It is next to the target, has a name of its own for each target, and is locked while a process
writes. After a kill the next call with the same inputs goes on where this one was: bytes are
written in order, so the size of a file says how much of it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ExportError, FxLoraError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None

_NAMES = {"lock", "inputs", "journal", "content"}  # in the folder
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Work:
    """A folder in use.

    Attributes:
        folder: the folder.
        records: what the journal says, by the name of a tensor.
        resumed: whether an earlier call began it.
    """

    folder: Path
    records: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    resumed: bool = False

    @property
    def content(self) -> Path:
        """The folder of the files that are being written."""
        return self.folder / "content"

    def record(self, name: str, data: dict[str, Any]) -> None:
        """Note in the journal that a tensor is written."""
        self.records[name] = data
        with (self.folder / "journal").open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, data]) + "\n")

    def begin(self, key: Any) -> None:
        """Go on with what is there, if it was begun with the same inputs; else begin anew.

        After a crash of the machine, too, it begins anew: what was written may not be on the disk.
        """
        boot = _BOOT.read_text() if _BOOT.exists() else os.urandom(8).hex()
        digest = hashlib.sha256(json.dumps([boot, key]).encode()).hexdigest()
        state = self.folder / "inputs"
        self.resumed = state.exists() and state.read_text() == digest and self.content.exists()
        if self.resumed:
            self.records = _journal(self.folder / "journal")
            return
        shutil.rmtree(self.content, ignore_errors=True)
        for name in ("journal", "inputs"):
            (self.folder / name).unlink(missing_ok=True)
        self.content.mkdir()
        state.write_text(digest)


def _journal(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a journal, whose last line a kill may have cut."""
    found: dict[str, dict[str, Any]] = {}
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, data = json.loads(line)
            found[name] = data
    return found


@contextmanager
def work_for(target: Path) -> Generator[Work]:
    """Yield the locked folder in which a target is written, and remove it after the block.

    It stays if the block is interrupted.

    Raises:
        ExportError: the folder cannot be written to, or another process writes to the target.
    """
    folder = target.parent / f".{target.name}.fxlora"
    try:
        lock = _locked(folder, target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error.strerror or error}.") from error
    try:
        yield Work(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, FxLoraError):
            raise
        if isinstance(error, OSError):
            raise ExportError(f"cannot write {target}: {error.strerror or error}.") from error
        if isinstance(error, MemoryError):
            raise ExportError(f"cannot write {target}: not enough memory.") from error
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(folder: Path, target: Path) -> int:
    """Make the folder, and return the descriptor that holds its lock."""
    path = folder / "lock"
    while True:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink() or {path.name for path in folder.glob("*")} - _NAMES:
            raise ExportError(
                f"cannot write {target}: {folder}, where it is written first, holds something "
                "else. Move that away, or choose another target."
            )
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just finished, and removed the folder
            continue
        if fcntl is None:  # pragma: no cover - Windows, where an open file cannot be removed
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ExportError(
                f"another process is writing {target}. Wait for it, or choose another target."
            ) from error
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)
