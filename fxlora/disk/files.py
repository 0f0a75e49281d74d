"""Atomic writes: a file is written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..data import as_path
from ..errors import FxLoraError


@contextmanager
def whole_file(path: str | Path, error: type[FxLoraError]) -> Generator[Path]:
    """Yield a temporary path next to the target, and rename it onto the target after the block.

    If the block raises, the temporary file is deleted and the target stays unchanged.

    Raises:
        error: the target cannot be written; it stays unchanged.
    """
    target = as_path(path, error)
    try:
        if target.is_dir():
            raise error(f"cannot write {target}: it is a folder.")
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix
        )
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}.") from cause
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as cause:
        raise error(f"cannot write {target}: {cause.strerror or cause}.") from cause
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
