"""The contract on a graph's inputs, read off what torch.export says that it assumed."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..module.inputs import (
    ConstantInput,
    Dimension,
    Guard,
    Input,
    InputSpec,
    IntegerInput,
    TensorInput,
)
from .examples import Example


def contract_of(
    program: ExportedProgram, module: fx.GraphModule, model: nn.Module, example: Example
) -> InputSpec:
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
    guards = tuple(_guards(program, model, example))
    return InputSpec(names, tuple(structures), tuple(leaves), guards)


def _guards(program: ExportedProgram, model: nn.Module, example: Example) -> Iterator[Guard]:
    """torch.export's remaining assumptions, written over the leaves instead of its `L[...]`."""
    paths = _paths(model, example)
    by_length = sorted(enumerate(paths), key=lambda item: -len(item[1]))
    for text in getattr(program, "_guards_code", None) or ():
        code = text
        for index, path in by_length:
            code = code.replace(path, f"V[{index}]")
        if "L[" in code:
            raise CaptureError(
                f"{type(model).__name__}: torch.export assumes {text}, which cannot be checked at "
                "a call. Give dynamic_shapes with that dimension static."
            )
        readable = re.sub(r"L\['(\w+)'\]", r"\1", text).replace(".size()[", ".shape[")
        # torch.export's own words about sizes, as a function that torch.compile can trace too
        holds = eval(f"lambda V: {code}", {"math": math, "Max": max, "Min": min})
        yield Guard(readable, holds, _excludes_small(code))


def _excludes_small(code: str) -> bool:
    """Whether a guard only says that some size, or product of sizes, is not 0 or not 1."""
    more = any(word in code for word in (" and ", " or ", "==", "%"))
    form = r".+ (!= [01]|> [01]|>= [12])|(0|1) < .+|(1|2) <= .+"
    return not more and re.fullmatch(form, code) is not None


def _paths(model: nn.Module, example: Example) -> list[str]:
    """What torch.export calls each leaf of the inputs, in the order of the call.

    Its names follow the forward's signature, in which keywords may stand elsewhere.
    """
    values = [*example.args, *example.kwargs.values()]
    numbers = list(range(len(values)))
    split = len(example.args)
    keywords = dict(zip(example.kwargs, numbers[split:], strict=True))
    bound = inspect.signature(model.forward).bind(*numbers[:split], **keywords).arguments
    places = {number: path for path, number in pytree.tree_flatten_with_path(dict(bound))[0]}
    return [
        f"L{pytree.keystr((*places[number], *path))}"
        for number, value in enumerate(values)
        for path, _ in pytree.tree_flatten_with_path(value)[0]
    ]


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
            f"{expression}, which cannot be checked at a call. Give dynamic_shapes with that "
            "dimension static."
        )
    scale, offset = (int(c) for c in polynomial.all_coeffs())
    lower, upper = bounds.get(str(symbols[0]), (0, None))
    return Dimension(str(symbols[0]), scale, offset, lower, upper)
