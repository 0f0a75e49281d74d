"""What a captured graph holds for: the contract on its inputs, checked at every call.

An exported graph is specialised to the example it was made from: constants are baked in, a
static dimension of size 1 would broadcast, and a branch of the source on a size was taken once
for all. The contract holds what torch.export assumed, and turns any other call into an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension of size `scale * symbol + offset`, with the symbol between bounds."""

    symbol: str
    scale: int = 1
    offset: int = 0
    min: int = 0
    max: int | None = None

    def assume(self, size: torch.SymInt) -> None:
        """Have torch.export assume this of a size, so that a re-export keeps the bounds."""
        torch._check(size >= self.scale * self.min + self.offset)
        if self.max is not None:
            torch._check(size <= self.scale * self.max + self.offset)

    def solve(self, size: int) -> int | None:
        """The symbol's value for a dimension of this size, or None where there is none."""
        value = size - self.offset
        if self.scale != 1:  # torch.compile traces these, but not divmod
            if value % self.scale:
                return None
            value = value // self.scale
        if value < self.min or (self.max is not None and value > self.max):
            return None
        return value

    def describe(self) -> str:
        form = self.symbol if self.scale == 1 else f"{self.scale}*{self.symbol}"
        form += f"{self.offset:+d}" if self.offset else ""
        return f"{form} with {self.symbol} in [{self.min}, {'∞' if self.max is None else self.max}]"


@dataclass(frozen=True)
class TensorInput:
    """A tensor input: its dimensions and its dtype (for integers, any integer will do)."""

    name: str
    dims: tuple[int | Dimension, ...]
    dtype: torch.dtype

    def check(self, value: object, bound: dict[str, tuple[int, str]]) -> None:
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{self.name}: captured as a tensor, called with {type(value).__name__}. "
                "Give a tensor (torch.as_tensor makes one of an array or a number)."
            )
        integers = category_of(self.dtype) == category_of(value.dtype) == "integer"
        if value.dtype != self.dtype and not integers:
            raise InputError(
                f"{self.name}: captured as {self.dtype}, called with {value.dtype}. "
                "Convert it, or capture again."
            )
        if value.ndim != len(self.dims):
            raise InputError(
                f"{self.name}: captured with {len(self.dims)} dimensions, "
                f"called with shape {tuple(value.shape)}."
            )
        for axis, dim in enumerate(self.dims):
            self._check_dimension(axis, dim, value.shape[axis], bound)

    def _check_dimension(
        self, axis: int, dim: int | Dimension, size: int, bound: dict[str, tuple[int, str]]
    ) -> None:
        where = f"{self.name}, dimension {axis}"
        if isinstance(dim, int):
            if size != dim:
                raise InputError(
                    f"{where}: captured as {dim}, called with {size}. Capture with "
                    f"dynamic_shapes that leave dimension {axis} of {self.name} open, "
                    "or with an example of this size."
                )
            return
        if isinstance(size, torch.SymInt):
            dim.assume(size)
            return
        value = dim.solve(size)
        if value is None:
            raise InputError(f"{where}: captured as {dim.describe()}, called with {size}.")
        first, place = bound.setdefault(dim.symbol, (value, where))
        if value != first:
            raise InputError(
                f"{where}: is {size}, but by {place} (captured as the same dimension "
                f"{dim.symbol}) it must be {dim.scale * first + dim.offset}."
            )


@dataclass(frozen=True)
class ConstantInput:
    """An input that capture baked into the graph (a number, a string, None)."""

    name: str
    value: Any

    def check(self, value: object, bound: dict[str, tuple[int, str]]) -> None:
        if type(value) is not type(self.value) or value != self.value:
            raise InputError(
                f"{self.name}: captured as the constant {self.value!r}, called with "
                f"{value!r}. Capture again with this value."
            )


@dataclass(frozen=True)
class IntegerInput:
    """A dynamic integer."""

    name: str
    dim: Dimension

    def check(self, value: object, bound: dict[str, tuple[int, str]]) -> None:
        if isinstance(value, torch.SymInt):
            self.dim.assume(value)
        elif type(value) is not int or self.dim.solve(value) is None:
            raise InputError(
                f"{self.name}: captured as an integer {self.dim.describe()}, called with {value!r}."
            )


Input = TensorInput | ConstantInput | IntegerInput


@dataclass(frozen=True)
class Guard:
    """What else torch.export assumed of the inputs, such as an even batch.

    Attributes:
        text: the condition as torch.export says it.
        holds: the condition as a function of the leaves.
        excludes_small: whether it only says that a size is not 0, or not 1.
    """

    text: str
    holds: Callable[[Sequence[Any]], Any] = field(compare=False)
    excludes_small: bool = False

    def check(self, leaves: Sequence[Any]) -> None:
        holds = self.holds(leaves)
        if isinstance(holds, torch.SymBool):  # a re-export keeps the assumption
            torch._check(holds)
        elif not holds:
            raise InputError(
                f"the captured graph holds only where {self.text}: the source model takes "
                "another way for this call. Capture it with such inputs."
            )


@dataclass(frozen=True)
class Update:
    """A container among the arguments (a cache) that the source changes in place and returns.

    Attributes:
        argument: its name.
        path: where it stands in the output.
    """

    argument: str
    path: Any  # a pytree.KeyPath

    def apply(self, given: Any, output: Any) -> None:
        """Give the caller's container the state of the one that the graph returned."""
        returned = pytree.key_get(output, self.path)
        if isinstance(given, dict):
            given.clear()
            given.update(returned)
        elif isinstance(given, list):
            given[:] = returned
        else:
            for name, value in vars(returned).items():
                setattr(given, name, value)


@dataclass(frozen=True)
class InputSpec:
    """The arguments of a captured graph by name, each with its structure and its leaves."""

    names: tuple[str, ...]
    structures: tuple[Any, ...]  # one pytree.TreeSpec per argument
    leaves: tuple[tuple[Input, ...], ...]
    guards: tuple[Guard, ...] = ()
    updates: tuple[Update, ...] = ()

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise InputError unless the graph holds for these arguments."""
        bound: dict[str, tuple[int, str]] = {}
        pairs = self.pairs(args, kwargs)
        for leaf, item in pairs:
            leaf.check(item, bound)
        items = [item for _, item in pairs]
        for guard in self.guards:
            guard.check(items)

    def holds_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether `check` passes."""
        try:
            self.check(args, kwargs)
        except InputError:
            return False
        return True

    def pairs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Input, Any]]:
        """Each leaf of the contract with what the call gives for it."""
        found: list[tuple[Input, Any]] = []
        for value, structure, leaves in zip(
            self._bind(args, kwargs), self.structures, self.leaves, strict=True
        ):
            found += zip(leaves, self._flatten(value, structure, leaves), strict=True)
        return found

    def update(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Change the arguments that the source changes in place, after a call."""
        given = dict(zip(self.names, self._bind(args, kwargs), strict=True))
        for update in self.updates:
            update.apply(given[update.argument], output)

    def symbols(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        """What each symbol is for these inputs."""
        return {
            dim.symbol: (size - dim.offset) // dim.scale
            for leaf, value in self.pairs(args, kwargs)
            if isinstance(leaf, TensorInput) and isinstance(value, torch.Tensor)
            for dim, size in zip(leaf.dims, value.shape, strict=False)
            if isinstance(dim, Dimension)
        }

    def batches(self) -> list[str]:
        """The symbols of first dimensions."""
        tensors = (leaf for group in self.leaves for leaf in group if isinstance(leaf, TensorInput))
        firsts = (leaf.dims[0] for leaf in tensors if leaf.dims)
        return list(dict.fromkeys(dim.symbol for dim in firsts if isinstance(dim, Dimension)))

    def larger(self, symbols: Mapping[str, int]) -> InputSpec:
        """The contract with those of the symbols that are 0 or 1 here larger than that."""
        small = {symbol for symbol, value in symbols.items() if value < 2}

        def raised(dim: int | Dimension) -> int | Dimension:
            if isinstance(dim, Dimension) and dim.symbol in small:
                return replace(dim, min=max(dim.min, 2))
            return dim

        return self._with_dims(raised)

    def _with_dims(self, change: Callable[[int | Dimension], int | Dimension]) -> InputSpec:
        def changed(leaf: Input) -> Input:
            if not isinstance(leaf, TensorInput):
                return leaf
            return replace(leaf, dims=tuple(map(change, leaf.dims)))

        return replace(self, leaves=tuple(tuple(map(changed, group)) for group in self.leaves))

    def allowing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputSpec | None:
        """The contract without what excludes sizes of 0 and 1 from these inputs.

        None where more than that stands against them.
        """
        symbols = self.symbols(args, kwargs)

        def lowered(dim: int | Dimension) -> int | Dimension:
            if isinstance(dim, Dimension) and dim.min <= 2:
                return replace(dim, min=min(dim.min, max(symbols.get(dim.symbol, dim.min), 0)))
            return dim

        items = [item for _, item in self.pairs(args, kwargs)]
        guards = tuple(g for g in self.guards if not g.excludes_small or g.holds(items))
        spec = replace(self._with_dims(lowered), guards=guards)
        return spec if spec.holds_for(args, kwargs) else None

    def moved(self, moves: Mapping[Any, Any]) -> InputSpec:
        """The contract after the module's dtypes changed: floating inputs follow."""

        def move(leaf: Input) -> Input:
            if isinstance(leaf, TensorInput) and leaf.dtype in moves:
                return replace(leaf, dtype=moves[leaf.dtype])
            return leaf

        return replace(self, leaves=tuple(tuple(map(move, group)) for group in self.leaves))

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        if len(args) > len(self.names):
            raise InputError(
                f"called with {len(args)} positional arguments, captured with "
                f"{len(self.names)}: {', '.join(self.names)}."
            )
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for name in given:
            if name not in self.names:
                raise InputError(
                    f"{name}: not among the captured arguments ({', '.join(self.names)}). "
                    "Capture again with it."
                )
        for name in self.names:
            if name not in given:
                raise InputError(f"{name}: missing; it was given when the model was captured.")
        return [given[name] for name in self.names]

    def _flatten(self, value: Any, structure: Any, leaves: tuple[Input, ...]) -> list[Any]:
        if structure.is_leaf():
            return [value]
        if isinstance(value, torch.Size):
            value = tuple(value)
        items, found = pytree.tree_flatten(value)
        if found != structure:
            names = ", ".join(leaf.name for leaf in leaves)
            raise InputError(
                f"captured with the structure {names}; called with another one: "
                f"{first_difference(found, structure)}"
            )
        return items


def category_of(dtype: torch.dtype) -> str:
    """Whether a dtype holds floating, complex, boolean or integer numbers."""
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "boolean" if dtype == torch.bool else "integer"


def first_difference(found: object, expected: object) -> str:
    """Where two descriptions part, in a few words of each."""
    ours, theirs = (" ".join(str(value).split()) for value in (found, expected))
    pairs = enumerate(zip(ours, theirs, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    begin = max(end - 30, 0)
    return f"…{ours[begin : end + 40]}… instead of …{theirs[begin : end + 40]}…"
