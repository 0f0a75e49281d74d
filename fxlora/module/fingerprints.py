"""A number that tells whether a tensor was written to, in one pass over its memory.

Multilinear hashing (Carter and Wegman 1979): a row of words w is hashed to Σ mᵢ·wᵢ + nᵢ·hi(wᵢ)
modulo 2⁶⁴, where hi is a word's upper half and mᵢ, nᵢ are random numbers of 64 bits. Each half of
a word then has a random factor of its own. Two rows that differ differ in a half, by d with
0 < |d| < 2³²; their hashes are equal for at most 2³¹ of the 2⁶⁴ values of its factor. So a change
goes unseen with a probability of 2⁻³³ at most, whether it adds, permutes, negates or transposes.
The hashes of the rows are hashed in the same way, with other factors, until one is left: each such
level (two for a tensor of half a gigabyte, three for one of four terabytes) adds 2⁻³³.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ROW = 8192  # words of eight bytes: their factors stay in the cache
_ROWS = {"cpu": 32}  # hashed at a time: what is made of them stays there, too
_MANY_ROWS = 1024  # on other devices, where starting a kernel costs more


def fingerprint(tensor: torch.Tensor) -> int:
    """A number made of a tensor's bits in their order, its shape and its dtype.

    0 where there are no bits to read: on the meta device, in a layout that is not strided.
    """
    if is_traceable_wrapper_subclass(tensor):
        inner: Any = tensor.__tensor_flatten__()[0]
        return _digest([fingerprint(getattr(tensor, name)) for name in inner])
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.is_meta:
        return 0
    words, level = _words(tensor.detach()), 0
    while level == 0 or len(words) > 1:
        words, level = _hashed(words, level), level + 1
    return int(words.sum()) ^ _digest((tuple(tensor.shape), tensor.dtype))


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as words of eight bytes, with zeros behind the last ones."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    if missing := -len(flat) % 8:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _hashed(words: torch.Tensor, level: int) -> torch.Tensor:
    """The hash of each row."""
    factors = _factors(level, words.device)
    whole = len(words) // _ROW * _ROW
    pieces = list(words[:whole].view(-1, _ROW).split(_ROWS.get(words.device.type, _MANY_ROWS)))
    if whole < len(words):
        pieces.append(words[whole:][None])
    upper = words.new_empty(max((piece.numel() for piece in pieces), default=0))
    return torch.cat([words[:0], *(_sums(piece, factors, upper) for piece in pieces)])


def _sums(rows: torch.Tensor, factors: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Σ m·w + n·hi(w) of each row, as (rows,); `upper` is memory for all hi(w)."""
    upper = upper[: rows.numel()].view(rows.shape)
    torch.bitwise_right_shift(rows, 32, out=upper)
    m, n = factors[:, : rows.shape[1]]
    if rows.device.type == "cpu":
        return torch.mv(rows, m) + torch.mv(upper, n)
    return (rows * m).sum(1) + upper.mul_(n).sum(1)  # elsewhere mv takes no whole numbers


@functools.cache
def _factors(level: int, device: torch.device) -> torch.Tensor:
    """The m and n of a level, as (2, _ROW): the same in every process and on every device."""
    words = torch.iinfo(torch.int64)
    generator = torch.Generator().manual_seed(level)
    drawn = torch.randint(
        words.min, words.max, (2, _ROW), generator=generator, dtype=torch.int64, device="cpu"
    )
    return drawn.to(device)
