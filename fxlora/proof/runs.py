"""Run modules, leaving them, the inputs and the random state as they were; compare outputs."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..module import CapturedModule
from ..module.memory import copied_values
from ..module.parent import RegionCall
from ..module.quantised import is_quantised, stored
from .wider import no_draws


class MethodCall(NamedTuple):
    """A call of a method of a captured module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: str = "forward"


def record_calls(module: CapturedModule, calls: Sequence[MethodCall]) -> list[RegionCall]:
    """Make each call once and return them with their outputs, or the calls of regions in them.

    Python between regions may depend on its inputs discontinuously (as in a choice of boxes above a
    threshold). So for a module of regions, only the outputs of each region can be compared.
    """
    if not module.parent_module:
        return [RegionCall("", c.args, c.kwargs, run(module, *c), c.method) for c in calls]
    with module.parent_module.recorded() as found:
        for call in calls:
            run(module, *call)
    return found


def replay(module: CapturedModule, call: RegionCall) -> Any:
    """Repeat a recorded call, possibly on another module, and return its output."""
    if not module.parent_module:
        return run(module, call.args, call.kwargs, call.method)
    args, kwargs = copied_values((call.args, call.kwargs))
    with fixed_seed(module), _state_restored(module):
        return module.parent_module.call(call.path, args, kwargs)


def run(
    module: CapturedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    method: str = "forward",
) -> Any:
    """Run a method of a module with a fixed seed and return its output.

    The inputs are copied and the module's state is restored, because a graph may write to both.
    """
    args, kwargs = copied_values((args, kwargs))
    call = module if method == "forward" else functools.partial(module._call_method, method)
    with fixed_seed(module), _state_restored(module):
        return call(*args, **kwargs)


class Ran(NamedTuple):
    """What a run returned and left behind.

    Attributes:
        output: a copy of the output, and of the inputs as the run left them.
        written: the parameters and buffers that the run changed, by name, as it left them.
    """

    output: Any
    written: dict[str, Tensor]


def run_with_state(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any], may_draw: bool = True
) -> Ran:
    """Run a module as `run` does, and return also what it changed.

    Raises:
        Draws: it draws random numbers, and may not.
    """
    args, kwargs = copied_values((args, kwargs))
    before = copied_values(module.state_tensors())
    with fixed_seed(module), _state_restored(module):
        with nullcontext() if may_draw else no_draws():
            output = module(*args, **kwargs)
        after = module.state_tensors()
        changed = {n: t for n, t in after.items() if not equal_tensors(t.detach(), before[n])}
        return Ran(*copied_values(((output, args, kwargs), changed)))


def float_tensors(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among the outputs, with complex ones as pairs of reals."""
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    return [t for t in real if t.is_floating_point()]


def equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal dtypes, shapes and entries; NaN counts as equal to NaN."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if is_quantised(a) or is_quantised(b):
        pairs = zip(stored(a), stored(b), strict=type(a) is type(b))
        return type(a) is type(b) and all(equal_tensors(x, y) for x, y in pairs)
    if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):  # same memory, same view
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def fixed_seed(module: CapturedModule) -> Generator[None]:
    """Seed the generators of the module's devices with 0, for a `with` block only."""
    generators = _generators(module)
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(module: CapturedModule) -> list[torch.Generator]:
    """Return torch's default generators for the CPU and for the module's devices."""
    found = [torch.default_generator]
    for device in {tensor.device for tensor in (*module.parameters(), *module.buffers())}:
        if device.type in ("cpu", "meta"):
            continue
        backend: Any = torch.get_device_module(device)
        if device.type == "mps":
            found.append(backend._get_default_mps_generator())
        else:
            found.append(backend.default_generators[device.index or 0])
    return found


@contextmanager
def _state_restored(module: CapturedModule) -> Generator[None]:
    """Restore the module's state, such as its buffers, after a `with` block that calls it."""
    before = [(tensor, tensor.detach().clone()) for tensor in module.state_tensors().values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.data.copy_(value)
