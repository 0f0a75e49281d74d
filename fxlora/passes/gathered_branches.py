"""Gathered branches in a graph: op(x, W) + s_i·B_i(A_i(x)) for sample i."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..fx.calls import example_value
from ..lora.gathered import BatchDim, Samples
from ..lora.row import Read, aten
from ..lora.variants import VARIANTS
from ..module.adapted_weight import rank, to_weights
from ..module.routing import dropout_of, scaling_of
from ..plan import Entry
from ..reads.facts import padding_row
from ..reads.readers import Reader
from .slots import SlotGraph


def add_branch(
    slots: SlotGraph, entry: Entry, reader: Reader, batch: BatchDim, training: bool
) -> None:
    """Rewrite op(x, W) to op(x, W) + s_i·B_i(A_i(x)) for sample i, at one read.

    Args:
        slots: the graph; the read may be in a region that it calls.
        entry: the stacked adapters.
        reader: the read.
        batch: where the samples are in x.
        training: whether x is dropped, with the probability of each sample's own adapter.
    """
    op, base = reader.op, reader.node
    assert op is not None and op.gathered is not None
    with base.graph.inserting_before(base.next):
        samples = _samples(slots, entry, reader, batch)
        drops = training and entry.dropout > 0 and op.dropout
        for each in _dropped(slots, entry, reader, samples) if drops else [samples]:
            users = set(base.users)
            output = _sum(slots, base, _padded(entry, reader, op.gathered(each)))
            slots.replace(base, output, 0, users)
            base = output


def _samples(slots: SlotGraph, entry: Entry, reader: Reader, batch: BatchDim) -> Samples:
    op, node, path = reader.op, reader.node, reader.path
    assert op is not None
    given = op.input_of(node, reader.weight)
    value = example_value(given)
    assert value is not None
    layout = reader.layout or entry.layout
    down, up = slots.fetch(entry.name_a, path), slots.fetch(entry.name_b, path)
    for variant, held in entry.variant_tensors.items():
        more = [slots.fetch(name, path) for name in held]
        down, up = VARIANTS[variant].factors(entry.layout, down, up, *more)
    size_i, size_o = entry.layout.features(entry.adapted_shape)
    if layout.in_first != entry.layout.in_first:  # (BA)^T = A^T B^T
        down, up = aten.transpose.int(up, 1, 2), aten.transpose.int(down, 1, 2)
        size_i, size_o = size_o, size_i
    trains = entry.padding_idx is None and padding_row(node, entry.shape[0]) is not None
    x = slots.proxy(given)
    return Samples(
        Read(node, reader.weight, x, layout, entry.shape, rank(entry), 1.0, trains),
        slots.seen(slots.rows, path),
        down,
        up,
        slots.fetch(scaling_of(entry), path),
        (size_i, size_o),
        batch,
        value.ndim,
        lambda factor: to_weights(entry, factor),
        slots.seen(slots.weights, path) if slots.weights else None,
        slots.mixture,
    )


def _dropped(slots: SlotGraph, entry: Entry, reader: Reader, samples: Samples) -> Iterator[Samples]:
    """Yield the samples with dropout on x; of a mixture, each adapter with a mask of its own.

    x_i is multiplied by m / (1 - p_i), with m = 1 at the probability 1 - p_i and else 0.
    """
    stack = slots.fetch(dropout_of(entry), reader.path)
    for each in _one_by_one(samples):
        x = each.read.x
        p = aten.squeeze.dim(aten.index.Tensor(stack, [each.slots]), -1)  # (b,)
        p = each.batch.along(p, x, each.dims)
        mask = aten.ge.Tensor(aten.rand_like.default(x, dtype=torch.float32), p)
        mask = aten.div.Tensor(mask, aten.rsub.Scalar(p, 1))
        x = aten.mul.Tensor(x, aten.type_as.default(mask, x))
        yield dataclasses.replace(each, read=dataclasses.replace(each.read, x=x))


def _one_by_one(samples: Samples) -> Iterator[Samples]:
    """Yield the samples with each adapter of a mixture."""
    if samples.mixture == 1:
        yield samples
        return
    for number in range(samples.mixture):
        own = aten.select.int(samples.slots, 1, number)
        weights = samples.weights
        weights = None if weights is None else aten.select.int(weights, 1, number)
        yield dataclasses.replace(samples, slots=own, weights=weights, mixture=1)


def _padded(entry: Entry, reader: Reader, branch: Any) -> Any:
    """Pad a part's outputs with zeros to all outputs of the weight."""
    if entry.rows is None:
        return branch
    assert reader.op is not None and reader.op.output is not None
    behind = entry.shape[entry.layout.part_dim] - entry.rows[1]
    pad = [0, 0] * (-1 - reader.op.output) + [entry.rows[0], behind]
    return aten.constant_pad_nd.default(branch, pad)


def _sum(slots: SlotGraph, base: fx.Node, branch: Any) -> fx.Node:
    """Add a branch; one that ends in a product in the shape of the sum is added in it."""
    if branch.node.target is not aten.bmm.default:
        return aten.add.Tensor(slots.proxy(base), branch).node
    factors = [slots.proxy(factor) for factor in branch.node.args]
    branch.node.graph.erase_node(branch.node)
    return aten.baddbmm.default(slots.proxy(base), *factors).node
