"""A function that computes a chain of ops, and computes it again in the backward.

A joint op that reads the result needs it in the backward, too, for the gradients of A. Its backward
comes first: it has the chain computed again (`again`), and leaves what the chain's backward needs.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ..fx.autocast import current_autocast
from .plain import autocast_to, is_plain


class Chain:
    """A function that computes a chain, and computes it again in the backward."""

    def __init__(self, inner: fx.GraphModule, number: int, draws: bool) -> None:
        self.inner, self.draws = inner, draws
        self.__name__, self.__module__ = f"recomputed_{number}", __name__  # which torch.fx asks for

    def __call__(self, *given: Any) -> Any:
        tensors = [value for value in given if isinstance(value, Tensor)]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.inner(*given)  # a compiler chooses what to compute again
        if not any(tensor.requires_grad for tensor in tensors) or not is_plain(tensors):
            return self.inner(*given)
        return _Recompute.apply(self.inner, self.draws, *given)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: fx.GraphModule, draws: bool, *given: Any) -> Any:
        ctx.inner, ctx.autocast = inner, current_autocast()
        ctx.random = _random_states(given) if draws else {}
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in given]
        ctx.save_for_backward(*(value for value in given if isinstance(value, Tensor)))
        ctx.computed = None
        return inner(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        given, output = ctx.computed or _computed(ctx)
        ctx.computed = None
        needed = ctx.needs_input_grad[2:]
        wanted = [value for value, need in zip(given, needed, strict=True) if need]
        twice = torch.is_grad_enabled()
        found = iter(
            torch.autograd.grad(output, wanted, grads, create_graph=twice, allow_unused=True)
        )
        return None, None, *(next(found) if need else None for need in needed)


def source_of(tensor: Tensor) -> Any:
    """Return what computed a tensor if it can compute it again, or None."""
    node = tensor.grad_fn
    return node if isinstance(node, _Recompute._backward_cls) else None


def again(source: Any) -> Tensor:
    """Return the tensor of a source, computed again.

    Saved tensors can be read once in a backward, as checkpoints want it: the source's own backward
    takes what was computed here.
    """
    source.computed = _computed(source)
    output = source.computed[1]
    return output if torch.is_grad_enabled() else output.detach()


def _computed(ctx: Any) -> tuple[list[Any], Tensor]:
    """Compute a chain again; return its inputs, in a graph of their own, and the result."""
    twice = torch.is_grad_enabled()  # the gradient itself is to be differentiated
    saved = iter(ctx.saved_tensors)
    given = [next(saved) if other is None else other[0] for other in ctx.others]
    given = [
        _apart(value, need, twice) if isinstance(value, Tensor) else value
        for value, need in zip(given, ctx.needs_input_grad[2:], strict=True)
    ]
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_with_random_states(ctx.random))
        for device in {value.device.type for value in given if isinstance(value, Tensor)}:
            stack.enter_context(autocast_to(device, dict(ctx.autocast).get(device)))
        return given, ctx.inner(*given)


def _apart(value: Tensor, needed: bool, twice: bool) -> Tensor:
    """Return a tensor whose gradient is that of one input alone, not of what it is computed from.

    If the gradient is to be differentiated (`twice`), it depends on the input.
    """
    return value.view_as(value) if twice else value.detach().requires_grad_(needed)


States = dict[torch.device, Tensor]  # of random generators


def _random_states(given: tuple[Any, ...]) -> States:
    devices = {value.device for value in given if isinstance(value, Tensor)}
    return {device: _generator(device).get_state() for device in devices}


def _generator(device: torch.device) -> torch.Generator:
    """Return the default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.get_device_module(device).default_generators[device.index]


@contextmanager
def _with_random_states(states: States) -> Generator[None]:
    """Within the context, the generators go on from these states."""
    before = {device: _generator(device).get_state() for device in states}
    try:
        for device, state in states.items():
            _generator(device).set_state(state)
        yield
    finally:
        for device, state in before.items():
            _generator(device).set_state(state)
