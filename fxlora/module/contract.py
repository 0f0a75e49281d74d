"""The input contract of a captured graph, checked at every call.

An exported graph is specialised to its example inputs: constants are baked in, a wrong size would
broadcast where a static dimension is 1, and a branch of the source that depends on a size was
decided at capture. The contract records the assumptions of torch.export, and raises InputError
for a call that violates them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..fx.autocast import current_autocast
from ..fx.literals import same_literal
from ..tables import did_you_mean
from .tensor_state import Gradient, Order

_PLAIN = (type(None), bool, int, float, str)
# The value of each symbol at a call, with the size that gave it and that size's place.
Bound = dict[str, tuple[int, int, str]]


class OtherArgumentsError(InputError):
    """A call has other arguments than the capture."""


class OtherStructureError(InputError):
    """An argument of a call has another structure than in the capture."""


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension of size `scale * symbol + offset`, with bounds on the symbol."""

    symbol: str
    scale: int = 1
    offset: int = 0
    min: int = 0
    max: int | None = None

    def assume(self, size: torch.SymInt) -> None:
        """Have torch.export assume the bounds for a size, so that a re-export keeps them."""
        torch._check(size >= self.at(self.min))
        if self.max is not None:
            torch._check(size <= self.at(self.max))

    def solve(self, size: int) -> int | None:
        """Return the symbol's value for a dimension of this size, or None if it has none."""
        value = size - self.offset
        if self.scale != 1:  # torch.compile traces % and //, but not divmod
            if value % self.scale:
                return None
            value = value // self.scale
        if value < self.min or (self.max is not None and value > self.max):
            return None
        return value

    def at(self, value: int) -> int:
        """Return the size of this dimension for a value of the symbol."""
        return self.scale * value + self.offset

    def describe(self) -> str:
        """Say which sizes there are, as in "from 5 to 21 in steps of 2"."""
        first = self.at(self.min)
        steps = f" in steps of {abs(self.scale)}" if abs(self.scale) != 1 else ""
        if self.max is None:
            return f"{first} or {'more' if self.scale > 0 else 'less'}{steps}"
        low, high = sorted((first, self.at(self.max)))
        return f"from {low} to {high}{steps}"


def bind(dim: Dimension, value: int, size: int, where: str, bound: Bound) -> None:
    """Note the value of a symbol; raise InputError if another size of the call gives another."""
    first, size_there, place = bound.setdefault(dim.symbol, (value, size, where))
    if value != first:
        raise InputError(
            f"{where}: is {size}, but must be {dim.at(first)} where {place} is {size_there}: "
            "in the captured graph one follows from the other. Give sizes that fit, or "
            "capture again with an example like this call."
        )


@dataclass(frozen=True)
class TensorInput:
    """A tensor input.

    Attributes:
        name: the argument's name.
        dims: its dimensions.
        dtype: its dtype, or None for any.
        order: how it lies in memory, or None for any way.
        gradient: whether it has a gradient, or None if that does not matter.
        any_float: whether any other floating-point dtype will do if `dtype` is one.
        autocast: whether its dtype under the caller's autocast is that of the autocast.
    """

    name: str
    dims: tuple[int | Dimension, ...]
    dtype: torch.dtype | None
    order: Order | None = None
    gradient: Gradient | None = None
    any_float: bool = False
    autocast: bool = False

    def takes(self, dtype: torch.dtype | None) -> bool:
        """Whether a tensor may have this dtype; None stands for any."""
        if dtype is None or self.dtype in (None, dtype):
            return True
        return self.any_float and self.dtype.is_floating_point and dtype.is_floating_point

    def expected(self) -> TensorInput:
        """Return the input with the dtype that it has under the caller's autocast."""
        dtypes = {dtype for _, dtype in current_autocast()}
        return replace(self, dtype=dtypes.pop()) if len(dtypes) == 1 else self

    def check(self, value: object, bound: Bound, assume: bool = True) -> None:
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{self.name}: captured as a tensor, called with {type(value).__name__}. "
                "Give a tensor (torch.as_tensor makes one from an array or a number)."
            )
        if value.is_nested:
            raise InputError(
                f"{self.name}: captured as a dense tensor, called with a nested one. Pad it: "
                "torch.nested.to_padded_tensor(value, 0.0)."
            )
        # The source may decide by any dtype, of integers too.
        expected = self.expected() if self.autocast else self
        if not expected.takes(value.dtype):
            raise InputError(
                f"{self.name}: captured as {expected.dtype}, called with {value.dtype}. Convert it "
                f"with .to({expected.dtype}), or capture again with an example of {value.dtype}."
            )
        if value.ndim != len(self.dims):
            raise InputError(
                f"{self.name}: captured with {len(self.dims)} dimensions, called with shape "
                f"{tuple(value.shape)}. Give it the same number of dimensions, or capture again "
                "with an example of this shape."
            )
        for axis, dim in enumerate(self.dims):
            self._check_dimension(axis, dim, value.shape[axis], bound, assume)
        if self.gradient and (difference := self.gradient.difference(value)):
            raise InputError(
                f"{self.name}: captured with {difference}, and the source reads whether its "
                "tensors have gradients. Capture again with an example like this one, and with the "
                "same weights frozen."
            )
        if self.order and (difference := self.order.difference(value)):
            contiguous = self.order.strides is None and self.order.offset is None
            copy = f"{self.name}.clone(memory_format=torch.contiguous_format)"
            advice = f"Give {copy}, or capture" if contiguous else "Capture"
            raise InputError(
                f"{self.name}: called with {difference}, and the source reads how its tensors lie "
                f"in memory. {advice} again with an example that lies like this one."
            )

    def _check_dimension(
        self, axis: int, dim: int | Dimension, size: int, bound: Bound, assume: bool
    ) -> None:
        where = f"{self.name}, dimension {axis}"
        if isinstance(dim, int):
            if size != dim:
                raise InputError(
                    f"{where}: captured as {dim}, called with {size}. Capture with "
                    f"dynamic_shapes that make dimension {axis} of {self.name} dynamic, "
                    "or with an example of this size."
                )
            return
        if assume and isinstance(size, torch.SymInt):
            dim.assume(size)
            return
        value = dim.solve(size)
        if value is None:
            raise InputError(
                f"{where}: captured for sizes {dim.describe()}, called with {size}. Capture again "
                "with an example of this size, and without bounds in dynamic_shapes that exclude "
                "it."
            )
        bind(dim, value, size, where, bound)


@dataclass(frozen=True)
class SlotsInput(TensorInput):
    """The input of a routed graph that chooses a slot for each sample: -1 (none) to slots - 1.

    Attributes:
        slots: the number of slots.
        symbols: the symbols of the other inputs' dimensions that count the samples, too.
    """

    slots: int = 0
    symbols: tuple[str, ...] = ()

    def check(self, value: object, bound: Bound, assume: bool = True) -> None:
        super().check(value, bound, assume)
        assert isinstance(value, torch.Tensor)
        given = value.shape[0]
        if assume and isinstance(given, torch.SymInt):  # the graph's ops relate the sizes
            return
        for symbol in self.symbols:
            count, size, place = bound.get(symbol, (None, None, ""))
            if count not in (None, given):
                raise InputError(
                    f"{self.name}: has {given} entries where {place} is {size}: give the slot "
                    "of each sample, and inputs of as many samples."
                )
        if assume and torch.compiler.is_compiling():  # the graph asserts it, too
            return
        if isinstance(value, FakeTensor) or not given:
            return
        low, high = (int(bound) for bound in value.aminmax())
        if low < -1 or high >= self.slots:
            raise InputError(
                f"{self.name}: from -1 (the base) to {self.slots - 1}, but called with "
                f"{low if low < -1 else high}."
            )


@dataclass(frozen=True)
class ConstantInput:
    """An input that capture baked into the graph as a constant (a number, a string, None)."""

    name: str
    value: Any

    def check(self, value: object, bound: Bound, assume: bool = True) -> None:
        if not same_literal(value, self.value):
            raise InputError(
                f"{self.name}: captured as the constant {self.value!r}, called with "
                f"{value!r}. Capture again with this value."
            )


@dataclass(frozen=True)
class IntegerInput:
    """A dynamic integer input."""

    name: str
    dim: Dimension

    def check(self, value: object, bound: Bound, assume: bool = True) -> None:
        if assume and isinstance(value, torch.SymInt):
            self.dim.assume(value)
            return
        known = self.dim.solve(value) if type(value) in (int, torch.SymInt) else None  # pyright: ignore[reportArgumentType]
        if known is None:
            raise InputError(
                f"{self.name}: captured for integers {self.dim.describe()}, called with "
                f"{value!r}. Capture again with this value as the example, and without bounds in "
                "dynamic_shapes that exclude it."
            )
        bind(self.dim, known, value, self.name, bound)  # pyright: ignore[reportArgumentType]


Input = TensorInput | ConstantInput | IntegerInput


@dataclass(frozen=True)
class Guard:
    """A further assumption of torch.export about the inputs, such as an even batch size.

    Attributes:
        text: the condition as a Python expression in the inputs' sizes.
        holds: the condition as a function of the leaves.
        excludes_small: whether only a size of 0 or 1 can violate it.
        condition: the condition as an expression in the symbols of the dimensions.
    """

    text: str
    holds: Callable[[Sequence[Any]], Any] = field(compare=False)
    excludes_small: bool = False
    condition: Any = field(default=None, compare=False)

    def check(self, leaves: Sequence[Any], assume: bool = True) -> None:
        holds = self.holds(leaves)
        if assume and isinstance(holds, torch.SymBool):  # so that a re-export keeps the assumption
            torch._check(holds)
        elif not holds:
            raise InputError(
                f"the captured graph holds only where {self.text}: the source model takes "
                "another branch for this call, or fails. Capture again with inputs like these, as "
                "one of several calls=[…]."
            )


@dataclass(frozen=True)
class Update:
    """A container argument (such as a cache) that the source changes in place and returns.

    Attributes:
        argument: the argument's name.
        path: its position in the output, a `pytree.KeyPath`.
    """

    argument: str
    path: Any

    def apply(self, given: Any, output: Any) -> None:
        """Copy the state of the container that the graph returned into the caller's."""
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
    """The input contract of a graph: its arguments by name, each with structure and leaves.

    Attributes:
        names: the arguments' names.
        structures: one pytree.TreeSpec per argument.
        leaves: the leaves of each argument.
        guards: further assumptions about the sizes.
        updates: the arguments that the source changes in place.
        positional: how many leading arguments have the same position in the source's forward, so
            that they may be given by position; None for all.
        defaults: the defaults of the source's arguments that the example left out, in its order. To
            give one of these values is the same as to leave it out.
    """

    names: tuple[str, ...]
    structures: tuple[Any, ...]
    leaves: tuple[tuple[Input, ...], ...]
    guards: tuple[Guard, ...] = ()
    updates: tuple[Update, ...] = ()
    positional: int | None = None
    defaults: tuple[tuple[str, Any], ...] = ()

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, assume: bool = True) -> None:
        """Raise InputError unless these arguments satisfy the contract.

        Args:
            args, kwargs: the arguments.
            assume: in a trace with symbolic sizes, assume that these satisfy it. Otherwise, the
                sizes of the example that is traced decide.
        """
        bound: Bound = {}
        pairs = self.pairs(args, kwargs)
        for leaf, item in pairs:
            leaf.check(item, bound, assume)
        items = [item for _, item in pairs]
        for guard in self.guards:
            guard.check(items, assume)

    def holds_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether `check` passes; assumes nothing."""
        try:
            self.check(args, kwargs, assume=False)
        except InputError:
            return False
        return True

    def pairs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Input, Any]]:
        """Return each leaf of the contract with the value that the call passes for it."""
        found: list[tuple[Input, Any]] = []
        for value, structure, leaves in zip(
            self._bind(args, kwargs), self.structures, self.leaves, strict=True
        ):
            found += zip(leaves, self._flatten(value, structure, leaves), strict=True)
        return found

    def update(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a call, update the arguments that the source would change in place."""
        given = dict(zip(self.names, self._bind(args, kwargs), strict=True))
        for update in self.updates:
            update.apply(given[update.argument], output)

    def symbols(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
        """Return the value of each symbol for these inputs."""
        found: dict[str, int] = {}
        for leaf, value in self.pairs(args, kwargs):
            pairs: list[tuple[Any, Any]] = []
            if isinstance(leaf, TensorInput) and isinstance(value, torch.Tensor):
                pairs = list(zip(leaf.dims, value.shape, strict=False))
            elif isinstance(leaf, IntegerInput) and isinstance(value, int):
                pairs = [(leaf.dim, value)]
            dynamic = ((dim, size) for dim, size in pairs if isinstance(dim, Dimension))
            found |= {dim.symbol: (size - dim.offset) // dim.scale for dim, size in dynamic}
        return found

    def batches(self) -> list[str]:
        """Return the symbols of the tensors' first dimensions."""
        tensors = (leaf for group in self.leaves for leaf in group if isinstance(leaf, TensorInput))
        firsts = (leaf.dims[0] for leaf in tensors if leaf.dims)
        return list(dict.fromkeys(dim.symbol for dim in firsts if isinstance(dim, Dimension)))

    def larger(self, symbols: Mapping[str, int]) -> InputSpec:
        """Return the contract with a minimum of 2 for every symbol that is 0 or 1 in `symbols`."""
        small = {symbol for symbol, value in symbols.items() if value < 2}

        def raised(dim: int | Dimension) -> int | Dimension:
            if isinstance(dim, Dimension) and dim.symbol in small:
                return replace(dim, min=max(dim.min, 2))
            return dim

        return self._with_dims(raised)

    def up_to(self, symbols: Mapping[str, int]) -> InputSpec:
        """Return the contract with the values in `symbols` as maximums where there are none."""

        def bounded(dim: int | Dimension) -> int | Dimension:
            if isinstance(dim, Dimension) and dim.max is None and dim.symbol in symbols:
                return replace(dim, max=max(dim.min, symbols[dim.symbol]))
            return dim

        return self._with_dims(bounded)

    def _with_dims(self, change: Callable[[int | Dimension], int | Dimension]) -> InputSpec:
        def changed(leaf: Input) -> Input:
            if not isinstance(leaf, TensorInput):
                return leaf
            return replace(leaf, dims=tuple(map(change, leaf.dims)))

        return replace(self, leaves=tuple(tuple(map(changed, group)) for group in self.leaves))

    def allowing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputSpec | None:
        """Return the contract extended to these inputs' sizes of 0 and 1.

        Minimums of 2 or less are lowered to the symbols' values, and violated guards that exclude
        only small sizes are dropped. None if the inputs violate the contract even then.
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
        """Return the contract after the module's dtypes changed: inputs of an old dtype follow."""

        def move(leaf: Input) -> Input:
            if isinstance(leaf, TensorInput) and leaf.dtype in moves:
                return replace(leaf, dtype=moves[leaf.dtype])
            return leaf

        return replace(self, leaves=tuple(tuple(map(move, group)) for group in self.leaves))

    def without_defaults(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leave out the arguments of a call that the example left out and that are the defaults."""
        defaults = dict(self.defaults)
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if name not in defaults or not same_literal(value, defaults[name])
        }
        most = len(self.names) if self.positional is None else self.positional
        further = args[most:]
        same = len(further) <= len(defaults) and all(map(same_literal, further, defaults.values()))
        return (args[:most] if same else args), kwargs

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        args, kwargs = self.without_defaults(args, kwargs)
        most = len(self.names) if self.positional is None else self.positional
        if len(args) > most:
            others = ", ".join(self.names[:most]) or "none"
            raise OtherArgumentsError(
                f"called with {len(args)} positional arguments, captured with {most}: {others}. "
                "Leave out the others, give them by name, or capture again with them."
            )
        if twice := {name for name in self.names[: len(args)] if name in kwargs}:
            raise OtherArgumentsError(f"{min(twice)}: given twice, by position and by name.")
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        for name in given:
            if name not in self.names:
                raise OtherArgumentsError(
                    f"{name}: not among the captured arguments ({', '.join(self.names)})."
                    f"{did_you_mean(name, self.names)} Capture again with it."
                )
        for name in self.names:
            if name not in given:
                raise OtherArgumentsError(
                    f"{name}: missing; it was given when the model was captured. Give it, or "
                    "capture again without it."
                )
        return [given[name] for name in self.names]

    def _flatten(self, value: Any, structure: Any, leaves: tuple[Input, ...]) -> list[Any]:
        if structure.is_leaf():
            return [value]
        if isinstance(value, torch.Size):
            value = tuple(value)
        items, found = pytree.tree_flatten(value)
        if found != structure:
            names = ", ".join(leaf.name for leaf in leaves)
            raise OtherStructureError(
                f"captured with the structure {names}; called with another one: "
                f"{first_difference(found, structure)} Give the captured structure, or capture "
                "again with an example like this."
            )
        return items


def by_position(module: nn.Module, names: Sequence[str], given: int) -> int:
    """Return how many leading arguments of a call have the same position in a module's forward.

    Args:
        module: the module.
        names: the names of the call's arguments.
        given: how many of them the call gave by position.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    declared = inspect.signature(module.forward).parameters.values()
    pairs = zip(names, (p.name for p in declared if p.kind in kinds), strict=False)
    return max(given, len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))))


def defaults_of(module: nn.Module, names: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """Return the defaults of the forward's arguments that are not among `names`.

    These are plain values; at the first argument without one the list ends, so that the positions
    of those before it are known.
    """
    declared = inspect.signature(module.forward).parameters.values()
    others = (parameter for parameter in declared if parameter.name not in names)
    plain = itertools.takewhile(lambda p: isinstance(p.default, _PLAIN), others)
    return tuple((parameter.name, parameter.default) for parameter in plain)


def first_difference(found: object, expected: object) -> str:
    """Show where two descriptions first differ, with some text around it from each."""
    ours, theirs = (" ".join(str(value).split()) for value in (found, expected))
    pairs = enumerate(zip(ours, theirs, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    begin = max(end - 30, 0)
    return f"…{ours[begin : end + 40]}… instead of …{theirs[begin : end + 40]}…"
