"""Modules that FSDP2 shards (fully_shard): its units, and the state that it keeps between calls.

torch has no public functions for some of this; the private names are those of torch 2.11 to 2.14.
It is imported inside the functions, because torch may be built without distributed.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from ..errors import InjectError
from .sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
            f"'{name}' is sharded by fully_shard, and torch cannot copy such a module. Inject, or "
            "load an adapter, before you shard. To fold or remove, load its state into a module "
            "that is made in the same way without sharding: "
            "plain.load_state_dict(get_model_state_dict(sharded, "
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
