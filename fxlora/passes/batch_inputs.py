"""Random inputs that fit a contract, with the dimension of them that counts the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import InputError
from ..fx.calls import example_value
from ..module.contract import ConstantInput, Dimension, InputSpec, IntegerInput, TensorInput
from ..tables import some

_BATCHES = (5, 6, 7, 8, 12, 9, 16, 4, 3)


@dataclass(frozen=True)
class Batch:
    """The dynamic dimension that counts the samples of a contract.

    Attributes:
        size: the dimension of the first input that has one.
        symbols: its symbol, and those of the other inputs' dimensions.
    """

    size: Dimension
    symbols: tuple[str, ...]

    @classmethod
    def of(cls, spec: InputSpec, given: str | Mapping[str, int] | None) -> Batch:
        """Return the dimensions that count the samples, as far as they are dynamic.

        Args:
            spec: the contract of a graph.
            given: the dimension of each argument that has samples; or the only argument whose
                first dimension counts them, or None for all.

        Raises:
            InputError: the contract has no such dimension.
        """
        axes = {given: 0} if isinstance(given, str) else given
        places = [
            (argument, leaf.dims[axis])
            for argument, leaves in zip(spec.names, spec.leaves, strict=True)
            for leaf in leaves
            for axis in ((0,) if axes is None else (axes[argument],) if argument in axes else ())
            if isinstance(leaf, TensorInput) and axis < len(leaf.dims)
        ]
        dynamic = [dim for _, dim in places if isinstance(dim, Dimension)]
        missing = set(axes or ()).difference(n for n, dim in places if isinstance(dim, Dimension))
        if not dynamic or missing or any((d.scale, d.offset) != (1, 0) for d in dynamic):
            where = "a dynamic first dimension"
            if isinstance(given, Mapping):
                where = f"dynamic dimensions {dict(given)}"
            raise InputError(
                f"routing needs {f'batch={given!r}' if given else 'an input'} with {where}, which "
                f"counts the samples; {_described(spec)}. Capture with dynamic_shapes that make it "
                "dynamic, or say with batch={argument: dimension} where the samples are."
            )
        return cls(dynamic[0], tuple(dict.fromkeys(dim.symbol for dim in dynamic)))

    def counts(self, dim: object) -> bool:
        """Whether a dimension of an input counts the samples."""
        return isinstance(dim, Dimension) and dim.symbol in self.symbols


def _described(spec: InputSpec) -> str:
    """Return which dimensions of the inputs are dynamic."""
    found = [
        f"dimension {axis} of {argument}"
        for argument, leaves in zip(spec.names, spec.leaves, strict=True)
        for leaf in leaves
        for axis, dim in enumerate(leaf.dims if isinstance(leaf, TensorInput) else ())
        if isinstance(dim, Dimension)
    ]
    return (
        f"{some(found)} {'is' if len(found) == 1 else 'are'} dynamic" if found else "none has one"
    )


def _hints(graph: fx.Graph) -> dict[str, int]:
    """Return the size that each symbol had in the example of the capture."""
    found: dict[str, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = example_value(node)
        for size in () if value is None else value.shape:
            if isinstance(size, torch.SymInt) and size.node.hint is not None:
                found[str(size.node.expr)] = int(size.node.hint)
    return found


@dataclass(frozen=True)
class Inputs:
    """Random inputs that fit a contract."""

    spec: InputSpec
    batch: Batch
    hints: dict[str, int]
    below: int
    sign: int

    @classmethod
    def of(cls, graph: fx.Graph, spec: InputSpec, batch: Batch, below: int, sign: int) -> Inputs:
        """Return inputs of the sizes of the capture's example, but for the batch.

        Args:
            graph: the graph that takes them.
            spec: its contract.
            batch: the dimension that counts the samples.
            below: the bound of integers.
            sign: the sign of the mean of floating-point numbers.
        """
        return cls(spec, batch, _hints(graph), below, sign)

    def drawn(self) -> tuple[list[Any], list[list[int]], int] | None:
        """Return the leaves, the dimensions of each that count samples, and their number.

        None if no batch of three or more fits the contract.
        """
        leaves = [leaf for group in self.spec.leaves for leaf in group]
        generator = torch.Generator().manual_seed(1 + self.sign)
        for value in _BATCHES:
            sizes = {**self.hints, **dict.fromkeys(self.batch.symbols, value)}
            items = [self._item(leaf, sizes, generator) for leaf in leaves]
            try:
                bound: Any = {}
                for leaf, item in zip(leaves, items, strict=True):
                    leaf.check(item, bound, assume=False)
                for guard in self.spec.guards:
                    guard.check(items, assume=False)
            except InputError:
                continue
            dims = [self._batch_dims(leaf) for leaf in leaves]
            return items, dims, value
        return None

    def _item(self, leaf: Any, sizes: dict[str, int], generator: torch.Generator) -> Any:
        if isinstance(leaf, ConstantInput):
            return leaf.value
        if isinstance(leaf, IntegerInput):
            return leaf.dim.at(sizes.get(leaf.dim.symbol, max(leaf.dim.min, 4)))
        assert isinstance(leaf, TensorInput)
        shape = [
            dim.at(sizes.get(dim.symbol, max(dim.min, 4))) if isinstance(dim, Dimension) else dim
            for dim in leaf.dims
        ]
        dtype = leaf.dtype or torch.float32
        if dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
            high = 2 if dtype == torch.bool else self.below
            return torch.randint(0, high, shape, generator=generator).to(dtype)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (drawn + 0.5 * self.sign).to(dtype)

    def _batch_dims(self, leaf: Any) -> list[int]:
        dims = leaf.dims if isinstance(leaf, TensorInput) else ()
        return [axis for axis, dim in enumerate(dims) if self.batch.counts(dim)]
