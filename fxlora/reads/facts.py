"""Facts about single calls: whether one reads a tensor's values, and a look-up's padding row.

An op that is missing from the tables counts as a read of values, which only costs speed.
"""

from __future__ import annotations

import torch
from torch import fx

from ..fx.calls import flat_inputs, named_argument, torch_kind

_DESCRIBING = frozenset(
    {
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset"),
        *("size", "stride", "numel", "dim", "storage_offset", "is_floating_point"),
    }
)
_MADE_ALIKE = frozenset(
    f"{made}_like" for made in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | {f"new_{made}" for made in ("zeros", "ones", "full", "empty", "empty_strided", "tensor")}


def reads_no_values(node: fx.Node, value: fx.Node) -> bool:
    """Whether a call uses only the dtype, shape or device of one of its inputs.

    The ops in the tables use only these of their first argument. A fill value, as in `full_like`,
    is read.
    """
    if not (node.args and node.args[0] is value and torch_kind(node) in _DESCRIBING | _MADE_ALIKE):
        return False
    return sum(given is value for given in flat_inputs(node)) == 1


def padding_row(node: fx.Node, rows: int) -> int | None:
    """Return the index of the row that gets no gradient from a look-up, or None without one."""
    index = named_argument(node, "padding_idx")
    if not isinstance(index, int):
        return None
    if node.target is torch.ops.aten.embedding_bag.padding_idx:
        return index % rows  # embedding_bag counts negative indices from the end
    return index if index >= 0 else None  # for embedding, -1 means that there is no padding row
