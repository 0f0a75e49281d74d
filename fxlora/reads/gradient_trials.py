"""Whether a gradient passes an op, found by trying it on random numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..fx.calls import example_value, frozen, is_torchs

# What torch's ops raise on numbers that they were not made for.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError)


def passes_gradient(node: fx.Node, source: fx.Node) -> bool:
    """Whether a gradient of a call's result reaches one of its inputs; True where that is unknown.

    None does where the result holds other than real numbers, where autograd cuts it off (a
    detach), and where the derivative is zero nearly everywhere (sign, round).
    """
    value = example_value(node)
    if value is not None and not (value.is_floating_point() or value.is_complex()):
        return False
    if not (is_torchs(node) and _can_be_tried(node)):
        return True
    try:
        key = node.op, node.target, frozen(node, lambda given: given is source)
    except TypeError:  # an argument that cannot be hashed
        return True
    if key not in _KNOWN:
        _KNOWN[key] = _tried(node, source)
    return _KNOWN[key]


_KNOWN: dict[Hashable, bool] = {}


def _can_be_tried(node: fx.Node) -> bool:
    """Whether a call runs on small matrices: entry by entry, or with one input of any shape."""
    alone = len(node.all_input_nodes) == 1 and not _is_private(node.target)
    return alone or _is_pointwise(node)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_private(target: object) -> bool:
    """Whether a function is of torch's insides (vmap's levels), which run in their context only."""
    module = str(getattr(target, "__module__", ""))
    registered = isinstance(target, torch._ops.OpOverload | str)
    return not registered and "._" in module


def _tried(node: fx.Node, source: fx.Node) -> bool:
    """Whether any of several trials has a gradient; True where no trial runs."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        trials = [_gradient(node, source, values) for values in _values()]
    ran = [found for found in trials if found is not None]
    return any(ran) or not ran


def _values() -> Iterator[Tensor]:
    """Square matrices of numbers of many magnitudes and both signs, and of probabilities."""
    for _ in range(3):
        sizes = 10 ** torch.empty(4, 4, dtype=torch.float64).uniform_(-3, 3)
        yield sizes * torch.randn(4, 4, dtype=torch.float64)
        yield torch.empty(4, 4, dtype=torch.float64).uniform_(0.1, 0.9)


def _gradient(node: fx.Node, source: fx.Node, values: Tensor) -> bool | None:
    """Whether the call has a gradient by one input at these values; None if it does not run."""
    x = values.clone().requires_grad_()

    def seen(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        if not isinstance(leaf, fx.Node):
            return leaf
        return x * 1 if leaf is source else values.flip(0)  # x * 1: an op may write in place

    args: Any = map_aggregate(node.args, seen)
    kwargs: Any = map_aggregate(dict(node.kwargs), seen)
    function: Any = node.target
    try:
        if node.op == "call_method":
            function, args = getattr(args[0], str(node.target)), args[1:]
        results = function(*args, **kwargs)
        tensors = [
            result
            for result in (results if isinstance(results, list | tuple) else [results])
            if isinstance(result, Tensor)
        ]
        if any(not tensor.numel() for tensor in tensors):
            return None  # a slice beyond these small matrices, for one
        reals = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
        sums = [
            (real * torch.randn(real.shape, dtype=torch.float64)).sum()
            for real in reals
            if real.requires_grad
        ]
        if not sums:
            return False
    except _REFUSALS:
        return None
    try:
        (gradient,) = torch.autograd.grad(sum(sums[1:], sums[0]), x, materialize_grads=True)
    except _REFUSALS:  # entry by entry, nothing else than a missing derivative can fail
        return False if _is_pointwise(node) else None
    return bool((gradient != 0).any())
