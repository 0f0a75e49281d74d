"""The ops that read weights, one row each. Nothing else in fxlora knows kinds of op.

A low-rank pair is A and B with W + s·L·R, W seen as a matrix (d0, d1): L (d0, r), R (r, d1).
The layout of a weight says which of A and B is which:

    out first (linear, convolution; W is (out, in, …))   L = B     R = A
    in first  (embedding, addmm, x @ W; W is (in, out))  L = A^T   R = B^T

so A always takes the input and B gives the output, with PEFT's shapes. A row says how its op
applies L·R to its own input without forming it: the branch. What has no row, or an obstacle,
takes the weight form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    """The pair as nodes of a graph. A `_t` is the transpose; taking it twice adds no node."""

    graph: fx.Graph
    a: fx.Node
    b: fx.Node
    in_first: bool
    scaling: float

    def scaled(self, hidden: fx.Node) -> fx.Node:
        """s·A(x): the scaling where the branch is narrowest, r wide."""
        return self.graph.call_function(aten.mul.Tensor, (hidden, self.scaling))

    @property
    def left(self) -> fx.Node:
        return self._t(self.a) if self.in_first else self.b

    @property
    def left_t(self) -> fx.Node:
        return self.a if self.in_first else self._t(self.b)

    @property
    def right(self) -> fx.Node:
        return self._t(self.b) if self.in_first else self.a

    @property
    def right_t(self) -> fx.Node:
        return self.b if self.in_first else self._t(self.a)

    def _t(self, node: fx.Node) -> fx.Node:
        return self.graph.call_function(aten.t.default, (node,))


@dataclass(frozen=True)
class Read:
    """One call that reads a weight, as an op row sees it."""

    graph: fx.Graph
    node: fx.Node
    x: fx.Node

    def arg(self, position: int, default: Any = None) -> Any:
        return self.node.args[position] if position < len(self.node.args) else default

    def call(self, op: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(op, args)


Shape = tuple[int, ...]


def _no_obstacle(node: fx.Node, shape: Shape) -> str | None:
    return None


def _never_dearer(node: fx.Node, shape: Shape, r: int) -> str | None:
    return None


@dataclass(frozen=True)
class Op:
    """A row: how an op reads a weight, and the branch beside it.

    Attributes:
        kind: what rules call it.
        input: position of the activation that the branch starts from.
        branch: emits s·L·R applied to the read's own input.
        in_first: whether the weight is (in, out) in this op.
        obstacle: why this node cannot take the branch all the same, or None.
        dearer: why the branch, though possible, costs more than the weight form, or None.
        dropout: whether lora_dropout applies to its input (indices cannot be dropped).
    """

    kind: str
    input: int
    branch: Callable[[Read, Factors], fx.Node]
    in_first: bool = False
    obstacle: Callable[[fx.Node, Shape], str | None] = _no_obstacle
    dearer: Callable[[fx.Node, Shape, int], str | None] = _never_dearer
    dropout: bool = True


# ---- branches -----------------------------------------------------------------------------------


def _linear(read: Read, f: Factors) -> fx.Node:
    hidden = read.call(aten.linear.default, read.x, f.right)  # (…, r)
    return read.call(aten.linear.default, f.scaled(hidden), f.left)  # (…, out)


def _input_times_weight(read: Read, f: Factors) -> fx.Node:
    hidden = read.call(aten.linear.default, read.x, f.left_t)  # (…, r)
    return read.call(aten.linear.default, f.scaled(hidden), f.right_t)  # (…, out)


def _weight_times_input(read: Read, f: Factors) -> fx.Node:
    hidden = read.call(aten.matmul.default, f.right, read.x)  # (r, n)
    return read.call(aten.matmul.default, f.left, f.scaled(hidden))  # (d0, n)


def _transposed_weight_times_input(read: Read, f: Factors) -> fx.Node:
    hidden = read.call(aten.matmul.default, f.left_t, read.x)  # (r, n)
    return read.call(aten.matmul.default, f.right_t, f.scaled(hidden))  # (d1, n)


def _embedding(read: Read, f: Factors) -> fx.Node:
    # W's gradient may be sparse; A's is dense. Rows of padding_idx get none in either.
    rows = read.call(aten.embedding.default, f.left, read.x, *read.node.args[2:4])  # (…, r)
    return read.call(aten.linear.default, f.scaled(rows), f.right_t)  # (…, dim)


def _addmm_obstacle(node: fx.Node, shape: Shape) -> str | None:
    return "addmm with an alpha of its own" if node.kwargs.get("alpha", 1) != 1 else None


def _stack_obstacle(node: fx.Node, shape: Shape) -> str | None:
    return None if len(shape) == 2 else "a stack of matrices"


# ---- convolutions: A keeps the layer's geometry, B is 1x1 ----------------------------------------


def _convolution(dims: int) -> Callable[[Read, Factors], fx.Node]:
    def branch(read: Read, f: Factors) -> fx.Node:
        # (input, weight, bias, stride, padding, dilation, groups)
        groups = read.arg(6, 1)
        a = f.a  # (r, in/groups, *kernel)
        if groups > 1:  # each group's slice meets all r filters
            a = read.call(aten.repeat.default, a, [groups] + [1] * (dims + 1))
        defaults = [a.default_value for a in read.node.target._schema.arguments]  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
        geometry = [read.arg(position, defaults[position]) for position in (3, 4, 5)]
        hidden = read.call(read.node.target, read.x, a, None, *geometry, groups)
        pointwise = getattr(aten, f"conv{dims}d").default
        one, none = [1] * dims, [0] * dims
        return read.call(pointwise, f.scaled(hidden), f.b, None, one, none, one, groups)

    return branch


def _grouped_dearer(node: fx.Node, shape: Shape, r: int) -> str | None:
    """Whether the weight form is cheaper for a grouped convolution: per output position,

    branch: r·in·k + r·out multiplications forward, and as many twice more backward;
    weight: out·(in/groups)·k once, for the gradient of the whole weight.
    """
    groups = int(node.args[6]) if len(node.args) > 6 else 1  # pyright: ignore[reportArgumentType]
    if groups == 1:
        return None
    branch = 3 * r * (groups * math.prod(shape[1:]) + shape[0])
    weight = math.prod(shape)
    if branch <= weight:
        return None
    return f"{groups} groups: the weight's gradient costs {branch / weight:.0f}x less than a branch"


def _conv_rows(dims: int) -> dict[tuple[Any, int], Op]:
    packet = getattr(aten, f"conv{dims}d")
    row = Op(f"conv{dims}d", 0, _convolution(dims), dearer=_grouped_dearer)
    return {(packet.default, 1): row, (packet.padding, 1): row}


_MATMUL = Op("matmul", 0, _input_times_weight, in_first=True, obstacle=_stack_obstacle)
_MATMUL_LEFT = Op("matmul", 1, _weight_times_input, obstacle=_stack_obstacle)

# (overload, position of the weight among its arguments) → row
OPS: dict[tuple[Any, int], Op] = {
    (aten.linear.default, 1): Op("linear", 0, _linear),
    (aten.addmm.default, 2): Op(
        "addmm", 1, _input_times_weight, in_first=True, obstacle=_addmm_obstacle
    ),
    (aten.mm.default, 1): _MATMUL,
    (aten.matmul.default, 1): _MATMUL,
    (aten.mm.default, 0): _MATMUL_LEFT,
    (aten.matmul.default, 0): _MATMUL_LEFT,
    (aten.embedding.default, 0): Op("embedding", 1, _embedding, in_first=True, dropout=False),
    **_conv_rows(1),
    **_conv_rows(2),
    **_conv_rows(3),
}

# The same for an op that is given W^T: x @ W.T is what F.linear(x, W) is.
_LINEAR_SPELLED_OUT = Op("linear", 0, _linear)
_MATMUL_TRANSPOSED_LEFT = Op("matmul", 1, _transposed_weight_times_input, in_first=True)

TRANSPOSED_OPS: dict[tuple[Any, int], Op] = {
    (aten.linear.default, 1): Op("matmul", 0, _input_times_weight, in_first=True),
    (aten.addmm.default, 2): Op("linear", 1, _linear, obstacle=_addmm_obstacle),
    (aten.mm.default, 1): _LINEAR_SPELLED_OUT,
    (aten.matmul.default, 1): _LINEAR_SPELLED_OUT,
    (aten.mm.default, 0): _MATMUL_TRANSPOSED_LEFT,
    (aten.matmul.default, 0): _MATMUL_TRANSPOSED_LEFT,
}

_PRODUCTS = frozenset(overload for overload, _ in OPS)

# Weights of so many dimensions that are matrices (d0, d1·k) all the same.
FLATTENED = {
    f"conv{turned}{dims}d": dims + 2 for turned in ("", "_transpose") for dims in (1, 2, 3)
} | {"deform_conv2d": 4}
CASTS = frozenset({"to", "_to_copy", "type_as"})
MATRIX_PRODUCTS = frozenset({"linear", "addmm", "matmul"})  # what "all-linear" takes


def row_of(node: fx.Node, position: int, transposed: bool) -> Op | None:
    """The row of a call that is given a weight, or its transpose, at this position."""
    return (TRANSPOSED_OPS if transposed else OPS).get((node.target, position))


def is_product(node: fx.Node) -> bool:
    """Whether a call is of an op with a row, whatever it is given."""
    return node.target in _PRODUCTS


def is_transpose(node: fx.Node) -> bool:
    """Whether a call is the transpose of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    dims: Any
    if node.target is aten.permute.default:
        dims = node.args[1]
        return [dim % 2 for dim in dims] == [1, 0] and len(dims) == 2
    if node.target is aten.transpose.int:
        dims = node.args[1:3]
        return (dims[0] - dims[1]) % 2 == 1
    return False


def reads_no_values(node: fx.Node) -> bool:
    """Whether a call looks at a tensor's dtype and shape alone (torch.export leaves some)."""
    return node.target is aten._assert_tensor_metadata.default


def kind_of(node: fx.Node) -> str:
    """A name for a call that has no row: its op's."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", None) or getattr(node.target, "__name__", None)
    return str(name or node.target)


# ---- shapes and the weight form -----------------------------------------------------------------


def factor_shapes(shape: Shape, r: int, in_first: bool, convolution: bool) -> tuple[Shape, Shape]:
    """Shapes of A and B for a weight, PEFT's: (r, in) and (out, r); for a convolution
    (r, in/groups, *kernel) and (out, r, 1, …)."""
    if convolution:
        return (r, *shape[1:]), (shape[0], r, *(1 for _ in shape[2:]))
    if in_first:
        return (r, shape[0]), (math.prod(shape[1:]), r)
    return (r, math.prod(shape[1:])), (shape[0], r)


def adapted_weight(f: Factors, weight: fx.Node, shape: Shape) -> fx.Node:
    """Emit W + s·L·R as one addmm, for any op to read. W (d0, …) → (d0, …)."""
    call = f.graph.call_function
    if len(shape) == 2:
        matrices = (weight, f.left, f.right)
    else:
        d0, d1 = shape[0], math.prod(shape[1:])
        matrices = tuple(
            call(aten.reshape.default, (node, size))
            for node, size in ((weight, [d0, d1]), (f.b, [d0, -1]), (f.a, [-1, d1]))
        )
    result = call(aten.addmm.default, matrices, {"alpha": f.scaling})
    return result if len(shape) == 2 else call(aten.reshape.default, (result, list(shape)))
