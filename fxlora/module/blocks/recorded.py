"""Recorded calls of submodules: capture puts them into the meta of a graph's nodes and module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...fx.literals import literal
from ..tensor_state import Gradient

CALLS = "module_calls"  # key in a node's meta: the recorded calls around it, outermost first
VALUES = "module_values"  # key in a node's meta: the inputs and outputs of calls that it is

CallKey = tuple[str, int]  # a submodule's path, and the number of its call


@dataclass(frozen=True)
class Value:
    """A leaf of a call's inputs or outputs that a node computes.

    Attributes:
        call: the call.
        output: whether it is an output.
        index: its index among the leaves.
    """

    call: CallKey
    output: bool
    index: int


@dataclass(frozen=True, eq=False)
class Leaves:
    """The inputs or the output of a call: its structure, and its leaves.

    Attributes:
        structure: the pytree structure.
        constants: the leaves; None where a node computes the leaf.
        computed: indices of the leaves that a node computes.
        tensors: those of them that are tensors; the others are sizes.
    """

    structure: Any
    constants: tuple[Any, ...]
    computed: tuple[int, ...]
    tensors: frozenset[int]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaves) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.computed)

    def _key(self) -> tuple[Any, ...]:
        return self.structure, literal(self.constants), self.computed, self.tensors


@dataclass(frozen=True)
class ModuleCall:
    """A call of a submodule, as capture recorded it.

    Attributes:
        key: path and number of the call.
        names: names of its arguments, positional ones first.
        positional: number of positional arguments.
        by_position: number of leading arguments that may be given by position.
        structures: the pytree structure of each argument.
        inputs: the leaves of the list of arguments.
        output: the leaves of the result.
        asks: whether it reads if gradients are enabled, or if tensors have one.
        gradients: the gradient state of each leaf of the arguments, if it reads whether tensors
            have a gradient; None for a leaf that is no tensor.
    """

    key: CallKey
    names: tuple[str, ...]
    positional: int
    by_position: int
    structures: tuple[Any, ...]
    inputs: Leaves
    output: Leaves
    asks: bool = False
    gradients: tuple[Gradient | None, ...] = ()

    @property
    def path(self) -> str:
        return self.key[0]
