"""Graphs as text for a reader: a formula, then a line for each call, with the shape of its result.

No version of torch shows in it: overloads, and arguments at the schema's defaults, are left out.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn


class Text(fx.Interpreter):
    """Runs a graph of one input, and writes it down; `names` are those of its parameters."""

    def __init__(self, module: nn.Module, graph: fx.Graph, names: Mapping[str, str]) -> None:
        super().__init__(module, graph=graph)
        self.names, self.kinds = names, Counter[str]()
        self.short: dict[fx.Node, str] = {}  # the name of each value
        self.whole: dict[fx.Node, str] = {}  # its formula, or the name if it is used repeatedly
        self.formulas: list[str] = []
        self.lines: list[tuple[str, Any]] = []

    def of(self, x: torch.Tensor) -> str:
        self.run(x)
        width = max(len(line) for line, _ in self.lines)
        lines = (f"{line:{width}}  {shape}".rstrip() for line, shape in self.lines)
        return "\n".join([*self.formulas, "", *lines])

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op == "output":
            (result,) = n.all_input_nodes
            self.formulas.append(self.whole[result])
            self.lines.append((f"return {self.short[result]}", ""))
        elif n.op != "call_function":
            self.short[n] = self.whole[n] = self.names.get(str(n.target), str(n.target))
        elif n.users:
            self._write(n, tuple(found.shape) if isinstance(found, torch.Tensor) else "")
        return found

    def _write(self, n: fx.Node, shape: Any) -> None:
        kind = getattr(n.target, "__name__", "").partition(".")[0]
        self.kinds[kind] += 1
        self.short[n] = kind if self.kinds[kind] == 1 else f"{kind}_{self.kinds[kind]}"
        self.whole[n] = _formula(kind, n, [self.whole[operand] for operand in n.all_input_nodes])
        if sum(bool(user.users) or user.op == "output" for user in n.users) > 1:
            self.formulas.append(f"{self.short[n]} = {self.whole[n]}")
            self.whole[n] = self.short[n]
        given = [repr(fx.map_arg(value, lambda m: _Bare(self.short[m]))) for value in _given(n)]
        given += [f"{key}={value}" for key, value in n.kwargs.items()]
        call = f"aten.{kind}({', '.join(given)})"
        call = f"{given[0]}[{given[1]}]" if n.target is operator.getitem else call
        self.lines.append((f"{self.short[n]} = {call}", shape))


class _Bare(str):
    __slots__ = ()
    __repr__ = str.__str__


def _formula(kind: str, n: fx.Node, operands: list[str]) -> str:
    """Return a call of other formulas, with no numbers but the scaling."""
    factors = [f"({text})" if " + " in text else text for text in operands]
    if kind in ("addmm", "baddbmm"):
        scaling = f"{n.kwargs['alpha']} * " if "alpha" in n.kwargs else ""
        return f"{operands[0]} + {scaling}{factors[1]} @ {factors[2]}"
    if kind in ("add", "mul"):
        return " + ".join(operands) if kind == "add" else f"{n.args[1]} * {factors[0]}"
    return operands[0] if kind == "getitem" else f"{kind}({', '.join(operands)})"


def _given(n: fx.Node) -> list[Any]:
    """Return a call's arguments, without the last ones where they are the schema's defaults."""
    given = list(n.args)
    known = getattr(getattr(n.target, "_schema", None), "arguments", [])
    while known and given[-1] == known[len(given) - 1].default_value:
        given.pop()
    return given
