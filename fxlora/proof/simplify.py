"""simplify: smaller graphs for inference, each step proved equal by a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError, InjectError, InputError
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.autocasts import no_gradients
from ..module.quantised import stored_bytes
from ..module.simplified import Simplification, Step
from ..names import shown
from ..passes.simplify import PASSES, ForInference
from .runs import float_tensors, run

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
_TOLERANCE = 1e-2  # of narrower dtypes, to which each new weight is rounded


@no_ambient_modes(defaults=False)
def simplify(
    module: CapturedModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    passes: Sequence[str] = tuple(PASSES),
) -> CapturedModule:
    """Return a module for inference, with fewer ops, that computes the same.

    Each pass is proved by a run on the given inputs, against the module's own outputs: to 1e-10 of
    the largest output in float64, to 1e-5 in float32. One that is not equal is left out.

    - "dropout": drop random ops that are switched off in eval.
    - "constants": compute once what depends on parameters and buffers only: parametrized weights,
      masks, positions and their embeddings.
    - "affine": fold scales and shifts into the layer before them (batch norms into convolutions
      and linear layers), and consecutive scales into one.
    - "dead": remove nodes, parameters and buffers that no output depends on.

    Args:
        module: a captured module without adapters, usually a folded one; it is not changed.
        args, kwargs: inputs to run on.
        passes: the passes to try, which run in the order above.

    Returns:
        The module, in eval; it has no train mode. `print(result.simplified)` tells what each pass
        brought. `fxlora.export` takes it; functions that adapt weights do not.

    Raises:
        NotCapturedError: the module is not a captured one.
        InjectError: it has adapters (fold them first), or parts that are modules of their own.
        InputError: the inputs are missing, or the graph does not hold for them.
        ConfigError: a pass is unknown.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
        >>> x = torch.randn(2, 3, 5, 5)
        >>> small = fxlora.simplify(fxlora.capture(model, x), x)
        >>> torch.allclose(small(x), model(x), atol=1e-6)
        True
        >>> [(step.name, step.ops) for step in small.simplified.steps if step.ops]
        [('affine', 1)]
    """
    check_captured(module, "simplify")
    if isinstance(passes, str) or not set(passes) <= PASSES.keys():
        raise ConfigError(f"passes must be a list of {', '.join(PASSES)}, not {shown(passes)}.")
    if module.plan is not None:
        raise InjectError(
            "simplify takes a module without adapters: fold them first (fxlora.fold)."
        )
    if module.known.outlined or module.parent_module or len(module.programs) > 1:
        raise InjectError(
            "simplify takes a module of one whole graph, which one run proves: capture one call of "
            "the model, without modules=."
        )
    positional = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    if not positional and not kwargs:
        raise InputError("simplify proves its passes by a run: simplify(module, args).")
    return _simplified(module, (positional, dict(kwargs or {})), passes)


def _simplified(
    module: CapturedModule, inputs: tuple[Any, dict[str, Any]], passes: Sequence[str]
) -> CapturedModule:
    current = ForInference()(module).eval()
    expected = _outputs(current, inputs)
    steps: list[Step] = []
    for name, one in PASSES.items():
        if name not in passes:
            continue
        tried = one(current)
        error = _error(expected, _outputs(tried, inputs))
        equal = error <= min((_tolerance(t) for t in expected), default=0.0)
        steps.append(_step(name, current, tried, error, equal))
        current = tried if equal else current
    known = replace(current.known, simplified=Simplification(tuple(steps)))
    current.known = known
    return current


def _outputs(module: CapturedModule, inputs: tuple[Any, dict[str, Any]]) -> list[torch.Tensor]:
    with no_gradients():
        return float_tensors(run(module, *inputs))


def _error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of its output."""
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if not one.numel():
            continue
        same = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(same, 0.0, (one.double() - other.double()).abs())
        size = float(one.double().abs().nan_to_num().max()) or 1.0
        worst = max(worst, float(apart.nan_to_num(float("inf")).max()) / size)
    return worst


def _tolerance(output: torch.Tensor) -> float:
    return TOLERANCES.get(output.dtype, _TOLERANCE)


def _step(
    name: str, before: CapturedModule, after: CapturedModule, error: float, kept: bool
) -> Step:
    sizes = [
        (
            sum(n.op == "call_function" for g in module.distinct_graphs() for n in g.nodes),
            sum(map(stored_bytes, (*module.parameters(), *module.buffers()))),
        )
        for module in (before, after)
    ]
    ops, size = (sizes[0][n] - sizes[1][n] if kept else 0 for n in (0, 1))
    return Step(name, ops, size, error, kept)
