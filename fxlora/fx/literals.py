"""Equality of values in a graph: Python's `==` takes 2, 2.0 and True, or 0.0 and -0.0, as equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def same_literal(first: Any, second: Any) -> bool:
    """Whether two arguments mean the same to every op: equal, of one type, and of one sign."""
    return literal(first) == literal(second)


def literal(value: Any, name: Callable[[fx.Node], Any] = lambda node: node) -> Any:
    """Return a key for a value: equal keys mean that the values mean the same to every op.

    The key can be hashed if the values in it can.

    Args:
        value: an argument of a call: a number, a node, or any other object, nested in containers.
        name: function of a node that identifies it in the key; by default the node itself.
    """
    if isinstance(value, fx.Node):
        return "node", name(value)
    if isinstance(value, list | tuple):
        named = type(value).__name__ if hasattr(value, "_fields") else "tuple"
        kind = "list" if isinstance(value, list) else named  # torch.fx has a list of its own
        return kind, tuple(literal(item, name) for item in value)
    if isinstance(value, dict):
        pairs = ((literal(key, name), literal(item, name)) for key, item in value.items())
        return "mapping", tuple(pairs)
    if isinstance(value, slice):
        return "slice", literal((value.start, value.stop, value.step), name)
    if isinstance(value, complex):
        return type(value), value.real.hex(), value.imag.hex()
    if isinstance(value, float):
        return type(value), value.hex()  # tells 0.0 from -0.0, and NaN equals itself
    return type(value), value
