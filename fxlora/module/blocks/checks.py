"""Checks, at every call of a block, of the assumptions about it in the graph around it.

Hooks, wrappers and replacements may change the arguments of a block and its result. The graphs
assume that these have the structure, the constants and the sizes as captured, and that two values
that were one tensor still are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from ...errors import SubmoduleError
from ...fx.literals import same_literal
from ...tables import a


def same(one: Any, other: Any) -> bool:
    """Whether two values are one tensor (or one size), so that either can be read for the other.

    Two tensors in the same memory with the same gradient count as one, because fully_shard wraps
    tensors.
    """
    if one is other:
        return True
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
    if torch.compiler.is_compiling():  # memory cannot be traced
        return False
    try:
        return _memory(one) == _memory(other) and _gradient(one) == _gradient(other)
    except RuntimeError:  # a tensor without storage, of another layout or inside a transform
        return False


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    kind = tensor.dtype, tensor.is_conj(), tensor.is_neg()
    place = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return *kind, *place, tuple(tensor.shape), tensor.stride()


def _gradient(tensor: Tensor) -> Any:
    """Return where a tensor's gradient goes: a view may scale it, or have none."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor.requires_grad and torch.is_grad_enabled()
    node, number = get_gradient_edge(tensor)[:2]
    while node.name() == _SHARDED:
        node, number = node.next_functions[number]
        assert node is not None
    return node, number


_SHARDED = "RegisterPostBackwardFunctionBackward"  # the identity, by which fully_shard gets a hook


def leaves_of(
    output: Any, path: str, structure: Any, count: int, constants: Sequence[tuple[int, Any]]
) -> list[Any]:
    """Return the leaves of a block's result; raise SubmoduleError for another structure.

    Args:
        output: the result.
        path: the block's path.
        structure: the structure of the result as captured, with numbers for leaves, or None if a
            node of a graph cannot hold it.
        count: the number of leaves.
        constants: index and value of the leaves that are constants in the graph around the block.
    """
    leaves, found = pytree.tree_flatten(output)
    different = structure is not None and found != pytree.tree_structure(structure)
    if different or len(leaves) != count:
        raise SubmoduleError(
            f"'{path}': it returned {a(type(output).__name__)} of another structure than the one "
            "captured: a hook, wrapper or replacement changed it. Return the same structure (and "
            "a dict's keys in the same order)."
        )
    for index, value in constants:
        if not same_literal(leaves[index], value):
            raise SubmoduleError(
                f"'{path}': a hook, wrapper or replacement changed its output {index}, which the "
                f"code around the module has as the constant {value!r}. Leave it as it is, or "
                "outline the module around it."
            )
    return leaves


@has_side_effect
def check_unchanged(leaf: Any, path: str, index: int, value: Any) -> None:
    """Raise SubmoduleError unless a leaf of a block's result is the value that the graph uses."""
    if isinstance(leaf, fx.Proxy) or same(leaf, value):
        return
    raise SubmoduleError(
        f"'{path}': a hook, wrapper or replacement changed its output {index}, but in the graph "
        "that output is the same tensor as an argument, another output or a parameter, and the "
        "code around the module takes it from there. Leave that output as it is, or outline the "
        "module around it."
    )


@has_side_effect
def check_sizes(
    leaf: Any, path: str, index: int, sizes: Sequence[int | None], equal: Sequence[Any]
) -> None:
    """Raise SubmoduleError unless a leaf of a block's result has the shape that the graph expects.

    Args:
        leaf: the leaf.
        path: the block's path.
        index: the leaf's index.
        sizes: the expected size of each dimension; None for a dynamic one.
        equal: for dynamic ones: (dimension, tensor with the same size, its dimension).
    """
    if isinstance(leaf, fx.Proxy):
        return
    if not isinstance(leaf, Tensor):
        raise _misshapen(path, index, f"is {a(type(leaf).__name__)}, not a tensor")
    shape = leaf.shape
    if len(shape) != len(sizes):
        raise _misshapen(path, index, f"has {len(shape)} dimensions, not {len(sizes)}")
    for axis, size in enumerate(sizes):
        if size is not None and shape[axis] != size:
            raise _misshapen(path, index, f"has size {shape[axis]} in dimension {axis}, not {size}")
    for axis, tensor, other in equal:
        if shape[axis] != tensor.shape[other]:
            found, wanted = shape[axis], tensor.shape[other]
            raise _misshapen(path, index, f"has size {found} in dimension {axis}, not {wanted}")


def _misshapen(path: str, index: int, how: str) -> SubmoduleError:
    return SubmoduleError(
        f"'{path}': its output {index} {how}, as captured: a hook, wrapper or replacement changed "
        "it, and the graph around the module was captured for the size that it had. Keep the "
        "shape, or change the source model and capture that."
    )
