"""Checks that each adapter changes the outputs, and that gradients reach its A and B.

Large random A and B saturate a tanh or overflow a deep model, and gradients underflow over many
layers. In each case a good adapter looks like one without effect. So s·BA is drawn small relative
to the weight, and an adapter that seems to have no effect is tried again with gradients that every
step of the backward rescales to a maximum of 1. It is dead if it has none in any of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import VerificationError
from ..module import CapturedModule
from ..module.quantised import dequantised
from ..module.sharded import whole, write
from ..plan import Entry
from .runs import MethodCall, float_tensors, record_calls


@dataclass(frozen=True)
class Effect:
    """The effect of one adapter on a weighted sum of the outputs.

    Attributes:
        effect: change of the sum by the adapter, to first order.
        by_a, by_b: largest absolute gradient of the sum with respect to A and to B.
    """

    effect: float = 0.0
    by_a: float = 0.0
    by_b: float = 0.0

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.effect, self.by_a, self.by_b)))

    @property
    def live(self) -> bool:
        return self.finite and min(self.effect, self.by_a, self.by_b) > 0


# Returns the gradients of a module's outputs with respect to named parameters, for cotangents of
# the outputs.
Gradients = Callable[
    [CapturedModule, Sequence[str], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]
]


@dataclass(frozen=True)
class _Draw:
    """How A and B are drawn, and how gradients are computed.

    Attributes:
        size: root mean square of the drawn s·BA, relative to that of the weight.
        trained: whether to keep the module's A (unless it is zero), and add the draw to its B.
        unit: whether every step of the backward rescales its gradients to a maximum of 1.
    """

    size: float
    trained: bool = False
    unit: bool = False


_DRAWS = (
    _Draw(1 / 64, trained=True),
    _Draw(1 / 64),
    _Draw(1 / 64, trained=True, unit=True),
    _Draw(1 / 64, unit=True),
    _Draw(1, unit=True),
    _Draw(1 / 4096, unit=True),
)


class Values(Protocol):
    """The user's values of A and B: an adapted module, or a copy of its parameters."""

    def get_parameter(self, target: str) -> Tensor: ...


def effects(
    module: CapturedModule,
    trained: Values,
    calls: Sequence[MethodCall],
    gradients: Gradients | None = None,
) -> dict[str, Effect]:
    """Return the effect of each adapter, by the name of its A.

    Args:
        module: an adapted module, whose A and B are overwritten.
        trained: the same module with the user's values of A and B.
        calls: the inputs to run on.
        gradients: computes the gradients of outputs; by default, torch.autograd.grad.

    Raises:
        VerificationError: an adapter has no effect in either mode, or its gradients are not
            finite; names the sites.
    """
    assert module.plan is not None
    found = {entry.name_a: Effect() for entry in module.plan}
    for draw in _DRAWS:
        for mode in ("eval", "train"):  # some weights are read only in the train graph
            dead = [entry for entry in module.plan if not found[entry.name_a].live]
            if dead:
                _fill(module, trained, draw)
                better = _gradients(
                    module.train(mode == "train"), dead, calls, draw.unit, gradients or _autograd
                )
                found |= {name: e for name, e in better.items() if e.live or found[name].finite}
    dead = [entry.site for entry in module.plan if not found[entry.name_a].live]
    endless = [entry.site for entry in module.plan if not found[entry.name_a].finite]
    if endless:
        raise VerificationError(
            f"effect and gradient: on '{endless[0]}' a gradient is not finite for these inputs, "
            "however small the adapter. Training would diverge: look for a division by zero, or a "
            "root or logarithm of zero."
        )
    if dead:
        raise VerificationError(
            f"effect and gradient: the adapter on '{dead[0]}' cannot change the outputs for these "
            "inputs"
            + (f", nor can {len(dead) - 1} more: {', '.join(dead[1:])}." if dead[1:] else ".")
            + " Give inputs that reach it (a branch, an expert; several as calls=[…]), or leave it "
            "out of the rules."
        )
    return found


# ---- values -------------------------------------------------------------------------------------


def draw_adapters(module: CapturedModule, trained: Values) -> None:
    """Write the adapters of `trained` into a module, and add random values to each B.

    An A that is zero is drawn at random, too. B is not replaced by random values, because PiSSA and
    OLoRA subtract their initial s·BA from W0: without a B near the initial one, the adapted weight
    may be almost zero.
    """
    _fill(module, trained, _DRAWS[0])


@torch.no_grad()
def _fill(module: CapturedModule, trained: Values, draw: _Draw) -> None:
    """Write A and B into the module as a draw says, with a fixed seed for each tensor."""
    for number, entry in enumerate(module.plan or ()):
        a, b = (module.get_parameter(name).requires_grad_(True) for name in _pair(entry))
        for name in entry.tensors:  # also the tensors of variants
            module.get_parameter(name).copy_(trained.get_parameter(name))
        size = draw.size * _size_of(dequantised(whole(module.get_parameter(entry.parameter))))
        # An entry of s·BA has a standard deviation of s·√r·std(A)·std(B).
        product = size / abs(entry.scaling or 1.0) / entry.r**0.5  # std(A)·std(B)
        now_a, now_b = whole(a), whole(b)
        kept = draw.trained and bool(now_a.any())
        std = _size_of(now_a) if kept else product**0.5
        if not kept:
            write(a, _drawn(now_a, std, 2 * number))
        more = _drawn(now_b, product / std, 2 * number + 1)
        write(b, now_b + more if draw.trained else more)


def _pair(entry: Entry) -> tuple[str, str]:
    return entry.name_a, entry.name_b


def _size_of(tensor: Tensor) -> float:
    """Return the root mean square of a tensor's entries.

    Where that is zero or not finite: n^-1/2, for n entries per index of the first dimension.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm = float(torch.linalg.vector_norm(tensor, dtype=wide))
    usual = max(1, tensor[0].numel()) ** -0.5
    return norm / tensor.numel() ** 0.5 if 0 < norm < float("inf") else usual


def _drawn(tensor: Tensor, std: float, seed: int) -> Tensor:
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.empty_like(tensor).normal_(std=std, generator=generator)


# ---- gradients ----------------------------------------------------------------------------------


def _gradients(
    module: CapturedModule,
    entries: list[Entry],
    calls: Sequence[MethodCall],
    unit: bool,
    gradients: Gradients,
) -> dict[str, Effect]:
    """Return the effects of some entries, from one forward and one backward pass."""
    outputs = [
        whole(out)
        for call in record_calls(module, calls)
        for out in float_tensors(call.output)
        if out.requires_grad
    ]
    if not outputs:
        return {entry.name_a: Effect() for entry in entries}
    if unit:
        _scale_to_one(outputs)
    # Unequal cotangents, because the plain sum of a softmax's or layer norm's outputs is constant.
    loads = [_load(output) for output in outputs]
    names = [name for entry in entries for name in _pair(entry)]
    found = iter(gradients(module, names, outputs, loads))
    return {e.name_a: _effect(module, e, next(found), next(found)) for e in entries}


def _autograd(
    module: CapturedModule,
    names: Sequence[str],
    outputs: Sequence[Tensor],
    loads: Sequence[Tensor],
) -> Sequence[Tensor]:
    inputs = [module.get_parameter(name) for name in names]
    return torch.autograd.grad(outputs, inputs, loads, allow_unused=True, materialize_grads=True)


def _effect(module: CapturedModule, entry: Entry, by_a: Tensor, by_b: Tensor) -> Effect:
    b = whole(module.get_parameter(entry.name_b).detach())
    moved = abs(float((by_b.double() * b.double()).sum()))  # <∂/∂B, B>, as s·BA is linear in B
    return Effect(moved, float(by_a.abs().max()), float(by_b.abs().max()))


def _load(output: Tensor) -> Tensor:
    """Return the cotangent of an output: 0.5 to 1.5, over the number of entries for float16."""
    load = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape)
    return (load / max(1, output.numel()) if output.dtype == torch.float16 else load).to(output)


def _scale_to_one(outputs: Iterable[Tensor]) -> None:
    """Rescale the gradients at every step of the backward to a maximum of 1: none underflows.

    A positive factor keeps zero gradients zero and nonzero gradients nonzero.
    """
    ahead: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while ahead:
        step = ahead.pop()
        if step is not None and step not in seen:
            seen.add(step)
            step.register_prehook(_at_size_one)
            ahead += [source for source, _ in step.next_functions]


def _at_size_one(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else _scaled(g) for g in gradients)


def _scaled(gradient: Tensor) -> Tensor:
    """Divide a gradient by its largest absolute entry, unless that is zero or not finite."""
    if gradient.layout is not torch.strided or not gradient.numel():
        return gradient
    size = gradient.abs().max()
    return torch.where((size > 0) & size.isfinite(), gradient / size, gradient)
