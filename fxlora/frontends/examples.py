"""Examples: what to export a model with, and which sizes to leave open."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from ..module.contract import Dimension, InputSpec, TensorInput


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs to export with, the dynamic shapes that go with them, and who asked for those."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    asked: bool = False  # by the user: a dimension that comes out static is an error then
    patience: float = math.inf  # seconds that an export may take


def examples_for(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> list[Example]:
    """What to try, in order: the user's own shapes, or a dynamic batch and then a static one.

    The batch is dimension 0 of the first tensor, and of every tensor of that size. An example
    batch of 1 is widened to 2 first, because torch.export fixes dimensions of size 1.
    """
    args, kwargs = _told_apart(args, kwargs)
    if shapes is not None:
        return [Example(args, kwargs, shapes, asked=True)]
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if _has_batch(leaf)]
    static = Example(args, kwargs, None)
    if not tensors:
        return [static]
    batch = tensors[0].shape[0]
    given = _with_dynamic_batch(args, kwargs, batch)
    if batch != 1:
        return [given, static]
    wide_args, wide_kwargs = pytree.tree_map(_widened, (args, kwargs))
    return [_with_dynamic_batch(wide_args, wide_kwargs, 2), static]


def in_signature_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords as the forward declares them: torch.export speaks of inputs in that order."""
    declared = [name for name in inspect.signature(model.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in dict.fromkeys([*declared, *kwargs])}


def _told_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A copy of every tensor that is given twice (labels=ids), which torch.export would take for
    one input for good; and of those that were made in inference mode, which it does not take."""
    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        again = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.clone() if again or leaf.is_inference() else leaf

    return pytree.tree_map(apart, (args, kwargs))


def example_for(spec: InputSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Inputs and dynamic shapes that a captured graph's own contract asks for."""
    args, kwargs = _told_apart(args, kwargs)
    wide: dict[int, torch.Tensor] = {}
    shapes = ShapesCollection()
    for leaf, value in spec.pairs(args, kwargs):
        if not isinstance(leaf, TensorInput):
            continue
        axes = [axis for axis, dim in enumerate(leaf.dims) if isinstance(dim, Dimension)]
        tensor = value
        for axis in axes:  # torch.export would fix a dimension of size 1
            tensor = torch.cat([tensor, tensor], axis) if tensor.shape[axis] == 1 else tensor
        wide[id(value)] = tensor
        shapes[tensor] = dict.fromkeys(axes, Dim.AUTO)

    def widened(leaf: Any) -> Any:
        return wide.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map(widened, (args, kwargs))
    return Example(args, kwargs, shapes)


def _has_batch(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and not leaf.is_nested


def _widened(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if _has_batch(leaf) and leaf.shape[0] == 1 else leaf


def _with_dynamic_batch(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> Example:
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves((args, kwargs)):
        if _has_batch(leaf) and leaf.shape[0] == batch:
            shapes[leaf] = {0: Dim.AUTO}
    return Example(args, kwargs, shapes)
