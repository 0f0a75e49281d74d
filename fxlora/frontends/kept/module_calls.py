"""Record the calls of submodules in a graph: which nodes they consist of, and their arguments.

torch.export keeps the ops only. While a model is exported, each call of a submodule is marked by a
call of an op without results, at its beginning and at its end. The marks are then taken out of the
graph, and each node's meta gets the calls around it, and those whose inputs or outputs it computes.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import has_side_effect
from torch.library import Library
from torch.utils import _pytree as pytree

from ...module.blocks.recorded import CALLS, VALUES, CallKey, Leaves, ModuleCall, Value
from ...module.contract import by_position
from ...module.tensor_state import Gradient
from .tensor_state import StateReads


def _nothing(*given: Any) -> None:
    """Do nothing: the op only marks a place in a graph."""


_LIBRARY = Library("fxlora", "FRAGMENT")
_LIBRARY.define("boundary(Tensor[] tensors, SymInt[] sizes, str path, int number, bool end) -> ()")
_LIBRARY.impl("boundary", _nothing, "CompositeExplicitAutograd")
_MARK = torch.ops.fxlora.boundary.default
has_side_effect(_MARK)


@dataclass(frozen=True)
class _Begun:
    """A call that has begun.

    Attributes:
        recorded: the fields of `ModuleCall` from its names to its inputs.
        gradients: the gradient state of each leaf of its arguments; None where that is no tensor.
        reads: the forward's reads before the call.
    """

    recorded: tuple[tuple[str, ...], int, int, tuple[Any, ...], Leaves]
    gradients: tuple[Gradient | None, ...]
    reads: StateReads


class Calls:
    """The calls of submodules during one export.

    Attributes:
        calls: the calls that ended.
        reads: the forward's reads of tensor state so far.
    """

    def __init__(self, reads: StateReads) -> None:
        self.calls: dict[CallKey, ModuleCall] = {}
        self.reads = reads
        self._begun: dict[CallKey, _Begun] = {}
        self._open: list[CallKey] = []
        self._counts: Counter[str] = Counter()

    def begin(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        key = (path, self._counts[path])
        self._counts[path] += 1
        self._open.append(key)
        kwargs = _as_declared(module, kwargs)
        names = _names(module, len(args), kwargs)
        values = [*args, *kwargs.values()]
        structures = tuple(pytree.tree_structure(value) for value in values)
        positional = len(args), by_position(module, names, len(args))
        inputs = _marked(values, key, end=False)
        recorded = names, *positional, structures, inputs
        self._begun[key] = _Begun(recorded, _gradients(values), replace(self.reads))

    def end(self, path: str, output: Any) -> None:
        key = self._open.pop()
        assert key[0] == path
        leaves = _marked(output, key, end=True)
        begun = self._begun[key]
        reads = self.reads.gradient > begun.reads.gradient
        asks = reads or self.reads.mode > begun.reads.mode
        self.calls[key] = ModuleCall(
            key, *begun.recorded, leaves, asks, begun.gradients if reads else ()
        )

    def taken(self, graph: fx.Graph) -> tuple[ModuleCall, ...]:
        """Take the marks out of a graph; return the calls that are in it, not in a nested graph."""
        around: list[CallKey] = []
        complete: list[CallKey] = []
        for node in list(graph.nodes):
            if node.target is _MARK:
                self._take(node, around, complete)
            elif self.calls and node.op not in ("placeholder", "output", "get_attr"):
                node.meta[CALLS] = tuple(around)
        return tuple(self.calls[key] for key in complete if key in self.calls)

    def _take(self, mark: fx.Node, around: list[CallKey], complete: list[CallKey]) -> None:
        tensors, sizes, path, number, end = mark.args
        key = (str(path), int(number))  # pyright: ignore[reportArgumentType]
        if end and key in around:
            del around[around.index(key) :]
            complete.append(key)
        elif not end:
            around.append(key)
        call = self.calls.get(key)
        if call is not None:
            leaves = call.output if end else call.inputs
            for index, node in zip(leaves.computed, _in_order(leaves, tensors, sizes), strict=True):
                if isinstance(node, fx.Node):
                    held = node.meta.get(VALUES, ())
                    node.meta[VALUES] = (*held, Value(key, bool(end), index))
        mark.graph.erase_node(mark)


def _in_order(leaves: Leaves, tensors: Any, sizes: Any) -> list[Any]:
    """Return the marked nodes in the order of the leaves."""
    ahead = {True: iter(tensors), False: iter(sizes)}
    return [next(ahead[index in leaves.tensors]) for index in leaves.computed]


@contextmanager
def recorded_calls_of(
    model: nn.Module, paths: Collection[str], reads: StateReads
) -> Generator[Calls]:
    """Mark the calls of these submodules while a model is exported in a `with` block.

    Args:
        model: the model.
        paths: the submodules.
        reads: the record of the forward's reads of tensor state, which the export fills.
    """
    calls = Calls(reads)
    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)

            def begin(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                calls.begin(path, module, args, kwargs)

            def end(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                calls.end(path, output)

            first = module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
            stack.callback(first.remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield calls


def _marked(values: Any, key: CallKey, end: bool) -> Leaves:
    """Emit a mark that takes all tensors and sizes in `values`, and describe the leaves."""
    leaves, structure = pytree.tree_flatten(values)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes = [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]
    _MARK(tensors, sizes, *key, end)
    kinds = (torch.Tensor, torch.SymInt)
    return Leaves(
        structure,
        tuple(None if isinstance(leaf, kinds) else leaf for leaf in leaves),
        tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)),
        frozenset(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)),
    )


def _gradients(values: Any) -> tuple[Gradient | None, ...]:
    """Return the gradient state of each tensor in `values`; to ask for it is no read."""
    with torch._C.DisableTorchFunction():
        leaves = pytree.tree_leaves(values)
        return tuple(Gradient.of(v) if isinstance(v, torch.Tensor) else None for v in leaves)


def _as_declared(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments in the order in which the forward declares them.

    So calls that give the same arguments in another order are the same call.
    """
    declared = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in dict.fromkeys([*declared, *kwargs])}


def _names(module: nn.Module, positional: int, kwargs: Collection[str]) -> tuple[str, ...]:
    """Return names for a call's positional arguments, as its forward declares them, and kwargs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    declared: Sequence[inspect.Parameter] = list(
        inspect.signature(module.forward).parameters.values()
    )
    names = [parameter.name for parameter in declared if parameter.kind in kinds][:positional]
    names += [f"args_{index}" for index in range(len(names), positional)]
    return (*names, *kwargs)
