"""Values that are computed once per slot, and the choice of each sample's among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn

from ..errors import UnsupportedOpError
from ..fx.calls import example_value
from ..fx.effects import written_nodes
from ..fx.marks import ROUTED
from ..lora.gathered import BatchDim
from ..lora.row import aten
from ..lora.variants import VARIANTS
from ..module.adapted_weight import adapted_weight, rank
from ..module.casts import mark
from ..module.routing import owned_of, scaling_of
from ..plan import Entry, scales_outputs
from .slots import KEPT, SlotGraph


def compute_per_slot(
    slots: SlotGraph,
    owner: nn.Module,
    sources: Mapping[fx.Node, list[Entry] | str],
    full: Mapping[str, str],
    batch: Mapping[fx.Node, BatchDim],
    writers: Collection[fx.Node],
) -> None:
    """Compute all that depends on some weights once per slot, and choose where samples are.

    Args:
        slots: the graph.
        owner: the module that has the attributes which the graph fetches.
        sources: the nodes that fetch the weights, with the entries that adapt them, or with the
            name of the parameter that an adapter trains in full.
        full: the stack of each parameter that trains in full.
        batch: where the samples are in the nodes.
        writers: nodes that write to buffers.

    Raises:
        UnsupportedOpError: a value that depends on a weight writes to memory, or leaves the graph
            before the samples can be told apart; names the weight.
    """
    if sources and (slots.weights or slots.mixture > 1):
        name = next(iter(sources)).target
        raise UnsupportedOpError(
            f"'{name}' is not adapted by a gathered branch, so it takes no weights and no "
            "mixture for each sample. Route without weights= and mixture=, or combine the "
            "adapters into one (fxlora.combine)."
        )
    copies: dict[fx.Node, list[fx.Node]] = {}  # of a node, by slot
    origin: dict[fx.Node, str] = {}
    for node in list(slots.graph.nodes):
        if node in sources:
            copies[node] = _weights(slots, node, sources[node], full)
            origin[node] = str(node.target)
            continue
        inside = [given for given in node.all_input_nodes if given in copies]
        if not inside:
            continue
        weight = origin[inside[0]]
        _refuse(node, weight, node in writers or bool(written_nodes(node, owner)))
        made = [_copied(node, copies, slot) for slot in range(slots.slots)]
        if node in batch:
            _choose(slots, node, made, batch[node])
        else:
            copies[node], origin[node] = made, weight


def _weights(
    slots: SlotGraph, node: fx.Node, adapted: list[Entry] | str, full: Mapping[str, str]
) -> list[fx.Node]:
    """Return the weight of each slot."""
    with slots.graph.inserting_before(node.next):
        if isinstance(adapted, str):
            stack = slots.fetch(full[adapted])
            flags = slots.fetch(owned_of(full[adapted]))
            return [
                aten.where.self(
                    _owns(flags, slot),
                    mark(aten.select.int(stack, 0, slot), full[adapted], adapted),
                    slots.proxy(node),
                ).node
                for slot in range(slots.slots)
            ]
        names = [n for entry in adapted for n in (*entry.tensors, scaling_of(entry))]
        names += [owned_of(entry) for entry in adapted if scales_outputs(entry)]
        stacks = {name: slots.fetch(name) for name in names}
        found: list[fx.Node] = []
        for slot in range(slots.slots):
            weight = slots.proxy(node)
            for entry in adapted:
                row = {name: aten.select.int(stacks[name], 0, slot) for name in entry.tensors}
                row[scaling_of(entry)] = _number(stacks[scaling_of(entry)], slot)
                before, weight = weight, _adapted(entry, weight, row)
                if scales_outputs(entry):
                    owns = _owns(stacks[owned_of(entry)], slot)
                    weight = aten.where.self(owns, weight, before)
            found.append(weight.node)
        return found


def _refuse(node: fx.Node, weight: str, writes: bool) -> None:
    """Raise UnsupportedOpError for a node that cannot be computed once per slot."""
    if node.op != "call_function" or writes:
        what = "writes to memory" if writes else "leaves the graph"
        raise UnsupportedOpError(
            f"'{weight}': a value that depends on it {what} ('{node.name}') where the samples "
            "of the batch cannot be told apart, so they cannot have different adapters. Route "
            "adapters that leave this weight alone, or capture the model without that output."
        )


def _copied(node: fx.Node, copies: Mapping[fx.Node, list[fx.Node]], slot: int) -> fx.Node:
    with node.graph.inserting_before(node.next):
        copied = node.graph.node_copy(
            node, lambda given: copies[given][slot] if given in copies else given
        )
    copied.meta = {**node.meta, ROUTED: KEPT}
    return copied


def _choose(slots: SlotGraph, node: fx.Node, made: list[fx.Node], batch: BatchDim) -> None:
    """Give each sample the value of its slot."""
    value = example_value(node)
    assert value is not None
    users, chosen = set(node.users), node
    for slot, copied in enumerate(made):
        with slots.graph.inserting_before(max(copied, chosen).next):
            mine = aten.eq.Scalar(slots.proxy(slots.rows), slot)
            mine = batch.along(mine, slots.proxy(node), value.ndim)
            args = (mine, slots.proxy(copied), slots.proxy(chosen))
            output = aten.where.self(*args).node
        output.meta = {**node.meta, ROUTED: 2}
        chosen = output
    node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user in users)


def _number(stack: Any, slot: int) -> Any:
    """Return the number of a slot, from a stack (slots, 1)."""
    return aten.select.int(aten.select.int(stack, 0, slot), 0, 0)


def _owns(flags: Any, slot: int) -> Any:
    """Return whether the adapter of a slot has a place."""
    return aten.ne.Scalar(_number(flags, slot), 0)


def _adapted(entry: Entry, weight: Any, row: Mapping[str, Any]) -> Any:
    """Return the adapted weight of one slot, from a row of the entry's stacks."""
    down, up = row[entry.name_a], row[entry.name_b]
    for variant, held in entry.variant_tensors.items():
        more = [row[name] for name in held]
        down, up = VARIANTS[variant].factors(entry.layout, down, up, *more)
    # s is no number here, so it goes into B: W0 + (s·B)·A
    up = aten.type_as.default(aten.mul.Tensor(up, row[scaling_of(entry)]), up)
    gains = tuple(name for name in entry.variants if VARIANTS[name].gain)
    plain = dataclasses.replace(entry, variants=gains, r=rank(entry))
    return adapted_weight(plain, weight, {**row, entry.name_a: down, entry.name_b: up})
