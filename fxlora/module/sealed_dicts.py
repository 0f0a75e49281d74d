"""The dicts of hooks and children of a submodule, which refuse changes without effect."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from .host_attributes import MACHINERY, joined
from .seal import Seal, refusal

# The dicts of hooks of every nn.Module, other than those for state_dict.
HOOKS = [name for name in MACHINERY if "hooks" in name and "state_dict" not in name]


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
