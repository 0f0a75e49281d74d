"""Dimensions that were asked to be dynamic and came out static, and the line that fixed them.

torch.export makes a symbol for every dimension that is asked to be dynamic, however that was
said, and none for the others. A symbol that it then sets equal to a number is a dimension that
the model's code has fixed. It tells so for some spellings (`Dim.DYNAMIC`, a named `Dim`) and
keeps silent for others (`Dim.AUTO`); in neither case does it say where.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ..errors import CaptureError
from .kept.patches import patched
from .places import called_at


@dataclass
class Sizes:
    """What torch.export sets symbols equal to while it traces, and where."""

    known: dict[sympy.Symbol, tuple[sympy.Expr, str]] = field(
        default_factory=dict[sympy.Symbol, tuple[sympy.Expr, str]]
    )
    env: Any = None

    def record(self, env: Any, symbol: sympy.Symbol, value: sympy.Expr) -> None:
        self.env = self.env or env
        # the first place says most: what comes later follows from it
        place = self.known[symbol][1] if symbol in self.known else called_at()
        self.known[symbol] = (value, place)

    def fixed(self) -> dict[str, tuple[int, str]]:
        """Input dimensions that are numbers now: name → (number, place in the model's code)."""
        inputs: dict[sympy.Symbol, list[Any]] = self.env.var_to_sources if self.env else {}
        found: dict[str, tuple[int, str]] = {}
        for symbol, sources in inputs.items():
            value, place = self._resolved(symbol)
            if value.is_number:
                found |= {_readable(source.name): (int(value), place) for source in sources}
        return found

    def _resolved(self, symbol: sympy.Symbol) -> tuple[sympy.Expr, str]:
        """A symbol's value, through other symbols, with the place of the last step."""
        value: Any = symbol
        place = ""
        while known := next((s for s in value.free_symbols if s in self.known), None):
            number, place = self.known[known]
            value = value.subs(known, number)
        return value, place


@contextmanager
def watched_sizes() -> Generator[Sizes]:
    """Record the sizes that torch.export fixes inside."""
    sizes = Sizes()
    original = ShapeEnv._set_replacement

    def recorded(self: ShapeEnv, a: sympy.Symbol, tgt: sympy.Expr, msg: str) -> None:
        original(self, a, tgt, msg)
        if a in self.replacements:  # it may decline
            sizes.record(self, a, self.replacements[a])

    with patched(ShapeEnv, _set_replacement=recorded):
        yield sizes


@contextmanager
def refuse_fixed_sizes(model: nn.Module, mode: str) -> Generator[None]:
    """Raise where an export fixes a dimension that it was asked to keep dynamic.

    Raises:
        CaptureError: names each such dimension, and the line that fixed it.
    """
    with watched_sizes() as sizes:
        try:
            yield
        except UserError as error:
            violated = error.error_type is UserErrorType.CONSTRAINT_VIOLATION
            if violated and (fixed := sizes.fixed()):
                raise _fixed_error(model, mode, fixed) from error
            raise
    if fixed := sizes.fixed():
        raise _fixed_error(model, mode, fixed)


def _fixed_error(model: nn.Module, mode: str, fixed: dict[str, tuple[int, str]]) -> CaptureError:
    unknown = "a line that torch.export does not tell"
    found = [f"{name} is {size}, by {place or unknown}" for name, (size, place) in fixed.items()]
    return CaptureError(
        f"{type(model).__name__}: dynamic_shapes asks for dynamic dimensions that the model fixes "
        f"in {mode} mode: {'; '.join(found)}. Have the model take any "
        "size there, or leave the dimension out of dynamic_shapes: it is static then."
    )


def _readable(source: str) -> str:
    """`L['x'].size()[1]` as `x, dimension 1`."""
    text = re.sub(r"^L\['(\w+)'\]", r"\1", source)
    return re.sub(r"\.size\(\)\[(\d+)\]$", r", dimension \1", text)
