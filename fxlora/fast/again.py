"""Compute a chain of ops again in the backward.

A chain is a graph whose inputs are saved instead of what its ops save.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ..fx.autocast import current_autocast
from .plain import autocast_to, is_plain, outside_of_transforms


class Chain:
    """A function that computes a chain, and computes it again in the backward."""

    def __init__(self, inner: fx.GraphModule, number: int, draws: bool) -> None:
        self.inner, self.draws = inner, draws
        self.__name__, self.__module__ = f"recomputed_{number}", __name__  # which torch.fx asks for

    def __call__(self, *given: Any) -> Any:
        if not may_repeat(given):
            return self.inner(*given)
        return _Recompute.apply(self.inner, self.draws, *given)


def may_repeat(given: Sequence[Any]) -> bool:
    """Whether a chain is to be computed again for a gradient of one of its inputs."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False  # a compiler chooses what to compute again
    tensors = [value for value in given if isinstance(value, Tensor)]
    return any(tensor.requires_grad for tensor in tensors) and is_plain(tensors)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: fx.GraphModule, draws: bool, *given: Any) -> Any:
        ctx.again = Again(inner, given, draws)
        ctx.save_for_backward(*(value for value in given if isinstance(value, Tensor)))
        return inner(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        given, output = ctx.again.computed(ctx.saved_tensors, needed)
        return None, None, *gradients(given, needed, output, grads)


class Again:
    """What is known of a chain's run but its tensors, which are saved."""

    def __init__(self, inner: fx.GraphModule, given: Sequence[Any], draws: bool = False) -> None:
        self.inner, self.autocast = inner, current_autocast()
        self.random = _random_states(given) if draws else {}
        self.others = [None if isinstance(value, Tensor) else (value,) for value in given]

    def computed(self, saved: Sequence[Tensor], needed: Sequence[bool]) -> tuple[list[Any], Tensor]:
        """Compute the chain again; return its inputs, in a graph of their own, and its result.

        Args:
            saved: the tensors among its inputs.
            needed: of which inputs a gradient is wanted.
        """
        twice = torch.is_grad_enabled()  # the gradient itself is to be differentiated
        tensors = iter(saved)
        given = [next(tensors) if other is None else other[0] for other in self.others]
        given = [
            _apart(value, need, twice) if isinstance(value, Tensor) else value
            for value, need in zip(given, needed, strict=True)
        ]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self.random:  # vmap, of a batch of gradients, draws no random numbers
                stack.enter_context(outside_of_transforms())
                stack.enter_context(_with_random_states(self.random))
            for device in {tensor.device.type for tensor in saved}:
                stack.enter_context(autocast_to(device, dict(self.autocast).get(device)))
            return given, self.inner(*given)


def gradients(
    given: Sequence[Any], needed: Sequence[bool], output: Tensor, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of a chain's inputs, or None where none is needed."""
    wanted = [value for value, need in zip(given, needed, strict=True) if need]
    twice = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(output, wanted, grads, create_graph=twice, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _apart(value: Tensor, needed: bool, twice: bool) -> Tensor:
    """Return a tensor whose gradient is that of one input alone, not of what it is computed from.

    If the gradient is to be differentiated (`twice`), it depends on the input.
    """
    return value.view_as(value) if twice else value.detach().requires_grad_(needed)


States = dict[torch.device, Tensor]  # of random generators


def _random_states(given: Sequence[Any]) -> States:
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
