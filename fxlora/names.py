"""Names that are valid in a graph, and safe display of text from untrusted sources.

torch.fx writes a node's target into generated source code: an identifier as an attribute, any other
string between quotes, unescaped. A graph may contain only names that this code reads back
unchanged. Names that users choose (of adapters and of parts) must also follow a stricter rule,
`WORD_RULE`.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from functools import lru_cache

from torch import nn

WORD_RULE = "up to 64 letters, digits, '_', '-' and inner spaces, and no Python keyword"
ADAPTER_RULE = f"{WORD_RULE} or attribute of nn.Module"

_WORD = re.compile(r"\w(?:[\w -]{0,62}[\w-])?")
_QUOTED = re.compile(r'[^"\\\n\r\0\ud800-\udfff]+')
_MODULE = nn.Module()


@lru_cache(maxsize=1 << 16)
def _word(text: str) -> bool:
    return bool(_WORD.fullmatch(text)) and not keyword.iskeyword(text) and _normal(text)


@lru_cache(maxsize=1 << 16)
def _path(text: str) -> bool:
    return all(map(_reads_back, text.split(".")))


def is_word(text: object) -> bool:
    """Whether a name that a user chose may be a name in the module tree (see `WORD_RULE`)."""
    return isinstance(text, str) and _word(text)


def is_adapter(text: object) -> bool:
    """Whether a text may be the name of an adapter, and so of a submodule (see `ADAPTER_RULE`)."""
    return isinstance(text, str) and _word(text) and not hasattr(_MODULE, text)


def is_path(text: object) -> bool:
    """Whether a dotted name is unchanged when torch.fx writes it into source code."""
    return isinstance(text, str) and _path(text)


def _reads_back(part: str) -> bool:
    """Whether one part of a dotted name is unchanged, as an attribute or between quotes."""
    if part.isidentifier():
        return not keyword.iskeyword(part) and _normal(part)
    return _QUOTED.fullmatch(part) is not None


def _normal(text: str) -> bool:
    """Whether Python's parser, which normalizes identifiers to NFKC, leaves a text unchanged."""
    return unicodedata.normalize("NFKC", text) == text


# ---- showing text -------------------------------------------------------------------------------


def printable(text: str, keep: str = "") -> str:
    """Return text with unprintable characters escaped, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def shown(value: object, limit: int = 200) -> str:
    """Return the repr of any value for a message: one line, escaped, cut to `limit` characters."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a repr may raise anything; an int's does, beyond 4,300 digits
        text = f"a value of type {type(value).__name__}"
    text = " ".join(text.split("\n"))
    return printable(text if len(text) <= limit else f"{text[:limit]}…")
