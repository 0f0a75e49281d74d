"""Calls of ops on tensor subclasses, such as quantised weights, which choose what is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Position:
    """The place of an argument of an overload, among the arguments of a function."""

    number: int


class Dispatched:
    """A node's target that computes an overload by the function of torch that users call.

    A tensor subclass may implement a function (`F.linear`) without the overload that the function
    calls on plain tensors. The arguments of the node are the overload's, so that all that
    is known of the overload holds for the node.
    """

    writes_nothing = True

    def __init__(
        self,
        overload: torch._ops.OpOverload,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Make a target from a call of the function, with a `Position` for each tensor in it."""
        self.overload, self.function = overload, function
        self.leaves, self.structure = pytree.tree_flatten((args, kwargs))
        self.__name__ = self.__qualname__ = overload.overloadpacket.__name__
        self.overloadpacket, self.tags = overload.overloadpacket, overload.tags
        self._schema = overload._schema

    def __call__(self, *given: Any) -> Any:
        leaves = [given[v.number] if isinstance(v, Position) else v for v in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{self.overload} by {self.function.__name__}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dispatched) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.overload)

    def _key(self) -> tuple[Any, ...]:
        return self.overload, self.function, self.structure, repr(self.leaves)


def overload_of(target: Any) -> Any:
    """Return the overload that a node's target computes, or else the target itself."""
    return target.overload if isinstance(target, Dispatched) else target
