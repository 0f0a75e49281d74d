"""verify for modules whose parameters are sharded over processes: on the shards, without a copy.

Every process calls it, and it fails on all if on one. A fold is not checked: it needs the whole
weights.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import VerificationError
from ..module import CapturedModule
from ..module.fingerprints import differing_copies
from ..module.fsdp import gradients_reduced, mesh_of, reshard
from ..module.program import MODES
from ..module.sharded import is_sharded, mean_over, together, whole
from ..module.skeleton import skeleton
from ..tables import some
from .coverage import prove_coverage
from .effects import effects
from .graph_checks import check_code, check_modes, without_adapters
from .result import SiteCheck, Verification, sizes_of
from .runs import MethodCall
from .weight_checks import check_adapters, check_base, check_finite

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def verified_sharded(module: CapturedModule, calls: Sequence[MethodCall]) -> Verification:
    """Run every check that needs no whole copy of the module; the first that fails raises."""
    assert module.plan is not None
    mesh = mesh_of(module)
    assert mesh is not None
    with together(mesh, VerificationError):
        check_code(module, "the adapted module")
        graphs = skeleton(module)
        base = without_adapters(graphs)
        reads = prove_coverage(graphs, base)
        check_modes(graphs, base)
    with together(mesh, VerificationError):
        check_adapters(module)
    with together(mesh, VerificationError):
        _check_copies(module, mesh)
    with together(mesh, VerificationError):
        check_base(module)
    with together(mesh, VerificationError):
        check_finite(module)
    with _kept(module) as values:
        with together(mesh, VerificationError):
            _check_calls(module, calls)
        moved = effects(module, values, calls, functools.partial(_backward, mesh))
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
    """The values of a module's adapters at one time, by name."""

    def __init__(self, module: CapturedModule) -> None:
        names = module.adapter_parameters()
        self.parameters = {name: module.get_parameter(name) for name in names}
        self.held = {name: p.detach().clone() for name, p in self.parameters.items()}

    def get_parameter(self, target: str) -> Tensor:
        return self.held[target]


@contextmanager
def _kept(module: CapturedModule) -> Generator[_Values]:
    """Restore the adapters, all gradients and all modes after a `with` block, also if it fails."""
    values = _Values(module)
    modes = [(part, part.training) for part in module.modules()]
    states = [(p, p.grad, p.requires_grad) for p in module.parameters()]
    for parameter, _, _ in states:
        parameter.grad = None
    try:
        with gradients_reduced(module):
            yield values
    finally:
        reshard(module)
        with torch.no_grad():  # into the shards, whatever the module holds
            for name, value in values.held.items():
                values.parameters[name].copy_(value)
        for parameter, gradient, requires_grad in states:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for part, training in modes:
            if part.training is not training:
                part.training = training


def _check_copies(module: CapturedModule, mesh: DeviceMesh) -> None:
    """Raise unless copied tensors have the same values on all processes."""
    if differing := differing_copies(mesh, dict(module.named_parameters())):
        raise VerificationError(
            f"processes: {some(differing)} is another in each process, which should have copies of "
            "it. Start from the same weights (one seed), give the processes of one "
            "tensor-parallel group the same data, and shard all that trains with fully_shard."
        )


def _check_calls(module: CapturedModule, calls: Sequence[MethodCall]) -> None:
    """Raise InputError for a call that the module would refuse, before any process waits in one."""
    training = module.training
    for mode in MODES:
        module.train(mode == "train")
        for call in calls:
            if not module.parent_module:  # Python decides about those of regions
                module.chosen_call(call.args, call.kwargs, call.method)
    module.train(training)


def _backward(
    mesh: DeviceMesh,
    module: CapturedModule,
    names: Sequence[str],
    outputs: Sequence[Tensor],
    loads: Sequence[Tensor],
) -> Sequence[Tensor]:
    """Return whole gradients, the same on all processes, from a backward as in training."""
    for parameter in module.parameters():
        parameter.grad = None
    torch.autograd.backward(outputs, loads)
    reshard(module)
    found: list[Tensor] = []
    for parameter in map(module.get_parameter, names):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        sharded = is_sharded(gradient)  # and so the same on all processes
        found.append(whole(gradient) if sharded else mean_over(mesh, gradient))
    return found
