"""Example inputs for torch.export, and the choice of their dynamic dimensions."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ShapesCollection
from torch.export.dynamic_shapes import _combine_args, _tree_map_with_path
from torch.utils import _pytree as pytree

from ..fx.autocast import Context
from ..fx.literals import same_literal
from ..module.contract import Dimension, InputSpec, TensorInput
from ..module.example_calls import Call
from .kept.containers import integers_of_containers


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs for one export, with its options.

    Attributes:
        args, kwargs: the inputs.
        dynamic_shapes: torch.export's specification of their dynamic dimensions.
        asked: whether the user gave `dynamic_shapes`: it is then an error if the model fixes
            one of those dimensions.
        patience: time limit for the export, in seconds.
        reordered: whether tensors are contiguous copies of the user's: a graph of it is good only
            if the forward does not read how tensors lie in memory.
        autocast: ids of the tensors among the inputs that have the dtype of the caller's autocast
            under one, as outputs of ops that autocast casts.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    asked: bool = False
    patience: float = math.inf
    reordered: bool = False
    autocast: frozenset[int] = frozenset()

    def under(self, context: Context) -> Example:
        """Return the example as it is under an autocast of one device."""
        if not self.autocast:
            return self
        ((_, dtype),) = context
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        cast = [v.to(dtype) if id(v) in self.autocast else v for v in leaves]
        shapes = self.dynamic_shapes
        if isinstance(shapes, ShapesCollection):  # by the identity of the tensors
            shapes = ShapesCollection()
            for leaf, new in zip(leaves, cast, strict=True):
                if isinstance(leaf, torch.Tensor):
                    shapes[new] = self.dynamic_shapes[leaf]
        args, kwargs = pytree.tree_unflatten(cast, structure)
        return Example(args, kwargs, shapes, self.asked, self.patience, self.reordered)

    def marked(self, spec: InputSpec) -> InputSpec:
        """Return the contract, with a mark on each input that autocast casts."""
        if not self.autocast:
            return spec
        marked = iter(
            dataclasses.replace(leaf, autocast=True)
            if isinstance(leaf, TensorInput) and id(value) in self.autocast
            else leaf
            for leaf, value in spec.pairs(self.args, self.kwargs)
        )
        groups = tuple(tuple(itertools.islice(marked, len(group))) for group in spec.leaves)
        return dataclasses.replace(spec, leaves=groups)


def examples_for(args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> list[Example]:
    """Return the examples to try, in order.

    If the user gave `shapes`, only those are tried; else a dynamic batch, then a static one. The
    batch is dimension 0 of the first tensor, and of every tensor with the same size there. For
    the dynamic batch, an example batch of 1 is widened to 2, because torch.export fixes
    dimensions of size 1. Tensors that are not contiguous (slices) are given as contiguous copies
    first: of their strides, torch.export would make sizes.
    """
    args, kwargs = _with_distinct_tensors(args, kwargs)
    given = _examples_of(args, kwargs, shapes)
    copied = pytree.tree_map(_in_order, (args, kwargs))
    pairs = zip(pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(copied), strict=True)
    if all(leaf is copy for leaf, copy in pairs):
        return given
    first = [
        dataclasses.replace(e, reordered=True) for e in _examples_of(copied[0], copied[1], shapes)
    ]
    return [*first, *given]


def _in_order(leaf: Any) -> Any:
    plain = type(leaf) is torch.Tensor and leaf.layout is torch.strided and not leaf.is_nested
    if not plain or leaf.is_contiguous():
        return leaf
    return leaf.detach().contiguous().requires_grad_(leaf.requires_grad)


def _examples_of(args: Any, kwargs: Any, shapes: Any) -> list[Example]:
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


def examples_for_kind(calls: Sequence[Call]) -> list[Example]:
    """Return the examples to try for calls that differ in the sizes of their tensors only.

    All have the inputs of the largest call. In the first, the batch and the sizes that vary are
    dynamic; then only the sizes that vary; then only the batch; then none.
    """
    sizes = [_sizes(call) for call in calls]
    base = calls[max(range(len(calls)), key=lambda number: sum(map(math.prod, sizes[number])))]
    single = examples_for(*base, None)
    varied = [
        {axis for axis in range(len(own[0])) if len({size[axis] for size in own}) > 1}
        for own in zip(*sizes, strict=True)
    ]
    if not any(varied):
        return single
    return [*(_also_dynamic(example, varied) for example in single), *single]


def same_but_for_sizes(one: Call, other: Call) -> bool:
    """Whether two calls have the same structure, constants, and kinds of tensors."""
    leaves, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    if pytree.tree_structure(one) != pytree.tree_structure(other):
        return False
    return all(map(_same_kind, leaves, others, integers_of_containers(one)))


def _same_kind(leaf: Any, other: Any, counts: bool) -> bool:
    if isinstance(leaf, torch.Tensor) and isinstance(other, torch.Tensor):
        kinds = [(len(t.shape), t.dtype, t.device, t.layout) for t in (leaf, other)]
        return kinds[0] == kinds[1]
    return (counts and type(other) is int) or same_literal(leaf, other)


def _sizes(call: Call) -> list[tuple[int, ...]]:
    """Return the shape of each leaf that is a tensor, and each integer of a container."""
    pairs = zip(pytree.tree_leaves(call), integers_of_containers(call), strict=True)
    return [
        tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else (leaf,)
        for leaf, counts in pairs
        if counts or isinstance(leaf, torch.Tensor)
    ]


def _also_dynamic(example: Example, varied: Sequence[set[int]]) -> Example:
    """Make more dimensions of an example dynamic: those that vary, as `_sizes` lists them."""
    given = example.args, example.kwargs
    known: Any = example.dynamic_shapes
    left = iter(varied)
    shapes = _Shapes()
    for number, (leaf, counts) in enumerate(
        zip(pytree.tree_leaves(given), integers_of_containers(given), strict=True)
    ):
        if isinstance(leaf, torch.Tensor):
            before = {} if known is None else known[leaf]
            shapes[leaf] = {**before, **dict.fromkeys(next(left), Dim.AUTO)}
        elif counts and next(left):
            shapes.integers.add(number)
    return dataclasses.replace(example, dynamic_shapes=shapes)


class _Shapes(ShapesCollection):
    """Dynamic dimensions of tensors, and dynamic integers by the number of the leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.integers: set[int] = set()

    def dynamic_shapes(self, m: Any, args: Any, kwargs: Any = None) -> Any:
        """Return the specification for torch.export, in the structure of the arguments."""
        shapes = super().dynamic_shapes(m, args, kwargs)
        if not self.integers:
            return shapes
        numbers = itertools.count()

        def specified(_path: Any, _leaf: Any, shape: Any) -> Any:
            return Dim.AUTO if next(numbers) in self.integers else shape

        return _tree_map_with_path(specified, _combine_args(m, args, kwargs), shapes)


def in_signature_order(signature: inspect.Signature, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Sort keyword arguments as a signature declares them, the order that torch.export uses."""
    declared = [name for name in signature.parameters if name in kwargs]
    return {name: kwargs[name] for name in dict.fromkeys([*declared, *kwargs])}


def _with_distinct_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Clone repeated tensors and inference tensors among the inputs.

    torch.export would treat a tensor that is given twice (labels=ids) as one input in every later
    call, too. It does not accept tensors that were created in inference mode.
    """
    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        again = id(leaf) in seen
        seen.add(id(leaf))
        return leaf.clone() if again or leaf.is_inference() else leaf

    return pytree.tree_map(apart, (args, kwargs))


def example_for(spec: InputSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    """Return an example for exporting a captured graph again, dynamic where its contract is."""
    args, kwargs = _with_distinct_tensors(args, kwargs)
    wide: dict[int, torch.Tensor] = {}
    shapes = ShapesCollection()
    for leaf, value in spec.pairs(args, kwargs):
        if not isinstance(leaf, TensorInput):
            continue
        axes = [axis for axis, dim in enumerate(leaf.dims) if isinstance(dim, Dimension)]
        tensor = value
        for axis in axes:  # torch.export fixes dimensions of size 1
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
