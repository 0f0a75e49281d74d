"""The tensors of submodules: none of another kind, and no write into the source model's.

The graphs of a captured module were made for the dtypes and kinds of device that the tensors have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import SubmoduleError
from ..tables import a
from .adapted_tensor import is_called_by
from .host_attributes import joined
from .quantised import is_quantised
from .seal import Seal

# Functions of a module that set a tensor. Code of torch.distributed may call them: FSDP sets its
# shards, and casts them for a call.
SETTERS = ("__setattr__", "_may_set", "register_parameter", "register_buffer")


class Guarded(nn.Module):
    """A submodule that refuses tensors of another kind, and never writes to the source's."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if "." in name:  # torch's parallelize_module shards all parameters inside a layer
            raise SubmoduleError(
                f"'{name}' is not a parameter of '{self.__dict__.get('_path', '')}' itself, but of "
                "its adapter. Call parallelize_module on the captured module before inject, which "
                "then shards A and B as their weight is."
            )
        check_tensor(self, name, param)
        super().register_parameter(name, param)

    def register_buffer(
        self, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        check_tensor(self, name, tensor)
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for name, held in tensors_by_name(self).items() if _is_sealed(self) else ():
            check_kind(held, fn(_empty(held)), joined(self.__dict__["_path"], name))
        return super()._apply(fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Set `requires_grad` of all parameters; those that would train are copied first."""
        if requires_grad:
            _unshare(self)
        return super().requires_grad_(requires_grad)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as nn.Module does, without writing into the source model's storage."""
        if assign:
            check_kinds(self, state_dict, self.__dict__.get("_path", ""))
        else:
            _unshare(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _unshare(part: nn.Module, names: Collection[str] | None = None) -> None:
    """Copy the storage of a submodule's parameters before they are written to or trained."""
    if seal := part.__dict__.get("_seal"):
        owner = seal.owner
        owner.__dict__.get("_captured", owner).unshare(part, names)  # a host's are the module's


def _is_sealed(part: nn.Module) -> bool:
    seal: Seal | None = part.__dict__.get("_seal")
    return seal is not None and not seal.open


def tensors_by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module, by all their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def check_tensor(part: nn.Module, name: str, value: Any) -> None:
    """Raise if the graph does not read the tensor of this name, or was made for another kind."""
    if not _is_sealed(part) or is_called_by(sys._getframe(1), SETTERS, "torch.distributed."):
        return
    path: str = part.__dict__["_path"]
    known = {**part._parameters, **part._buffers}
    if name not in known or (name in part.__dict__["_unread"] and value is not None):
        raise SubmoduleError(
            f"setting '{name}' of '{path}' would have no effect: the source had none, so the "
            "graph reads none. Set it on the source model, and capture that."
        )
    held = known[name]
    if held is not None and isinstance(value, torch.Tensor):
        check_kind(held, value, joined(path, name))


def check_kinds(module: nn.Module, state_dict: Mapping[str, Any], path: str) -> None:
    """Raise if a state dict would put a tensor of another kind in the place of a module's own."""
    held = tensors_by_name(module)
    for name in state_dict.keys() & held.keys():
        if isinstance(state_dict[name], torch.Tensor):
            check_kind(held[name], state_dict[name], joined(path, name))


def check_kind(held: torch.Tensor, value: torch.Tensor, name: str) -> None:
    """Raise if a tensor differs in dtype, kind of device or storage from the one in its place."""
    if is_quantised(value) and type(value) is not type(held):
        raise SubmoduleError(
            f"'{name}' would become {a(type(value).__name__)}, and its graph cannot read that. "
            "Quantise the model before the capture; or the folded weights in a copy of the model: "
            "fxlora.merged(model, fxlora.fold(module))."
        )
    ours, theirs = ((str(t.dtype), t.device.type) for t in (held, value))
    if ours != theirs and not held.is_meta:  # no call has worked with a meta tensor before
        raise SubmoduleError(
            f"'{name}' is {' on '.join(ours)}, and would become {' on '.join(theirs)}. The graph "
            "was made for the dtypes and devices that its tensors have. Move the whole module "
            "(module.to(…)), or change the source model and capture it afterwards."
        )


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)
