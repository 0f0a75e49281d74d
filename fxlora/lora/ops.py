"""The table of ops that read weights. A row here is all that an op needs to get a branch.

A row holds the branch of its op: the function that applies a low-rank pair to the op's input
without forming the product BA. A weight takes the weight form if an op without a row reads it, or
if a call that reads it has an obstacle. Branches are written in aten overloads and called on
torch.fx's proxies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import fx
from torch._ops import OpOverload

from ..errors import ConfigError
from ..fx.calls import argument, example_value, flat_inputs, kind_of, named_argument, qualified_kind
from ..fx.dispatched import overload_of
from ..names import shown
from .convolutions import (
    convolution,
    gathered_convolution,
    gathered_transposed,
    groups_cost_more,
    transposed_convolution,
)
from .einsum import einsum, einsum_layout
from .gathered import looked_up, times_weights
from .layout import Layout, Shape, standard_layout
from .row import Op, Read, aten

# ---- matrix products ----------------------------------------------------------------------------


def _times_weight(read: Read, down: Any, up: Any) -> Any:
    """Emit the branch of x @ W or x @ W^T: (…, in) -> (…, out)."""
    if read.layout.stacked:
        # (…, e, n, in) @ (e, in, r) -> (…, e, n, r)
        hidden = aten.matmul.default(read.x, read.layout.transpose_factor(down))
        # (…, e, n, r) @ (e, r, out) -> (…, e, n, out)
        return aten.matmul.default(read.scaled(hidden), read.layout.transpose_factor(up))
    hidden = aten.linear.default(read.x, down)  # (…, in) @ (in, r) -> (…, r)
    return aten.linear.default(read.scaled(hidden), up)  # (…, r) @ (r, out) -> (…, out)


def _weight_times(read: Read, down: Any, up: Any) -> Any:
    """Emit the branch of W @ x: (…, in, n) -> (…, out, n)."""
    hidden = aten.matmul.default(down, read.x)  # (…, r, in) @ (…, in, n) -> (…, r, n)
    # (…, out, r) @ (…, r, n) -> (…, out, n)
    return aten.matmul.default(up, read.scaled(hidden))


def _grouped_mm(read: Read, down: Any, up: Any) -> Any:
    """Emit the branch of a grouped product: each group of rows of x times its own matrix."""
    ends = read.arg(2)
    pad = -read.rank % 8  # the kernels require rows of a multiple of 16 bytes
    down = aten.constant_pad_nd.default(down, [0, 0, 0, pad]) if pad else down
    up = aten.constant_pad_nd.default(up, [0, pad]) if pad else up
    turn = read.layout.transpose_factor
    # (n, in) @ (e, in, r + pad) -> (n, r + pad)
    hidden = aten._grouped_mm.default(read.x, turn(down), ends)
    # (n, r + pad) @ (e, r + pad, out) -> (n, out)
    return aten._grouped_mm.default(read.scaled(hidden), turn(up), ends)


def _own_alpha(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    scaled = any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
    return f"{kind_of(node)} with alpha or beta other than 1" if scaled else None


def _perhaps_vector(position: int) -> Callable[[fx.Node, fx.Node, Shape], str | None]:
    """Return the obstacle function for an op whose other operand, at `position`, may be a vector.

    A stack of matrices needs an operand that is known to have at least two dimensions.
    """

    def obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
        value = example_value(node.args[position])
        if len(shape) == 2 or (value is not None and value.ndim >= 2):
            return None
        return "a stack of matrices times an operand that may be a vector"

    return obstacle


# ---- look-ups -----------------------------------------------------------------------------------


def _embedding(read: Read, down: Any, up: Any) -> Any:
    # W's `sparse` is not passed on: A's gradient is dense. padding_idx is, so that the padding row
    # gets no gradient in A either.
    table = read.layout.transpose_factor(down)  # (num, r)
    rows = aten.embedding.default(table, read.x, read.arg(2))  # (…, r)
    branch = aten.linear.default(read.scaled(rows), up)  # (…, r) @ (r, dim) -> (…, dim)
    if not read.padding_trains:
        return branch
    # Another read of the tied weight (the head) trains the padding row, so its branch is not zero.
    # This look-up gives the row no gradient, so none may reach B through it.
    padded = aten.unsqueeze.default(aten.eq.Scalar(read.x, read.arg(2)), -1)
    return aten.where.self(padded, aten.detach.default(branch), branch)


def _embedding_bag(read: Read, down: Any, up: Any) -> Any:
    table = read.layout.transpose_factor(down)  # (num, r)
    offsets, mode, weights, last = (read.arg(position) for position in (2, 4, 6, 7))
    padding = read.arg(8)
    given = (table, read.x, offsets, False, mode, False, weights, last, padding)
    bags = aten.embedding_bag.padding_idx(*given)[0]  # (bags, r)
    return aten.linear.default(read.scaled(bags), up)  # (bags, r) @ (r, dim) -> (bags, dim)


def _frequencies(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    # It scales W's gradient per row, and so the gradient that reaches B through W. A branch cannot.
    return "scale_grad_by_freq" if named_argument(node, "scale_grad_by_freq") else None


def _bag_obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    if argument(node, 4, 0) not in (0, 1):  # sum, mean
        return "a maximum over each bag is not linear"
    return _frequencies(node, weight, shape)


def _conv_rows(dims: int) -> dict[tuple[Any, int], Op]:
    packet = getattr(aten, f"conv{dims}d")
    transposed = getattr(aten, f"conv_transpose{dims}d")
    row = Op(
        packet.__name__,
        0,
        convolution(dims),
        kernel=dims,
        costlier=groups_cost_more,
        output=-1 - dims,
        bias=2,
        gathered=gathered_convolution(dims),
    )
    turned = dataclasses.replace(
        row,
        kind=transposed.__name__,
        branch=transposed_convolution(dims),
        in_first=True,
        gathered=gathered_transposed(dims),
    )
    overload = transposed.default if dims == 1 else transposed.input
    return {(packet.default, 1): row, (packet.padding, 1): row, (overload, 1): turned}


_LINEAR = Op(
    "linear",
    0,
    _times_weight,
    bias=2,
    all_linear=True,
    transposed_kind="matmul",
    gathered=times_weights,
)
_ADDMM = Op(
    "addmm",
    1,
    _times_weight,
    in_first=True,
    obstacle=_own_alpha,
    bias=0,
    all_linear=True,
    transposed_kind="linear",
    gathered=times_weights,
)
_MATMUL = Op(
    "matmul",
    0,
    _times_weight,
    in_first=True,
    obstacle=_perhaps_vector(0),
    all_linear=True,
    transposed_kind="linear",
    gathered=times_weights,
)
_MATMUL_LEFT = Op(
    "matmul",
    1,
    _weight_times,
    obstacle=_perhaps_vector(1),
    output=None,
    all_linear=True,
    transposed_kind="matmul",
)
_BMM = Op("bmm", 0, _times_weight, in_first=True, transposed_kind="bmm")
_BMM_LEFT = Op("bmm", 1, _weight_times, output=None, transposed_kind="bmm")
_BADDBMM = Op(
    "baddbmm", 1, _times_weight, in_first=True, obstacle=_own_alpha, transposed_kind="baddbmm"
)
_BADDBMM_LEFT = Op(
    "baddbmm", 2, _weight_times, output=None, obstacle=_own_alpha, transposed_kind="baddbmm"
)
_GROUPED_MM = Op(
    "grouped_mm",
    0,
    _grouped_mm,
    in_first=True,
    layout=lambda node, weight: Layout("eio"),  # of three dimensions: None for a matrix
    transposed_kind="grouped_mm",
)

# (overload, position of the weight among its arguments) → row
OPS: dict[tuple[Any, int], Op] = {
    (aten.linear.default, 1): _LINEAR,
    (aten.addmm.default, 2): _ADDMM,
    (aten.mm.default, 1): _MATMUL,
    (aten.matmul.default, 1): _MATMUL,
    (aten.mm.default, 0): _MATMUL_LEFT,
    (aten.matmul.default, 0): _MATMUL_LEFT,
    (aten.bmm.default, 1): _BMM,
    (aten.bmm.default, 0): _BMM_LEFT,
    (aten.baddbmm.default, 2): _BADDBMM,
    (aten.baddbmm.default, 1): _BADDBMM_LEFT,
    (aten._grouped_mm.default, 1): _GROUPED_MM,
    (aten.einsum.default, 1): Op("einsum", 1, einsum, output=None, layout=einsum_layout),
    (aten.embedding.default, 0): Op(
        "embedding",
        1,
        _embedding,
        in_first=True,
        obstacle=_frequencies,
        dropout=False,
        gathered=looked_up,
    ),
    (aten.embedding_bag.padding_idx, 0): Op(
        "embedding_bag",
        1,
        _embedding_bag,
        in_first=True,
        obstacle=_bag_obstacle,
        dropout=False,
        result=0,
    ),
    **_conv_rows(1),
    **_conv_rows(2),
    **_conv_rows(3),
}

# The rows whose results are W x + b by definition, for `simplify`; registered ops are not.
AFFINE_READS = frozenset(
    [
        (aten.linear.default, 1),
        (aten.addmm.default, 2),
        (aten.mm.default, 1),
        (aten.matmul.default, 1),
        (aten.embedding.default, 0),
        (aten.conv1d.default, 1),
        (aten.conv2d.default, 1),
        (aten.conv3d.default, 1),
        (aten.conv1d.padding, 1),
        (aten.conv2d.padding, 1),
        (aten.conv3d.padding, 1),
        (aten.conv_transpose1d.default, 1),
        (aten.conv_transpose2d.input, 1),
        (aten.conv_transpose3d.input, 1),
    ]
)


def register_op(target: OpOverload, weight: int, op: Op) -> None:
    """Give calls of an op a branch, so that weights that it reads are adapted like a linear's.

    Call it before `capture`, once per process. `fxlora.verify` checks the branch against the
    weight form.

    Args:
        target: the overload as it appears in captured graphs, `torch.ops.mine.product.default`.
        weight: position of the weight among the op's arguments.
        op: the row: the op's name in rules, the position of its input, and its branch.

    Raises:
        ConfigError: the target is not an overload with an argument at that position, or it has a
            row for this argument already.

    Example:
        >>> import torch, fxlora
        >>> @torch.library.custom_op("mine::product", mutates_args=())
        ... def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ...     return x @ w.T
        >>> @product.register_fake
        ... def _(x, w):
        ...     return x.new_empty(*x.shape[:-1], w.shape[0])
        >>> product.register_autograd(
        ...     lambda ctx, g: (g @ ctx.saved_tensors[0], None),
        ...     setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
        ... )
        >>> linear = torch.ops.aten.linear.default  # branches are written in overloads
        >>> def branch(read, down, up):  # down (r, in), up (out, r)
        ...     hidden = linear(read.x, down)  # (…, in) @ (in, r) -> (…, r)
        ...     return linear(read.scaled(hidden), up)  # (…, r) @ (r, out) -> (…, out)
        >>> fxlora.register_op(torch.ops.mine.product.default, 1, fxlora.Op("product", 0, branch))
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.randn(4, 6))
        ...     def forward(self, x):
        ...         return product(x, self.w)
        >>> gm = fxlora.capture(Model(), torch.randn(3, 6))
        >>> rule = fxlora.Rule(op="product", lora=fxlora.LoraConfig(r=2))
        >>> fxlora.match(gm, rule).entries[0].form
        'branch'
    """
    if not isinstance(target, OpOverload):
        raise ConfigError(
            f"register_op takes an overload such as torch.ops.mine.product.default, "
            f"not {shown(target)}."
        )
    if not 0 <= weight < len(target._schema.arguments):
        raise ConfigError(f"{target} has no argument {weight}: its schema is {target._schema}.")
    if (target, weight) in OPS:
        raise ConfigError(f"{target} has a row for argument {weight} already.")
    OPS[target, weight] = op


def is_lookup(kind: str) -> bool:
    """Whether a kind of op takes indices, as an embedding does."""
    return any(row.kind == kind and not row.dropout for row in OPS.values())


def in_all_linear(kind: str) -> bool:
    """Whether "all-linear" includes a kind of op."""
    return any(row.kind == kind and row.all_linear for row in OPS.values())


# Kinds without a branch whose weights torch declares as (out, in, *kernel), with the number of
# kernel dimensions.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
OUT_FIRST = {
    "torchvision.deform_conv2d": 2,
    **{f"aten.{kind}{cell}": 0 for kind in _RECURRENT for cell in ("", "_cell")},
}


def row_of(node: fx.Node, weight: fx.Node) -> Op | None:
    """Return the row of a call that has the weight as exactly one operand, or None without one."""
    positions = [i for i, given in enumerate(node.args) if _holds(given, weight)]
    uses = sum(n is weight for n in flat_inputs(node))
    if not positions or uses != 1:
        return None
    return OPS.get((overload_of(node.target), positions[0]))


def layout_given(node: fx.Node, weight: fx.Node, row: Op | None, dims: int) -> Layout | None:
    """Return the layout in which a call reads a weight of `dims` dimensions; None if unknown."""
    if row:
        return row.layout_of(node, weight, dims)
    kernel = OUT_FIRST.get(qualified_kind(node))
    return standard_layout(dims, False, kernel) if kernel is not None and dims > 1 else None


def _holds(given: Any, weight: fx.Node) -> bool:
    return given is weight or (isinstance(given, list | tuple) and any(g is weight for g in given))


LOW_RANK_PRODUCT = aten.linear.default  # multiplies by A, and by B, in `_times_weight`


def times_matrix(target: Any) -> tuple[int, Op] | None:
    """Return the row of an op that multiplies x by a weight, x @ W or x @ W^T, or None.

    Returns:
        The position of the weight, and the row.
    """
    rows = ((at, row) for (overload, at), row in OPS.items() if overload == target)
    return next(((at, row) for at, row in rows if row.branch is _times_weight), None)


def matrix_products() -> tuple[OpOverload, ...]:
    """Return the overloads of x @ W^T and x @ W, whose weight is their second argument."""
    return aten.linear.default, aten.matmul.default


def is_product(node: fx.Node) -> bool:
    """Whether the call's op has a row, for any of its arguments."""
    target = overload_of(node.target)
    return any(overload == target for overload, _ in OPS)  # no cache: rows may be added later
