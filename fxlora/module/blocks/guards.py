"""The guards of a block: those of the whole model's that the sizes of its arguments decide.

The code of a submodule sees the sizes of its arguments, and of fixed tensors. So whatever it
assumes about sizes is a function of its arguments' sizes, however torch.export writes it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Max
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from ...errors import SubmoduleError
from ..contract import Guard
from ..size_guards import Size, guard_of

Expressions = Mapping[str, Any]  # by the name of a symbol: the expression that it stands for
Ranges = Mapping[str, ValueRanges[Any]]  # by the name of a symbol of the whole model

_TRIED = 1000  # examples of sizes


def guards_of_block(
    guards: Iterable[Guard],
    sizes: Mapping[str, Size],
    expressions: Expressions,
    ranges: Ranges,
    path: str,
) -> Iterator[Guard]:
    """Yield the guards of a block.

    Args:
        guards: those of the whole model.
        sizes: where the block's arguments have the value of each symbol.
        expressions: those of the symbols that stand for sizes such as s0*s1.
        ranges: the values of the whole model's symbols.
        path: the block's path.

    Raises:
        SubmoduleError: a guard may be the block's own, but cannot be computed from its arguments.
    """
    inner = {str(s) for expression in expressions.values() for s in expression.free_symbols}
    for guard in guards:
        if not {str(s) for s in guard.condition.free_symbols} <= {*sizes, *inner}:
            continue  # it is about a size that no argument depends on
        condition = _solved(_substituted(guard.condition, expressions), sizes, expressions)
        if not _unknown(condition, sizes):
            if condition is not sympy.true:
                yield guard_of(condition, sizes)
        elif _may_be_of(guard.condition, sizes, expressions, ranges):
            raise SubmoduleError(
                f"'{path}' cannot be a module of its own: it may assume that {guard.text}, and "
                "its arguments' sizes do not tell. Outline the module around it, or those inside, "
                "or make a dimension static in dynamic_shapes."
            )


def _unknown(condition: Any, sizes: Mapping[str, Size]) -> list[Any]:
    found = (symbol for symbol in condition.free_symbols if str(symbol) not in sizes)
    return sorted(found, key=str)


def _symbol(name: str) -> Any:
    return sympy.Symbol(name, integer=True, nonnegative=True)


def _substituted(condition: Any, expressions: Expressions) -> Any:
    """Return a condition with the symbols of its expressions, as far as it has these."""
    for name in sorted(expressions, key=lambda name: -expressions[name].count_ops()):
        for form in (expressions[name], sympy.expand(expressions[name])):
            condition = condition.subs(form, _symbol(name))
    return condition


def _solved(condition: Any, sizes: Mapping[str, Size], expressions: Expressions) -> Any:
    """Return a condition without the symbols that an expression gives, as s0*s1 and s0 give s1."""
    for (name, expression), symbol in itertools.product(
        expressions.items(), _unknown(condition, sizes)
    ):
        factor, rest = _linear(expression, symbol)
        if factor != 0 and not _unknown(factor, sizes) and not _unknown(rest, sizes):
            divisor: Any = Max(_may_be_zero(factor), sympy.S.One)
            condition = condition.subs(symbol, FloorDiv(_symbol(name) - rest, divisor))
    return condition


def _linear(expression: Any, symbol: Any) -> tuple[Any, Any]:
    """Return (a, b) for an expression a*symbol + b, or (0, 0) for any other."""
    whole = sympy.expand(expression)
    factor, rest = whole.coeff(symbol, 1), whole.coeff(symbol, 0)
    linear = sympy.expand(whole - factor * symbol - rest) == 0
    return (factor, rest) if linear else (sympy.S.Zero, sympy.S.Zero)


def _may_be_zero(expression: Any) -> Any:
    """Return an expression in symbols that torch.export does not take for positive."""
    return expression.xreplace({s: _symbol(str(s)) for s in expression.free_symbols})


def _may_be_of(
    condition: Any, sizes: Mapping[str, Size], expressions: Expressions, ranges: Ranges
) -> bool:
    """Whether a condition may be a function of a block's sizes, and not true for all of them."""
    inner = {s for expression in expressions.values() for s in expression.free_symbols}
    plain = {s for s in condition.free_symbols if str(s) in sizes}
    seen = (*expressions.values(), *sorted(plain, key=str))
    limits = {s: ranges[str(s)] for s in inner | condition.free_symbols if str(s) in ranges}
    with contextlib.suppress(ArithmeticError):  # such as a division by a size of 0
        if bound_sympy(condition, limits).lower is sympy.true:
            return False
    return _is_function_of(condition, seen, tuple(sorted(limits.items(), key=str)))


@functools.lru_cache(maxsize=1024)
def _is_function_of(
    condition: Any, seen: tuple[Any, ...], limits: tuple[tuple[Any, ValueRanges[Any]], ...]
) -> bool:
    """Whether a condition is the same in all examples in which the expressions `seen` are."""
    symbols = sorted({s for e in (condition, *seen) for s in e.free_symbols}, key=str)
    near = {int(c) + d for c in condition.atoms(sympy.Integer) for d in (-1, 0, 1)}
    inside = [_examples(dict(limits).get(symbol, _ANY), near) for symbol in symbols]
    results: dict[Any, Any] = {}
    for numbers in itertools.islice(itertools.product(*inside), _TRIED):
        example = dict(zip(symbols, numbers, strict=True))
        try:
            key = tuple(_value(expression, example) for expression in seen)
            holds = _value(condition, example)
        except ArithmeticError:
            continue
        if results.setdefault(key, holds) != holds:
            return False
    return True


_ANY: ValueRanges[Any] = ValueRanges(0, int_oo)


def _examples(limits: ValueRanges[Any], near: Iterable[int]) -> list[int]:
    """Return sizes within limits: the least ones, and those of `near`."""
    least = max(int(limits.lower), 1)
    return [size for size in sorted({*near, *range(least, least + 6)}) if size in limits and size]


def _value(expression: Any, example: Mapping[Any, int]) -> Any:
    return sympy_interp(PythonReferenceAnalysis, dict(example), expression)
