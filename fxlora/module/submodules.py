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
from collections.abc import Collection, Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import fx, nn

from ..errors import SubmoduleError
from .adapted_tensor import is_called_by
from .guarded import SETTERS, Guarded, check_tensor
from .host_attributes import (
    MISSING,
    SetByCalls,
    is_private,
    is_same,
    joined,
    set_by_calls,
)
from .seal import Seal, call_refusal, refusal
from .sealed_dicts import seal_part


def may_note(part: nn.Module, name: str, value: Any, seal: Seal) -> bool:
    """Whether a private attribute may be set: as far as is known, no graph's source reads it."""
    if is_called_by(sys._getframe(1), SETTERS, "torch.distributed."):
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
    # where the generated code finds them without nn.Module.__getattr__, which took 5 % of a call
    # of GPT-2 for one token
    view.__dict__.update(
        {n: child for n, child in view._modules.items() if not hasattr(nn.Module, n)}
    )
    return view
