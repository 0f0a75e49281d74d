"""Several files that belong together: all of them are written, or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportError


@contextmanager
def whole_files(path: Path) -> Generator[Path]:
    """Yield a path in a temporary folder; after the block, move all files there next to the target.

    If the block raises, or a file cannot be moved, the target and its neighbours stay as they were.

    Raises:
        ExportError: the files cannot be written.
    """
    try:
        if path.is_dir():
            raise ExportError(f"cannot write {path}: it is a folder.")
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as cause:
        raise ExportError(f"cannot write {path}: {cause.strerror or cause}.") from cause
    try:
        yield folder / path.name
        _move(folder, path)
    except OSError as cause:
        raise ExportError(f"cannot write {path}: {cause.strerror or cause}.") from cause
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, path: Path) -> None:
    """Move the files of a folder next to a path, the path itself last; undo all if one fails."""
    files = sorted(folder.iterdir(), key=lambda file: (file.name == path.name, file.name))
    kept: dict[Path, Path | None] = {}
    try:
        for file in files:
            target = path.parent / file.name
            before = _kept(target, folder) if len(files) > 1 else None
            file.replace(target)
            kept[target] = before
    except OSError:
        for target, before in kept.items():
            if before is None:
                target.unlink(missing_ok=True)
            else:
                before.replace(target)
        raise


def _kept(target: Path, folder: Path) -> Path | None:
    """Keep what is at a path under another name; None if nothing is there."""
    if not target.exists():
        return None
    before = folder / f"{target.name}.before"
    try:
        os.link(target, before)
    except OSError:  # a file system without hard links
        shutil.copy2(target, before)
    return before
