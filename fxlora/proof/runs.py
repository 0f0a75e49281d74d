"""Run a module without changing the module, the inputs or the random state."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..module import CapturedModule
from ..module.memory import copied_values
from ..module.parent import RegionCall


def calls(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[RegionCall]:
    """Call a module once; return the call, or the calls of its regions that it consists of.

    Python between regions may depend on its inputs discontinuously (as in a choice of boxes above a
    threshold). So for a module of regions, only the outputs of each region can be compared.
    """
    if not module.parent_module:
        return [RegionCall("", args, kwargs, output(module, args, kwargs))]
    with module.parent_module.recorded() as found:
        output(module, args, kwargs)
    return found


def again(module: CapturedModule, call: RegionCall) -> Any:
    """Return the output of another module for the same call."""
    if not module.parent_module:
        return output(module, call.args, call.kwargs)
    args, kwargs = copied_values((call.args, call.kwargs))
    with fixed_seed(module), _buffers_kept(module):
        return module.parent_module.call(call.path, args, kwargs)


def output(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the output of a module with a fixed seed.

    The inputs are copied and buffers are restored, because a graph may write to them.
    """
    args, kwargs = copied_values((args, kwargs))
    with fixed_seed(module), _buffers_kept(module):
        return module(*args, **kwargs)


def floats(outputs: Any) -> list[Tensor]:
    """Return the real and complex tensors of the outputs, complex ones as pairs of reals."""
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    return [t for t in real if t.is_floating_point()]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every entry; NaN counts as equal to NaN."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def fixed_seed(module: CapturedModule) -> Generator[None]:
    """Seed the generators of the module's devices with 0 for a block, and restore them after it."""
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
    """Return torch's default generators of the CPU and of the devices that hold the module."""
    found = [torch.default_generator]
    for device in {tensor.device for tensor in (*module.parameters(), *module.buffers())}:
        if device.type in ("cpu", "meta"):
            continue
        held: Any = torch.get_device_module(device)
        if device.type == "mps":
            found.append(held._get_default_mps_generator())
        else:
            found.append(held.default_generators[device.index or 0])
    return found


@contextmanager
def _buffers_kept(module: CapturedModule) -> Generator[None]:
    """Restore what a call of the module may change, its buffers above all, after a block."""
    before = [(tensor, tensor.detach().clone()) for tensor in module.state_tensors().values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.data.copy_(value)
