"""Build a captured module's parameter tree: the source's names, sharing the source's storage."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..fx.calls import call_site
from ..module import CapturedModule
from ..module.parent import copied_module
from ..module.submodules import container as empty_container
from .kept.undisturbed import plain_tensors


def refuse_lazy(model: nn.Module) -> None:
    """Raise if a parameter or buffer has no shape yet.

    Raises:
        CaptureError: names the parameter or buffer.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(
                f"'{name}' has no shape yet (a lazy module). "
                "Call the model once on an example before capturing it."
            )


def build_tree(
    model: nn.Module, leaves: Collection[str], tensors: Mapping[int, torch.Tensor]
) -> nn.Module:
    """Build a tree of modules with the model's names over other tensors.

    Args:
        model: the source model.
        leaves: paths of submodules that a graph calls; each is copied whole, with its tensors
            treated in the same way.
        tensors: the tree's tensor for each of the model's, by its id (see `own_tensors`).
    """
    memo: dict[int, Any] = dict(tensors)

    def held(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: None if t is None else memo[id(t)] for name, t in tensors.items()}

    containers: dict[int, nn.Module] = {}  # a module with two names stays one module

    def container(module: nn.Module, path: str) -> nn.Module:
        if path in leaves:
            return copy.deepcopy(module, memo)
        if id(module) in containers:
            return containers[id(module)]
        result = containers[id(module)] = empty_container(type(module))
        result.training = module.training
        result._parameters = held(module._parameters)
        result._buffers = held(module._buffers)
        result._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            inner_path = f"{path}.{name}" if path else name
            if child is not None:
                result._modules[name] = container(child, inner_path)
        return result

    return container(model, "")


def separate_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules, with new Parameters over the same memory.

    Attributes that a forward sets stay on the copy. An in-place write to a parameter also changes
    the model's.
    """
    return copied_module(model, _own_parameters(model))


def working_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules for a trace, with all tensors over the same memory.

    The user's modules keep their mode, hooks and attributes. A trace computes nothing on real
    values, so that it writes nothing to the shared memory. If the model cannot be copied (an
    attribute cannot, or a function has a module or tensor in its closure), return the model
    itself, which `undisturbed` restores after the trace.
    """
    if attribute_that_reaches_modules(model) is not None:
        return model
    memo = _own_parameters(model)
    for tensor in (*model.buffers(), *(tensor for _, tensor in plain_tensors(model))):
        memo[id(tensor)] = tensor.detach().requires_grad_(tensor.requires_grad)
    try:
        return copied_module(model, memo)
    except Exception:  # noqa: BLE001 - copying a user's object may raise anything
        return model


def _own_parameters(model: nn.Module) -> dict[int, Any]:
    """Return a deepcopy memo with a new Parameter, over the same memory, for each parameter."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        own = memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        vars(own).update(vars(parameter))
    return memo


def attribute_that_reaches_modules(model: nn.Module) -> str | None:
    """Return the first attribute that holds a function with a module or tensor in its closure.

    A deep copy of the model does not copy closures. Returns None if there is no such attribute.
    """
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            for leaf in pytree.tree_leaves(value):
                if any(isinstance(held, nn.Module | torch.Tensor) for held in _closed_over(leaf)):
                    return f"{path or type(model).__name__}.{name}"
    return None


def _closed_over(value: Any) -> Iterator[Any]:
    for cell in getattr(value, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def attach(tree: nn.Module, path: str, value: torch.Tensor | nn.Module) -> None:
    """Register a graph's constant (as a buffer) or nested graph in the tree, under its path."""
    owner, _, name = path.rpartition(".")
    container = tree
    for part in owner.split(".") if owner else []:
        if part not in container._modules:
            container.add_module(part, empty_container())
        container = container.get_submodule(part)
    if isinstance(value, nn.Module):
        container.add_module(name, value)
    else:
        container.register_buffer(name, value, persistent=False)


def read_by_own_names(module: CapturedModule) -> None:
    """Have each module read a tied weight under the name that this module has for it."""
    ties = [names for names in module.aliases().values() if len(names) > 1]
    for graph in module.distinct_graphs() if ties else ():
        for node in list(graph.nodes):
            names = next((n for n in ties if node.target in n), None)
            if node.op == "get_attr" and names:
                _split(graph, node, names)
    if ties:
        module.refresh()


def _split(graph: fx.Graph, node: fx.Node, names: Sequence[str]) -> None:
    own = {user: _own_name(call_site(user), names) or str(node.target) for user in node.users}
    for name in dict.fromkeys(own.values()):
        if name == node.target:
            continue
        with graph.inserting_after(node):
            fetched = graph.create_node("get_attr", name)
        fetched.meta = dict(node.meta)
        for user in [user for user, mine in own.items() if mine == name]:
            user.replace_input_with(node, fetched)
    if not node.users:
        graph.erase_node(node)


def _own_name(site: str, names: Sequence[str]) -> str | None:
    """Return a weight's name in the innermost module around a call that has one, or None."""
    owners = {name.rpartition(".")[0]: name for name in reversed(names)}
    around = [owner for owner in owners if owner and f"{site}.".startswith(f"{owner}.")]
    return owners[max(around, key=len)] if around else None
