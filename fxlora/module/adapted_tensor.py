"""Reads of an adapted weight by code outside the graph."""

from __future__ import annotations

import types
from collections.abc import Collection
from typing import Any

from torch._ops import OpOverload

from ..errors import SubmoduleError
from .read_only import ReadOnlyTensor, untraced


class AdaptedTensor(ReadOnlyTensor):
    """The value of an adapted weight, as Python outside of the graph reads it off its module.

    Functions and methods of torch take it as the plain tensor W0 + s·BA, with gradients to A and B.
    A call of an overload raises, because it means that something runs the graph's own nodes on the
    module, which add the adapters themselves. A write to it or to a view of it raises too: the
    value is computed at each read, so the graph would not see the write.
    """

    @classmethod
    @untraced
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
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def write_refusal(cls, function: str) -> SubmoduleError:
        return SubmoduleError(
            f"{function}: a write to an adapted weight that was read off a captured module would "
            "have no effect, because W0 + s·BA is computed at each read. Write to "
            "module.get_parameter(name), which is W0, or to its A and B. For a tensor of your own, "
            "take weight.detach().clone()."
        )


class _Detached(AdaptedTensor):
    """A detached one: the user's own leaf, which may require a gradient of its own."""

    is_own_leaf = True


AdaptedTensor.detached = _Detached


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
