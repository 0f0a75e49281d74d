"""Checks of single values of a configuration or a rule, which may be of any type."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, warn
from ..names import shown

MAX_RANK = 2**20
MAX_SIZE = 2**48  # limit for sizes of dimensions, numbers of parameters, layer numbers, …


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value of any type is an integer, not a bool, with low <= value <= high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_finite(value: object) -> bool:
    """Whether a value of any type is an int or float, not a bool, that fits a finite float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # float() overflows for large integers


def check_one_of(name: str, value: object, allowed: Sequence[Any]) -> None:
    if any(isinstance(value, type(one)) and value == one for one in allowed):
        return
    if set(allowed) == {True, False}:
        raise ConfigError(f"{name} must be True or False, not {shown(value)}.")
    *names, last = (f'"{one}"' if isinstance(one, str) else str(one) for one in allowed)
    raise ConfigError(f"{name} must be {', '.join(names)} or {last}, not {shown(value)}.")


def check_rank(name: str, value: object) -> None:
    if not is_whole(value, 1, MAX_RANK):
        bound = f" and ≤ {MAX_RANK}" if is_whole(value, 1, sys.maxsize) else ""
        raise ConfigError(f"{name} must be a whole number ≥ 1{bound}, not {shown(value)}.")


def check_alpha(name: str, value: Any) -> None:
    if not is_finite(value) or value <= 0:
        raise ConfigError(
            f"{name} must be a finite number > 0, not {shown(value)} (at 0 the branch has no "
            "effect)."
        )
    if value != int(value):
        warn(
            f"{name}={value} is not a whole number; it is used as it is, but PEFT's "
            "configuration declares an integer there."
        )


def check_regex(name: str, value: Any, within: str = "{}", groups: int | None = None) -> None:
    """Check a regular expression, also inside the larger one that it becomes part of.

    Args:
        name: the field, for messages.
        value: the regular expression.
        within: the larger expression, with `{}` in the place of the value.
        groups: the number of groups that the larger expression must have; None allows any.

    Raises:
        ConfigError: it is not a valid regular expression, or has groups where it must not.
    """
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {shown(value)} is not a regular expression, but no text.")
    try:
        re.compile(value)
        compiled = re.compile(within.replace("{}", value))
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{name}: {shown(value)} is not a regular expression: {error}."
        ) from error
    if groups is not None and compiled.groups != groups:
        raise ConfigError(f"{name}: {shown(value)} must have no groups: write (?:…).")


def tokens_in(name: str, value: Any) -> tuple[int, ...]:
    """Return the indices of rows as a tuple.

    Raises:
        ConfigError: they are no list of distinct whole numbers, or none at all.
    """
    items = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if not items or not all(is_whole(item, 0, MAX_SIZE) for item in items):
        raise ConfigError(f"{name} must be a list of row numbers ≥ 0, not {shown(value)}.")
    if len(set(items)) < len(items):
        raise ConfigError(f"{name} has a row twice: {shown(value)}.")
    return items


def names_in(name: str, value: Any) -> tuple[str, ...] | None:
    """Return a list of names as a tuple, and a set sorted, or None for None."""
    if value is None:
        return None
    items = list(value) if isinstance(value, set | frozenset) else value
    if not isinstance(items, Sequence) or not all(isinstance(i, str) and i for i in items):
        raise ConfigError(f"{name} must be a name or a list of names, not {shown(value)}.")
    if not items:
        raise ConfigError(f"{name} is an empty list: it would match nothing.")
    return tuple(sorted(items) if isinstance(value, set | frozenset) else items)
