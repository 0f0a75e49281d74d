"""Tables, through tabulate, and lists cut short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from .names import printable

FORMATS = {"table": "simple", "github": "github", "html": "html"}


def render(header: Sequence[str], rows: Sequence[Sequence[Any]], style: str = "table") -> str:
    """A table as text. Numbers arrive formatted; columns of them are set right.

    What names and notes say may come from a file: a cell is one line, without control characters
    and without what the style would take for its own.
    """
    rows = [[_cell(cell, style) for cell in row] for row in rows]
    align = [_alignment(column) for column in zip(*rows, strict=True)] if rows else None
    return tabulate(rows, header, tablefmt=FORMATS[style], disable_numparse=True, colalign=align)


def some(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message: the first of them, and how many more there are."""
    listed = [printable(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _cell(cell: Any, style: str) -> str:
    text = printable(str(cell))  # (tabulate escapes HTML by itself)
    return text.replace("|", "\\|") if style == "github" else text


def _alignment(column: Sequence[Any]) -> str:
    texts = [str(cell) for cell in column if str(cell)]
    return "right" if texts and all(_numeric(text) for text in texts) else "left"


def _numeric(text: str) -> bool:
    bare = text.strip("%x+-").replace(",", "").replace(".", "")
    return bare.isdigit()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")


def one_line(text: str) -> str:
    return printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))
