"""Messages that fit on one line of stderr."""

from __future__ import annotations


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(str(error))}".removesuffix(": ")


def one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
