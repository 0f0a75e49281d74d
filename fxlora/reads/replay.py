"""Steps of a chain of ops, run on stand-ins for a weight that show where its entries go."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..fx.calls import frozen


class UnknownStepError(Exception):
    """The chain of ops cannot be replayed."""


@dataclass(frozen=True, eq=False)
class Step:
    """One call in the chain, with the number of the step or constant for each input node."""

    node: fx.Node
    given: Mapping[fx.Node, int]

    @property
    def key(self) -> Hashable:
        return self.node.op, self.node.target, frozen(self.node, self.given.__getitem__)

    @property
    def inert(self) -> bool:
        """Whether the call has no dtype or device argument, by which it might cast or copy."""
        named: list[Any] = []
        map_aggregate((self.node.args, dict(self.node.kwargs)), named.append)
        return not any(isinstance(n, torch.dtype | torch.device) for n in named)

    def run(self, values: Sequence[Any], constant: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
        """Run the call on the values of earlier steps; `constant` converts other arguments."""

        def seen(leaf: Any) -> Any:
            return values[self.given[leaf]] if isinstance(leaf, fx.Node) else constant(leaf)

        args: Any = map_aggregate(self.node.args, seen)
        kwargs: Any = map_aggregate(dict(self.node.kwargs), seen)
        if self.node.op == "call_method":
            return getattr(args[0], str(self.node.target))(*args[1:], **kwargs)
        function: Any = self.node.target
        return function(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class StandIn:
    """Stand-ins for a tensor that depends on the weight, in both runs.

    Attributes:
        names: the number (from 1) of the weight's entry at each position, as float64.
        values: the random values of the same entries.
        entry: which positions hold entries of the weight; at others, both runs are equal.
        verbatim: whether the steps only moved entries.
        intact: whether the steps only moved and cast entries.
    """

    names: Tensor
    values: Tensor
    entry: Tensor
    verbatim: bool
    intact: bool


class Replay:
    """Runs steps on stand-ins for a weight with `entries` entries."""

    def __init__(self, entries: int) -> None:
        generator = torch.Generator().manual_seed(entries)
        # Many magnitudes and both signs: a clamp or a threshold changes some values, not all.
        self.table = torch.randn(entries + 1, generator=generator, dtype=torch.float64)
        sizes = torch.rand(entries + 1, generator=generator, dtype=torch.float64)
        self.table *= 10 ** (60 * sizes - 30)

    def start(self, weight: Tensor) -> StandIn:
        """Return the stand-in for the weight itself, with the weight's strides."""
        shape, numbers = weight.shape, torch.arange(1, weight.numel() + 1, dtype=torch.float64)
        names = torch.empty_strided(shape, weight.stride(), dtype=torch.float64)
        names.copy_(numbers.reshape(shape))
        everywhere = torch.ones(shape, dtype=torch.bool)
        return StandIn(names, self._values(names), everywhere, True, True)

    def after(self, step: Step, values: Sequence[Any]) -> Any:
        """Return the stand-in for a step's result, or the result if no input is a stand-in.

        Raises:
            UnknownStepError: the step neither moves data nor is pointwise, or draws random numbers.
        """
        given = [values[number] for number in step.given.values()]
        stands = [v for value in given for v in _items(value) if isinstance(v, StandIn)]
        if not stands:
            return _constant(step, values)
        verbatim = step.inert and len(stands) == len(given) and all(s.verbatim for s in stands)
        try:
            names = step.run([_side(v, "names") for v in values], wide)
            found = step.run([_side(v, "values") for v in values], wide)
            return self._agreed(names, found, verbatim, all(s.intact for s in stands))
        except Exception:  # noqa: BLE001 - a call raises anything for unsupported inputs
            return self._pointwise(step, given)

    def _agreed(self, names: Any, values: Any, verbatim: bool, intact: bool) -> Any:
        """Return the results of both runs as stand-ins, if they moved the same entries.

        Raises:
            UnknownStepError: they did not.
        """
        if isinstance(names, list | tuple):
            pairs = zip(names, values, strict=True)
            return [self._agreed(name, value, verbatim, intact) for name, value in pairs]
        if not isinstance(names, Tensor) or not names.is_floating_point():
            raise UnknownStepError
        inside = (names > 0) & (names < len(self.table)) & (names == names.round())
        entry = inside & (self._values(torch.where(inside, names, 0.0)) == values)
        if not bool((entry | (names == values)).all()):
            raise UnknownStepError
        return StandIn(names, values, entry, verbatim, intact)

    def _pointwise(self, step: Step, given: Sequence[Any]) -> StandIn:
        """Return the stand-in for a pointwise op, which leaves the entries in their positions.

        Raises:
            UnknownStepError: torch does not tag the op as pointwise, or its inputs have different
                entries at one position.
        """
        if torch.Tag.pointwise not in getattr(step.node.target, "tags", ()):
            raise UnknownStepError
        tensors = (_side(value, "names") for value in given)
        shape = torch.broadcast_shapes(*(t.shape for t in tensors if isinstance(t, Tensor)))
        first, *others = (
            torch.where(v.entry, v.names, 0.0).expand(shape)
            for v in given
            if isinstance(v, StandIn)
        )
        if not all(torch.equal(first, other) for other in others):
            raise UnknownStepError
        entry = first > 0
        return StandIn(first, torch.where(entry, self._values(first), 0.0), entry, False, False)

    def _values(self, names: Tensor) -> Tensor:
        return self.table[names.long()]


def _constant(step: Step, values: Sequence[Any]) -> Any:
    """Return the value of a step that does not depend on the weight.

    Raises:
        UnknownStepError: two runs differ, because the step draws random numbers.
    """
    first, second = (wide(step.run(values, wide)) for _ in range(2))
    alike = torch.equal(first, second) if isinstance(first, Tensor) else first == second
    if not alike:
        raise UnknownStepError
    return first


def _items(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list | tuple) else [value]


def _side(value: Any, side: str) -> Any:
    """Replace stand-ins by their tensors in one run: `names` or `values`."""
    if isinstance(value, list):
        return [_side(item, side) for item in value]
    return getattr(value, side) if isinstance(value, StandIn) else value


def wide(leaf: Any) -> Any:
    """Convert a constant to suit stand-ins: floating point to float64, devices to the CPU."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if isinstance(leaf, torch.dtype):
        return torch.float64 if leaf.is_floating_point else leaf
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
