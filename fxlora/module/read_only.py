"""Tensors that Python reads as plain ones, and may not write to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree

from ..errors import SubmoduleError
from .memory import memory_id

_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - typed nowhere

untraced: Any = torch.compiler.disable  # Dynamo breaks the graph in any case, at as_subclass


class ReadOnlyTensor(torch.Tensor):
    """A tensor that functions of torch take as a plain one. Writes to it or its views raise.

    Attributes:
        is_own_leaf: whether the user may set the gradient of such a tensor, and whether it has one.
        detached: the class of what `detach` returns.
    """

    is_own_leaf: ClassVar[bool] = False
    detached: ClassVar[type[ReadOnlyTensor]]

    @classmethod
    def write_refusal(cls, function: str) -> SubmoduleError:
        """Return the error for a function that would write to such a tensor."""
        raise NotImplementedError

    @classmethod
    @untraced
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name: str = getattr(func, "__name__", "")
        own_leaf = func in _OF_LEAVES and isinstance(args[0], cls) and args[0].is_own_leaf
        if own_leaf or func in _GRADIENTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if _writes(name, args, kwargs or {}):
            raise cls.write_refusal(name)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, ReadOnlyTensor)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [_version(tensor) for tensor in given]
            plain, plain_kwargs = pytree.tree_map(_plain, (args, kwargs or {}))
            result = func(*plain, **plain_kwargs)
            if versions != [_version(tensor) for tensor in given]:  # as embedding(max_norm=…) does
                raise cls.write_refusal(name)
        if func == _GET_BASE:  # Dynamo asks a tensor's base for its own base
            return result
        return marked(cls, name, result, given)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return _plain(self).__reduce_ex__(protocol)


def _of_leaves() -> list[Any]:
    """Return the functions that get or set a leaf's gradient, and write to none of its entries."""
    held = vars(torch._C.TensorBase)
    gradients = [held[name] for name in ("requires_grad", "grad")]
    getters = [held[name].__get__ for name in ("requires_grad", "grad", "is_leaf", "grad_fn")]
    return [torch.Tensor.requires_grad_, *getters, *(item.__set__ for item in gradients)]


_OF_LEAVES = _of_leaves()
_GRADIENTS = (torch.autograd.grad, torch.autograd.backward)  # of the very tensors they are given


def _version(tensor: torch.Tensor) -> int:
    """Return the number of writes to a tensor, 0 where torch does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes to a read-only tensor or hooks it, rather than to a plain one."""
    written = [kwargs.get("out")]
    if is_writer(name) or kwargs.get("inplace"):
        written += [*args, *kwargs.values()][:1]
    leaves = (leaf for value in written for leaf in _leaves(value))
    return any(isinstance(leaf, ReadOnlyTensor) for leaf in leaves)


def is_writer(name: str) -> bool:
    """Whether a function or method of torch writes to its first argument, or hooks it."""
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITERS


# Methods that write to a tensor or hook it, and whose names do not end with one underscore.
_WRITERS = frozenset(
    (
        *("__setitem__", "__set__", "__delete__", "__iadd__", "__isub__", "__imul__", "__idiv__"),
        *("__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__"),
        *("__ixor__", "__ilshift__", "__irshift__"),
        *("register_hook", "register_post_accumulate_grad_hook", "retain_grad"),
    )
)

_GET_BASE: Any = vars(torch.Tensor).get("_base", vars(torch._C.TensorBase)["_base"]).__get__


def marked(
    kind: type[ReadOnlyTensor], name: str, result: Any, given: Collection[torch.Tensor]
) -> Any:
    """Return a function's result, in which views of some tensors are read-only, too.

    Args:
        kind: the class of these views.
        name: the function's name.
        given: the tensors that may not be written to.
    """
    if name in ("numpy", "__array__"):
        result.flags.writeable = False
    if not isinstance(result, torch.Tensor | list | tuple):
        return result
    memory = {_memory(_plain(tensor)) for tensor in given} - {None}
    if not any(isinstance(t, torch.Tensor) and _memory(t) in memory for t in _leaves(result)):
        return result
    if name == "detach" and isinstance(result, torch.Tensor):
        return result.as_subclass(kind.detached)
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.as_subclass(kind), result)


def _memory(tensor: torch.Tensor) -> int | None:
    """Return an id of a tensor's storage, or None for one inside a transform of torch.func."""
    return None if _functorch.is_functorch_wrapped_tensor(tensor) else memory_id(tensor)


def _leaves(value: Any) -> Collection[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, ReadOnlyTensor) else value
