"""Parameters sharded over processes: DTensors, as FSDP2 and tensor parallelism make them.

A function here that is said to be collective must be called by every process of the mesh, and in
the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import distributed

from ..errors import FxLoraError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is spread over processes, or copied to them, by a device mesh."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # exists only where torch.distributed does

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all its entries, on this process; collective if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process has."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def placements_like(weight: DTensor, dim_of: Callable[[int], int | None]) -> list[Placement]:
    """Return placements for a tensor, on the mesh of a weight, by the placements of the weight.

    Args:
        weight: the weight.
        dim_of: the tensor's dimension that a dimension of the weight is; None if it is none. The
            tensor is then copied to each process.
    """
    from torch.distributed.tensor import Replicate, Shard

    dims = [dim_of(p.dim) if type(p) is Shard else None for p in weight.placements]
    return [Replicate() if dim is None else Shard(dim) for dim in dims]


def distribute(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Spread the first process's tensor over a mesh. Collective."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, placements)


@torch.no_grad()
def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value, the same on all processes, into a tensor."""
    if is_sharded(tensor):
        value = distribute(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


# ---- agreement of processes ---------------------------------------------------------------------


@contextmanager
def together(mesh: DeviceMesh | None, error: type[FxLoraError]) -> Generator[None]:
    """Have a `with` block fail on all processes of a mesh if it fails on one. Collective.

    Raises:
        FxLoraError: of type `error`, where only other processes failed.
    """
    if mesh is None:
        yield
        return
    failed = torch.ones((), dtype=torch.int32, device=mesh.device_type)
    try:
        yield
        failed.zero_()
    finally:
        for dim in range(mesh.ndim):
            distributed.all_reduce(failed, distributed.ReduceOp.MAX, mesh.get_group(dim))
    if failed:
        raise error("another process failed; its own error says why.")


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this process is the first of a mesh; each process is, of no mesh."""
    coordinate = None if mesh is None else mesh.get_coordinate()
    return coordinate is None or not any(coordinate)


def from_first(mesh: DeviceMesh, tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors with those of the first process of a mesh. Collective."""
    for tensor in tensors:
        for dim in range(mesh.ndim):
            distributed.broadcast(tensor, group=mesh.get_group(dim), group_src=0)


@contextmanager
def once(mesh: DeviceMesh | None, error: type[FxLoraError]) -> Generator[bool]:
    """Have the first process of a mesh run a `with` block, and the others wait for it.

    If it fails, the others raise `error`, instead of waiting for ever. Collective.

    Yields:
        Whether this process is the first one.
    """
    with together(mesh, error):
        yield is_first(mesh)


def mean_over(mesh: DeviceMesh, tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over the processes of a mesh. Collective."""
    total = tensor.detach().clone()
    for dim in range(mesh.ndim):
        distributed.all_reduce(total, group=mesh.get_group(dim))
    return total / mesh.size()
