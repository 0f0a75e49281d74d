"""What is known of ops that stand between a weight and the op that reads it."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ..fx.calls import example_value, named_argument, torch_kind
from ..lora.layout import Layout, plain

aten = torch.ops.aten

# Kinds without a row whose weights have a kernel: how many dimensions of it.
_KERNELS = {"deform_conv2d": 2}
CASTS = frozenset({"to", "_to_copy", "type_as"})


VIEWS = frozenset({"view", "reshape", "flatten", "_unsafe_view"})
SLICES = frozenset(
    {"slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split"}
)
_TURNS = frozenset({"t", "transpose", "permute", "mT", "numpy_T", "squeeze", "unsqueeze", "detach"})
_STEPS = frozenset(
    {"detach", "detach_", "sign", "sgn", "round", "floor", "ceil", "trunc", "heaviside"}
)
# Kinds without a row whose weights are (out, in), as torch declares them.
_OUT_FIRST = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "deform_conv2d"}) | {
    f"{kind}_cell" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}
# What may leave the shape as it is and exchange what its dimensions mean.
_EXCHANGES = frozenset(
    {
        *("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "T"),
        *("getattr", "index", "gather", "flip", "rot90", "roll", "as_strided", "unfold", "matmul"),
    }
)
_DESCRIBING = frozenset(
    {
        *("_assert_tensor_metadata", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
        *("size", "stride", "numel", "dim", "storage_offset", "is_floating_point"),
    }
)
_MADE_ALIKE = frozenset(
    f"{made}_like" for made in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | {f"new_{made}" for made in ("zeros", "ones", "full", "empty", "empty_strided", "tensor")}


def layout_without_row(kind: str, dims: int) -> Layout:
    """The roles of a weight that an op without a row reads."""
    return plain(dims, False, _KERNELS.get(kind, 0))


def keeps_roles(kind: str, way: Collection[str], same_shape: bool, has_row: bool) -> bool:
    """Whether what an op says of the weight that it is given holds for the weight itself.

    Args:
        way: the kinds of the ops between the two.
        same_shape: whether both are known to have one shape.
        has_row: whether the op has a row in the table.
    """
    if not has_row and kind not in _OUT_FIRST:
        return False
    if set(way) <= CASTS | SLICES | {"getitem"}:
        return True
    return same_shape and _EXCHANGES.isdisjoint(way)


def padding_row(node: fx.Node, rows: int) -> int | None:
    """The row that a look-up gives no gradient, or None."""
    index = named_argument(node, "padding_idx")
    if not isinstance(index, int):
        return None
    if node.target is aten.embedding_bag.padding_idx:
        return index % rows  # a bag's counts from the end
    return index if index >= 0 else None  # where an embedding's -1 says that there is none


def is_transpose(node: fx.Node, of: fx.Node, dims: int) -> bool:
    """Whether a call is the transpose of a matrix, or of each in a stack.

    Args:
        of: what would be transposed.
        dims: how many dimensions it has where its example value does not say.
    """
    value = example_value(of)
    dims = dims if value is None else value.ndim
    if dims < 2:
        return False
    if node.target in (aten.t.default, aten.numpy_T.default):
        return dims == 2
    last = {dims - 2, dims - 1}
    turned: Any
    if node.target is aten.permute.default:
        turned = [dim % dims for dim in node.args[1]]  # pyright: ignore[reportGeneralTypeIssues, reportOperatorIssue, reportUnknownVariableType, reportOptionalIterable]
        return turned == [*range(dims - 2), dims - 1, dims - 2]
    if node.target is aten.transpose.int:
        turned = node.args[1:3]
        return {dim % dims for dim in turned} == last
    return node.target is aten.mT.default


def stops_gradients(node: fx.Node) -> bool:
    """Whether no gradient passes a call: a detach, steps, or what makes other than real numbers."""
    value = example_value(node)
    counted = value is not None and not (value.is_floating_point() or value.is_complex())
    return counted or torch_kind(node) in _STEPS


def moves_data(node: fx.Node) -> bool:
    """Whether a call takes parts of a tensor, or arranges it in other ways, and no more."""
    if node.target is operator.getitem:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    named = getattr(packet, "__name__", "") in VIEWS | SLICES | _TURNS
    return named and not node.kwargs


def reads_no_values(node: fx.Node) -> bool:
    """Whether a call looks at a tensor's dtype, shape or device alone."""
    kind = torch_kind(node)
    return kind in _DESCRIBING or kind in _MADE_ALIKE
