"""verify: check the laws of fxlora on the user's module and inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import (
    InjectError,
    InputError,
    NoProductError,
    QuantisedError,
    VerificationError,
)
from ..fx.autocast import by_autocast
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.autocasts import no_gradients
from ..module.example_calls import Call, MethodCalls, calls_of, calls_of_methods
from ..module.fsdp import mesh_of
from ..module.parent import RegionCall
from ..module.program import MODES
from ..passes import FoldConstants, Inject, chosen
from ..passes.fold_constants import quantised_sites
from ..passes.fold_quantised import QuantisedFold
from ..tables import some
from .coverage import AdaptedRead, adapted_names, prove_coverage
from .effects import draw_adapters, effects
from .graph_checks import check_code, check_folded_graphs, check_modes, without_adapters
from .result import SiteCheck, Verification, sizes_of
from .runs import MethodCall, equal_tensors, float_tensors, record_calls, replay, run
from .sharded import verified_sharded
from .weight_checks import (
    check_adapters,
    check_base,
    check_finite,
    check_shared_memory,
    check_ties,
    check_unadapted,
    folded_weights,
)

__all__ = ["AdaptedRead", "SiteCheck", "Verification", "verify"]

# Largest difference, relative to the largest output, that another order of summation may cause.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
# A larger difference is accepted up to this many times the one that a further rounding of every
# folded weight makes.
_ROUNDINGS = 32


@no_ambient_modes(defaults=False)  # the graphs may use the process's default dtype and device
def verify(
    module: CapturedModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    calls: Sequence[Call] | None = None,
    methods: Mapping[str, MethodCalls] | None = None,
    folded: CapturedModule | None = None,
    adapter: str | Sequence[str] | None = None,
) -> Verification:
    """Check the laws of fxlora on the given inputs, with a few forward and backward passes.

    - Coverage: every read of an adapted weight, in every graph and mode, has its adapter.
    - Modes agree: the graph of each mode is the captured one with these adapters and nothing else;
      the code that runs was generated from the graphs as they are now.
    - Base unchanged: no weight that the plan does not train was written to since the injection, and
      with B = 0 the outputs are bit for bit those without adapters.
    - Adapters: all tensors of the plan exist and are finite, the trainable ones require gradients
      (unless all are frozen, for inference), and padding rows stay unchanged.
    - Effect and gradient: every adapter changes the outputs, and gradients reach its A and its B.
    - Fold: the folded graphs are the captured ones node for node, ties are kept, each folded
      weight is W0 + s·BA up to one rounding, everything else is unchanged, and the outputs equal
      the unfolded ones up to rounding, also with A and B drawn at random and in train mode.

    Modes of the caller, such as autocast, do not affect the result.

    Where parameters are sharded over processes (FSDP2, tensor parallelism), every process calls
    this, and it fails on all if on one. The fold is not checked then, nor outputs with B = 0.

    Args:
        module: an adapted module; it is not changed. To check an adapter on disk, load it and pass
            the loaded module, with `folded` made from the module that was saved.
        args, kwargs: inputs to run on. They must reach every adapter (every branch, every expert).
        calls: several inputs `(args, kwargs)` instead, which together reach every adapter.
        methods: inputs of captured methods, as for `capture`.
        folded: the folded module to check; by default `fold(module)`.
        adapter: the name or names of the adapters to check; by default the active ones.

    Returns:
        The reads, errors and gradients of each site; print it for a table.

    Raises:
        NotCapturedError: `module` or `folded` is not a captured module.
        InputError: `folded` still has branches (on quantised weights); or the inputs do not fit.
        VerificationError: a law does not hold; names the law, and the site if there is one.
        InjectError: the module has no active adapter, or is on the meta device.

    Example:
        >>> import torch, fxlora
        >>> x, config = torch.randn(3, 6), fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> lora = fxlora.adapt(torch.nn.Sequential(torch.nn.Linear(6, 4)), x, rules=config)
        >>> found = fxlora.verify(lora, x, folded=fxlora.fold(lora))
        >>> [(site.site, site.reads_in("train"), site.effect > 0) for site in found.sites]
        [('0', 1, True)]
    """
    check_captured(module, "verify")
    module = chosen(module, adapter)
    if module.plan is None:
        raise InjectError("nothing to verify: pass the adapted module, before it is folded.")
    if folded is not None:
        check_captured(folded, "verify(…, folded=…)")
        if branches := quantised_sites(folded):
            raise InputError(
                f"the folded module still has the branches of {some(branches)}, as "
                'fold(…, quantised="keep") leaves them on quantised weights: it is no fold to '
                "compare. verify(folded, …) checks these branches, and verify(module, …) without "
                "folded= all adapters, with a fold made on the spot."
            )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise InjectError("nothing can be computed on the meta device: load the weights first.")
    of_methods = {} if methods is None else calls_of_methods(methods, InputError)
    given = [
        *(MethodCall(*call) for call in _calls_of_forward(args, kwargs, calls, bool(of_methods))),
        *(MethodCall(*call, name) for name, of_one in of_methods.items() for call in of_one),
    ]
    if unknown := {call.method for call in given} - {*module.captured_methods, "forward"}:
        raise InputError(
            f"the module has no method {some(sorted(unknown))}: {some(module.captured_methods)} "
            "were captured."
        )
    if mesh_of(module) is not None:
        if folded is not None:
            raise InputError(
                "the module is sharded over processes, and its fold cannot be compared. Leave "
                "folded out, or load the adapter into a module that is not sharded."
            )
        return verified_sharded(module, given)
    return _verified(module, given, folded)


def _calls_of_forward(args: Any, kwargs: Any, calls: Any, none: bool) -> list[Call]:
    """Return the user's calls of the forward.

    Args:
        none: whether no arguments at all mean no call, and not a call without arguments.
    """
    if calls is not None:
        if args is not None or kwargs is not None:
            raise InputError("give args and kwargs as one of calls=[(args, kwargs), …].")
        return calls_of(calls, InputError)
    if none and args is None and kwargs is None:
        return []
    if not isinstance(kwargs, Mapping | None):
        raise InputError(
            f"kwargs must be a mapping of names to inputs, not {type(kwargs).__name__}. "
            "Give several positional inputs as one tuple: verify(module, (a, b))."
        )
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    return [(args, dict(kwargs or {}))]


def _verified(
    module: CapturedModule, calls: Sequence[MethodCall], folded: CapturedModule | None
) -> Verification:
    """Run every check on validated arguments; the first that fails raises."""
    assert module.plan is not None
    check_code(module, "the adapted module")
    check_adapters(module)
    base = without_adapters(module)
    reads = prove_coverage(module, base)
    copied = check_modes(module, base)
    check_base(module)
    check_finite(module)
    if folded is None:
        folded = _fold(module)
    else:
        check_code(folded, "the folded module")
        folded = folded.derive()
    check_folded_graphs(base, folded)
    check_shared_memory(module, folded)
    check_ties(module, folded)
    weights = folded_weights(module, folded)
    check_unadapted(module, folded)
    _check_identity(copied, base, calls)
    _copy_adapters(module, copied)
    error, tolerance = _output_error(copied, folded, calls)
    moved = effects(copied, module, calls)
    _check_drawn(module, copied, base, calls)
    checks = [
        SiteCheck(
            site=module.plan.label(entry),
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
    return Verification(tuple(checks), error, tolerance, **sizes_of(module))


def _check_identity(
    started: CapturedModule, base: CapturedModule, calls: Sequence[MethodCall]
) -> None:
    """Raise unless with B = 0 the outputs are bit for bit those without adapters."""
    # torch selects attention kernels by requires_grad, even under no_grad.
    modules = [module.eval().requires_grad_(False) for module in (started, base)]
    with no_gradients():
        adapted, plain = (
            [out for call in calls for out in float_tensors(run(module, *call))]
            for module in modules
        )
    if not all(equal_tensors(a, b) for a, b in zip(adapted, plain, strict=True)):
        raise VerificationError(
            "base unchanged: with B = 0 the outputs differ from those without adapters."
        )


def _check_drawn(
    module: CapturedModule,
    copied: CapturedModule,
    base: CapturedModule,
    calls: Sequence[MethodCall],
) -> None:
    """Raise unless with random A and B the outputs are the folded ones, in each mode.

    Where a module's own B is small, its outputs say nothing about its branches. Dropout of the
    branches, which a fold does not have, is left out.

    Args:
        module: the adapted module.
        copied: the same graphs over other tensors, which are overwritten.
        base: the same module without adapters.
    """
    assert module.plan is not None
    if any(entry.dropout for entry in module.plan):
        entries = tuple(dataclasses.replace(e, init=True, dropout=0.0) for e in module.plan)
        copied = Inject(dataclasses.replace(module.plan, entries=entries))(base)
    draw_adapters(copied, module)
    folded = _fold(copied)
    for mode in MODES if _modes_differ(base) else ("eval",):
        _output_error(copied.train(mode == "train"), folded, calls)


def _fold(module: CapturedModule) -> CapturedModule:
    """Fold a module; quantised weights become plain ones, which need not be rounded to a grid."""
    try:
        return FoldConstants(quantised=QuantisedFold("dequantise"))(module)
    except NoProductError as error:
        raise QuantisedError(
            f"{error.reason} So no fold into plain weights computes the same, with which verify "
            "could compare. Verify the adapter on a module captured from the model before it was "
            "quantised."
        ) from error


def _modes_differ(module: CapturedModule) -> bool:
    programs = module.programs
    return any(program.graphs["train"] is not program.graphs["eval"] for program in programs)


@no_gradients()
def _copy_adapters(source: CapturedModule, target: CapturedModule) -> None:
    for name in target.adapter_parameters():  # the source may hold others, which are not active
        target.get_parameter(name).copy_(source.get_parameter(name))


def _output_error(
    module: CapturedModule, folded: CapturedModule, calls: Sequence[MethodCall]
) -> tuple[float, float]:
    """Return the difference between folded and unfolded outputs, and its tolerance.

    Both are relative to the largest entry of an output. Both modules run in the mode of the first.

    Raises:
        VerificationError: the difference exceeds the tolerance.
    """
    folded.train(module.training)
    for each in (module, folded):  # torch selects attention kernels by requires_grad
        each.requires_grad_(False)
    with no_gradients():
        made = record_calls(module, calls)
        expected = [out for call in made for out in float_tensors(call.output)]
        if module.parent_module and module.training:  # each call under the same seed
            expected = _outputs(module, made)
        found = _outputs(folded, made)
        error = _largest_difference(expected, found)
        tolerance = _tolerance(module, expected)
        if not error <= tolerance:
            # A deep model may amplify one rounding: measure by how much, with another one.
            with _rounded_weights(module, folded):
                rounded = _outputs(folded, made)
            tolerance = max(tolerance, _ROUNDINGS * _largest_difference(found, rounded))
    if not error <= tolerance:
        raise VerificationError(
            f"fold: folded and unfolded outputs differ by {error:.3g} of the largest output in "
            f"{module.mode} mode, where rounding allows {tolerance:.1g}."
        )
    return error, tolerance


def _outputs(module: CapturedModule, made: list[RegionCall]) -> list[Tensor]:
    return [out for call in made for out in float_tensors(replay(module, call))]


def _largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest finite entry of each output."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        finite = a[a.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        # Equal infinities count as equal, although their difference is NaN.
        equal = (a == b) | (a.isnan() & b.isnan())
        error = (
            float(torch.where(equal, 0.0, (a - b).abs()).nan_to_num(float("inf")).max())
            if a.numel()
            else 0.0
        )
        worst = max(worst, error / scale if scale else error)
    return worst


def _tolerance(module: CapturedModule, outputs: list[Tensor]) -> float:
    """Return the largest tolerance of the dtypes of outputs, parameters and casts."""
    dtypes = {t.dtype for t in outputs} | {p.dtype for p in module.parameters()} | _named(module)
    return max((TOLERANCES[d] for d in dtypes if d in TOLERANCES), default=1e-10)


@contextmanager
def _rounded_weights(module: CapturedModule, folded: CapturedModule) -> Generator[None]:
    """Move every entry of the folded weights by one rounding, up or down at random, for a block."""
    names = [name for names in adapted_names(module).values() for name in names]
    weights = {folded.get_parameter(name) for name in names}  # each tied weight once
    before = {weight: weight.data for weight in weights}
    for weight in weights:
        generator = torch.Generator(weight.device).manual_seed(0)
        signs = torch.empty_like(weight).bernoulli_(generator=generator).mul_(2).sub_(1)
        weight.data = weight.data * (1 + signs * torch.finfo(weight.dtype).eps)
    yield
    for weight, data in before.items():
        weight.data = data


def _named(module: CapturedModule) -> set[torch.dtype]:
    """Return the dtypes that are arguments in the graphs, as those of casts and autocast are.

    Without those that a graph takes only under the caller's autocast.
    """
    graphs = [*module.distinct_graphs(), *(nested.graph for nested in module.nested_graphs())]
    nodes = [node for graph in graphs for node in graph.nodes if node.target is not by_autocast]
    given = [(node.args, dict(node.kwargs)) for node in nodes if not _disables_autocast(node)]
    return {value for value in pytree.tree_leaves(given) if isinstance(value, torch.dtype)}


def _disables_autocast(node: fx.Node) -> bool:
    """Whether a node runs a region with autocast disabled: nothing is rounded to its dtype."""
    return node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False
