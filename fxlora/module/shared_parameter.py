"""A parameter in memory that the source model shares, which user code cannot change there."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .writes import is_writer, leaves, storage_of

CopyMemory = Callable[[nn.Parameter], None]


class SharedParameter(nn.Parameter):
    """A parameter whose memory another model shares, until user code may write to it.

    A method that writes, or gives user code a view to write to (`detach`, `data`, an item), and an
    assignment of its gradient, copy the memory first: the parameter is an nn.Parameter then.
    Torch's own code, graphs among it, takes it as the nn.Parameter that it is. Functions that write
    to their arguments or make views of them (`torch.add(…, out=parameter)`) are not noticed.

    Attributes:
        copy_memory: gives a parameter, and all that shares memory with it in its module, memory
            of its own.
    """

    copy_memory: CopyMemory

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """Return an nn.Parameter: only `share` makes shared ones."""
        return nn.Parameter(data, requires_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        trains = bool(value) if name == "requires_grad" else name == "grad" and value is not None
        if trains and not _is_trusted(sys._getframe(1).f_globals.get("__name__", "")):
            own(self)
        nn.Parameter.__setattr__(self, name, value)  # super() needs a SharedParameter

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an nn.Parameter."""
        return _as_parameter(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(_as_parameter(self), memo)
        return memo[id(self)]


def share(parameter: nn.Parameter, copy_memory: CopyMemory) -> None:
    """Make a parameter, in place, a `SharedParameter`, unless it is of a class of its own."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = SharedParameter
    if isinstance(parameter, SharedParameter):
        parameter.copy_memory = copy_memory


def unshared(parameter: nn.Parameter) -> None:
    """Make a parameter, in place, an nn.Parameter, now that its memory is its own."""
    if isinstance(parameter, SharedParameter):
        del parameter.copy_memory
        held: Any = parameter
        held.__class__ = nn.Parameter


def own(tensor: torch.Tensor) -> None:
    """Give a tensor memory of its own if it is a shared parameter."""
    if isinstance(tensor, SharedParameter):
        tensor.copy_memory(tensor)


def _as_parameter(shared: SharedParameter) -> nn.Parameter:
    plain = nn.Parameter(shared.as_subclass(torch.Tensor).detach(), shared.requires_grad)
    vars(plain).update({k: v for k, v in vars(shared).items() if k != "copy_memory"})
    return plain


# ---- methods and attributes ---------------------------------------------------------------------


def _guarded(name: str, method: Any) -> Any:
    """Return a method of nn.Parameter that copies the memory first where user code may write."""

    @functools.wraps(method)
    def call(self: SharedParameter, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return method(self, *args, **kwargs)
        caller: str = sys._getframe(1).f_globals.get("__name__", "")
        if caller == _PARAMETER and name == "detach":  # nn.Parameter(self)
            own(self)
            return nn.Parameter(self.as_subclass(torch.Tensor).detach())
        if caller == _INITS or (_writes(name, args) and not _is_trusted(caller)):
            own(self)
        result = method(self, *args, **kwargs)
        if _is_trusted(caller) or not _has_memory_of(self, result):
            return result
        own(self)
        return method(self, *args, **kwargs)

    return call


def _writes(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a method writes to the parameter, or gives access to its memory by other objects."""
    if name == "requires_grad_":
        return not args or bool(args[0])
    return is_writer(name) or name in ("__iter__", "numpy", "__array__", "__dlpack__")


def _has_memory_of(parameter: nn.Parameter, result: Any) -> bool:
    """Whether a result is a view of a parameter that is still a shared one."""
    if result is parameter or not isinstance(parameter, SharedParameter):
        return False
    views = [leaf for leaf in leaves(result) if isinstance(leaf, torch.Tensor)]
    memory = storage_of(parameter) if views else None
    return memory is not None and any(storage_of(view) == memory for view in views)


def _is_trusted(caller: str) -> bool:
    """Whether code of torch or of fxlora calls, which writes to no parameter on its own account."""
    return caller.startswith(("torch.", "fxlora.")) and not caller.startswith(_ON_REQUEST)


_PARAMETER = "torch.nn.parameter"
_INITS = "torch.nn.init"  # all functions in it write to the tensor that they are given
_ON_REQUEST = (_INITS, "torch.nn.utils.", "torch.optim.")  # these write where a user asks for it


def _view(view: Callable[[torch.Tensor], torch.Tensor], set_: Any = None) -> property:
    """Return an attribute of nn.Parameter that is a view."""

    def get(self: SharedParameter) -> torch.Tensor:
        if not torch.compiler.is_dynamo_compiling():
            caller: str = sys._getframe(1).f_globals.get("__name__", "")
            if not _is_trusted(caller):
                own(self)
        return view(self)

    return property(get, set_)


def _set_data(parameter: SharedParameter, value: torch.Tensor) -> None:
    memory = storage_of(parameter)
    vars(torch._C.TensorBase)["data"].__set__(parameter, value)
    if storage_of(parameter) != memory:
        unshared(parameter)


# Views, spelled so that Dynamo can look into them.
_VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "data": lambda p: p.detach(),
    "T": lambda p: p.permute(*reversed(range(p.dim()))),
    "mT": lambda p: p.transpose(-2, -1),
    "H": lambda p: p.adjoint(),
    "mH": lambda p: p.adjoint(),
    "real": torch.real,
    "imag": torch.imag,
}
_KEPT = frozenset(vars(object)) | {
    *vars(SharedParameter),
    *("__torch_function__", "__torch_dispatch__", "__setstate__", "__class__", "__weakref__"),
}

for _name in dir(nn.Parameter):
    _value = inspect.getattr_static(nn.Parameter, _name)
    if (
        _name not in _KEPT
        and inspect.isroutine(_value)
        and not isinstance(_value, staticmethod | classmethod)
    ):
        setattr(SharedParameter, _name, _guarded(_name, _value))

for _name, _function in _VIEWS.items():
    setattr(SharedParameter, _name, _view(_function, _set_data if _name == "data" else None))
