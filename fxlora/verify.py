"""verify: the laws, checked on a module and inputs of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .adapted import adapted_weight
from .alike import difference
from .errors import InjectError, VerificationError
from .module import CapturedModule
from .passes import Remove
from .passes.structure import insertions
from .plan import Entry
from .program import MODES
from .shell import RegionCall
from .tables import render
from .verbs import fold, remove

# Relative to the largest output: what rounding alone may do between two orders of summation.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


@dataclass(frozen=True)
class SiteCheck:
    """What was found at one site.

    Attributes:
        effect: largest gradient of the outputs by B, A and B drawn at random: 0 is a dead adapter.
        reads: places where the adapter stands, per mode.
        weight_error: largest difference of the folded weight from W0 + s·BA, as a part of what
            rounding may do (at most 1).
    """

    site: str
    form: str
    effect: float
    reads: dict[str, int]
    weight_error: float


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; printing it prints a table."""

    sites: tuple[SiteCheck, ...]
    output_error: float
    tolerance: float

    def __str__(self) -> str:
        header = ("site", "form", "effect", "reads train/eval", "folded weight: part of rounding")
        rows = [
            [
                check.site,
                check.form,
                f"{check.effect:.2e}",
                "/".join(str(check.reads[mode]) for mode in MODES),
                f"{check.weight_error:.2f}",
            ]
            for check in self.sites
        ]
        return (
            f"{render(header, rows)}\n"
            f"folded against unfolded: {self.output_error:.1e} of the largest output "
            f"(tolerance {self.tolerance:.0e}). With B = 0 the outputs are those without adapters, "
            "bit for bit; the folded graphs are the captured ones, node for node."
        )


def verify(
    module: CapturedModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    folded: CapturedModule | None = None,
) -> Verification:
    """Check the laws of fxlora on the given inputs.

    Every adapter stands in the graphs and can change the output; with B = 0 the output is the
    base's, bit for bit; the folded graph is the base's node for node, each folded weight is
    W0 + s·BA, and its outputs are the unfolded ones'.

    Args:
        module: an adapted module; it is left as it is.
        args, kwargs: inputs to run on.
        folded: the folded module to check; by default it is folded here.

    Raises:
        VerificationError: a law does not hold; names the site where one can be named.
        InjectError: the module has no adapters.
    """
    if not isinstance(module, CapturedModule) or module.plan is None:
        raise InjectError("nothing to verify: give the adapted module, before it is folded.")
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    kwargs = dict(kwargs or {})
    if folded is not None and not isinstance(folded, CapturedModule):
        raise InjectError(f"folded must be what fxlora.fold made, not {type(folded).__name__}.")
    base = remove(module)
    folded = fold(module) if folded is None else folded
    reads = _reads(module)
    _check_structure(base, folded)
    _check_identity(module, args, kwargs)
    effects = _effects(module, args, kwargs)
    checks = [
        SiteCheck(
            entry.site,
            entry.form,
            effects[entry.site],
            reads[entry.site],
            _weight_error(module, base, folded, entry),
        )
        for entry in module.plan
    ]
    error, tolerance = _output_error(module, folded, args, kwargs)
    return Verification(tuple(checks), error, tolerance)


def _reads(module: CapturedModule) -> dict[str, dict[str, int]]:
    """How often each adapter stands in each mode's graph."""
    assert module.plan is not None
    counts: dict[str, dict[str, int]] = {e.site: dict.fromkeys(MODES, 0) for e in module.plan}
    for program in module.programs:
        for mode, graph in program.graphs.items():
            for insertion in insertions(module, graph):
                counts[insertion.entry.site][mode] += 1
    for site, by_mode in counts.items():
        if not any(by_mode.values()):
            raise VerificationError(f"'{site}': its adapter stands in no graph.")
    return counts


def _check_structure(base: CapturedModule, folded: CapturedModule) -> None:
    for before, after in zip(base.programs, folded.programs, strict=True):
        for mode in MODES:
            if found := difference(before.graphs[mode], after.graphs[mode]):
                region = f" of '{before.path}'" if before.path else ""
                raise VerificationError(
                    f"the folded {mode} graph{region} is not the captured one node for node: "
                    f"{found}."
                )


def _check_identity(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """With B = 0 the outputs are those without adapters, bit for bit."""
    assert module.plan is not None
    # torch chooses attention kernels by requires_grad, under no_grad too.
    neutral = module.derive().eval().requires_grad_(False)
    without = _without_adapters(module).requires_grad_(False)
    with torch.no_grad():
        for entry in module.plan:
            neutral.get_parameter(entry.name_b).zero_()
        adapted = _floats(neutral(*args, **kwargs))
        plain = _floats(without(*args, **kwargs))
    pairs = zip(adapted, plain, strict=True)
    if not all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs):
        raise VerificationError("with B = 0 the outputs are not those without adapters.")


def _without_adapters(module: CapturedModule) -> CapturedModule:
    """The module less its adapters; heads and buffers stay as they were trained."""
    result = Remove(restore=False)(module)
    assert result is not None and isinstance(result.graph_module, CapturedModule)
    return result.graph_module.eval()


def _effects(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, float]:
    """The largest gradient by each B, for A and B drawn at random; raises where it is 0."""
    assert module.plan is not None
    random = module.derive()
    _randomise(random)
    effects = {entry.site: 0.0 for entry in module.plan}
    for mode in ("eval", "train"):  # a weight may be read in the train graph alone
        dead = [entry for entry in module.plan if not effects[entry.site]]
        if dead:
            found = _gradients(random.train(mode == "train"), dead, args, kwargs)
            effects |= found
    if dead := [site for site, effect in effects.items() if not effect > 0]:
        raise VerificationError(
            f"the adapter on '{dead[0]}' cannot change the outputs for these inputs"
            + (f", nor can {len(dead) - 1} others: {', '.join(dead[1:6])}." if dead[1:] else ".")
            + " Give inputs that reach it (a branch, an expert), or leave it out of the rules."
        )
    return effects


def _randomise(module: CapturedModule) -> None:
    assert module.plan is not None
    with torch.no_grad():
        for entry in module.plan:
            for name in (entry.name_a, entry.name_b):
                parameter = module.get_parameter(name)
                generator = torch.Generator(parameter.device).manual_seed(entry.r)
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)


def _gradients(
    module: CapturedModule, entries: list[Entry], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, float]:
    with torch.enable_grad():
        outputs = [
            out
            for call in _calls(module, args, kwargs)
            for out in _floats(call.output)
            if out.requires_grad
        ]
        if not outputs:
            raise VerificationError("no output depends on the adapters: nothing can be trained.")
        wanted = [module.get_parameter(entry.name_b) for entry in entries]
        # Cotangents that cancel nothing: an even sum is blind behind a softmax or a layer norm.
        loads = [
            torch.linspace(0.5, 1.5, o.numel(), device=o.device).view(o.shape).to(o)
            for o in outputs
        ]
        found: Any = torch.autograd.grad(outputs, wanted, loads, allow_unused=True)
    return {
        entry.site: 0.0 if grad is None else float(grad.abs().max())
        for entry, grad in zip(entries, found, strict=True)
    }


def _weight_error(
    module: CapturedModule, base: CapturedModule, folded: CapturedModule, entry: Entry
) -> float:
    """Largest |folded - (W0 + s·BA)| over what one rounding of an exact enough sum may do.

    In the dtype's ε, and ε' of the type that products accumulate in:
    ε/2·|W| + (r + 2)·ε'·(|W0| + s·|B||A|) (Higham, Accuracy and Stability, §3.1).
    """
    weight = base.get_parameter(entry.parameter).detach()
    found = folded.get_parameter(entry.parameter).detach()
    if found.dtype != weight.dtype or found.shape != weight.shape:
        raise VerificationError(
            f"'{entry.site}': folded to {found.dtype} {tuple(found.shape)} from "
            f"{weight.dtype} {tuple(weight.shape)}."
        )
    values = {name: module.get_parameter(name).detach().double() for name in entry.tensors}
    exact = adapted_weight(entry, weight.double(), values)
    largest = {name: value.abs() for name, value in values.items()}
    size = adapted_weight(entry, weight.double().abs(), largest).abs()
    accumulator = torch.float64 if weight.dtype == torch.float64 else torch.float32
    bound = torch.finfo(weight.dtype).eps / 2 * exact.abs()
    bound += (entry.r + 2) * torch.finfo(accumulator).eps * size + torch.finfo(weight.dtype).tiny
    error = float(((found.double() - exact).abs() / bound).max())
    if not error <= 1:
        raise VerificationError(
            f"'{entry.site}': its folded weight is not W0 + s·BA (off by {error:.3g} times what "
            "rounding allows)."
        )
    return error


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
                f"folded and unfolded outputs differ by {error:.3g} where the largest is "
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
        return [RegionCall("", args, kwargs, module(*args, **kwargs))]
    with module.shell.recorded() as calls:
        module(*args, **kwargs)
    return calls


def _again(module: CapturedModule, call: RegionCall) -> Any:
    """The same call of another module."""
    if module.shell:
        return module.shell.call(call.path, call.args, call.kwargs)
    return module(*call.args, **call.kwargs)


def _named(module: CapturedModule) -> set[torch.dtype]:
    """The dtypes that the graphs name: what a cast or an autocast computes in."""
    graphs = [*module.distinct_graphs(), *(nested.graph for nested in module.nested_graphs())]
    nodes = [node for graph in graphs for node in graph.nodes]
    values = pytree.tree_leaves([(node.args, dict(node.kwargs)) for node in nodes])
    return {value for value in values if isinstance(value, torch.dtype)}


def _floats(outputs: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]
