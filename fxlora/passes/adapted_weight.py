"""The adapted weight of an entry, as a formula.

The functions call aten overloads only. They take tensors, and torch.fx's proxies: then they emit
the nodes that compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..lora.variants import VARIANTS
from ..plan import Entry

aten = torch.ops.aten

Values = Mapping[str, Any]  # an entry's tensors by name


def factors(entry: Entry, values: Values) -> tuple[Any, Any]:
    """What stands for A and B."""
    a, b = values[entry.name_a], values[entry.name_b]
    for variant, held in entry.extras.items():
        a, b = VARIANTS[variant].factors(entry.layout, a, b, *(values[name] for name in held))
    return a, b


def rank(entry: Entry) -> int:
    """That of what stands for A and B."""
    a, _ = factors(entry, {n: torch.empty(s, device="meta") for n, s in entry.tensors.items()})
    return a.shape[entry.layout.rank_dims[0]]


def adapted_weight(entry: Entry, weight: Any, values: Values) -> Any:
    """W0 + s·BA and what the variants make of it, in W0's shape; other rows as they are."""
    if entry.rows is None:
        return _adapted(entry, weight, values)
    dim, (start, stop) = entry.layout.part_dim, entry.rows
    part = aten.slice.Tensor(weight, dim, start, stop)
    return aten.slice_scatter.default(weight, _adapted(entry, part, values), dim, start, stop)


def output_gains(entry: Entry, weight: Any, values: Values) -> list[Any]:
    """What the variants multiply the outputs with, a factor (…, out) each."""
    matrix = sum_matrix(entry, weight, values)
    gains: list[Any] = []
    for variant, held in entry.extras.items():
        if gain := VARIANTS[variant].gain:
            gains.append(gain(_constant(entry, matrix), *(values[name] for name in held)))
    return gains


def sum_matrix(entry: Entry, weight: Any, values: Values) -> Any:
    """V = W0 + s·BA as (…, d0, d1), for a weight that the entry covers whole."""
    a, b = factors(entry, values)
    matrix = entry.layout.matrix(weight, entry.covered)
    return entry.layout.product(matrix, a, b, entry.scaling, entry.covered)


def _constant(entry: Entry, matrix: Any) -> Any:
    """V as (…, out, in), without gradients."""
    return entry.layout.by_output(aten.detach.default(matrix), entry.covered)


def _adapted(entry: Entry, weight: Any, values: Values) -> Any:
    matrix = sum_matrix(entry, weight, values)
    for variant, held in entry.extras.items():
        if gain := VARIANTS[variant].gain:
            found = gain(_constant(entry, matrix), *(values[name] for name in held))
            matrix = aten.mul.Tensor(matrix, entry.layout.per_output(found, entry.covered))
    return entry.layout.unmatrix(matrix, entry.covered)
