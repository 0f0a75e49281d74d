"""Tables, through tabulate, and lists cut short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

FORMATS = {"table": "simple", "github": "github", "html": "html"}


def render(header: Sequence[str], rows: Sequence[Sequence[Any]], style: str = "table") -> str:
    """A table as text. Numbers arrive formatted; columns of them are set right."""
    align = [_alignment(column) for column in zip(*rows, strict=True)] if rows else None
    return tabulate(rows, header, tablefmt=FORMATS[style], disable_numparse=True, colalign=align)


def some(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message: the first of them, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _alignment(column: Sequence[Any]) -> str:
    texts = [str(cell) for cell in column if str(cell)]
    return "right" if texts and all(_numeric(text) for text in texts) else "left"


def _numeric(text: str) -> bool:
    bare = text.strip("%x+-").replace(",", "").replace(".", "")
    return bare.isdigit()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")


def one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
