"""Blocks of a routed module: submodules that its graphs call get the rows of the stacks, too.

The recorded calls of the submodules get further arguments, `adapter_rows` and `adapter_weights`.
The split of the graph at these calls passes them like any other. A row is the position of a
sample's adapter, and the number of slots for the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import UnsupportedOpError
from ..fx.calls import example_value
from ..module.blocks.recorded import VALUES, Leaves, ModuleCall, Value
from ..module.program import MODES, Program
from ..module.routing import BLOCK_INPUTS, ROWS, WEIGHTS
from .batch_inputs import Batch
from .slots import SlotGraph


def pass_to_blocks(program: Program, slots: Mapping[fx.Graph, SlotGraph], batch: Batch) -> None:
    """Have the calls of blocks in a program take the rows, and the weights if there are any."""
    known: set[tuple[fx.Graph, ModuleCall]] = set()
    calls: dict[str, tuple[ModuleCall, ...]] = {}
    for mode in MODES:
        graph = program.graphs[mode]
        given = _given(slots[graph])
        for node, dtype in zip(given.values(), (torch.int64, torch.float32), strict=False):
            _describe(node, graph, batch, slots[graph].mixture, dtype)
        for call in program.calls.get(mode, ()):
            if (graph, call) in known:
                continue
            known.add((graph, call))
            for index, node in enumerate(given.values(), len(call.inputs.constants)):
                value = Value(call.key, output=False, index=index)
                node.meta[VALUES] = (*node.meta.get(VALUES, ()), value)
        calls[mode] = tuple(_extended(c, list(given)) for c in program.calls.get(mode, ()))
    program.calls = calls


def _given(slots: SlotGraph) -> dict[str, fx.Node]:
    return {ROWS: slots.rows} | ({WEIGHTS: slots.weights} if slots.weights else {})


def _describe(
    node: fx.Node, graph: fx.Graph, batch: Batch, mixture: int, dtype: torch.dtype
) -> None:
    """Give a node an example value, from which the contracts of blocks take its sizes."""
    held = (example_value(given) for given in graph.find_nodes(op="placeholder"))
    for value in held:
        for size in () if value is None else value.shape:
            if value is not None and str(size) in batch.symbols:
                shape = (size, mixture) if mixture > 1 else (size,)
                node.meta["val"] = value.new_empty(shape, dtype=dtype)
                return


def _extended(call: ModuleCall, names: Sequence[str]) -> ModuleCall:
    """Return a call with further arguments, which are tensors."""
    if taken := [name for name in names if name in call.names]:
        raise UnsupportedOpError(
            f"the forward of '{call.path}' has an argument named {taken[0]} of its own: capture "
            "without modules= for a routed graph."
        )
    leaf, before = pytree.tree_structure(0), call.inputs
    count = len(before.constants)
    more = range(count, count + len(names))
    spec = before.structure
    children = [*spec.children(), *(leaf for _ in names)]
    inputs = Leaves(
        pytree.TreeSpec(spec.type, spec.context, children),
        (*before.constants, *(None for _ in names)),
        (*before.computed, *more),
        before.tensors.union(more),
    )
    gradients = (*call.gradients, *(None for _ in names)) if call.gradients else ()
    return dataclasses.replace(
        call,
        names=(*call.names, *names),
        structures=(*call.structures, *(leaf for _ in names)),
        inputs=inputs,
        gradients=gradients,
    )


def take_from_blocks(program: Program) -> None:
    """Undo `pass_to_blocks`."""
    program.calls = {mode: tuple(map(_shortened, c)) for mode, c in program.calls.items()}


def _shortened(call: ModuleCall) -> ModuleCall:
    kept = sum(name not in BLOCK_INPUTS for name in call.names)
    gone = len(call.names) - kept
    if not gone:
        return call
    before = call.inputs
    count = len(before.constants) - gone
    spec = before.structure
    inputs = Leaves(
        pytree.TreeSpec(spec.type, spec.context, spec.children()[:kept]),
        before.constants[:count],
        tuple(index for index in before.computed if index < count),
        frozenset(index for index in before.tensors if index < count),
    )
    return dataclasses.replace(
        call,
        names=call.names[:kept],
        structures=call.structures[:kept],
        inputs=inputs,
        gradients=call.gradients[:count],
    )
