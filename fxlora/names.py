"""Names: which texts may name something in a graph, and how text from anywhere is shown.

torch.fx writes a target into generated source: an identifier as an attribute, anything else
between quotes, unescaped. No name may get into a graph that does not read back from there as
itself; what is made up (the name of an adapter, of a part) keeps to a grammar of its own.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from functools import lru_cache

from torch import nn

WORD_RULE = "up to 64 letters, digits, '_', '-' and spaces within, and no keyword of Python's"
ADAPTER_RULE = f"{WORD_RULE}, nor an attribute of every nn.Module"

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
    """Whether a name that somebody made up may be one in the module's tree (see `WORD_RULE`)."""
    return isinstance(text, str) and _word(text)


def is_adapter(text: object) -> bool:
    """Whether a word can be an adapter's name: a module's that no attribute of modules hides."""
    return isinstance(text, str) and _word(text) and not hasattr(_MODULE, text)


def is_path(text: object) -> bool:
    """Whether torch.fx writes a dotted name as source that means the same name."""
    return isinstance(text, str) and _path(text)


def _reads_back(part: str) -> bool:
    if part.isidentifier():
        return not keyword.iskeyword(part) and _normal(part)
    return _QUOTED.fullmatch(part) is not None


def _normal(text: str) -> bool:
    """Whether Python's parser leaves an identifier as it is."""
    return unicodedata.normalize("NFKC", text) == text


# ---- showing text -------------------------------------------------------------------------------


def printable(text: str, keep: str = "") -> str:
    """Text without control characters: they are escaped, but for those to keep."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def shown(value: object, limit: int = 200) -> str:
    """A value of any origin for a message: its repr, on one line, cut short."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a repr may raise whatever it likes; integers do beyond 4,300 digits
        text = f"a value of type {type(value).__name__}"
    text = " ".join(text.split("\n"))
    return printable(text if len(text) <= limit else f"{text[:limit]}…")
