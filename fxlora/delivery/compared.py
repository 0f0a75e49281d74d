"""Comparison of a file, loaded again by its own runtime, with the module that it was made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..module import CapturedModule
from ..module.program import ProgramModule
from ..module.sizes import Arguments, larger, resized
from ..proof.differences import largest, only_rounds, relative_errors
from ..proof.wider import FAILURES, Wider, no_draws
from .adapters import Tensors
from .call import Call
from .program import Exported

# The largest difference of a number from the module's, relative to its size, that another runtime's
# kernels may make by rounding; in half precision, four times ε.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}
ADVICE = (
    "If its runtime here lacks an op in some dtype, export the module in another (module.float()); "
    "or with tolerance=math.inf, which writes the file as it is, for a runtime that has the op."
)

Run = Callable[..., Any]  # a loaded file, called as the program is
Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Trial:
    """A call of a file, and what it should return.

    Attributes:
        args, kwargs: the arguments of the program.
        expected: the tensors of the module's output, and its inputs as the call leaves them.
        inputs: how many of these are inputs.
        exact: returns the same in a wider dtype, or None if there is none.
        what: what the call is, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Outputs
    inputs: int
    exact: Callable[[], Outputs | None]
    what: str

    @property
    def returned(self) -> Outputs:
        return self.expected[: len(self.expected) - self.inputs]

    def place(self, number: int) -> str:
        after = number - len(self.returned)
        return f"output {number}" if after < 0 else f"input {after}, as the call leaves it,"


@dataclass(frozen=True)
class Reference:
    """A module that says what a call should return, up to rounding and in a wider dtype.

    Attributes:
        module: what runs the call.
        wider: the captured module in a wider dtype.
        runner: returns what runs the call, of a captured module.
    """

    module: ProgramModule
    wider: Wider
    runner: Callable[[CapturedModule], ProgramModule]

    @functools.cached_property
    def _exact(self) -> ProgramModule | None:
        module = self.wider.module
        return None if module is None else self.runner(module)

    def exact(self, called: Arguments, call: Call) -> Outputs | None:
        """Return the tensors that a call returns in a wider dtype, or None if there is none."""
        args, kwargs = self.wider.cast(called)
        try:
            found = self._exact
            return found and _run(found, (args, kwargs), call, may_draw=False)
        except FAILURES:
            return None


def trials(
    made: Exported,
    reference: Reference,
    values: Tensors,
    what: str,
    *,
    left_out: bool = False,
) -> Iterator[Trial]:
    """Yield the calls to compare: the example, a batch of 1, and larger sizes where these may be.

    The example is called twice: the second call shows whether a file keeps what the first wrote.

    Args:
        made: the program, and the call that it is of.
        reference: computes what is expected.
        values: the values of the adapter's tensors, if these are inputs.
        what: what is compared, for messages.
        left_out: whether the call leaves these inputs out, of a flat program.
    """
    call, spec = made.call, made.spec
    given = call.given(call.args, call.kwargs, values)
    others = (*resized(spec, *given, 1), *larger(spec, *given))
    for number, (args, kwargs) in enumerate((given, given, *others)):
        called = call.taken(*_copied((args, kwargs)))[:2]
        if not reference.module.holds_for(*called):
            continue
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(called))
        kept = _copied(called)
        try:
            expected = _run(reference.module, called, call)
        except (RuntimeError, IndexError, ValueError):
            if number < 2:  # the example itself
                raise
            continue  # its values (offsets, lengths) need not be right for another size

        exact = functools.partial(reference.exact, kept, call)
        args = args[: len(args) - len(values)] if left_out else args
        inputs = len(tensors_of(called))
        yield Trial(args, kwargs, expected, inputs, exact, f"{what}, inputs of {shapes}")


def _run(module: ProgramModule, called: Arguments, call: Call, may_draw: bool = True) -> Outputs:
    """Return the tensors that a call returns, and its inputs as it leaves them."""
    inputs = tensors_of(called)  # before the call, which may put others in a container
    output = call.returned(run_seeded(module.forward, *called, may_draw=may_draw))
    return *tensors_of(output), *inputs


def run_seeded(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], may_draw: bool = True
) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        with nullcontext() if may_draw else no_draws():
            return run(*args, **kwargs)


def _copied(arguments: Arguments) -> Arguments:
    """Return the arguments with tensors and containers of their own: a call may change them."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(copied, arguments)


def tensors_of(output: Any) -> tuple[torch.Tensor, ...]:
    leaves = pytree.tree_leaves(output)
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def check(
    run: Run, found: Sequence[Trial], dtypes: Sequence[torch.dtype], tolerance: float | None = None
) -> None:
    """Raise ExportError unless a file returns what is expected.

    Without a tolerance, each output has that of its own dtype. Where that is too little, because
    rounding adds up in a deep module, or some weights are less precise, the error of the file is
    compared with the module's own: both from the same module in a wider dtype. If there is none,
    the least precise dtype of the module decides.

    Args:
        run: the loaded file.
        found: the calls.
        dtypes: the dtypes of the module.
        tolerance: the largest relative error of a number, whatever the module's own.
    """
    outputs = [_output(run, trial) for trial in found]
    of_outputs = [tensor.dtype for trial in found for tensor in trial.returned]
    known = [TOLERANCES[dtype] for dtype in (*dtypes, *of_outputs) if dtype in TOLERANCES]
    allowed = max(known, default=1e-4) if tolerance is None else tolerance
    wrong: list[tuple[float, int, Trial]] = []
    for output, trial in zip(outputs, found, strict=True):
        for number, (ours, expected) in enumerate(zip(output, trial.expected, strict=True)):
            error = distance(ours, expected)
            own = allowed if tolerance is not None else _of_dtype(expected, allowed)
            wrong += [] if error <= own else [(error, number, trial)]
    if wrong and tolerance is None:
        rounds = _only_rounds(outputs, found, {n for _, n, _ in wrong}, allowed)
        wrong = [] if rounds else [w for w in wrong if rounds is not None or not w[0] <= allowed]
    if not wrong:
        return
    worst, number, trial = max(wrong, key=lambda one: one[0])
    more = "" if tolerance is not None else ", or a few times its own rounding error"
    raise ExportError(
        f"the file computes something else than the module ({trial.what}): "
        f"{trial.place(number)} differs by {worst:.1e} of its numbers' size, of which "
        f"{_of_dtype(trial.expected[number], allowed) if more else allowed:.2g} is allowed{more}. "
        "Nothing was written; tolerance=… allows more."
    )


def _of_dtype(output: torch.Tensor, otherwise: float) -> float:
    return TOLERANCES.get(output.dtype, otherwise)


def _only_rounds(
    outputs: Sequence[Outputs], found: Sequence[Trial], numbers: set[int], allowed: float
) -> bool | None:
    """Whether the errors of some outputs are about as large as the module's own, from the exact.

    Returns:
        None if there is no module in a wider dtype.
    """
    if not all(_is_real(found[0].expected[n]) for n in numbers):
        return False
    known = [trial.exact() for trial in found]
    exact = [tensors for tensors in known if tensors is not None]
    if len(exact) < len(found):
        return None
    each = outputs, [trial.expected for trial in found], exact
    return all(
        only_rounds(*([one[n] for one in of] for of in each), allowed=allowed) for n in numbers
    )


def _output(run: Run, trial: Trial) -> Outputs:
    """Return the tensors that a file returns, and its inputs as it leaves them."""
    called = _copied((trial.args, trial.kwargs))
    inputs = tensors_of(called)[: trial.inputs]
    try:
        output = *tensors_of(run_seeded(run, *called)), *inputs
    except Exception as error:
        raise ExportError(f"the file does not run ({trial.what}): {error} {ADVICE}") from error
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (output, trial.expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"the file returns tensors of shapes {shapes[0]}, and the module {shapes[1]} "
            f"({trial.what}; inputs come last). Nothing was written."
        )
    return output


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two numbers, relative to their size."""
    if not _is_real(expected):
        exact = found.to(expected)
        same = torch.equal(exact, expected) and torch.equal(exact.to(found), found)
        return 0.0 if same else math.inf
    if found.is_complex() is not expected.is_complex():
        return math.inf
    return largest(relative_errors(found, expected))


def _is_real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
