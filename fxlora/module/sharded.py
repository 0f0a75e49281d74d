"""Parameters sharded over processes: DTensors, as FSDP2 and tensor parallelism make them.

A function here that is said to be collective must be called by every process of the mesh, and in
the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import distributed, nn

from ..errors import FxLoraError, InjectError

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


def mesh_of(module: nn.Module) -> DeviceMesh | None:
    """Return the largest mesh that a module's parameters are sharded over, or None.

    FSDP2's are sharded again first: after a forward, it may still hold them whole.
    """
    reshard(module)
    meshes = [p.device_mesh for p in module.parameters() if is_sharded(p)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def reshard(module: nn.Module) -> None:
    """Put back the shards of parameters that FSDP2 still holds whole, and maybe rounded.

    Also after a call that failed, which leaves FSDP2 in the middle of a forward; torch has no
    public function for that.
    """
    for part in _fsdp_units(module):
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        for held in (part._get_fsdp_state(), *_fsdp_groups(part)):
            held._training_state = TrainingState.IDLE
        part.reshard()


@contextmanager
def gradients_reduced(module: nn.Module) -> Generator[None]:
    """Within the context, FSDP2 reduces gradients at each backward, and has not kept any.

    Those that it kept, of a step whose gradients are accumulated, are put back.
    """
    groups = [group for part in _fsdp_units(module) for group in _fsdp_groups(part)]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    kept = [(p, p.unsharded_accumulated_grad) for p in parameters]
    wholes = [p._unsharded_param for p in parameters if hasattr(p, "_unsharded_param")]
    held = [(tensor, tensor.grad) for tensor in wholes]
    reduced = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    for parameter, _ in kept:
        parameter.unsharded_accumulated_grad = None
    for tensor in wholes:
        tensor.grad = None
    for group in groups:
        group.reduce_grads = group.all_reduce_grads = True
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.unsharded_accumulated_grad = gradient
        for tensor, gradient in held:
            tensor.grad = gradient
        for group, reduces, reduces_all in reduced:
            group.reduce_grads, group.all_reduce_grads = reduces, reduces_all


def _fsdp_groups(unit: Any) -> list[Any]:
    """Return the groups of parameters of a unit of FSDP2."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # before torch 2.12


def refuse_copy(module: nn.Module) -> None:
    """Raise InjectError if FSDP2 shards a module: its hooks belong to this module only."""
    if has_fsdp(module):
        reshard(module)
        name = next((n for n, p in module.named_parameters() if is_sharded(p)), "")
        raise InjectError(
            f"'{name}' is sharded by fully_shard, and torch cannot copy such a module, which fold "
            "and remove do. Load its state into a module that is made in the same way without "
            "sharding (capture, inject): plain.load_state_dict(get_model_state_dict(sharded, "
            "options=StateDictOptions(full_state_dict=True))), both from "
            "torch.distributed.checkpoint.state_dict."
        )


def has_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module, or a part of it."""
    return bool(_fsdp_units(module))


@contextmanager
def without_fsdp(module: nn.Module) -> Generator[None]:
    """Within the context, FSDP2's units have the classes that they had before, to be copied."""
    units = {part: type(part) for part in _fsdp_units(module)}
    for part, kind in units.items():
        part.__class__ = _class_before_fsdp(kind)
    try:
        yield
    finally:
        for part, kind in units.items():
            part.__class__ = kind


def _class_before_fsdp(kind: type) -> type:
    from torch.distributed.fsdp import FSDPModule

    return next(base for base in kind.__mro__ if not issubclass(base, FSDPModule))


def _fsdp_units(module: nn.Module) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


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
    """Have all processes of a mesh fail if what is in a `with` block fails in one. Collective.

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
    """Have the first process of a mesh do what is in a `with` block, and the others wait for it.

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
