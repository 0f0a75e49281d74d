"""A row of the table of ops: how an op reads a weight, and the branch to add to its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx.calls import argument
from .layout import Layout, Shape, standard_layout

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """One call that reads a weight, with everything that a branch needs.

    Attributes:
        node: the call.
        weight: the node of the call's weight operand.
        x: a proxy of the call's input, after dropout if there is any.
        layout: the layout in which this call reads the weight.
        shape: shape of the weight.
        rank: rank of the pair that the branch is given.
        scaling: the scaling s.
        padding_trains: True if another read of the tied weight trains this look-up's padding row.
    """

    node: fx.Node
    weight: fx.Node
    x: Any
    layout: Layout
    shape: Shape
    rank: int
    scaling: float
    padding_trains: bool = False

    def arg(self, position: int) -> Any:
        """Return an argument by its position in the op's schema, with proxies for nodes."""
        return fx.map_arg(argument(self.node, position), self._proxied)

    def _proxied(self, node: fx.Node) -> Any:
        return fx.Proxy(node, self.x.tracer)

    def scaled(self, hidden: Any) -> Any:
        """Multiply A(x) by s. With r features, the branch is narrowest here."""
        return aten.mul.Tensor(hidden, self.scaling)


Branch = Callable[[Read, Any, Any], Any]
Gathered = Callable[[Any], Any]  # (Samples) -> the branch: see gathered.py


def _no_obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    return None


def _never_costlier(node: fx.Node, shape: Shape, r: int) -> str | None:
    return None


@dataclass(frozen=True)
class Op:
    """A row of the table: how an op reads a weight, and its branch.

    Attributes:
        kind: the name of the op in rules (`Rule.op`).
        input: position of the argument with the input activation, which the branch starts from.
        branch: function (read, down (…, r, in), up (…, out, r)) → s·B(A(x)).
        in_first: whether the weight is (in, out) in this op.
        kernel: number of kernel dimensions of the weight.
        obstacle: function (node, weight, shape) → why this call cannot take the branch although
            its op has one, or None.
        costlier: function (node, shape, r) → why the branch, though possible, costs more than the
            weight form, or None.
        dropout: whether lora_dropout applies to the input (indices cannot be dropped).
        output: the dimension of the result that holds the output features, as a negative index;
            None if that depends on the input.
        bias: position of the argument that is added to the product, unscaled; None without one.
        result: index of the product among the op's results; None if the op has one result.
        layout: function (node, weight) → the weight's layout, for ops where `in_first` and
            `kernel` do not determine it.
        all_linear: whether "all-linear" in a rule includes the op.
        transposed_kind: kind in rules for a call that gets the transpose of the weight (x @ W.T
            counts as linear); None if the branch does not support that.
        gathered: function (samples) → the branch with a low-rank pair for each sample of a batch
            (see `gathered.py`); None if there is none, and `route` computes the op once per slot.
    """

    kind: str
    input: int
    branch: Branch
    in_first: bool = False
    kernel: int = 0
    obstacle: Callable[[fx.Node, fx.Node, Shape], str | None] = _no_obstacle
    costlier: Callable[[fx.Node, Shape, int], str | None] = _never_costlier
    dropout: bool = True
    output: int | None = -1
    bias: int | None = None
    result: int | None = None
    layout: Callable[[fx.Node, fx.Node], Layout | None] | None = None
    all_linear: bool = False
    transposed_kind: str | None = None
    gathered: Gathered | None = None

    def layout_of(self, node: fx.Node, weight: fx.Node, dims: int) -> Layout | None:
        """Return the layout of the operand `weight`, with `dims` dimensions; None if unknown."""
        if self.layout is None:
            return standard_layout(dims, self.in_first, self.kernel) if dims > 1 else None
        found = self.layout(node, weight)
        return found if found and len(found.roles) == dims else None

    def input_of(self, node: fx.Node, weight: fx.Node) -> Any:
        """Return the operand that the op applies the weight to."""
        given = node.args[self.input]
        if isinstance(given, list | tuple):  # an einsum's operands
            return next((operand for operand in given if operand is not weight), None)
        return given
