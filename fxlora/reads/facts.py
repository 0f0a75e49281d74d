"""What is known of single reads: of those that look at no values, and of padding rows.

A missing name costs speed only: the read counts as a read of values.
"""

from __future__ import annotations

import torch
from torch import fx

from ..fx.calls import flat_inputs, named_argument, torch_kind

_DESCRIBING = frozenset(
    {
        *("_assert_tensor_metadata", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
        *("size", "stride", "numel", "dim", "storage_offset", "is_floating_point"),
    }
)
_MADE_ALIKE = frozenset(
    f"{made}_like" for made in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | {f"new_{made}" for made in ("zeros", "ones", "full", "empty", "empty_strided", "tensor")}


def reads_no_values(node: fx.Node, value: fx.Node) -> bool:
    """Whether a call looks at no more than the dtype, shape or device of one of its inputs.

    These ops do so with their first argument; one that is filled with is read.
    """
    first = bool(node.args) and node.args[0] is value
    once = sum(given is value for given in flat_inputs(node)) == 1
    return first and once and torch_kind(node) in _DESCRIBING | _MADE_ALIKE


def padding_row(node: fx.Node, rows: int) -> int | None:
    """The row that a look-up gives no gradient, or None."""
    index = named_argument(node, "padding_idx")
    if not isinstance(index, int):
        return None
    if node.target is torch.ops.aten.embedding_bag.padding_idx:
        return index % rows  # a bag's counts from the end
    return index if index >= 0 else None  # where an embedding's -1 says that there is none
