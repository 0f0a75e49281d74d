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
from torch.utils import _pytree as pytree

from ..errors import SubmoduleError
from .memory import memory_id
from .writes import is_writer, storage_of, version, written

_untraced: Any = torch.compiler.disable


class SharedView(torch.Tensor):
    """A view of a shared parameter. A write to it copies the parameter's memory first.

    Functions of torch take it as a plain tensor.

    Attributes:
        of: the parameter.
    """

    of: nn.Parameter

    @classmethod
    @_untraced  # Dynamo breaks the graph here in any case, at as_subclass
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name: str = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        sets_gradient = func in _GRADIENT_SETTERS  # of this tensor alone
        for tensor in () if sets_gradient else written(name, args, kwargs):
            if isinstance(tensor, SharedView):
                _own(tensor.of)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, SharedView)]
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in given:
                _follow(tensor)
            if func in (*_GRADIENT_SETTERS, *_GRADIENTS):
                return func(*args, **kwargs)
            versions = [version(tensor) for tensor in given]
            plain, plain_kwargs = pytree.tree_map(_plain, (args, kwargs))
            result = func(*plain, **plain_kwargs)
            shared = [tensor for tensor in given if isinstance(tensor.of, SharedParameter)]
            if shared and versions != [version(tensor) for tensor in given]:
                raise SubmoduleError(
                    f"{name} wrote to a weight that shares memory with the source model, which has "
                    "changed, too: load it again. Call requires_grad_(True) on the weight's module "
                    "before such a write: it copies the memory."
                )
        return _marked(name, result, given[0].of) if shared else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor."""
        return _plain(self).__reduce_ex__(protocol)


_held = vars(torch._C.TensorBase)
_GRADIENT_SETTERS: Any = (
    torch.Tensor.requires_grad_,
    *(_held[name].__set__ for name in ("requires_grad", "grad")),
)
_GRADIENTS: Any = (  # of the very tensors that they are given
    *(torch.autograd.grad, torch.autograd.backward),
    *(_held[name].__get__ for name in ("requires_grad", "grad", "is_leaf", "grad_fn")),
)


def _follow(view: SharedView) -> None:
    """Put a view, in place, over its parameter's memory, where that was copied since."""
    if storage_of(view) is None or memory_id(view) == memory_id(view.of):
        return
    if view.is_conj() or view.is_neg():
        raise SubmoduleError(
            "a lazy conjugate of a weight was made before the weight's memory was copied: make it "
            "again."
        )
    moved = torch.empty(0, dtype=view.dtype, device=view.device)
    place = view.storage_offset(), view.shape, view.stride()
    _held["data"].__set__(view, moved.set_(view.of.untyped_storage(), *place))


def _marked(name: str, result: Any, of: nn.Parameter) -> Any:
    """Return a function's result, in which views of a shared parameter are `SharedView`s."""
    if name in ("numpy", "__array__"):
        result.flags.writeable = False
    if not isinstance(result, torch.Tensor | list | tuple):
        return result
    memory = storage_of(of)

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        if memory is None or storage_of(tensor) != memory:
            return tensor
        view = tensor.as_subclass(SharedView)
        view.of = of
        return view

    return pytree.tree_map_only(torch.Tensor, mark, result)


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, SharedView) else value


class SharedParameter(nn.Parameter):
    """A parameter whose memory another model shares, until Python writes to it.

    A method that writes, to it or to a view of it (`SharedView`), or an assignment of its gradient,
    copies the memory first: it is an nn.Parameter then. Torch's own code, graphs among it, takes it
    as the nn.Parameter that it is. Functions that write to their arguments (`torch.add(…,
    out=parameter)`) are not noticed.

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
        return _marked(name, result, self)

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
        return value if _is_trusted(caller) else _marked(name, value, self)

    return property(get, _set_data if name == "data" else None)


def _set_data(parameter: SharedParameter, value: torch.Tensor) -> None:
    memory = memory_id(parameter)
    _held["data"].__set__(parameter, value)
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
