"""Run a module as if its tensors were on another device, which need not be there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..module.retarget import retarget
from .run_values import Unknown, Values


@contextmanager
def on_device(
    call: nn.Module,
    inputs: Any,
    target: torch.device | None,
    values: Values,
    *,
    constants: bool,
) -> Generator[Any]:
    """Within the context, a module on the CPU holds fake tensors on another device.

    The caller restores the module's attributes, by `undisturbed`.

    Args:
        call: the module.
        inputs: the inputs of a call.
        target: the device; None leaves everything as it is.
        values: holds the fake tensors.
        constants: whether plain tensors and the devices that graphs name move, too.

    Yields:
        The inputs on that device.

    Raises:
        Unknown: a graph names the device already.
    """
    if target is None:
        yield inputs
        return
    held = (*call.parameters(), *call.buffers(), *pytree.tree_leaves(inputs))
    weights = {id(tensor) for tensor in held}

    def move(leaf: Any) -> Any:
        chosen = isinstance(leaf, torch.Tensor) and (constants or id(leaf) in weights)
        return values.move(leaf, target) if chosen else leaf

    for module in call.modules():
        _replace_tensors(module, move)
    graphs = [m for m in call.modules() if constants and isinstance(m, fx.GraphModule)]
    with _retargeted(graphs, torch.device("cpu"), target):
        yield pytree.tree_map(move, inputs)


def _replace_tensors(module: nn.Module, move: Callable[[Any], Any]) -> None:
    """Replace the tensors in a module's attributes, and in containers there."""
    for name, value in list(module.__dict__.items()):
        leaves, structure = pytree.tree_flatten(value)
        moved = list(map(move, leaves))
        if any(a is not b for a, b in zip(leaves, moved, strict=True)):
            module.__dict__[name] = pytree.tree_unflatten(moved, structure)


@contextmanager
def _retargeted(
    modules: Sequence[fx.GraphModule], old: torch.device, new: torch.device
) -> Generator[None]:
    """Within the context, graphs that name one device name another."""
    named = [leaf for m in modules for node in m.graph.nodes for leaf in _constants(node)]
    if any(isinstance(leaf, torch.device) and leaf.type == new.type for leaf in named):
        raise Unknown(f"its graph names {new}")
    changed = modules if old in named else []
    try:
        for module in changed:
            retarget(module.graph, {old: new})
            module.recompile()
        yield
    finally:
        for module in changed:
            retarget(module.graph, {new: old})
            module.recompile()


def _constants(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)))


@contextmanager
def same_versions(held: Any) -> Generator[None]:
    """Keep the version counters of tensors, and of modules' tensors, in a run on fake tensors.

    Autograd counts an in-place op before the op reaches the fake tensor.
    """
    tensors: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(held):
        tensors += [*leaf.parameters(), *leaf.buffers()] if isinstance(leaf, nn.Module) else []
        tensors += [leaf] if isinstance(leaf, torch.Tensor) else []
    counted = tuple(tensor for tensor in tensors if not tensor.is_inference())
    with torch.autograd._unsafe_preserve_version_counter(counted):
        yield
