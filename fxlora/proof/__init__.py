"""verify: the laws, checked on a module and inputs of the user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..api import fold
from ..errors import InjectError, VerificationError
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from .coverage import adapted_names, prove_coverage
from .effects import effects
from .graph_checks import check_code, check_folded_graphs, check_modes, without_adapters
from .result import SiteCheck, Verification
from .runs import again, calls, floats, output, same
from .weight_checks import (
    check_adapters,
    check_base,
    check_finite,
    check_shared_memory,
    check_the_rest,
    check_ties,
    folded_weights,
)

__all__ = ["SiteCheck", "Verification", "verify"]

# Relative to the largest output: what rounding alone may do between two orders of summation.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
_ROUNDINGS = 32  # of every folded weight that may add up to the difference in the outputs


@no_ambient_modes(defaults=False)  # it runs the graphs
def verify(
    module: CapturedModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    folded: CapturedModule | None = None,
) -> Verification:
    """Check the laws of fxlora on the given inputs, in a handful of forwards.

    - Coverage: every read of an adapted weight, in every graph and mode, has its adapter.
    - Modes agree: each mode has the captured graph with these adapters, and nothing else; the
      code that runs is that of the graphs.
    - Base: no weight that the plan does not train was written to since the injection, and with
      B = 0 the outputs are those without adapters, bit for bit.
    - Adapters: all tensors of the plan are there and train, and leave padding rows as they are.
    - Effect: every adapter moves the outputs, and gradients reach its A and its B.
    - Fold: the folded graphs are the captured ones node for node, ties are kept, each folded
      weight is W0 + s·BA up to one rounding, everything else is as it was, and the outputs are
      the unfolded ones.

    The modes that the caller is in, such as autocast, change nothing.

    Args:
        module: an adapted module; it is left as it is. To check an adapter on disk, load it and
            give the loaded module, with `folded` made of the one that was saved.
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
    return _verified(module, args, dict(kwargs or {}), folded)


def _verified(
    module: CapturedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    folded: CapturedModule | None,
) -> Verification:
    assert module.plan is not None
    check_code(module, "the adapted module")
    check_adapters(module)
    base = without_adapters(module)
    reads = prove_coverage(module, base)
    copied = check_modes(module, base)
    check_base(module)
    check_finite(module)
    if folded is None:
        folded = fold(module)
    else:
        check_code(folded, "the folded module")
        folded = folded.derive()
    check_folded_graphs(base, folded)
    check_shared_memory(module, folded)
    check_ties(module, folded)
    weights = folded_weights(module, folded)
    check_the_rest(module, folded)
    _check_identity(copied, base, args, kwargs)
    _copy_adapters(module, copied)
    error, tolerance = _output_error(copied, folded, args, kwargs)
    moved = effects(copied, module, args, kwargs)
    checks = [
        SiteCheck(
            site=entry.site,
            form=entry.form,
            reads=found,
            effect=moved[entry.name_a].effect,
            gradient_a=moved[entry.name_a].by_a,
            gradient_b=moved[entry.name_a].by_b,
            weight_error=weights[entry.name_a][0],
            weight_tolerance=weights[entry.name_a][1],
        )
        for entry, found in zip(module.plan, reads, strict=True)
    ]
    return Verification(tuple(checks), error, tolerance)


def _check_identity(
    started: CapturedModule, base: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """With B = 0 the outputs are those without adapters, bit for bit."""
    # torch chooses attention kernels by requires_grad, under no_grad too.
    modules = [module.eval().requires_grad_(False) for module in (started, base)]
    with torch.no_grad():
        adapted, plain = (floats(output(module, args, kwargs)) for module in modules)
    if not all(same(a, b) for a, b in zip(adapted, plain, strict=True)):
        raise VerificationError(
            "base unchanged: with B = 0 the outputs are not those without adapters."
        )


@torch.no_grad()
def _copy_adapters(source: CapturedModule, target: CapturedModule) -> None:
    for name in source.adapter_parameters():
        target.get_parameter(name).copy_(source.get_parameter(name))


def _output_error(
    module: CapturedModule, folded: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float, float]:
    """The largest difference of folded and unfolded outputs, relative to the largest output, and
    the tolerance for it."""
    folded = folded.eval().requires_grad_(False)
    with torch.no_grad():
        made = calls(module, args, kwargs)
        expected = [out for call in made for out in floats(call.output)]
        found = [out for call in made for out in floats(again(folded, call))]
        error = _largest_difference(expected, found)
        tolerance = _tolerance(module, expected)
        if not error <= tolerance:
            # Deep stacks make much of one rounding: how much do they make of another one?
            _round_weights(module, folded)
            rounded = [out for call in made for out in floats(again(folded, call))]
            tolerance = max(tolerance, _ROUNDINGS * _largest_difference(found, rounded))
    if not error <= tolerance:
        raise VerificationError(
            f"fold: folded and unfolded outputs differ by {error:.3g} of the largest output, where "
            f"rounding allows {tolerance:.1g}."
        )
    return error, tolerance


def _largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Relative to the largest entry of each output."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        equal = (a == b) | (
            a.isnan() & b.isnan()
        )  # infinities are equal, their difference is not 0
        error = (
            float(torch.where(equal, 0.0, (a - b).abs()).nan_to_num(float("inf")).max())
            if a.numel()
            else 0.0
        )
        worst = max(worst, error / scale if scale else error)
    return worst


def _tolerance(module: CapturedModule, outputs: list[Tensor]) -> float:
    """For the dtypes that take part."""
    dtypes = {t.dtype for t in outputs} | {p.dtype for p in module.parameters()} | _named(module)
    return max((TOLERANCES[d] for d in dtypes if d in TOLERANCES), default=1e-10)


def _round_weights(module: CapturedModule, folded: CapturedModule) -> None:
    """Move every entry of the folded weights by the rounding of one sum, up or down."""
    names = [name for names in adapted_names(module).values() for name in names]
    for weight in {folded.get_parameter(name) for name in names}:  # tied ones once
        generator = torch.Generator(weight.device).manual_seed(0)
        signs = torch.empty_like(weight).bernoulli_(generator=generator).mul_(2).sub_(1)
        weight.data = weight.data * (1 + signs * torch.finfo(weight.dtype).eps)


def _named(module: CapturedModule) -> set[torch.dtype]:
    """The dtypes that the graphs name: what a cast or an autocast computes in."""
    graphs = [*module.distinct_graphs(), *(nested.graph for nested in module.nested_graphs())]
    nodes = [node for graph in graphs for node in graph.nodes]
    values = pytree.tree_leaves([(node.args, dict(node.kwargs)) for node in nodes])
    return {value for value in values if isinstance(value, torch.dtype)}
