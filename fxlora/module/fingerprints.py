"""Fingerprints: a hash that tells whether a tensor was written to, in one pass over its memory.

Multilinear hashing (Carter and Wegman 1979): a row of 64-bit words w is hashed to
Σ mᵢ·wᵢ + nᵢ·hi(wᵢ) modulo 2⁶⁴, where hi is the upper half of a word and mᵢ, nᵢ are random 64-bit
numbers. Each half of a word is thus multiplied by a different random factor. Two different rows
differ in at least one half, by some d with 0 < |d| < 2³². Their hashes are equal for at most 2³¹
of the 2⁶⁴ values of that half's factor. A change is therefore missed with a probability of at most
2⁻³³, whether it adds, permutes, negates or transposes.

The row hashes are hashed in the same way, with other factors, until one is left. Each level (two
for a tensor of half a gigabyte, three for one of four terabytes) adds 2⁻³³ to the probability.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .sharded import is_sharded, local, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ROW = 8192  # 64-bit words in a row: few enough that their factors stay in the cache
ROW_BYTES = 8 * _ROW
_ROWS = {"cpu": 32}  # rows hashed at a time: few enough that the temporaries stay in the cache
_MANY_ROWS = 1024  # on other devices, where a kernel launch costs more


def fingerprint(tensor: torch.Tensor) -> int:
    """Return a hash of a tensor's bits in their logical order, its shape and its dtype.

    A tensor that is sharded over processes has the hash of the whole one; the call is collective.
    Another traceable wrapper subclass is hashed by its inner tensors. The hash is 0 for tensors
    whose bits cannot be read: on the meta device, in a layout that is not strided, or of another
    subclass.
    """
    if is_sharded(tensor):
        return fingerprint(whole(tensor.detach()))
    if is_traceable_wrapper_subclass(tensor):
        inner: Any = tensor.__tensor_flatten__()[0]
        return _digest([fingerprint(getattr(tensor, name)) for name in inner])
    plain = type(tensor) is torch.Tensor or issubclass(type(tensor), nn.Parameter)
    if not plain or tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return of_row_hashes(row_hashes(tensor), tuple(tensor.shape), tensor.dtype)


def row_hashes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the hash of each `ROW_BYTES` of a tensor's bits; the last row may be shorter.

    Those of a tensor's consecutive parts, of whole rows each, are together those of the tensor.
    """
    return _hashed(_words(tensor.detach()), 0)


def of_row_hashes(hashes: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the fingerprint of a tensor from its row hashes, shape and dtype."""
    level = 1
    while len(hashes) > 1:
        hashes, level = _hashed(hashes, level), level + 1
    return int(hashes.sum()) ^ _digest((shape, dtype))


def differing_copies(mesh: DeviceMesh, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors whose copies on the processes of a mesh differ. Collective.

    A plain tensor is copied to all processes, a sharded one along the dimensions of its mesh that
    its placements say.
    """
    found: set[str] = set()
    for dim in range(mesh.ndim):
        copied = [name for name in sorted(tensors) if _is_copied(tensors[name], mesh, dim)]
        hashes = [fingerprint(local(tensors[name].detach())) for name in copied]
        least = torch.tensor(hashes, dtype=torch.int64, device=mesh.device_type)
        most = least.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN, mesh.get_group(dim))
        distributed.all_reduce(most, distributed.ReduceOp.MAX, mesh.get_group(dim))
        unlike: list[bool] = (least != most).tolist()
        found |= {name for name, differs in zip(copied, unlike, strict=True) if differs}
    return sorted(found)


def _is_copied(tensor: torch.Tensor, mesh: DeviceMesh, dim: int) -> bool:
    """Whether the processes along a dimension of a mesh have copies of a tensor."""
    if not is_sharded(tensor):
        return True
    if tensor.device_mesh == mesh:
        return tensor.placements[dim].is_replicate()
    whole_mesh = tensor.device_mesh.ndim == 1 and mesh.ndim == 1
    return whole_mesh and tensor.placements[0].is_replicate()


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest(), "big")


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits as 64-bit words, padded with zeros at the end."""
    flat = tensor.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    if missing := -len(flat) % 8:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _hashed(words: torch.Tensor, level: int) -> torch.Tensor:
    """Return the hash of each row of `_ROW` words (the last row may be shorter)."""
    factors = _factors(level, words.device)
    whole = len(words) // _ROW * _ROW
    pieces = list(words[:whole].view(-1, _ROW).split(_ROWS.get(words.device.type, _MANY_ROWS)))
    if whole < len(words):
        pieces.append(words[whole:][None])
    upper = words.new_empty(max((piece.numel() for piece in pieces), default=0))
    return torch.cat([words[:0], *(_sums(piece, factors, upper) for piece in pieces)])


def _sums(rows: torch.Tensor, factors: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """Return Σ m·w + n·hi(w) for each row, as (rows,); `upper` is a buffer for all hi(w)."""
    upper = upper[: rows.numel()].view(rows.shape)
    torch.bitwise_right_shift(rows, 32, out=upper)
    m, n = factors[:, : rows.shape[1]]
    if rows.device.type == "cpu":
        return torch.mv(rows, m) + torch.mv(upper, n)
    return (rows * m).sum(1) + upper.mul_(n).sum(1)  # other devices have no integer mv


@functools.cache
def _factors(level: int, device: torch.device) -> torch.Tensor:
    """Return a level's factors m and n, (2, _ROW), equal in every process and on every device."""
    words = torch.iinfo(torch.int64)
    generator = torch.Generator().manual_seed(level)
    drawn = torch.randint(
        words.min, words.max, (2, _ROW), generator=generator, dtype=torch.int64, device="cpu"
    )
    return drawn.to(device)
