"""Whether a gradient passes through an op, found by running the op on random numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..fx.calls import example_value, frozen, is_torch_call
from ..fx.trials import concrete_sizes


def passes_gradient(node: fx.Node, source: fx.Node) -> bool:
    """Whether a gradient of a call's result reaches its input `source`; True if that is unknown.

    No gradient reaches it if the result is neither floating point nor complex, if autograd stops at
    the call (a detach), or if the derivative is zero almost everywhere (sign, round).
    """
    value = example_value(node)
    if value is not None and not (value.is_floating_point() or value.is_complex()):
        return False
    if not (is_torch_call(node) and _can_be_tried(node)):
        return True
    found = _outcome(node, source, _SMALL)
    example = example_value(source)
    if found is Outcome.ZERO and example is not None and not _is_pointwise(node):
        # Perhaps of small matrices only: normalising over pixels gives a constant if there is one.
        shape = concrete_sizes(example.shape)
        if math.prod(shape) > _MOST_NUMBERS:
            return True
        found = _outcome(node, source, shape)
    return found in (Outcome.PASSES, Outcome.UNKNOWN)


class Outcome(Enum):
    """The result of trials of a call: whether a gradient of its result reached an input.

    Attributes:
        PASSES: it did, in some trial.
        ZERO: autograd records the call, but all gradients were zero.
        STOPS: autograd does not record the call, or has no derivative of it.
        UNKNOWN: no trial ran.
    """

    PASSES = "passes"
    ZERO = "zero"
    STOPS = "stops"
    UNKNOWN = "unknown"


_SMALL = (4, 4)
_MOST_NUMBERS = 2**22  # of an input that is tried in its own shape
_KNOWN: dict[Hashable, Outcome] = {}


def _can_be_tried(node: fx.Node) -> bool:
    """Whether a call can be tried on random numbers: it is pointwise, or has one input node."""
    alone = len(node.all_input_nodes) == 1 and not _is_private(node.target)
    return alone or _is_pointwise(node)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_private(target: object) -> bool:
    """Whether a function is internal to torch (vmap's levels), and so runs in its context only."""
    module = str(getattr(target, "__module__", ""))
    registered = isinstance(target, torch._ops.OpOverload | str)
    return not registered and "._" in module


def _outcome(node: fx.Node, source: fx.Node, shape: tuple[int, ...]) -> Outcome:
    """Try a call on inputs of this shape, unless a like one was tried before."""
    try:
        key = node.op, node.target, frozen(node, lambda given: given is source), shape
    except TypeError:  # an argument that cannot be hashed
        return Outcome.UNKNOWN
    if key not in _KNOWN:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            found = {_trial(node, source, values) for values in _values(shape)}
        _KNOWN[key] = next((o for o in Outcome if o in found), Outcome.UNKNOWN)
    return _KNOWN[key]


def _values(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield numbers of many magnitudes and both signs, and probabilities."""
    for _ in range(3):
        sizes = 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-3, 3)
        yield sizes * torch.randn(shape, dtype=torch.float64)
        yield torch.empty(shape, dtype=torch.float64).uniform_(0.1, 0.9)


def _trial(node: fx.Node, source: fx.Node, values: Tensor) -> Outcome:
    """Take the gradient of a call with respect to `source` at these values."""
    x = values.clone().requires_grad_()
    # Each other input has its own values: no gradient passes a clamp between equal limits.
    inputs = [given for given in node.all_input_nodes if given is not source]
    others = {given: values.flip(0).roll(number, 1) for number, given in enumerate(inputs)}

    def seen(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        if not isinstance(leaf, fx.Node):
            return leaf
        # x * 1 is not a leaf, so an in-place op may write to it.
        return x * 1 if leaf is source else others[leaf]

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
            return Outcome.UNKNOWN  # a slice beyond the end of these small matrices, perhaps
        reals = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
        sums = [
            (real * torch.randn(real.shape, dtype=torch.float64)).sum()
            for real in reals
            if real.requires_grad
        ]
        if not sums:
            return Outcome.STOPS
    except Exception:  # noqa: BLE001 - for inputs that it does not support, a call raises anything
        return Outcome.UNKNOWN
    try:
        (gradient,) = torch.autograd.grad(sum(sums[1:], sums[0]), x, materialize_grads=True)
    except Exception:  # noqa: BLE001 - in a pointwise op, only a missing derivative can fail
        return Outcome.STOPS if _is_pointwise(node) else Outcome.UNKNOWN
    return Outcome.PASSES if (gradient != 0).any() else Outcome.ZERO
