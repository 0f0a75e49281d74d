"""The branch of an einsum: any product of a weight and one other tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .layout import INPUT, OUTPUT, STACK, Layout
from .row import Read, aten


@dataclass(frozen=True)
class _Equation:
    """The subscripts of an einsum of an input and a weight; "." is written for an ellipsis."""

    x: str
    weight: str
    output: str

    @classmethod
    def of(cls, node: fx.Node, weight: fx.Node) -> _Equation | None:
        text, operands = node.args[:2]
        assert isinstance(text, str) and isinstance(operands, list | tuple)
        if len(operands) != 2:
            return None
        inputs, arrow, output = text.replace(" ", "").replace("...", ".").partition("->")
        if not arrow:  # numpy's rule: the letters that occur once, in alphabetical order
            output = "".join(sorted(n for n in set(inputs) - {","} if inputs.count(n) == 1))
        parts = inputs.split(",")
        mine = [operand is weight for operand in operands].index(True)
        return cls(parts[1 - mine], parts[mine], output)

    @property
    def roles(self) -> str:
        return "".join(map(self._role, self.weight))

    def _role(self, letter: str) -> str:
        kept = letter in self.output
        if letter in self.x:
            return STACK if kept else INPUT
        return OUTPUT if kept else "?"

    @property
    def layout(self) -> Layout | None:
        """The weight's layout, or None if no low-rank pair can split the einsum."""
        once = all(len(set(part)) == len(part) for part in (self.weight, self.x))
        roles = set(self.roles)
        if not once or "." in self.weight or not {INPUT, OUTPUT} <= roles <= {"e", "i", "o"}:
            return None
        return Layout(self.roles)

    def of_role(self, role: str) -> str:
        return "".join(n for n, r in zip(self.weight, self.roles, strict=True) if r == role)

    def split(self) -> tuple[str, str]:
        """Return the branch's two equations: x and A -> hidden, hidden and B -> output."""
        stack, inputs, outputs = map(self.of_role, "eio")
        used = {*self.x, *self.weight, *self.output}
        rank = next(n for n in "rzyxwvutsqponmlkjihgfedcba" if n not in used)
        hidden = "".join(n for n in self.output if n not in outputs) + rank
        first = f"{self.x},{stack}{rank}{inputs}->{hidden}"
        second = f"{hidden},{stack}{outputs}{rank}->{self.output}"
        return first.replace(".", "..."), second.replace(".", "...")


def einsum_layout(node: fx.Node, weight: fx.Node) -> Layout | None:
    equation = _Equation.of(node, weight)
    return equation and equation.layout


def einsum(read: Read, down: Any, up: Any) -> Any:
    equation = _Equation.of(read.node, read.weight)
    assert equation is not None
    size = dict(zip(equation.weight, read.shape, strict=True))
    stack, inputs, outputs = ([size[n] for n in equation.of_role(role)] for role in "eio")
    if len(inputs) > 1:
        down = aten.reshape.default(down, [*stack, -1, *inputs])
    if len(outputs) > 1:
        up = aten.reshape.default(up, [*stack, *outputs, -1])
    first, second = equation.split()
    hidden = aten.einsum.default(first, [read.x, down])  # x, (e, r, in) -> (…, r)
    # (…, r), (e, out, r) -> output
    return aten.einsum.default(second, [read.scaled(hidden), up])
