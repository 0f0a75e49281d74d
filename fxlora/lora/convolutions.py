"""Branches of convolutions, grouped and transposed ones too.

The layer's geometry is where the kernel is; the other factor is a 1x1 convolution.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ..fx.calls import named_argument
from .layout import Shape
from .row import Branch, Read, aten


def _ones(dims: int) -> tuple[list[int], list[int]]:
    return [1] * dims, [0] * dims


def convolution(dims: int) -> Branch:
    pointwise = getattr(aten, f"conv{dims}d").default
    one, none = _ones(dims)

    def branch(read: Read, down: Any, up: Any) -> Any:
        # (input, weight, bias, stride, padding, dilation, groups)
        stride, padding, dilation, groups = (read.arg(position) for position in (3, 4, 5, 6))
        if groups > 1:  # each group's slice meets all r filters
            down = aten.repeat.default(down, [groups] + [1] * (dims + 1))
        hidden = read.node.target(read.x, down, None, stride, padding, dilation, groups)  # pyright: ignore[reportCallIssue]
        return pointwise(read.scaled(hidden), up, None, one, none, one, groups)

    return branch


def transposed_convolution(dims: int) -> Branch:
    pointwise = getattr(aten, f"conv{dims}d").default
    one, none = _ones(dims)

    def branch(read: Read, down: Any, up: Any) -> Any:
        # (input, weight, bias, stride, padding, output_padding, groups, dilation)
        stride, padding, extra, groups, dilation = (read.arg(position) for position in range(3, 8))
        r_up = read.layout.transposed(up)  # (r, out/groups, *kernel)
        if groups > 1:  # each group of inputs has r channels of its own, and shares B
            down = aten.reshape.default(down, [-1, groups, read.shape[0] // groups, *one])
            down = aten.flatten.using_ints(aten.transpose.int(down, 0, 1), 0, 1)
            r_up = aten.repeat.default(r_up, [groups] + [1] * (dims + 1))
        hidden = pointwise(read.x, down, None, one, none, one, groups)
        geometry = (stride, padding, extra, groups, dilation)
        return read.node.target(read.scaled(hidden), r_up, None, *geometry)  # pyright: ignore[reportCallIssue]

    return branch


def groups_cost_more(node: fx.Node, shape: Shape, r: int) -> str | None:
    """Whether the weight form is cheaper for a grouped convolution: per position,

    branch: r·in·k + r·out multiplications forward, and as many twice more backward;
    weight: out·(in/groups)·k once, for the gradient of the whole weight.
    (Of a transposed one, in and out change places.)
    """
    groups = int(named_argument(node, "groups"))
    if groups == 1:
        return None
    branch = 3 * r * (groups * math.prod(shape[1:]) + shape[0])
    weight = math.prod(shape)
    if branch <= weight:
        return None
    return f"{groups} groups: the weight's gradient costs {branch / weight:.0f}x less than a branch"
