"""Reads and writes of an adapted weight by code outside the graph."""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..errors import SubmoduleError
from .writes import leaves, storage_of, version, written

_untraced: Any = torch.compiler.disable


class AdaptedTensor(torch.Tensor):
    """The value of an adapted weight, as Python outside of the graph reads it off its module.

    Functions and methods of torch take it as the plain tensor W0 + s·BA, with gradients to A and B.
    A call of an overload raises, because it means that something runs the graph's own nodes on the
    module, which add the adapters themselves. A write to it or to a view of it raises too: the
    value is computed at each read, so the graph would not see the write.
    """

    @classmethod
    @_untraced  # Dynamo breaks the graph here in any case, at as_subclass
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, OpOverload):
            raise SubmoduleError(
                f"{func} takes an adapted weight that was read off a captured module. A node of "
                "the graph would apply the adapters twice: call the module itself, or run the "
                "graph with torch.fx.Interpreter. In Python of your own, call the function in "
                "torch or torch.nn.functional instead of the overload."
            )
        name: str = getattr(func, "__name__", "")
        if (func in _OF_LEAVES and isinstance(args[0], _Detached)) or func in _GRADIENTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if any(isinstance(t, AdaptedTensor) for t in written(name, args, kwargs or {})):
            raise _no_effect(name)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, AdaptedTensor)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [version(tensor) for tensor in given]
            plain, plain_kwargs = pytree.tree_map(_plain, (args, kwargs or {}))
            result = func(*plain, **plain_kwargs)
            if versions != [version(tensor) for tensor in given]:  # as embedding(max_norm=…) does
                raise _no_effect(name)
        if func == _GET_BASE:  # Dynamo asks a tensor's base for its own base
            return result
        return _with_views_marked(name, result, (*args, *(kwargs or {}).values()))


class _Detached(AdaptedTensor):
    """A detached one: the user's own leaf, which may require a gradient of its own."""


def _of_leaves() -> list[Any]:
    """Return the functions that get or set a leaf's gradient, and write to none of its entries."""
    held = vars(torch._C.TensorBase)
    gradients = [held[name] for name in ("requires_grad", "grad")]
    getters = [held[name].__get__ for name in ("requires_grad", "grad", "is_leaf", "grad_fn")]
    return [torch.Tensor.requires_grad_, *getters, *(item.__set__ for item in gradients)]


_OF_LEAVES = _of_leaves()
_GRADIENTS = (torch.autograd.grad, torch.autograd.backward)  # of the very tensors they are given


def _no_effect(name: str) -> SubmoduleError:
    return SubmoduleError(
        f"{name}: a write to an adapted weight that was read off a captured module would have no "
        "effect, because W0 + s·BA is computed at each read. Write to module.get_parameter(name), "
        "which is W0, or to its A and B. For a tensor of your own, take weight.detach().clone()."
    )


_GET_BASE: Any = vars(torch.Tensor).get("_base", vars(torch._C.TensorBase)["_base"]).__get__


def _with_views_marked(name: str, result: Any, args: tuple[Any, ...]) -> Any:
    """Return a function's result, in which views of adapted weights refuse writes as these do."""
    if name in ("numpy", "__array__"):
        result.flags.writeable = False
    if not isinstance(result, torch.Tensor | list | tuple):
        return result
    if not _share_memory(leaves(result), args):
        return result
    if name == "detach" and isinstance(result, torch.Tensor):
        return result.as_subclass(_Detached)
    return pytree.tree_map_only(torch.Tensor, _as_adapted, result)


def _share_memory(tensors: Collection[Any], args: tuple[Any, ...]) -> bool:
    """Whether one of these tensors is in the memory of an adapted weight among the arguments."""
    given = (leaf for arg in args for leaf in leaves(arg) if isinstance(leaf, AdaptedTensor))
    memory = {storage_of(_plain(tensor)) for tensor in given} - {None}
    return any(isinstance(t, torch.Tensor) and storage_of(t) in memory for t in tensors)


def _as_adapted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(AdaptedTensor)


def reads_as_it_is(frame: types.FrameType | None) -> bool:
    """Whether torch itself reads an attribute, in this frame's `__getattr__`, to get or set W0."""
    return is_called_by(frame, ("__getattr__",), *_RAW_READERS)


def is_called_by(frame: types.FrameType | None, functions: Collection[str], *modules: str) -> bool:
    """Whether code in one of these modules calls the functions that end in this frame."""
    while frame is not None and frame.f_code.co_name in functions:
        frame = frame.f_back
    name: str = frame.f_globals.get("__name__", "") if frame else ""
    return name.startswith(modules)


# Code of torch that moves parameters, or runs the graph's own nodes, which add the adapters.
_RAW_READERS = (
    "torch.distributed.",
    "torch.fx.",
    "torch.nn.modules.module",
    "torch.nn.utils._named_member_accessor",  # torch.func.functional_call
)


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, AdaptedTensor) else value
