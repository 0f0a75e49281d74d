"""The input contract of an exported graph, from the constraints and guards of torch.export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import _convert_guards_to_code
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..module.contract import (
    ConstantInput,
    Dimension,
    Guard,
    Input,
    InputSpec,
    IntegerInput,
    TensorInput,
    by_position,
    defaults_of,
)
from ..module.size_guards import Size, guard_of
from ..module.tensor_state import Gradient, Order
from .examples import Example
from .kept.tensor_state import StateReads


def contract_of(
    program: ExportedProgram, module: fx.GraphModule, model: nn.Module, example: Example
) -> InputSpec:
    """Return the input contract of an exported graph.

    Args:
        program: the exported program, for the ranges of its symbols.
        module: its graph module.
        model: the source model, for error messages.
        example: the inputs that it was exported with.

    Raises:
        CaptureError: torch.export assumes something that cannot be checked at a call.
    """
    codegen: Any = module.graph._codegen
    names: tuple[str, ...] = tuple(codegen.pytree_info.orig_args)
    values = [*example.args, *example.kwargs.values()]
    placeholders = iter(node for node in module.graph.nodes if node.op == "placeholder")
    bounds = {str(symbol): _bounds(limits) for symbol, limits in program.range_constraints.items()}
    structures: list[Any] = []
    leaves: list[tuple[Input, ...]] = []
    for name, value in zip(names, values, strict=True):
        paths, structure = pytree.tree_flatten_with_path(value)
        structures.append(structure)
        group = [
            _leaf(f"{name}{pytree.keystr(path)}", next(placeholders).meta.get("val"), bounds, model)
            for path, _ in paths
        ]
        leaves.append(tuple(group))
    guards = tuple(_guards(module, [leaf for group in leaves for leaf in group], model))
    positional = by_position(model, names, len(example.args))
    return InputSpec(
        names,
        tuple(structures),
        tuple(leaves),
        guards,
        positional=positional,
        defaults=defaults_of(model, names),
    )


def with_state(
    spec: InputSpec, module: fx.GraphModule, reads: StateReads, example: Example, model: nn.Module
) -> InputSpec:
    """Return a contract that asks for the state of the example's tensors that the forward reads.

    Raises:
        CaptureError: the order in memory is that of no other size than the example's.
    """
    if not (reads.strides or reads.gradient):
        return spec
    fakes = iter(n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder")
    given = iter(value for _, value in spec.pairs(example.args, example.kwargs))

    def noted(leaf: Input) -> Input:
        fake, value = next(fakes), next(given)
        if not isinstance(leaf, TensorInput):
            return leaf
        gradient = Gradient.of(value) if reads.gradient else None
        if not reads.strides or value.layout is not torch.strided:
            return replace(leaf, gradient=gradient)
        if order := Order.of(fake, reads.offset):
            return replace(leaf, gradient=gradient, order=order)
        raise CaptureError(
            f"{type(model).__name__} reads how {leaf.name} lies in memory, and its example is not "
            "contiguous: a graph holds for no other size. Give a contiguous example "
            "(x.contiguous())."
        )

    return replace(spec, leaves=tuple(tuple(map(noted, group)) for group in spec.leaves))


def drop_guards_on_small_sizes(
    program: ExportedProgram, module: fx.GraphModule, spec: InputSpec, items: Sequence[Any]
) -> None:
    """Take the guards out of a program that exclude only small sizes, where inputs violate them.

    Args:
        program: the program; it is changed.
        module: its graph module.
        spec: its input contract.
        items: the leaves of the inputs.
    """
    environment = _shape_env(module)
    if environment is None:
        return
    sizes = _sizes([leaf for group in spec.leaves for leaf in group])
    kept: list[Any] = []
    for guard in environment.guards:
        condition: Any = environment.replace(guard.expr)
        known = condition.free_symbols and all(str(s) in sizes for s in condition.free_symbols)
        found = guard_of(condition, sizes) if known else None
        if found is None or not found.excludes_small or found.holds(items):
            kept.append(guard)
    environment.guards[:] = kept
    program._guards_code = _convert_guards_to_code(program.graph_module)


def _guards(module: fx.GraphModule, leaves: Sequence[Input], model: nn.Module) -> Iterator[Guard]:
    """Yield torch.export's remaining assumptions: its guards, as functions of the leaves."""
    environment = _shape_env(module)
    if environment is None:
        return
    sizes = _sizes(leaves)
    inputs: set[sympy.Symbol] = set(environment.var_to_sources)
    for guard in environment.guards:
        if not guard.expr.free_symbols <= inputs:
            continue  # about a data-dependent size: an assertion in the graph checks it
        condition: Any = environment.replace(guard.expr)
        if condition is sympy.true:
            continue
        if unknown := [s for s in condition.free_symbols if str(s) not in sizes]:
            raise CaptureError(
                f"{type(model).__name__}: torch.export assumes {condition}, but no input dimension "
                f"gives {unknown[0]}, so that this cannot be checked at a call. Make that "
                "dimension static in dynamic_shapes."
            )
        yield guard_of(condition, sizes)


def _sizes(leaves: Sequence[Input]) -> dict[str, Size]:
    """Map each symbol to a dimension that gives it, if possible without scale and offset."""
    found: dict[str, Size] = {}
    for number, leaf in enumerate(leaves):
        axes: list[tuple[int | None, Any]] = []
        if isinstance(leaf, TensorInput):
            axes += enumerate(leaf.dims)
        elif isinstance(leaf, IntegerInput):
            axes.append((None, leaf.dim))
        for axis, dim in axes:
            if isinstance(dim, Dimension):
                size = Size(number, axis, leaf.name, dim)
                known = found.setdefault(dim.symbol, size)
                if (dim.scale, dim.offset) == (1, 0) != (known.dim.scale, known.dim.offset):
                    found[dim.symbol] = size
    return found


def _shape_env(module: fx.GraphModule) -> ShapeEnv | None:
    """Return the ShapeEnv of a graph's symbols, or None if all its inputs are static."""
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _bounds(limits: Any) -> tuple[int, int | None]:
    lower = int(limits.lower) if limits.lower.is_finite else 0
    upper = limits.upper
    return lower, int(upper) if upper.is_finite and upper < torch.iinfo(torch.int64).max else None


def _leaf(
    name: str, value: Any, bounds: dict[str, tuple[int, int | None]], model: nn.Module
) -> Input:
    if isinstance(value, torch.Tensor):
        dims = tuple(_dimension(name, size, bounds, model) for size in value.shape)
        return TensorInput(name, dims, value.dtype)
    if isinstance(value, torch.SymInt):
        dim = _dimension(name, value, bounds, model)
        return ConstantInput(name, dim) if isinstance(dim, int) else IntegerInput(name, dim)
    return ConstantInput(name, value)


def _dimension(
    name: str, size: Any, bounds: dict[str, tuple[int, int | None]], model: nn.Module
) -> int | Dimension:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression: Any = size.node.expr
    if expression.is_number:
        return int(expression)
    symbols = sorted(expression.free_symbols, key=str)
    polynomial = sympy.Poly(expression, *symbols) if expression.is_polynomial(*symbols) else None
    if polynomial is None or len(symbols) > 1 or polynomial.degree() > 1:
        raise CaptureError(
            f"{type(model).__name__}: torch.export relates a dimension of {name} to others by "
            f"{expression}, which cannot be checked at a call. Make that dimension static in "
            "dynamic_shapes."
        )
    scale, offset = (int(c) for c in polynomial.all_coeffs())
    lower, upper = bounds.get(str(symbols[0]), (0, None))
    return Dimension(str(symbols[0]), scale, offset, lower, upper)
