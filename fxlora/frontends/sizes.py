"""Find dimensions that were asked to be dynamic but came out static, and the line that fixed them.

torch.export makes a symbol for every dimension that is asked to be dynamic, in whichever form,
and none for the others. If it then sets a symbol equal to a number, the model's code has fixed
that dimension. torch.export reports this for some forms (`Dim.DYNAMIC`, a named `Dim`) and not
for others (`Dim.AUTO`); in neither case does it report where.
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
    """The symbols that torch.export replaces while it traces.

    Attributes:
        known: by symbol, its replacement and the place in the model's code that caused it.
        env: the ShapeEnv of the first symbol that was replaced.
    """

    known: dict[sympy.Symbol, tuple[sympy.Expr, str]] = field(
        default_factory=dict[sympy.Symbol, tuple[sympy.Expr, str]]
    )
    env: Any = None

    def record(self, env: Any, symbol: sympy.Symbol, value: sympy.Expr) -> None:
        self.env = self.env or env
        # Keep the first place: it is the cause, and later replacements follow from it.
        place = self.known[symbol][1] if symbol in self.known else called_at()
        self.known[symbol] = (value, place)

    def fixed(self) -> dict[str, tuple[int, str]]:
        """Return the input dimensions that are now numbers: name → (number, place in the code)."""
        inputs: dict[sympy.Symbol, list[Any]] = self.env.var_to_sources if self.env else {}
        found: dict[str, tuple[int, str]] = {}
        for symbol, sources in inputs.items():
            value, place = self._resolved(symbol)
            if value.is_number:
                found |= {_readable(source.name): (int(value), place) for source in sources}
        return found

    def _resolved(self, symbol: sympy.Symbol) -> tuple[sympy.Expr, str]:
        """Return a symbol's value after all known substitutions, and the place of the last one."""
        value: Any = symbol
        place = ""
        while known := next((s for s in value.free_symbols if s in self.known), None):
            number, place = self.known[known]
            value = value.subs(known, number)
        return value, place


@contextmanager
def watched_sizes() -> Generator[Sizes]:
    """Record the symbols that torch.export replaces inside this context."""
    sizes = Sizes()
    original = ShapeEnv._set_replacement

    def recorded(self: ShapeEnv, a: sympy.Symbol, tgt: sympy.Expr, msg: str) -> None:
        original(self, a, tgt, msg)
        if a in self.replacements:  # torch may reject the replacement
            sizes.record(self, a, self.replacements[a])

    with patched(ShapeEnv, _set_replacement=recorded):
        yield sizes


@contextmanager
def refuse_fixed_sizes(model: nn.Module, mode: str) -> Generator[None]:
    """Raise if an export fixes a dimension that it was asked to keep dynamic.

    Raises:
        CaptureError: names each of these dimensions, and the line that fixed it.
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
    unknown = "a line that torch.export does not report"
    found = [f"{name} is {size}, by {place or unknown}" for name, (size, place) in fixed.items()]
    return CaptureError(
        f"{type(model).__name__}: dynamic_shapes asks for dynamic dimensions that the model fixes "
        f"in {mode} mode: {'; '.join(found)}. Make the model accept any "
        "size there, or leave the dimension out of dynamic_shapes, which makes it static."
    )


def _readable(source: str) -> str:
    """Rewrite `L['x'].size()[1]` as `x, dimension 1`."""
    text = re.sub(r"^L\['(\w+)'\]", r"\1", source)
    return re.sub(r"\.size\(\)\[(\d+)\]$", r", dimension \1", text)
