"""A parameter in memory that the source model shares: Python's writes get a copy of it first."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import SubmoduleError
from .memory import memory_id
from .read_only import ReadOnlyTensor, is_writer, marked


class SharedView(ReadOnlyTensor):
    """A view of a shared parameter."""

    is_own_leaf = True

    @classmethod
    def write_refusal(cls, function: str) -> SubmoduleError:
        return SubmoduleError(
            f"{function}: a write to a view of a weight that shares memory with the source model "
            "would change that model. Write to the parameter itself, which copies it first (with "
            "torch.no_grad(): parameter.copy_(…)). Or call requires_grad_(True) on the module that "
            "has it, before you take the view."
        )


SharedView.detached = SharedView


class SharedParameter(nn.Parameter):
    """A parameter whose memory another model shares, until Python writes to it.

    A method that writes, or an assignment of its gradient, copies the memory first: the parameter
    is then an nn.Parameter. Views of it refuse writes (`SharedView`). Torch's own code, graphs
    among it, takes it as the nn.Parameter that it is. Functions that write to their arguments
    (`torch.add(…, out=parameter)`) are not noticed.

    Attributes:
        copy_memory: gives the parameter, and all that shares memory with it in its module, memory
            of its own.
    """

    copy_memory: Callable[[], None]

    def __setattr__(self, name: str, value: Any) -> None:
        trains = bool(value) if name == "requires_grad" else name == "grad" and value is not None
        if trains and not _is_trusted(sys._getframe(1).f_globals.get("__name__", "")):
            self.copy_memory()
        nn.Parameter.__setattr__(self, name, value)  # super() needs a SharedParameter

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an nn.Parameter."""
        return _as_parameter(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = copy.deepcopy(_as_parameter(self), memo)
        return memo[id(self)]


def share(parameter: nn.Parameter, copy_memory: Callable[[nn.Parameter], None]) -> None:
    """Make a parameter, in place, a `SharedParameter`, unless it is of a class of its own."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = SharedParameter
    if isinstance(parameter, SharedParameter):
        held = weakref.ref(parameter)
        parameter.copy_memory = functools.partial(_copy, held, copy_memory)


def unshared(parameter: nn.Parameter) -> None:
    """Make a parameter, in place, an nn.Parameter, now that its memory is its own."""
    if isinstance(parameter, SharedParameter):
        del parameter.copy_memory
        held: Any = parameter
        held.__class__ = nn.Parameter


def _copy(held: weakref.ref[Any], copy_memory: Callable[[nn.Parameter], None]) -> None:
    if (parameter := held()) is not None:
        copy_memory(parameter)


def _as_parameter(shared: SharedParameter) -> nn.Parameter:
    plain = nn.Parameter(shared.as_subclass(torch.Tensor).detach(), shared.requires_grad)
    vars(plain).update({k: v for k, v in vars(shared).items() if k != "copy_memory"})
    return plain


# ---- methods and attributes ---------------------------------------------------------------------


def _guarded(name: str, method: Any) -> Any:
    """Return a method of nn.Parameter that copies the memory first where it may write to it."""

    @functools.wraps(method)
    def call(self: SharedParameter, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return method(self, *args, **kwargs)
        caller: str = sys._getframe(1).f_globals.get("__name__", "")
        if caller == _INITS or (is_writer(name) and not _is_trusted(caller)):
            _own(self)
        result = method(self, *args, **kwargs)
        if _is_trusted(caller) or result is self or not isinstance(self, SharedParameter):
            return result
        return marked(SharedView, name, result, (self,))

    return call


def _own(parameter: nn.Parameter) -> None:
    if isinstance(parameter, SharedParameter):
        parameter.copy_memory()


def _is_trusted(caller: str) -> bool:
    """Whether code of torch or of fxlora calls, which writes to no parameter on its own account."""
    return caller.startswith(("torch.", "fxlora.")) and not caller.startswith(_ON_REQUEST)


_INITS = "torch.nn.init"  # all functions in it write to the tensor that they are given
_ON_REQUEST = (_INITS, "torch.nn.utils.", "torch.optim.")  # these write where a user asks for it


def _view(name: str, view: Callable[[torch.Tensor], torch.Tensor]) -> property:
    """Return an attribute of nn.Parameter that is a view."""

    def get(self: SharedParameter) -> torch.Tensor:
        value = view(self)
        if torch.compiler.is_dynamo_compiling():
            return value
        caller: str = sys._getframe(1).f_globals.get("__name__", "")
        return value if _is_trusted(caller) else marked(SharedView, name, value, (self,))

    return property(get, _set_data if name == "data" else None)


def _set_data(parameter: SharedParameter, value: torch.Tensor) -> None:
    memory = memory_id(parameter)
    vars(torch._C.TensorBase)["data"].__set__(parameter, value)
    if memory_id(parameter) != memory:
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
    setattr(SharedParameter, _name, _view(_name, _function))
