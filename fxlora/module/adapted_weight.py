"""The adapted weight of a plan entry as a formula: W0 + s·BA with the entry's variants.

The functions call only aten overloads, so they accept both tensors and torch.fx proxies. With
proxies they emit the nodes that compute the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..lora.variants import VARIANTS
from ..plan import Entry

aten = torch.ops.aten

Values = Mapping[str, Any]  # an entry's tensors, or proxies for them, by name


def factors(entry: Entry, values: Values) -> tuple[Any, Any]:
    """Return the effective factors (…, r, in) and (…, out, r): A and B as the variants extend them.

    Inits that start from the weight (PiSSA, OLoRA) have effective factors of rank 2r.
    """
    a, b = values[entry.name_a], values[entry.name_b]
    for variant, held in entry.variant_tensors.items():
        a, b = VARIANTS[variant].factors(entry.layout, a, b, *(values[name] for name in held))
    return a, b


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
    return entry.layout.product(matrix, a, b, entry.scaling, entry.adapted_shape)


def _constant(entry: Entry, matrix: Any) -> Any:
    """Return V as (…, out, in), detached: variants treat it as a constant for gradients."""
    return entry.layout.by_output(aten.detach.default(matrix), entry.adapted_shape)


def _adapted(entry: Entry, weight: Any, values: Values) -> Any:
    """Return the adapted weight, or the adapted slice, in the shape of `weight`."""
    matrix = sum_matrix(entry, weight, values)
    for variant, held in entry.variant_tensors.items():
        if gain := VARIANTS[variant].gain:
            found = gain(_constant(entry, matrix), *(values[name] for name in held))
            matrix = aten.mul.Tensor(matrix, entry.layout.per_output(found, entry.adapted_shape))
    return entry.layout.unmatrix(matrix, entry.adapted_shape)
