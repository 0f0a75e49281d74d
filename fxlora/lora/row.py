"""A row of the table of ops: how an op reads a weight, and the branch that is added to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..fx.calls import argument
from .layout import Layout, Shape, plain

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """One call that reads a weight, as an op row sees it.

    Attributes:
        node: the call.
        weight: the node that it is given as the weight.
        x: its input, or what dropout left of it (a proxy).
        layout: the weight's in this op.
        shape: the weight's.
        rank: of the pair.
        scaling: s.
        padding_trains: whether a padding row that this read does not train is trained by others.
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
        """An argument of the call, as the branch can take it."""
        return fx.map_arg(argument(self.node, position), self._proxied)

    def _proxied(self, node: fx.Node) -> Any:
        return fx.Proxy(node, self.x.tracer)

    def scaled(self, hidden: Any) -> Any:
        """s·A(x): the scaling where the branch is narrowest, r wide."""
        return aten.mul.Tensor(hidden, self.scaling)


Branch = Callable[[Read, Any, Any], Any]


def _no_obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    return None


def _never_costlier(node: fx.Node, shape: Shape, r: int) -> str | None:
    return None


@dataclass(frozen=True)
class Op:
    """A row: how an op reads a weight, and the branch beside it.

    Attributes:
        kind: what rules call it.
        input: position of the activation that the branch starts from.
        branch: (read, down (…, r, in), up (…, out, r)) → s·B(A(x)).
        in_first: whether the weight is (in, out) in this op.
        kernel: how many dimensions of the weight are a kernel's.
        obstacle: why this node cannot take the branch all the same, or None.
        costlier: why the branch, though possible, costs more than the weight form, or None.
        dropout: whether lora_dropout applies to its input (indices cannot be dropped).
        output: the dimension of the output that the weight's outputs are in, from the end; None
            where that depends on the input.
        bias: position of what is added to the product, unscaled.
        result: which of the op's results is the product, where it has several.
        layout: the weight's roles, where `in_first` and `kernel` do not say them.
        turned: the kind for rules where it is given the transpose (x @ W.T is what F.linear is);
            None where no branch is known for that.
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
    turned: str | None = None

    def layout_of(self, node: fx.Node, weight: fx.Node, dims: int) -> Layout | None:
        """The roles of the dimensions of what `node` is given as `weight`; None where unclear."""
        if self.layout is None:
            return plain(dims, self.in_first, self.kernel) if dims > 1 else None
        found = self.layout(node, weight)
        return found if found and len(found.roles) == dims else None

    def input_of(self, node: fx.Node, weight: fx.Node) -> Any:
        """What the op applies the weight to."""
        given = node.args[self.input]
        if isinstance(given, list | tuple):  # an einsum's operands
            return next((operand for operand in given if operand is not weight), None)
        return given
