"""Example calls that a user gives to capture and verify, as pairs of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import FxLoraError

Call = tuple[tuple[Any, ...], dict[str, Any]]
# The example calls of a method: one or several, or only its positional or keyword arguments.
MethodCalls = Call | Sequence[Call] | torch.Tensor | Mapping[str, Any]


def calls_of(calls: Any, error: type[FxLoraError]) -> list[Call]:
    """Return the user's example calls as tuples and dicts of arguments.

    Args:
        calls: a list of pairs `(args, kwargs)`.
        error: the error to raise if they are anything else.
    """
    given = list(calls) if isinstance(calls, Sequence) else []
    pairs = [(tuple(call[0]), dict(call[1])) for call in given if _is_pair(call)]
    if not given or len(pairs) != len(given):
        raise error(
            "calls must be a list of pairs of a tuple of arguments and a dict of keyword "
            "arguments: calls=[((x,), {}), ((x,), {'mask': mask})]."
        )
    return pairs


def calls_of_methods(methods: Any, error: type[FxLoraError]) -> dict[str, list[Call]]:
    """Return the user's example calls of each method.

    Args:
        methods: a dict from names to a pair `(args, kwargs)`, a list of such pairs, a tensor (the
            only argument), or a mapping of keyword arguments.
        error: the error to raise if they are anything else.
    """
    if not isinstance(methods, Mapping) or not methods:
        raise error("methods must be a dict of names and example calls: methods={'encode': x}.")
    found: dict[str, list[Call]] = {}
    for name, given in methods.items():
        if isinstance(given, torch.Tensor):
            found[name] = [((given,), {})]
        elif isinstance(given, Mapping):
            found[name] = [((), dict(given))]
        elif _is_pair(given) or (isinstance(given, list) and given and all(map(_is_pair, given))):
            found[name] = calls_of([given] if _is_pair(given) else given, error)
        else:
            raise error(
                f"methods[{name!r}] must be a tensor, a dict of keyword arguments, a pair of a "
                "tuple of arguments and a dict of keyword arguments, or a list of such pairs: "
                f"methods={{{name!r}: ((x, mask), {{}})}}."
            )
    return found


def _is_pair(call: Any) -> bool:
    return (
        isinstance(call, tuple | list)
        and len(call) == 2
        and isinstance(call[0], tuple | list)
        and isinstance(call[1], Mapping)
    )
