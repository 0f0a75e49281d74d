"""Runs of a module that leave the module, the inputs and the random state as they are."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..module import CapturedModule
from ..module.parent import RegionCall


def calls(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[RegionCall]:
    """One call of the module: itself, or those of its regions that it makes.

    What Python does between regions may jump (boxes above a threshold): there, only regions can
    be compared.
    """
    if not module.parent_module:
        return [RegionCall("", args, kwargs, output(module, args, kwargs))]
    with module.parent_module.recorded() as found:
        output(module, args, kwargs)
    return found


def again(module: CapturedModule, call: RegionCall) -> Any:
    """What another module returns for the same call."""
    if not module.parent_module:
        return output(module, call.args, call.kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, _copied, (call.args, call.kwargs))
    with fixed_seed(module), _buffers_kept(module):
        return module.parent_module.call(call.path, args, kwargs)


def output(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module returns under one seed; a graph that writes to its inputs gets copies."""
    args, kwargs = pytree.tree_map_only(Tensor, _copied, (args, kwargs))
    with fixed_seed(module), _buffers_kept(module):
        return module(*args, **kwargs)


def floats(outputs: Any) -> list[Tensor]:
    """The tensors that can be compared up to rounding."""
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN is NaN."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def fixed_seed(module: CapturedModule) -> Generator[None]:
    """Every call draws the same, and the user's random state stays as it is."""
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


@contextmanager
def _buffers_kept(module: CapturedModule) -> Generator[None]:
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.data.copy_(value)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
