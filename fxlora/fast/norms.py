"""fxlora::sum_norms, an op: the norms of the rows of W + BA, without forming the sum.

    ‖w_i + b_i A‖² = ‖w_i‖² + 2 ⟨w_i Aᵀ, b_i⟩ + b_i (A Aᵀ) b_iᵀ

The explicit nodes write and read matrices of W's size, this op only reads W. The result is a
constant for autograd, as DoRA's norm is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from .plain import autocast_to, is_plain

aten = torch.ops.aten

_LIBRARY = torch.library.Library("fxlora", "FRAGMENT")
_LIBRARY.define("sum_norms(Tensor weight, Tensor down, Tensor up) -> Tensor")


def sum_norms(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the norms of the rows of W + BA, (out,). One of A and B has the factor s.

    Args:
        weight: W, (out, in).
        down: A, (r, in).
        up: B, (out, r).
    """
    weight, down, up = weight.detach(), down.detach(), up.detach()
    with autocast_to(weight.device.type, None):
        if weight.is_meta or not is_plain(
            [weight, down, up]
        ):  # as under torch.compile, which fuses these
            return torch.linalg.vector_norm(weight + up @ down, 2, -1)
        mixed = ((weight @ down.t()) * up).sum(1)  # (out, in) @ (in, r) -> (out, r) -> (out,)
        last = ((up @ (down @ down.t())) * up).sum(1)  # (out, r) @ (r, r) -> (out, r) -> (out,)
        first = torch.linalg.vector_norm(weight, 2, 1).square()
        squares = first + 2 * mixed + last
        if bool((squares < _CANCELLED * (first + last)).any()):  # W + BA is close to 0
            return torch.linalg.vector_norm(weight + up @ down, 2, -1)
    return squares.sqrt()


_CANCELLED = 1e-2  # then a seventh of the digits of float32 are lost


_LIBRARY.impl("sum_norms", sum_norms, "CompositeImplicitAutograd")


def rewrite_norms(graph: fx.Graph) -> None:
    """Replace the norms of detached sums W + BA, in float32 or float64, by the op."""
    for node in graph.find_nodes(op="call_function", target=aten.linalg_vector_norm.default):
        given = _summands(node)
        if given is None:
            continue
        with graph.inserting_before(node):
            made = graph.call_function(torch.ops.fxlora.sum_norms.default, given)
        node.replace_all_uses_with(made)
        _erase_unused(node)


def _summands(norm: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Return W, A and B if a node is the norms of the rows of their detached sum, or None."""
    if norm.kwargs or norm.args[1:] != (2, [-1]):
        return None
    detached = _call(norm.args[0], aten.detach.default)
    total = detached and _call(detached.args[0], aten.add.Tensor)
    product = total and _call(total.args[1], aten.mm.default)
    if not total or not product or total.kwargs:
        return None
    weight, (up, down) = total.args[0], product.args
    given = all(isinstance(node, fx.Node) for node in (weight, up, down))
    if not given or not _is_wide_matrix(weight):
        return None
    return cast("Any", (weight, down, up))


def _is_wide_matrix(node: Any) -> bool:
    """Whether a node is a matrix in float32 or float64."""
    value = node.meta.get("val")
    wide = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
    return wide and value.ndim == 2


def _call(node: Any, target: Any) -> fx.Node | None:
    """Return a node if it is a call of the target."""
    return node if isinstance(node, fx.Node) and node.target == target else None


def _erase_unused(node: fx.Node) -> None:
    """Erase a call without users and, recursively, its inputs that are then calls without users."""
    if node.op == "call_function" and not node.users:
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        for given in inputs:
            _erase_unused(given)
