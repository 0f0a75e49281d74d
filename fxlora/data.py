"""Files as data: paths, JSON and TOML from anywhere, read or refused with a typed error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import FxLoraError
from .names import shown

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the newer module under its older name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

MAX_DEPTH = 32  # of lists in lists: nothing that is written here comes near it


def as_path(path: Any, error: type[FxLoraError]) -> Path:
    """A path that an operating system may have.

    Raises:
        error: it is no path.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise error(f"a path is a text or a pathlib.Path, not {shown(path)}.")
    if "\0" in os.fspath(path):
        raise error(f"no path can have a null character: {shown(os.fspath(path))}.")
    return Path(path)


def parsed(text: str, what: str, error: type[FxLoraError], suffix: str = ".json") -> Any:
    """The data in a text of JSON, or of TOML.

    Args:
        what: says in errors what the text is.

    Raises:
        error: the text is not valid, or nested deeper than any real one.
    """
    parse: Callable[[str], Any] = json.loads if suffix == ".json" else tomllib.loads
    try:
        data = parse(text)
    except RecursionError as cause:
        raise error(f"{what} is not valid: it is nested too deep.") from cause
    except ValueError as cause:
        raise error(f"{what} is not valid: {cause}.") from cause
    if _deeper(data, MAX_DEPTH):
        raise error(f"{what} is not valid: it is nested more than {MAX_DEPTH} deep.")
    return data


def read_text(path: Path, what: str, error: type[FxLoraError]) -> str:
    """A file of UTF-8.

    Raises:
        error: the file cannot be read, or is something else.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise error(f"{what}: {cause.strerror or cause}.") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not valid: it is no text in UTF-8 ({cause}).") from cause


def _deeper(data: Any, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        level = [
            inner
            for item in level
            if isinstance(item, Mapping | list)
            for inner in (item.values() if isinstance(item, Mapping) else item)
        ]
        if not level:
            return False
    return True
