"""Names of fields: an unknown one is a ConfigError that says so, never a TypeError."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import ConfigError
from ..names import shown
from ..tables import did_you_mean, some

Kind = TypeVar("Kind")

_OTHER_NAMES = {"rank": "r", "lora_r": "r", "lora_rank": "r"}  # of fields, in other libraries


def known_keywords(kind: type[Kind]) -> type[Kind]:
    """Have a dataclass refuse keywords that are not its fields, as those of a newer PEFT."""
    made = kind.__init__
    known = [f.name for f in dataclasses.fields(kind) if f.init]  # pyright: ignore[reportArgumentType]

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := set(kwargs).difference(known):
            raise ConfigError(
                f"{kind.__name__} has no field {unknown_names(unknown, known)} Leave it out: no "
                "field is ignored silently."
            )
        made(self, *args, **kwargs)

    kind.__init__ = init
    return kind


def unknown_names(unknown: Iterable[Any], candidates: Iterable[str]) -> str:
    """Return the end of a sentence about unknown names: the first, the nearest known, the others.

    Args:
        unknown: the unknown names, at least one.
        candidates: the known names.
    """
    first, *others = sorted(unknown, key=str)
    near = did_you_mean(_OTHER_NAMES.get(first, str(first)), candidates, limit=1)
    also = f" Also unknown: {some(map(shown, others))}." if others else ""
    return f"{shown(first)}.{near}{also}"
