"""Copies of captured modules: to rewrite, by deepcopy, and over the same tensors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import SubmoduleError
from .blocks.tree import module_at
from .fsdp import refuse_copy
from .quantised import is_quantised, with_parts
from .sealed_dicts import HOOKS
from .sharing import copy_when_trained, is_shared

if TYPE_CHECKING:
    from .captured import CapturedModule


def derived(module: CapturedModule, *, same_adapters: bool = False) -> CapturedModule:
    """Return a copy to rewrite (see `CapturedModule.derive`).

    Args:
        module: the module.
        same_adapters: whether the copy trains the same memory: then it only has other graphs.
    """
    refuse_copy(module)
    trains = module.known.adapter_parameters | module.trained
    kept = module.state_parameters()
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in kept:
            continue
        tensor = with_parts(parameter, torch.Tensor.detach)
        tensor = tensor.clone() if name in trains and not same_adapters else tensor
        memo.setdefault(id(parameter), nn.Parameter(tensor, parameter.requires_grad))
    result = module.rebuilt(memo, module.known.with_originals(torch.clone))
    copy_hooks(module, result, copy.copy)
    for one in (module, result):
        one.copy_when_trained()
    return result


def deep_copy(module: CapturedModule, memo: dict[int, Any]) -> CapturedModule:
    """Return a copy with tensors of its own."""
    refuse_copy(module)
    module.check_blocks("deepcopy")
    known = module.known.with_originals(lambda tensor: copy.deepcopy(tensor, memo))
    result = module.rebuilt(memo, known)
    memo[id(module)] = result
    copy_hooks(module, result, functools.partial(copy.deepcopy, memo=memo))
    return result


def shallow_copy(module: CapturedModule) -> CapturedModule:
    """Return a module with its own graphs and containers over the same tensors."""
    refuse_copy(module)
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    result = module.rebuilt({id(tensor): tensor for _, tensor in tensors}, module.known)
    copy_when_trained(result, filter(is_shared, result.parameters()))
    return result


def complete_memo(module: CapturedModule, memo: dict[int, Any]) -> None:
    """Add copies to deepcopy's memo that it would refuse to make, or make otherwise."""
    for path, block in module.outlined_modules.items():
        found = module_at(module, path)
        if found is not block:  # a wrapper: the copy is the block itself
            memo[id(found)] = copy.deepcopy(block, memo)
    # A buffer that a call wrote to may be part of an autograd graph, which deepcopy refuses.
    for buffer in module.buffers():
        if not buffer.is_leaf and id(buffer) not in memo:
            memo[id(buffer)] = copy.deepcopy(buffer.detach(), memo)
    for parameter in filter(is_quantised, module.parameters()):
        if id(parameter) not in memo:
            data = with_parts(parameter, lambda part: copy.deepcopy(part.detach(), memo))
            memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for parameter in module.state_parameters().values():  # views of a buffer stay views of it
        if id(parameter) not in memo:
            data = copy.deepcopy(parameter.detach(), memo)
            memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad)


def copy_hooks(
    module: CapturedModule, copied: CapturedModule, copy_of: Callable[[Any], Any]
) -> None:
    """Give a copy the hooks of a module and of its blocks.

    Raises:
        SubmoduleError: the forward of a block was assigned: it may call the block of this module.
    """
    blocks = copied.outlined_modules
    for path, block in module.outlined_modules.items():
        if "forward" in block.__dict__:
            raise SubmoduleError(
                f"a copy of the module would lose the forward that was assigned to '{path}'. Take "
                "it off, and assign it to the copy: del module.get_submodule("
                f"{path!r}).forward."
            )
    pairs = [(module, copied), *((b, blocks[path]) for path, b in module.outlined_modules.items())]
    for old, new in pairs:
        for name in HOOKS:
            new.__dict__[name] = copy_of(old.__dict__[name])
