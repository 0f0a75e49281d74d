"""verify for modules whose parameters are sharded over processes: on the shards, without a copy.

Every process calls it, and what fails in one fails in all. A fold is not checked: it needs the
whole weights.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import VerificationError
from ..module import CapturedModule
from ..module.sharded import mesh_of, reshard, together, whole
from ..module.skeleton import skeleton
from .coverage import prove_coverage
from .effects import effects
from .graph_checks import check_code, check_modes, without_adapters
from .result import SiteCheck, Verification, sizes_of
from .runs import MethodCall
from .weight_checks import check_adapters, check_base, check_finite


def verified_sharded(module: CapturedModule, calls: Sequence[MethodCall]) -> Verification:
    """Run every check that needs no whole copy of the module; the first that fails raises."""
    assert module.plan is not None
    mesh = mesh_of(module)
    with together(mesh, VerificationError):
        check_code(module, "the adapted module")
        graphs = skeleton(module)
        base = without_adapters(graphs)
        reads = prove_coverage(graphs, base)
        check_modes(graphs, base)
    with together(mesh, VerificationError):
        check_adapters(module)
    with together(mesh, VerificationError):
        check_base(module)
    with together(mesh, VerificationError):
        check_finite(module)
    with _kept(module) as values:
        moved = effects(module, values, calls, _backward)
    checks = [
        SiteCheck(
            site=entry.site,
            form=entry.form,
            reads=found,
            effect=moved[entry.name_a].effect,
            gradient_a=moved[entry.name_a].by_a,
            gradient_b=moved[entry.name_a].by_b,
        )
        for entry, found in zip(module.plan, reads, strict=True)
    ]
    return Verification(tuple(checks), **sizes_of(module))


class _Values:
    """The values of a module's parameters at one time."""

    def __init__(self, module: CapturedModule) -> None:
        names = module.adapter_parameters()
        self.held = {name: module.get_parameter(name).detach().clone() for name in names}

    def get_parameter(self, target: str) -> Tensor:
        return self.held[target]


@contextmanager
def _kept(module: CapturedModule) -> Generator[_Values]:
    """Restore the adapters, all gradients and the mode after a `with` block."""
    values, training = _Values(module), module.training
    trains = {p: p.requires_grad for p in module.parameters()}
    gradients = {p: p.grad for p in module.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield values
    finally:
        reshard(module)
        with torch.no_grad():
            for name, value in values.held.items():
                module.get_parameter(name).copy_(value)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
            parameter.requires_grad_(trains[parameter])
        module.train(training)


def _backward(
    module: CapturedModule,
    names: Sequence[str],
    outputs: Sequence[Tensor],
    loads: Sequence[Tensor],
) -> Sequence[Tensor]:
    """Return whole gradients, from a backward as in training: FSDP2's hooks reduce them."""
    for parameter in module.parameters():
        parameter.grad = None
    torch.autograd.backward(outputs, loads)
    reshard(module)
    parameters = [module.get_parameter(name) for name in names]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return [whole(gradient.detach()) for gradient in found]
