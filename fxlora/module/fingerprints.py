"""A number that tells whether a tensor was written to, in one pass over its memory."""

from __future__ import annotations

import torch
from torch import nn


def fingerprint(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bits as whole numbers of eight bytes.

    0 where there are no bits to read: on the meta device, in a subclass with a layout of its own.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta:
        return 0
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = len(flat) // 8 * 8
    # Words of the sum's own type: torch converts narrower ones, which takes many times as long.
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())
