"""The adapted weight of a plan entry as a formula: W0 + s·BA with the entry's variants.

The functions call only aten overloads, so they accept both tensors and torch.fx proxies. With
proxies they emit the nodes that compute the same result, and mark the nodes after which a cast is
needed if the adapter is held in another dtype than its weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..lora.variants import VARIANTS
from ..plan import Entry
from .casts import mark

aten = torch.ops.aten

Values = Mapping[str, Any]  # an entry's tensors, or proxies for them, by name


def factors(entry: Entry, values: Values) -> tuple[Any, Any]:
    """Return the effective factors (…, r, in) and (…, out, r): A and B as the variants extend them.

    Inits that start from the weight (PiSSA, OLoRA) have effective factors of rank 2r.
    """
    a, b = values[entry.name_a], values[entry.name_b]
    for variant, held in entry.variant_tensors.items():
        a, b = VARIANTS[variant].factors(entry.layout, a, b, *(values[name] for name in held))
    return to_weights(entry, a), to_weights(entry, b)


def to_weights(entry: Entry, value: Any) -> Any:
    """Mark a node in the adapter's dtype as one whose users need the weight's dtype."""
    return mark(value, entry.name_a, entry.parameter)


def rank(entry: Entry) -> int:
    """Return the rank of the effective factors (2r for PiSSA and OLoRA)."""
    a, _ = factors(entry, {n: torch.empty(s, device="meta") for n, s in entry.tensors.items()})
    return a.shape[entry.layout.rank_dims[0]]


def adapted_weight(entry: Entry, weight: Any, values: Values) -> Any:
    """Return W0 + s·BA with the variants applied, in the shape of W0.

    For a part of a packed weight, only the part's slice changes.
    """
    if entry.rows is None:
        return _adapted(entry, weight, values)
    dim, (start, stop) = entry.layout.part_dim, entry.rows
    part = aten.slice.Tensor(weight, dim, start, stop)
    return aten.slice_scatter.default(weight, _adapted(entry, part, values), dim, start, stop)


def output_gains(entry: Entry, weight: Any, values: Values) -> list[Any]:
    """Return the factors (…, out) by which variants scale the outputs, one per scaling variant."""
    matrix = sum_matrix(entry, weight, values)
    gains: list[Any] = []
    for variant, held in entry.variant_tensors.items():
        if gain := VARIANTS[variant].gain:
            gains.append(gain(_constant(entry, matrix), *(values[name] for name in held)))
    return gains


def sum_matrix(entry: Entry, weight: Any, values: Values) -> Any:
    """Return V = W0 + s·BA as (…, d0, d1).

    Args:
        weight: W0, or the slice of it that the entry adapts.
    """
    a, b = factors(entry, values)
    matrix = entry.layout.matrix(weight, entry.adapted_shape)
    # (…, d0, d1) + s · (…, d0, r) @ (…, r, d1) -> (…, d0, d1)
    return entry.layout.add_pair(matrix, a, b, entry.scaling, entry.adapted_shape)


def _constant(entry: Entry, matrix: Any) -> Any:
    """Return V as (…, out, in), detached: variants treat it as a constant for gradients.

    In the graph it is in the adapter's dtype, if that is wider than the weight's.
    """
    constant = entry.layout.outputs_first(aten.detach.default(matrix), entry.adapted_shape)
    return mark(constant, entry.parameter, entry.name_a, widens=True)


def _adapted(entry: Entry, weight: Any, values: Values) -> Any:
    """Return the adapted weight, or the adapted slice, in the shape of `weight`."""
    matrix = sum_matrix(entry, weight, values)
    for variant, held in entry.variant_tensors.items():
        if gain := VARIANTS[variant].gain:
            found = gain(_constant(entry, matrix), *(values[name] for name in held))
            factor = entry.layout.broadcast_over_matrix(found, entry.adapted_shape)
            matrix = to_weights(entry, aten.mul.Tensor(matrix, factor))
    return entry.layout.unmatrix(matrix, entry.adapted_shape)
