"""Capture by regions, for a model that has no whole graph.

The model runs once per mode. The largest submodules that torch.export can capture for all their
recorded calls become graphs; the code around them stays Python.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from ..module import CapturedModule, example_calls
from ..module.parent import ParentModule
from .examples import Example, in_signature_order
from .exported import Source, depends_on_data, export_modes
from .failures import unable
from .kept.undisturbed import mode_of
from .methods import signature_of
from .observe import (
    Call,
    Observation,
    TensorLike,
    observe,
    observe_autocast,
    refuse_closures,
)
from .small_sizes import widened_if_proved
from .tree import separate_copy, working_copy

# The most kinds of calls of a submodule, and the most sizes per kind, that get a graph each. If
# there are more, the submodule's children are tried.
MOST_GRAPHS = 16
# Time limit, in seconds, for an export that a less dynamic attempt can replace.
EXPORT_TIMEOUT = 60.0


class Regions:
    """The regions of a model: submodules that become graphs.

    `capture` exports them; `leave` excludes those that change the model's outputs.

    Raises:
        CaptureError: the model does not run on these inputs, or it holds a function that a copy
            of the model would share (see `refuse_closures`).
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[example_calls.Call], failure: CaptureError
    ) -> None:
        refuse_closures(model, failure)
        self.model, self.failure = model, failure
        self._traced = working_copy(model)
        self.seen = observe(model, calls)
        if failed := self.seen.unrun():
            raise unable(model, "does not run on the example inputs", failed, "")
        observe_autocast(model, self.seen)
        self._left: set[str] = set()
        self._known: dict[str, list[Source]] = {}

    def capture(self) -> tuple[list[Source], ParentModule]:
        """Return the regions' graphs, and the parent module that runs the Python code around them.

        Raises:
            CaptureError: no submodule has a graph.
        """
        model = self.model
        sources = [s for path in _children(model, "") for s in self._below(path)]
        if not sources:
            raise self.failure
        outside = self.seen.outside({source.path for source in sources})
        flags = {path: module.training for path, module in model.named_modules()}
        parent = ParentModule(
            separate_copy(model), model.training, flags, outside, str(self.failure)
        )
        return sources, parent

    def leave(self, paths: Collection[str]) -> None:
        """Exclude these submodules from the regions; the submodules inside them may be regions."""
        self._left |= set(paths)

    def _below(self, path: str) -> Iterator[Source]:
        """Yield the graphs of a submodule or, if it has none, of the submodules inside it."""
        module = self.model.get_submodule(path)
        if next(module.parameters(), None) is None:
            return  # nothing to adapt
        try:
            yield from self._of(path)
        except CaptureError:
            for child in _children(module, path):
                yield from self._below(child)

    def _of(self, path: str) -> list[Source]:
        if path in self._left:
            raise CaptureError(f"'{path}' changes the model's outputs or buffers as a region.")
        if path not in self._known:
            self._known[path] = _graphs(self._traced, path, self.seen)
        return [source.copied() for source in self._known[path]]


def wrong_regions(module: CapturedModule, seen: Observation) -> list[str]:
    """Return the regions that change the example's outputs or buffers by more than rounding.

    A region does so if it and the Python code around it share more than arguments and outputs (an
    attribute set from outside, a mode changed in between). If no region does so by itself, but
    all together do, all are returned.
    """
    parent = module.parent_module
    assert parent is not None
    if _reproduces(module, seen):
        return []
    faulty = [path for path in module.regions if not _reproduces(module, seen, only=path)]
    return faulty or list(module.regions)


def _reproduces(module: CapturedModule, seen: Observation, only: str | None = None) -> bool:
    for mode, number in seen.outcomes:
        copied = module.derive().train(mode == "train")
        assert copied.parent_module is not None
        copied.parent_module.open([path for path in module.regions if only not in (None, path)])
        if not seen.ran(copied, mode, number):
            return False
    return True


def _children(module: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" if path else name for name, _ in module.named_children()]


def _graphs(root: nn.Module, path: str, seen: Observation) -> list[Source]:
    """Export a submodule in as few graphs as serve all its recorded calls.

    Raises:
        CaptureError: a call has no graph, there was no call, or there are too many kinds of calls.
    """
    kinds: list[list[Call]] = []
    for call in seen.calls.get(path, ()):
        if call.opaque:
            raise CaptureError(f"'{path}' is called with an object that a graph cannot take.")
        same = next((kind for kind in kinds if kind[0].like(call)), None)
        kinds.append([call]) if same is None else same.append(call)
    if not 0 < len(kinds) <= MOST_GRAPHS:
        raise CaptureError(f"'{path}' is called with {len(kinds)} kinds of arguments.")
    under_autocast = seen.under_autocast.get(path, ())
    return [s for same in kinds for s in _graphs_of_kind(root, path, same, under_autocast)]


def _graphs_of_kind(
    root: nn.Module, path: str, calls: Sequence[Call], under_autocast: Sequence[Call]
) -> list[Source]:
    """Export one graph for calls that differ only in sizes or, failing that, one graph per size."""
    try:
        return [_graph(root, path, calls, under_autocast)]
    except CaptureError:
        sizes = {tuple(_shapes(call)): call for call in calls}
        if not 1 < len(sizes) <= MOST_GRAPHS:
            raise
        return [_graph(root, path, [call], under_autocast) for call in sizes.values()]


def _graph(
    root: nn.Module, path: str, calls: Sequence[Call], under_autocast: Sequence[Call]
) -> Source:
    failure: CaptureError | None = None
    module = root.get_submodule(path)
    found = (cast for call in under_autocast if (cast := calls[0].cast_in(call)) is not None)
    examples = list(_examples(calls, next(found, frozenset())))
    for example in examples:
        kwargs = in_signature_order(signature_of(module), example.kwargs)
        patience = math.inf if example is examples[-1] else EXPORT_TIMEOUT
        ordered = replace(example, kwargs=kwargs, patience=patience)
        try:
            source = export_modes(module, [ordered], root=root, path=path)
            for call in calls:
                _require_holds(root, source, call)
            return source
        except CaptureError as error:
            failure = error
            if depends_on_data(error.__cause__):
                break
    assert failure is not None
    raise failure


def _require_holds(root: nn.Module, source: Source, call: Call) -> None:
    """Raise CaptureError unless the graph holds for a call.

    If its contract excludes the call, the contract is first widened to the call's sizes of 0 and
    1, where the graph is proved right for them.
    """
    spec, module = source.inputs[call.mode], source.modules[call.mode]
    assert spec is not None
    args, kwargs = call.inputs()
    try:
        spec.check(args, kwargs)
    except InputError as error:
        single = Example(args, kwargs, None)
        with mode_of(root, call.mode == "train"):
            wider = widened_if_proved(root.get_submodule(source.path), module, spec, single)
        if wider is None:
            raise CaptureError(f"'{source.path}': {error}") from error
        alike = [mode for mode, other in source.modules.items() if other is module]
        source.inputs |= dict.fromkeys(alike, wider)


# ---- examples to export with --------------------------------------------------------------------


def _examples(calls: Sequence[Call], cast: frozenset[int]) -> Iterator[Example]:
    """Yield the examples to try, from the most dynamic to the least.

    All have the inputs of the largest recorded call. The dynamic dimensions are, in turn:

    1. all;
    2. as 1, without those of size 1 (they may broadcast) that are not among 3;
    3. those that vary between calls, and the first of each tensor;
    4. those that vary between calls.

    Args:
        calls: calls that differ in sizes only.
        cast: numbers of the leaves that autocast casts.
    """
    base = max(calls, key=lambda call: sum(math.prod(shape) for shape in _shapes(call)))
    varied = {
        (number, axis)
        for call in calls
        for number, (shape, other) in enumerate(zip(_shapes(base), _shapes(call), strict=True))
        for axis, (size, another) in enumerate(zip(shape, other, strict=True))
        if size != another
    }
    shapes = list(_shapes(base))
    every = {(number, axis) for number, shape in enumerate(shapes) for axis in range(len(shape))}
    first = {(number, axis) for number, axis in every if axis == 0}
    larger = {(number, axis) for number, axis in every if shapes[number][axis] > 1}
    tried: list[set[tuple[int, int]]] = []
    for dynamic in (every, larger | first | varied, first | varied, varied):
        if dynamic not in tried:
            tried.append(dynamic)
            yield _example(base, dynamic, cast)


def _example(call: Call, dynamic: set[tuple[int, int]], cast: frozenset[int]) -> Example:
    """Return inputs like a call's, dynamic in these `(number of the tensor, axis)` pairs."""
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, TensorLike)]
    shapes = ShapesCollection()
    made: list[Any] = []
    for number, tensor in enumerate(tensors):
        axes = {axis for axis in range(len(tensor.shape)) if (number, axis) in dynamic}
        # torch.export would fix sizes of 0 and 1.
        sizes = (max(2, s) if axis in axes else s for axis, s in enumerate(tensor.shape))
        made.append(tensor.make(tuple(sizes)))
        shapes[made[-1]] = dict.fromkeys(axes, Dim.AUTO)
    args, kwargs = call.inputs(made)
    leaves = pytree.tree_leaves((args, kwargs))
    autocast = frozenset(id(leaves[number]) for number in cast)
    return Example(args, kwargs, shapes if dynamic else None, autocast=autocast)


def _shapes(call: Call) -> Iterator[tuple[int, ...]]:
    return (leaf.shape for leaf in call.leaves if isinstance(leaf, TensorLike))
