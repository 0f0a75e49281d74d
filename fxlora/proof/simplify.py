"""simplify: smaller graphs for inference, each step proved equal by a run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ConfigError, InjectError, InputError
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.autocasts import no_gradients
from ..module.quantised import is_quantised, stored_bytes
from ..module.simplified import Simplification, Step
from ..module.sizes import Arguments, larger, resized
from ..names import shown
from ..passes.simplify import PASSES, ForInference
from .differences import largest, only_rounds, relative_errors
from .runs import Ran, equal_tensors, run_with_state
from .wider import FAILURES, HALF, Wider

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

    Each pass is proved by runs on the given inputs, and on larger ones where sizes are dynamic: all
    that the module returns and writes must be its own. Integers and booleans must be equal; other
    numbers may differ by 1e-10 of their size or of the usual size in their tensor in float64, by
    1e-5 in float32, by 1e-2 in half precision, or there by about the module's own error, both
    against the module in float32. A pass that is not equal is left out.

    - "dropout": drop dropouts that are switched off in eval.
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


def _simplified(module: CapturedModule, inputs: Arguments, passes: Sequence[str]) -> CapturedModule:
    current = ForInference()(module).eval()
    proof = _Proof(current, inputs)
    steps: list[Step] = []
    for name, one in PASSES.items():
        if name not in passes:
            continue
        tried = one(current)
        error, equal = proof.compared(tried)
        steps.append(_step(name, current, tried, error, equal))
        current = tried if equal else current
    known = replace(current.known, simplified=Simplification(tuple(steps)))
    current.known = known
    return current


# ---- proof --------------------------------------------------------------------------------------


class _Proof:
    """Runs of a module, with which those of a changed one are compared.

    Attributes:
        calls: the calls, each with what the module returns and writes.
        wider: the module in a wider dtype.
    """

    def __init__(self, module: CapturedModule, inputs: Arguments) -> None:
        self.calls = list(_calls(module, inputs))
        self.wider = Wider(module)

    def compared(self, tried: CapturedModule) -> tuple[float, bool]:
        """Return the largest error of a changed module, and whether that is small enough."""
        found: list[list[Any]] = []
        for call, expected in self.calls:
            try:
                leaves, structure = pytree.tree_flatten(tuple(_ran(tried, call)))
            except (RuntimeError, IndexError, ValueError, TypeError):
                return math.inf, False
            if structure != pytree.tree_structure(tuple(expected)):
                return math.inf, False
            found.append(leaves)
        worst, wrong = 0.0, set[int]()
        for leaves, expected in zip(found, self._expected, strict=True):
            for number, pair in enumerate(zip(expected, leaves, strict=True)):
                error = _error(*pair)
                worst = max(worst, error)
                wrong |= set() if error <= _tolerance(pair[0]) else {number}
        return worst, worst < math.inf and all(self._only_rounds(found, n) for n in wrong)

    @functools.cached_property
    def _expected(self) -> list[list[Any]]:
        return [pytree.tree_leaves(tuple(expected)) for _, expected in self.calls]

    @functools.cached_property
    def _exact(self) -> list[list[Any]] | None:
        module = self.wider.module
        try:
            calls = (self.wider.cast(call) for call, _ in self.calls)
            return module and [pytree.tree_leaves(tuple(_ran(module, c, False))) for c in calls]
        except FAILURES:
            return None

    def _only_rounds(self, found: list[list[Any]], number: int) -> bool:
        """Whether the errors of a tensor in half precision are about as large as the module's."""
        mine = [leaves[number] for leaves in self._expected]
        if not all(isinstance(leaf, torch.Tensor) and leaf.dtype in HALF for leaf in mine):
            return False
        counts = {len(leaves) for leaves in (*self._expected, *(self._exact or [[]]))}
        if self._exact is None or len(counts) > 1:
            return False
        return only_rounds(
            *([one[number] for one in of] for of in (found, self._expected, self._exact)),
            allowed=_tolerance(mine[0]),
        )


def _calls(module: CapturedModule, inputs: Arguments) -> Iterator[tuple[Arguments, Ran]]:
    """Yield the call, and one of another size if there is one that the module runs.

    Larger sizes in all dynamic dimensions are tried first, then the batch's alone.
    """
    yield inputs, _ran(module, inputs)
    spec = module.programs[0].inputs["eval"]
    if spec is None:
        return
    batches = spec.symbols(*inputs).values()
    others = resized(spec, *inputs, size=max(batches, default=0) + 1)
    for other in itertools.chain(larger(spec, *inputs), others):
        try:
            expected = _ran(module, other)
        except (RuntimeError, IndexError, ValueError):  # as of positions beyond a table's end
            continue
        yield other, expected
        return


def _ran(module: CapturedModule, inputs: Arguments, may_draw: bool = True) -> Ran:
    with no_gradients():
        return run_with_state(module, *inputs, may_draw=may_draw)


def _error(expected: Any, found: Any) -> float:
    """Return the largest error of a number, relative to its size; inf if not comparable.

    What is no number of floating point is equal or not.
    """
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return 0.0 if type(expected) is type(found) and _same(expected, found) else math.inf
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    if equal_tensors(expected, found) or not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()) or is_quantised(expected):
        return math.inf
    return largest(relative_errors(found, expected))


def _same(expected: Any, found: Any) -> bool:
    return bool(expected == found or (expected != expected and found != found))  # NaN is NaN


def _tolerance(leaf: Any) -> float:
    if not isinstance(leaf, torch.Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return 0.0
    return TOLERANCES.get(leaf.dtype.to_real(), _TOLERANCE)


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
