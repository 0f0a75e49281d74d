"""Example calls that a user gives to capture and verify, as pairs of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import FxLoraError

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(calls: Any, error: type[FxLoraError]) -> list[Call]:
    """Return the user's example calls as tuples and dicts of arguments.

    Args:
        calls: a list of pairs `(args, kwargs)`.
        error: the error to raise if they are anything else.
    """
    given = list(calls) if isinstance(calls, Sequence) else []
    pairs = [
        call
        for call in given
        if isinstance(call, tuple | list)
        and len(call) == 2
        and isinstance(call[0], tuple | list)
        and isinstance(call[1], Mapping)
    ]
    if not given or len(pairs) != len(given):
        raise error(
            "calls must be a list of pairs of a tuple of arguments and a dict of keyword "
            "arguments: calls=[((x,), {}), ((x,), {'mask': mask})]."
        )
    return [(tuple(args), dict(kwargs)) for args, kwargs in pairs]
