"""Paths, and JSON and TOML text, from untrusted sources: read, or refused with a typed error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import FxLoraError
from .names import shown

# Only Python 3.10 has tomli: there, an ignore at the import would be unnecessary, an error.
# pyright: reportMissingImports=false

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - tomllib under its name on PyPI
    import tomli as tomllib

MAX_DEPTH = 32  # of nested lists and tables; valid files are far below it


def as_path(path: Any, error: type[FxLoraError]) -> Path:
    """Return a string or an `os.PathLike` as a `pathlib.Path`.

    Args:
        path: the path.
        error: the type of the error to raise.

    Raises:
        error: it is not a path, or contains a null character.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise error(f"a path must be a string or a pathlib.Path, not {shown(path)}.")
    if "\0" in os.fspath(path):
        raise error(f"a path cannot contain a null character: {shown(os.fspath(path))}.")
    return Path(path)


def parsed(text: str, source: str, error: type[FxLoraError], suffix: str = ".json") -> Any:
    """Parse JSON or TOML.

    Args:
        text: the text to parse.
        source: the source of the text, for messages.
        error: the type of the error to raise.
        suffix: ".json" for JSON; any other suffix means TOML.

    Raises:
        error: the text is not valid, or is nested more than `MAX_DEPTH` levels deep.
    """
    parse: Callable[[str], Any] = json.loads if suffix == ".json" else tomllib.loads
    try:
        data = parse(text)
    except RecursionError as cause:
        raise error(f"{source} is not valid: it is nested too deeply.") from cause
    except ValueError as cause:
        raise error(f"{source} is not valid: {cause}.") from cause
    if _deeper(data, MAX_DEPTH):
        raise error(f"{source} is not valid: it is nested more than {MAX_DEPTH} levels deep.")
    return data


def read_text(path: Path, source: str, error: type[FxLoraError]) -> str:
    """Return the content of a UTF-8 text file.

    Args:
        path: the file.
        source: the file's description, for messages.
        error: the type of the error to raise.

    Raises:
        error: the file cannot be read, or is not valid UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise error(f"{source}: {cause.strerror or cause}.") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{source} is not valid: it is not UTF-8 text ({cause}).") from cause


def _deeper(data: Any, limit: int) -> bool:
    """Whether lists and mappings are nested more than `limit` levels deep."""
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
