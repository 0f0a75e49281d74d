"""Comparison of a file, loaded again by its own runtime, with the module that it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ExportError
from ..module.program import ProgramModule
from ..module.sizes import Arguments, larger, resized
from .adapters import Tensors
from .program import Exported

# The largest difference of a number from the module's, relative to its size (see `_distance`), that
# another runtime's kernels may make by rounding.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}

Run = Callable[..., Any]  # a loaded file, called as the program is


@dataclass(frozen=True)
class Trial:
    """A call of a file, and what it should return.

    Attributes:
        args, kwargs: the arguments of the program.
        expected: the tensors of its output.
        what: what the call is, for messages.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: tuple[torch.Tensor, ...]
    what: str


def trials(
    made: Exported,
    reference: ProgramModule,
    values: Tensors,
    what: str,
    *,
    left_out: bool = False,
) -> Iterator[Trial]:
    """Yield the calls to compare: the example, a batch of 1, and larger sizes where these may be.

    The example is called twice: the second call shows whether a file keeps what the first wrote.

    Args:
        made: the program, and the call that it is of.
        reference: a module to compute what is expected.
        values: the values of the adapter's tensors, if these are inputs.
        what: what is compared, for messages.
        left_out: whether the call leaves these inputs out, of a flat program.
    """
    call, spec = made.call, made.spec
    given = call.given(call.args, call.kwargs, values)
    others = (*resized(spec, *given, 1), *larger(spec, *given))
    for number, (args, kwargs) in enumerate((given, given, *others)):
        called = call.taken(*_copied((args, kwargs)))[:2]
        if not reference.holds_for(*called):
            continue
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(called))
        try:
            expected = tensors_of(call.returned(run_seeded(reference.forward, *called)))
        except (RuntimeError, IndexError, ValueError):
            if number < 2:  # the example itself
                raise
            continue  # its values (offsets, lengths) need not be right for another size
        args = args[: len(args) - len(values)] if left_out else args
        yield Trial(args, kwargs, expected, f"{what}, inputs of {shapes}")


def run_seeded(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        return run(*args, **kwargs)


def _copied(arguments: Arguments) -> Arguments:
    """Return the arguments with tensors and containers of their own: a call may change them."""

    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(copied, arguments)


def tensors_of(output: Any) -> tuple[torch.Tensor, ...]:
    leaves = pytree.tree_leaves(output)
    return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def tolerance_for(tensors: Sequence[torch.Tensor]) -> float:
    """Return the tolerance of the least precise floating dtype."""
    return max((TOLERANCES.get(t.dtype, 0.0) for t in tensors), default=0.0) or 1e-4


def check(run: Run, found: Sequence[Trial], tolerance: float) -> float:
    """Raise ExportError unless a file returns what is expected; return the largest error."""
    worst = 0.0
    for trial in found:
        try:
            output = run_seeded(run, *_copied((trial.args, trial.kwargs)))
        except Exception as error:
            raise ExportError(f"the file does not run ({trial.what}): {error}") from error
        worst = max(worst, _error(tensors_of(output), trial, tolerance))
    return worst


def _error(output: Sequence[torch.Tensor], trial: Trial, tolerance: float) -> float:
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (output, trial.expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"the file returns tensors of shapes {shapes[0]}, and the module {shapes[1]} "
            f"({trial.what}). Nothing was written."
        )
    errors = [_distance(a, b) for a, b in zip(output, trial.expected, strict=True)]
    worst = max(errors, default=0.0)
    if not worst <= tolerance:
        raise ExportError(
            f"the file computes something else than the module ({trial.what}): output "
            f"{errors.index(worst)} differs by {worst:.1e} of its numbers' size, of which "
            f"{tolerance:g} is allowed. Nothing was written; tolerance=… allows more."
        )
    return worst


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of two numbers, relative to their size.

    The size is that of the number expected, or the output's usual one if that is larger: one
    number, such as a mask's minimum, says nothing about the error of the others.
    """
    if not (expected.is_floating_point() or expected.is_complex()):
        exact = found.to(expected)
        same = torch.equal(exact, expected) and torch.equal(exact.to(found), found)
        return 0.0 if same else math.inf
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to("cpu", kind), expected.detach().to("cpu", kind)
    odd = ~torch.isfinite(b)
    same = torch.where(odd, (a == b) | (torch.isnan(a) & torch.isnan(b)), torch.isfinite(a))
    if not bool(same.all()):
        return math.inf
    if bool(odd.all()):
        return 0.0
    a, b = a[~odd], b[~odd]
    scale = max(_usual_size(b.abs()), torch.finfo(expected.dtype).tiny)
    return float(((a - b).abs() / b.abs().clamp_min(scale)).max())


def _usual_size(sizes: torch.Tensor) -> float:
    """Return the median of the numbers that are not 0, without those that stand for infinity.

    There may be more of these than of others, as in scores under a causal mask.
    """
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 0.0
    small = float(sizes.kthvalue(len(sizes) // 20 + 1).values)
    return float(sizes[sizes <= 1e4 * small].median())
