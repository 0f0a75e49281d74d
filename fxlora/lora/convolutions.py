"""LoRA branches for convolutions, including grouped and transposed ones.

The factor with the kernel (A for a convolution, B for a transposed one) takes the layer's stride,
padding and dilation; the other factor is a 1x1 convolution.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ..fx.calls import named_argument
from .gathered import Samples
from .layout import Shape
from .row import Branch, Gathered, Read, aten


def _ones(dims: int) -> tuple[list[int], list[int]]:
    return [1] * dims, [0] * dims


def convolution(dims: int) -> Branch:
    """Return the branch for `conv{dims}d`.

    A is (r, in/groups, *kernel), B is (out, r, 1, …).
    """
    pointwise = getattr(aten, f"conv{dims}d").default
    one, none = _ones(dims)

    def branch(read: Read, down: Any, up: Any) -> Any:
        # (input, weight, bias, stride, padding, dilation, groups)
        stride, padding, dilation, groups = (read.arg(position) for position in (3, 4, 5, 6))
        if groups > 1:  # every group applies all r filters of A to its slice of the channels
            down = aten.repeat.default(down, [groups] + [1] * (dims + 1))
        # (…, in, *size) * (groups·r, in/groups, *kernel) -> (…, groups·r, *size_out)
        hidden = read.node.target(read.x, down, None, stride, padding, dilation, groups)  # pyright: ignore[reportCallIssue]
        # (…, groups·r, *size_out) * (out, r, 1, …) -> (…, out, *size_out)
        return pointwise(read.scaled(hidden), up, None, one, none, one, groups)

    return branch


def transposed_convolution(dims: int) -> Branch:
    """Return the branch for `conv_transpose{dims}d`.

    A is (r, in, 1, …), B is (out/groups, r, *kernel).
    """
    pointwise = getattr(aten, f"conv{dims}d").default
    one, none = _ones(dims)

    def branch(read: Read, down: Any, up: Any) -> Any:
        # (input, weight, bias, stride, padding, output_padding, groups, dilation)
        stride, padding, extra, groups, dilation = (read.arg(position) for position in range(3, 8))
        r_up = read.layout.transpose_factor(up)  # (r, out/groups, *kernel)
        if groups > 1:  # each group has its own r hidden channels; all groups share B
            down = aten.reshape.default(down, [-1, groups, read.shape[0] // groups, *one])
            down = aten.flatten.using_ints(aten.transpose.int(down, 0, 1), 0, 1)
            r_up = aten.repeat.default(r_up, [groups] + [1] * (dims + 1))
        # (…, in, *size) * (groups·r, in/groups, 1, …) -> (…, groups·r, *size)
        hidden = pointwise(read.x, down, None, one, none, one, groups)
        geometry = (stride, padding, extra, groups, dilation)
        # (…, groups·r, *size) * (groups·r, out/groups, *kernel) -> (…, out, *size_out)
        return read.node.target(read.scaled(hidden), r_up, None, *geometry)  # pyright: ignore[reportCallIssue]

    return branch


# With a pair for each sample, the samples are further groups: (b, c, *size) -> (1, b·c, *size).


def _side_by_side(samples: Samples, tensor: Any, channels: int, dims: int) -> Any:
    """Join the samples' channels: (b, channels, *size) -> (1, b·channels, *size)."""
    sizes = [aten.sym_size.int(tensor, dim) for dim in range(2, dims + 2)]
    return aten.reshape.default(tensor, [1, samples.count * channels, *sizes])


def _one_by_one(samples: Samples, tensor: Any, channels: int, dims: int) -> Any:
    """Undo `_side_by_side`."""
    sizes = [aten.sym_size.int(tensor, dim) for dim in range(2, dims + 2)]
    return aten.reshape.default(tensor, [samples.count, channels, *sizes])


def gathered_convolution(dims: int) -> Gathered:
    """Return the branch for `conv{dims}d` with a pair for each sample.

    The stack of A is (slots, r, in/groups, *kernel), that of B is (slots, out, r, 1, …).
    """
    pointwise = getattr(aten, f"conv{dims}d").default
    one, none = _ones(dims)

    def branch(samples: Samples) -> Any:
        read, (size_i, size_o) = samples.read, samples.sizes
        stride, padding, dilation, groups = (read.arg(position) for position in (3, 4, 5, 6))
        r, all_groups = samples.rank, samples.count * groups
        down = aten.unsqueeze.default(samples.own_down, 1)
        down = aten.repeat.default(down, [1, groups, 1, 1, *one])  # (b, groups, r, in/groups, …)
        down = aten.flatten.using_ints(down, 0, 2)
        up = aten.flatten.using_ints(samples.own_up, 0, 1)  # (b·out, r, 1, …)
        x = _side_by_side(samples, read.x, size_i * groups, dims)
        hidden = read.node.target(x, down, None, stride, padding, dilation, all_groups)  # pyright: ignore[reportCallIssue]
        hidden = _one_by_one(samples, hidden, groups * r, dims)
        hidden = samples.scaled(hidden, dims + 2, 1, groups)
        hidden = _side_by_side(samples, hidden, groups * r, dims)
        outputs = pointwise(hidden, up, None, one, none, one, all_groups)
        return _one_by_one(samples, outputs, size_o, dims)

    return branch


def gathered_transposed(dims: int) -> Gathered:
    """Return the branch for `conv_transpose{dims}d` with a pair for each sample.

    The stack of A is (slots, r, in, 1, …), that of B is (slots, out/groups, r, *kernel).
    """
    pointwise = getattr(aten, f"conv{dims}d").default
    one, none = _ones(dims)

    def branch(samples: Samples) -> Any:
        read, (size_i, size_o) = samples.read, samples.sizes
        stride, padding, extra, groups, dilation = (read.arg(position) for position in range(3, 8))
        r, all_groups = samples.rank, samples.count * groups
        down = samples.own_down
        down = aten.reshape.default(down, [samples.count, r, groups, size_i // groups, *one])
        down = aten.flatten.using_ints(aten.transpose.int(down, 1, 2), 0, 2)
        up = aten.unsqueeze.default(aten.transpose.int(samples.own_up, 1, 2), 1)
        up = aten.repeat.default(up, [1, groups, 1, 1, *one])  # (b, groups, r, out/groups, …)
        up = aten.flatten.using_ints(up, 0, 2)
        x = _side_by_side(samples, read.x, size_i, dims)
        hidden = pointwise(x, down, None, one, none, one, all_groups)
        hidden = _one_by_one(samples, hidden, groups * r, dims)
        hidden = samples.scaled(hidden, dims + 2, 1, groups)
        hidden = _side_by_side(samples, hidden, groups * r, dims)
        geometry = (stride, padding, extra, all_groups, dilation)
        outputs = read.node.target(hidden, up, None, *geometry)  # pyright: ignore[reportCallIssue]
        return _one_by_one(samples, outputs, size_o * groups, dims)

    return branch


def groups_cost_more(node: fx.Node, shape: Shape, r: int) -> str | None:
    """Return why the weight form is cheaper for this grouped convolution, or None if it is not.

    Multiplications per position, where k is the number of entries of a kernel:

        branch: r·in·k + r·out in the forward pass, and twice that in the backward pass
        weight form: out·(in/groups)·k, for the gradient of the whole weight

    For a transposed convolution, in and out change places. None for a convolution without groups.
    """
    groups = int(named_argument(node, "groups"))
    if groups == 1:
        return None
    ratio = 3 * r * (groups * math.prod(shape[1:]) + shape[0]) / math.prod(shape)
    if ratio <= 1:
        return None
    more = f"{ratio:.0f} times as much as" if ratio >= 2 else f"{ratio - 1:.0%} more than"
    return f"{groups} groups: a branch costs {more} the weight's gradient"
