"""The submodules of a captured module: containers of tensors under the source's names.

A container has the source's class, so that `isinstance`, indexing and `modules()` find it, but none
of its code: one graph computes the whole model. Whatever a user does to a container that the graph
cannot honour (a hook, a mode of its own, a replaced child, an attribute, a call) raises.

The graphs' code does not run on the containers, but on plain modules that share their dicts of
tensors (`plain_view`). So an adapted weight that Python reads off a container can be the adapted
one (`adapted_tensor.py`), while the graph reads W0.

Submodules that a graph does call are in `blocks/`.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import fx, nn

from ..errors import SubmoduleError
from ..tables import a
from .adapted_tensor import is_called_by
from .host_attributes import (
    MACHINERY,
    MISSING,
    SetByCalls,
    is_private,
    is_same,
    joined,
    set_by_calls,
)
from .quantised import is_quantised
from .seal import Seal, call_refusal, refusal

# Functions of a module that set a tensor. Code of torch.distributed may call them: FSDP sets its
# shards, and casts them for a call.
_SETTERS = ("__setattr__", "_may_set", "register_parameter", "register_buffer")


class Guarded(nn.Module):
    """A submodule that refuses tensors of another kind, and never writes to the source's."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if "." in name:  # torch's parallelize_module shards all parameters inside a layer
            raise SubmoduleError(
                f"'{name}' is not a parameter of '{self.__dict__.get('_path', '')}' itself, but of "
                "its adapter. Call parallelize_module on the captured module before inject, which "
                "then shards A and B as their weight is."
            )
        check_tensor(self, name, param)
        super().register_parameter(name, param)

    def register_buffer(
        self, name: str, tensor: torch.Tensor | None, persistent: bool = True
    ) -> None:
        check_tensor(self, name, tensor)
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        for name, held in tensors_by_name(self).items() if _is_sealed(self) else ():
            check_kind(held, fn(_empty(held)), joined(self.__dict__["_path"], name))
        return super()._apply(fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Set `requires_grad` of all parameters; those that would train are copied first."""
        if requires_grad:
            _unshare(self)
        return super().requires_grad_(requires_grad)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as nn.Module does, without writing into the source model's storage."""
        if assign:
            check_kinds(self, state_dict, self.__dict__.get("_path", ""))
        else:
            _unshare(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _unshare(part: nn.Module, names: Collection[str] | None = None) -> None:
    """Copy the storage of a submodule's parameters before they are written to or trained."""
    if seal := part.__dict__.get("_seal"):
        owner = seal.owner
        owner.__dict__.get("_captured", owner).unshare(part, names)  # a host's are the module's


def _is_sealed(part: nn.Module) -> bool:
    seal: Seal | None = part.__dict__.get("_seal")
    return seal is not None and not seal.open


def tensors_by_name(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module, by all their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def check_tensor(part: nn.Module, name: str, value: Any) -> None:
    """Raise if the graph does not read the tensor of this name, or was made for another kind."""
    if not _is_sealed(part) or is_called_by(sys._getframe(1), _SETTERS, "torch.distributed."):
        return
    path: str = part.__dict__["_path"]
    known = {**part._parameters, **part._buffers}
    if name not in known or (name in part.__dict__["_unread"] and value is not None):
        raise SubmoduleError(
            f"setting '{name}' of '{path}' would have no effect: the source had none, so the "
            "graph reads none. Set it on the source model, and capture that."
        )
    held = known[name]
    if held is not None and isinstance(value, torch.Tensor):
        check_kind(held, value, joined(path, name))


def check_kinds(module: nn.Module, state_dict: Mapping[str, Any], path: str) -> None:
    """Raise if a state dict would put a tensor of another kind in the place of a module's own."""
    held = tensors_by_name(module)
    for name in state_dict.keys() & held.keys():
        if isinstance(state_dict[name], torch.Tensor):
            check_kind(held[name], state_dict[name], joined(path, name))


def check_kind(held: torch.Tensor, value: torch.Tensor, name: str) -> None:
    """Raise if a tensor differs in dtype, kind of device or storage from the one in its place."""
    if is_quantised(value) and type(value) is not type(held):
        raise SubmoduleError(
            f"'{name}' would become {a(type(value).__name__)}, and its graph cannot read that. "
            "Quantise the model before the capture; or the folded weights in a copy of the model: "
            "fxlora.merged(model, fxlora.fold(module))."
        )
    ours, theirs = ((str(t.dtype), t.device.type) for t in (held, value))
    if ours != theirs and not held.is_meta:  # no call has worked with a meta tensor before
        raise SubmoduleError(
            f"'{name}' is {' on '.join(ours)}, and would become {' on '.join(theirs)}. The graph "
            "was made for the dtypes and devices that its tensors have. Move the whole module "
            "(module.to(…)), or change the source model and capture it afterwards."
        )


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def may_note(part: nn.Module, name: str, value: Any, seal: Seal) -> bool:
    """Whether a private attribute may be set: as far as is known, no graph's source reads it."""
    if is_called_by(sys._getframe(1), _SETTERS, "torch.distributed."):
        return True
    lacked = isinstance(part, HostPart) and getattr_static(part, name, MISSING) is MISSING
    return lacked or seal.may_note(part.__dict__["_path"], name, value)


def check_absent(seal: Seal, name: str, value: Any) -> None:
    """Raise if a tensor is set where the source had None, and graphs may know that."""
    read = seal.reads is None or name in seal.reads
    if value is not None and read and name in (seal.absent or ()):
        raise SubmoduleError(
            f"setting '{name}' would have no effect: the source had none, so the graph reads none. "
            "Set it on the source model, and capture that."
        )


class Part(Guarded):
    """A submodule, of a captured module or a host, that refuses changes without effect."""

    def __setattr__(self, name: str, value: Any) -> None:
        seal: Seal | None = self.__dict__.get("_seal")
        if not (seal is None or seal.open or self._may_set(name, value, seal)):
            raise self._set_refusal(name, value, seal)
        if seal is not None:
            seal.attributes.note(self, self._path, name, value)
        super().__setattr__(name, value)
        if name == "training" and seal is not None:
            seal.mode_set(self._path, value)

    def _may_set(self, name: str, value: Any, seal: Seal) -> bool:
        if isinstance(value, nn.Module) or name in self._modules:
            return joined(self._path, name) in seal.replaceable
        if name in self._parameters or name in self._buffers:
            check_tensor(self, name, value)
            return True  # the graph reads the tensor that is there at the call
        if name == "training" or seal.attributes.knows(self, name):
            return True
        if is_private(name) and may_note(self, name, value, seal):
            return True
        return is_same(value, getattr(self, name, MISSING))

    def _set_refusal(self, name: str, value: Any, seal: Seal) -> SubmoduleError:
        if isinstance(value, nn.Module) or name in self._modules:
            action = "replacing it" if name in self._modules else "adding it"
            return refusal(seal, joined(self._path, name), action)
        return refusal(seal, self._path, f"setting its '{name}'")

    def __delattr__(self, name: str) -> None:
        seal: Seal | None = self.__dict__.get("_seal")
        if seal is not None:
            if not (seal.open or seal.attributes.knows(self, name)):
                raise refusal(seal, self._path, f"deleting its '{name}'")
            seal.attributes.note(self, self._path, name, MISSING)
        super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        seal: Seal | None = self.__dict__.get("_seal")
        return value if seal is None else seal.outside(self._path, name, value)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        raise refusal(self.__dict__.get("_seal"), self._path, "compiling it")


class HostPart(Part):
    """A submodule of a host: the source's own, with its code and attributes.

    Code of the host may set attributes: a call that reads one then raises (see host_attributes.py).
    """

    source_class: type[nn.Module] = nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seal: Seal | None = self.__dict__.get("_seal")
        if seal is None:
            raise SubmoduleError(
                f"a copy of the host's submodule '{self._path}' cannot be called. Copy the host."
            )
        # While it is open, the source's own code runs, for which no adapters have to act.
        if not seal.open and (run := seal.calls.get(self._path)):
            return run(*args, **kwargs)
        if any(name.startswith(f"{self._path}.") for name in seal.adapted):
            raise SubmoduleError(
                f"'{self._path}' of a host has adapters, and cannot be called on its own: only "
                "graphs apply them. Capture its calls too: capture(model, …, methods="
                f"{{{self._path!r}: (args, kwargs)}}). Or fold the adapters (fxlora.fold) and host "
                "that."
            )
        with seal.opened(reads_adapted=True):
            return super().__call__(*args, **kwargs)


class NoAttributeError(SubmoduleError, AttributeError):
    """A submodule does not have an attribute that its source may have."""

    @classmethod
    def of(cls, error: AttributeError) -> NoAttributeError:
        return cls(
            f"{error}: a submodule of a captured module has the source's tensors and class, "
            "but not its other attributes."
        )


class _Pinned(nn.Module):
    """All that nn.Module defines, ahead of the source class's own version of it."""


for _name, _value in vars(nn.Module).items():
    if _name not in ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__"):
        setattr(_Pinned, _name, _value)


class Container(Part, _Pinned):
    """A submodule that only holds tensors. `container` makes one with the source's class."""

    source_class: type[nn.Module] = nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise SubmoduleError(
            f"a submodule of a captured module makes no other {type(self).__name__}, so a list of "
            "submodules has no slices. Take the items: [model.layers[n] for n in …]."
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seal: Seal | None = self.__dict__.get("_seal")
        if seal and (run := seal.calls.get(self._path)):
            return run(*args, **kwargs)
        raise call_refusal(seal, self._path)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise NoAttributeError.of(error) from None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Run no code of the source's class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)


# The dicts of hooks of every nn.Module, other than those for state_dict.
HOOKS = [name for name in MACHINERY if "hooks" in name and "state_dict" not in name]


def container(kind: type[nn.Module] = nn.Module) -> nn.Module:
    """Return an empty container that is an instance of the source's class `kind`."""
    made = object.__new__(_container_class(kind))
    nn.Module.__init__(made)
    return made


def host_part(part: nn.Module, path: str, seal: Seal, changes: Collection[str] = ()) -> None:
    """Make a submodule of a host, in place, refuse changes without effect on the host's graph.

    Args:
        changes: names of the Python attributes that the source changes in the captured calls.
    """
    kind = part.source_class if isinstance(part, HostPart) else type(part)
    names = set_by_calls(kind, path, changes)
    object.__setattr__(part, "__class__", _host_part_class(kind, names))
    seal_part(part, path, seal)


@functools.cache
def _host_part_class(kind: type[nn.Module], changed: frozenset[str]) -> type[HostPart]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "source_class": kind}
    own = {**names, **{name: SetByCalls(name) for name in changed}}
    bases = (HostPart, kind)
    return types.new_class(kind.__name__, bases, exec_body=lambda ns: ns.update(own))


@functools.cache
def _container_class(kind: type[nn.Module]) -> type[Container]:
    names = {"__module__": kind.__module__, "source_class": kind}
    return subclass(kind, (Container,), names)


def subclass(kind: type[nn.Module], bases: tuple[type[Any], ...], names: dict[str, Any]) -> Any:
    """Return a class with these bases that is also a subclass of the source's class, if it can be.

    Names that nn.Module defines are those of the bases or of nn.Module, not the source class's.
    """
    own = {**names, "__qualname__": kind.__qualname__}
    alone = types.new_class(kind.__name__, bases, exec_body=lambda ns: ns.update(own))
    if kind is nn.Module or issubclass(kind, (fx.GraphModule, torch.jit.ScriptModule)):
        return alone
    try:
        both = (*bases, _Pinned, kind)
        return types.new_class(kind.__name__, both, exec_body=lambda ns: ns.update(own))
    except Exception:  # noqa: BLE001 - a user's class may refuse to be subclassed in any way
        return alone


class _NoHooks(OrderedDict[Any, Any]):
    """The hooks of a module that is not called: adding one raises."""

    def __init__(self, path: str = "", seal: Seal | None = None) -> None:
        super().__init__()
        self.path, self.seal = path, seal

    def __setitem__(self, key: Any, value: Any) -> None:
        raise refusal(self.seal, self.path, "a hook on it")

    def __reduce__(self) -> Any:
        return _NoHooks, (self.path,)


class _Children(dict[str, Any]):
    """The children of a submodule: adding or replacing one raises unless the seal allows it."""

    def __init__(
        self, children: Mapping[str, Any], path: str = "", seal: Seal | None = None
    ) -> None:
        super().__init__(children)
        self.path, self.seal = path, seal

    def __setitem__(self, name: str, child: Any) -> None:
        path = joined(self.path, name)
        if not (self.seal is None or self.seal.open or path in self.seal.replaceable):
            raise refusal(self.seal, path, "replacing it" if name in self else "adding it")
        super().__setitem__(name, child)

    def __delitem__(self, name: str) -> None:
        if not (self.seal is None or self.seal.open):
            raise refusal(self.seal, joined(self.path, name), "deleting it")
        super().__delitem__(name)

    # dict's own versions of these do not call the methods above.

    def update(self, *others: Any, **children: Any) -> None:
        for name, child in dict(*others, **children).items():
            self[name] = child

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self:
            return super().pop(name, *default)
        child = self[name]
        del self[name]
        return child

    def popitem(self) -> tuple[str, Any]:
        if not self:
            return super().popitem()
        name = next(reversed(self))
        return name, self.pop(name)

    def clear(self) -> None:
        for name in list(self):
            del self[name]

    def __reduce__(self) -> Any:
        return _Children, (dict(self),)


def seal_part(part: nn.Module, path: str, seal: Seal) -> None:
    """Make a submodule refuse changes without effect on the graph."""
    held = {**part._parameters, **part._buffers}
    unread = {name for name, tensor in held.items() if tensor is None}
    part.__dict__.update(_path=path, _seal=seal, _unread=unread)
    part.__dict__["_modules"] = children_of(part._modules, path, seal)
    if not isinstance(part, fx.GraphModule):  # a block is called
        part.__dict__.update(
            {name: _NoHooks(path, seal) for name in HOOKS if name in part.__dict__}
        )


def children_of(children: Mapping[str, Any], path: str, seal: Seal) -> dict[str, Any]:
    """Return a module's dict of children as one that refuses changes without effect."""
    return _Children(children, path, seal)


def plain_view(module: nn.Module, wrapped: Mapping[int, nn.Module] | None = None) -> nn.Module:
    """Return plain modules over the dicts of tensors of a module and of all submodules in it.

    The nested graphs and the tracer's leaves in it are the same objects.

    Args:
        module: the module.
        wrapped: the blocks by the id of the modules at their paths, if these are wrappers.
    """
    view = nn.Module()
    view.__dict__["_parameters"], view.__dict__["_buffers"] = module._parameters, module._buffers
    for name, child in module._modules.items():
        if child is not None:
            inner = (wrapped or {}).get(id(child), child)
            view._modules[name] = (
                plain_view(inner, wrapped) if isinstance(inner, Guarded) else child
            )
    return view
