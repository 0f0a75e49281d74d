"""verify: the laws, checked on a module and inputs of the user's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..api import fold
from ..errors import InjectError, VerificationError
from ..module import CapturedModule
from ..module.shell import RegionCall
from ..passes.initialize import new_tensors
from ..plan import Entry
from .coverage import prove_coverage, refuse_bare_reads
from .proofs import (
    check_base,
    check_folded_graphs,
    check_modes,
    check_the_rest,
    check_ties,
    folded_weights,
    own_dice,
    same,
    without_adapters,
)
from .verification import SiteCheck, Verification

__all__ = ["SiteCheck", "Verification", "verify"]

# Relative to the largest output: what rounding alone may do between two orders of summation.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


@torch.inference_mode(False)
def verify(
    module: CapturedModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    folded: CapturedModule | None = None,
) -> Verification:
    """Check the laws of fxlora on the given inputs, in a handful of forwards.

    - Coverage: every read of an adapted weight, in every graph and mode, has its adapter.
    - Modes agree: each mode has the captured graph with these adapters, and nothing else.
    - Base: no weight under an adapter was written to since the injection, and with B = 0 the
      outputs are those without adapters, bit for bit.
    - Effect: every adapter moves the outputs, and gradients reach its A and its B.
    - Fold: the folded graphs are the captured ones node for node, ties are kept, each folded
      weight is W0 + s·BA up to one rounding, everything else is as it was, and the outputs are
      the unfolded ones.

    Args:
        module: an adapted module; it is left as it is.
        args, kwargs: inputs to run on. They must reach every adapter (every branch, every expert).
        folded: the folded module to check; by default it is folded here.

    Raises:
        VerificationError: a law does not hold; names the law, and the site where there is one.
        InjectError: the module has no adapters, or no memory to compute with.
    """
    if not isinstance(module, CapturedModule) or module.plan is None:
        raise InjectError("nothing to verify: give the adapted module, before it is folded.")
    if folded is not None and not isinstance(folded, CapturedModule):
        raise InjectError(f"folded must be what fxlora.fold made, not {type(folded).__name__}.")
    if any(parameter.is_meta for parameter in module.parameters()):
        raise InjectError("nothing can be computed on the meta device: verify where weights are.")
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    kwargs = dict(kwargs or {})
    refuse_bare_reads(module)
    base = without_adapters(module)
    reads = prove_coverage(module, base)
    check_modes(module, base)
    check_base(module)
    folded = fold(module) if folded is None else folded
    check_folded_graphs(base, folded)
    check_ties(module, folded)
    weights = folded_weights(module, folded)
    check_the_rest(module, folded)
    _check_identity(module, base, args, kwargs)
    effects = _effects(module, args, kwargs)
    error, tolerance = _output_error(module, folded, args, kwargs)
    checks = [
        SiteCheck(
            site=entry.site,
            form=entry.form,
            reads=found,
            effect=effects[entry.name_a].effect,
            gradient_a=effects[entry.name_a].by_a,
            gradient_b=effects[entry.name_a].by_b,
            weight_error=weights[entry.name_a][0],
            weight_tolerance=weights[entry.name_a][1],
        )
        for entry, found in zip(module.plan, reads, strict=True)
    ]
    return Verification(tuple(checks), error, tolerance)


def _check_identity(
    module: CapturedModule, base: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """With B = 0 the outputs are those without adapters, bit for bit."""
    assert module.plan is not None
    # torch chooses attention kernels by requires_grad, under no_grad too.
    neutral = module.derive().eval().requires_grad_(False)
    without = base.derive().eval().requires_grad_(False)
    with torch.no_grad(), own_dice(module):
        for entry in module.plan:
            start = dataclasses.replace(entry, init="kaiming_uniform")  # B = 0
            for name, tensor in new_tensors(start, module.get_parameter(entry.parameter)).items():
                neutral.get_parameter(name).copy_(tensor)
        adapted = _floats(_output(neutral, args, kwargs))
        plain = _floats(_output(without, args, kwargs))
    if not all(same(a, b) for a, b in zip(adapted, plain, strict=True)):
        raise VerificationError(
            "base unchanged: with B = 0 the outputs are not those without adapters."
        )


@dataclass(frozen=True)
class _Effect:
    """What one adapter does to the weighted sum of the outputs; see `SiteCheck`."""

    effect: float = 0.0
    by_a: float = 0.0
    by_b: float = 0.0

    @property
    def live(self) -> bool:
        return min(self.effect, self.by_a, self.by_b) > 0


def _effects(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, _Effect]:
    """What each adapter does, by the name of its A; raises where one does nothing in any mode."""
    assert module.plan is not None
    random = module.derive()
    _randomise(random)
    effects = {entry.name_a: _Effect() for entry in module.plan}
    for mode in ("eval", "train"):  # a weight may be read in the train graph alone
        dead = [entry for entry in module.plan if not effects[entry.name_a].live]
        if dead:
            effects |= _gradients(random.train(mode == "train"), dead, args, kwargs)
    if dead := [entry.site for entry in module.plan if not effects[entry.name_a].live]:
        raise VerificationError(
            f"effect and gradient: the adapter on '{dead[0]}' cannot change the outputs for these "
            "inputs"
            + (f", nor can {len(dead) - 1} others: {', '.join(dead[1:])}." if dead[1:] else ".")
            + " Give inputs that reach it (a branch, an expert), or leave it out of the rules."
        )
    return effects


def _randomise(module: CapturedModule) -> None:
    assert module.plan is not None
    with torch.no_grad():
        for number, entry in enumerate(module.plan):
            for seed, name in enumerate((entry.name_a, entry.name_b), 2 * number):
                parameter = module.get_parameter(name).requires_grad_(True)
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def _load(output: Tensor) -> Tensor:
    """Weights of an output's entries; where half precision would overflow, small ones."""
    load = torch.linspace(0.5, 1.5, output.numel(), device=output.device).view(output.shape)
    return (load / max(1, output.numel()) if output.dtype == torch.float16 else load).to(output)


def _gradients(
    module: CapturedModule, entries: list[Entry], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, _Effect]:
    """One forward and one backward for all entries."""
    with torch.enable_grad():
        outputs = [
            out
            for call in _calls(module, args, kwargs)
            for out in _floats(call.output)
            if out.requires_grad
        ]
        if not outputs:
            return {entry.name_a: _Effect() for entry in entries}
        names = [name for entry in entries for name in (entry.name_a, entry.name_b)]
        # Cotangents that cancel nothing: an even sum is blind behind a softmax or a layer norm.
        loads = [_load(output) for output in outputs]
        factors = [module.get_parameter(name) for name in names]
        found = torch.autograd.grad(
            outputs, factors, loads, allow_unused=True, materialize_grads=True
        )
    by_name = dict(zip(names, found, strict=True))
    return {e.name_a: _effect(module, e, by_name[e.name_a], by_name[e.name_b]) for e in entries}


def _effect(module: CapturedModule, entry: Entry, by_a: Tensor, by_b: Tensor) -> _Effect:
    if not (by_a.isfinite().all() and by_b.isfinite().all()):
        raise VerificationError(
            f"effect and gradient: on '{entry.site}' a gradient is not finite for these inputs."
        )
    b = module.get_parameter(entry.name_b).detach()
    moved = abs(float((by_b.double() * b.double()).sum()))  # all of s·BA goes through B
    return _Effect(moved, float(by_a.abs().max()), float(by_b.abs().max()))


def _output_error(
    module: CapturedModule, folded: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float, float]:
    folded = folded.derive().eval()
    with torch.no_grad():
        calls = _calls(module.derive().eval(), args, kwargs)
        expected = [out for call in calls for out in _floats(call.output)]
        found = [out for call in calls for out in _floats(_again(folded, call))]
    dtypes = {t.dtype for t in expected} | {p.dtype for p in module.parameters()} | _named(module)
    tolerance = max((TOLERANCES[d] for d in dtypes if d in TOLERANCES), default=1e-10)
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        same = (a == b) | (a.isnan() & b.isnan())  # infinities are equal, their difference is not 0
        error = float(torch.where(same, 0.0, (a - b).abs()).max()) if a.numel() else 0.0
        worst = max(worst, error / scale if scale else error)
        if not error <= tolerance * scale:
            raise VerificationError(
                f"fold: folded and unfolded outputs differ by {error:.3g} where the largest is "
                f"{scale:.3g} (tolerance {tolerance:.0e} of it)."
            )
    return worst, tolerance


def _calls(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[RegionCall]:
    """One call of the module: itself, or those of its regions that it makes.

    What Python does between regions may jump (boxes above a threshold): there, only regions can
    be compared.
    """
    if not module.shell:
        return [RegionCall("", args, kwargs, _output(module, args, kwargs))]
    with module.shell.recorded() as calls:
        _output(module, args, kwargs)
    return calls


def _again(module: CapturedModule, call: RegionCall) -> Any:
    """The same call of another module."""
    if module.shell:
        return module.shell.call(call.path, call.args, call.kwargs)
    return _output(module, call.args, call.kwargs)


def _output(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with own_dice(module):
        return module(*args, **kwargs)


def _named(module: CapturedModule) -> set[torch.dtype]:
    """The dtypes that the graphs name: what a cast or an autocast computes in."""
    graphs = [*module.distinct_graphs(), *(nested.graph for nested in module.nested_graphs())]
    nodes = [node for graph in graphs for node in graph.nodes]
    values = pytree.tree_leaves([(node.args, dict(node.kwargs)) for node in nodes])
    return {value for value in values if isinstance(value, torch.dtype)}


def _floats(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
