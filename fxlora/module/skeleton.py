"""A copy of a captured module without values, for checks of graphs where they cannot be copied."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InjectError
from .captured import CapturedModule
from .fsdp import has_fsdp, without_fsdp


def skeleton(module: CapturedModule) -> CapturedModule:
    """Return a copy of a module's graphs and containers, with all tensors on the meta device.

    Raises:
        InjectError: FSDP2 shards a module of regions, whose Python cannot be copied then.
    """
    if module.parent_module and has_fsdp(module):
        raise InjectError(
            "a module of regions that fully_shard shards can neither be saved nor verified. Load "
            "its full state (get_model_state_dict) into a module that is not sharded."
        )
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    with without_fsdp(module):
        return module.rebuilt({id(t): _on_meta(t) for _, t in tensors}, module.known)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    held = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(held, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else held
