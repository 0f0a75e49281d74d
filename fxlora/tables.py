"""Text for output: tables (by tabulate), lists of names, near names, and errors on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from .names import printable

FORMATS = {"table": "simple", "github": "github", "html": "html"}


def render(header: Sequence[str], rows: Sequence[Sequence[Any]], style: str = "table") -> str:
    """Return a table as text.

    Columns of numbers, which must be formatted already, are right-aligned. Names and notes may come
    from a file, so each cell is put on one line, with control characters and the style's own
    markup escaped.

    Args:
        header: the column names.
        rows: the cells of each row.
        style: a key of `FORMATS`.
    """
    rows = [[_cell(cell, style) for cell in row] for row in rows]
    align = [_alignment(column) for column in zip(*rows, strict=True)] if rows else None
    return tabulate(rows, header, tablefmt=FORMATS[style], disable_numparse=True, colalign=align)


def some(names: Iterable[str], limit: int = 8) -> str:
    """Return the first `limit` names, and the number of the others, for a message."""
    listed = [printable(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def did_you_mean(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Return a question with the names most similar to an unknown one, or "" if none is.

    Names are compared whole, by their last part, and with as many last parts as the unknown one
    has. The question begins with a space, so that it can follow a sentence.
    """
    parts = name.count(".") + 1

    def likeness(candidate: str) -> float:
        ends = (".".join(candidate.split(".")[-parts:]), candidate)
        pairs = ((name, ends[0]), (name, ends[1]), (_last(name), _last(candidate)))
        return max(difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs)

    ranked = sorted(dict.fromkeys(candidates), key=likeness, reverse=True)
    *more, last = ["", *(f"'{printable(n)}'" for n in ranked[:limit] if likeness(n) > 0.5)]
    listed = " or ".join(filter(None, (", ".join(more[1:]), last)))
    return f" Did you mean {listed}?" if listed else ""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def count(number: int, noun: str) -> str:
    """Return a number with a noun, in the plural unless it is one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def a(noun: str) -> str:
    """Return a noun with its indefinite article, for a message: "an Int8Tensor"."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def _cell(cell: Any, style: str) -> str:
    text = printable(str(cell))  # tabulate escapes HTML itself
    return text.replace("|", "\\|") if style == "github" else text


def _alignment(column: Sequence[Any]) -> str:
    texts = [str(cell) for cell in column if str(cell)]
    return "right" if texts and all(_numeric(text) for text in texts) else "left"


def _numeric(text: str) -> bool:
    bare = text.strip("%x+-").replace(",", "").replace(".", "")
    return bare.isdigit()


def said(error: BaseException) -> str:
    """Return the type and the message of an error on one line."""
    return f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")


def one_line(text: str) -> str:
    """Return the lines of a text joined by spaces, without blank ones, and escaped."""
    return printable(" ".join(line.strip() for line in text.splitlines() if line.strip()))
