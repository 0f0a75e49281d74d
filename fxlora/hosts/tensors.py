"""The tensors of a host: the captured module's, in the places where the source's code has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import InjectError
from ..module import CapturedModule


def check_fits(model: nn.Module, module: CapturedModule) -> None:
    held = dict(module.named_parameters(remove_duplicate=False))
    held |= dict(module.named_buffers(remove_duplicate=False))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in held or held[name].shape != tensor.shape:
            raise InjectError(
                f"the captured module has no '{name}' of shape {tuple(tensor.shape)}: host it in "
                "the model that it was captured from."
            )


def tensors_of(model: nn.Module, module: CapturedModule) -> dict[int, Any]:
    """Return a memo for deepcopy that replaces the model's tensors by the captured module's."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        memo[id(parameter)] = module.get_parameter(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        memo[id(buffer)] = module.get_buffer(name)
    return memo


def share_tensors(host: nn.Module, tree: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Make the host share the tree's dicts of tensors, and add submodules that it does not have.

    Yields:
        (parent, name, child) for each submodule of the host that is in the tree.
    """
    host._parameters, host._buffers = tree._parameters, tree._buffers
    host._non_persistent_buffers_set = tree._non_persistent_buffers_set
    for name, child in tree._modules.items():
        assert child is not None
        mine = host._modules.get(name)
        if mine is None:
            host._modules[name] = mine = child
        elif mine is not child:  # as in a submodule with two names, the second time
            yield from share_tensors(mine, child)
        yield host, name, mine
