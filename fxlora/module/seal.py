"""Seal: what the submodules of one captured module refuse, and what their errors advise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SubmoduleError
from .adapted_tensor import AdaptedTensor, reads_as_it_is
from .host_attributes import ALL, DATA, Attributes, joined


def is_called(kind: type[nn.Module]) -> bool:
    """Whether modules of a class have a forward, which containers such as nn.ModuleList do not."""
    return kind.forward is not nn.Module.forward


class Seal:
    """The state that all submodules of one module share: it tells which changes they refuse.

    Attributes:
        owner: the captured or hosted module.
        owners: the module whose mode selects the graph of a submodule's nodes, by the submodule's
            path.
        open: whether the module is being rewritten: its submodules may change, and its weights
            are read as they are.
        reads_adapted: whether they are read as adapted even then.
        own: paths of submodules whose `training` flag was set on its own. The other flags follow
            their owner's.
        apart: those of them whose flag differs from their owner's although the mode matters there.
        absent: names of the owner's own tensors that are None in the source.
        usual: paths that the source's own `train` sets apart, each with the owner's mode.
        following: paths of called submodules whose flags the code around them reads.
        matters: whether a submodule's part of the graph differs by mode.
        replaceable: paths of children that may be replaced, because they are called.
        adapted: functions that compute the adapted weights, by name.
        calls: functions that run the submodules that were captured for calls from outside, by path.
        attributes: what became of a host's Python attributes.
        reads: names of the attributes that the graphs' source reads, or None if that is not known.
        called: of a host, paths of the submodules that the captured module calls.
        regions: whether Python calls graphs of submodules, because the model has no graph.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.owners: dict[str, nn.Module] = {}
        self.open = True
        self.reads_adapted = False
        self.own: set[str] = set()
        self.apart: set[str] = set()
        self.absent: frozenset[str] | None = None
        self.usual: frozenset[tuple[str, bool]] = frozenset()
        self.following: tuple[str, ...] = ()
        self.matters: Callable[[str], bool] = lambda path: True
        self.replaceable: frozenset[str] = frozenset()
        self.adapted: Mapping[str, Callable[[], torch.Tensor]] = {}
        self.calls: Mapping[str, Callable[..., Any]] = {}
        self.attributes = Attributes(None)
        self.reads: frozenset[str] | None = None
        self.called: frozenset[str] = frozenset()
        self.regions = False

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # the module that a copy belongs to seals it again

    @contextmanager
    def opened(self, reads_adapted: bool = False) -> Generator[None]:
        """Allow changes in a `with` block.

        Args:
            reads_adapted: whether adapted weights are read as adapted, as they are from outside.
        """
        before = self.open, self.reads_adapted
        self.open, self.reads_adapted = True, reads_adapted
        try:
            yield
        finally:
            self.open, self.reads_adapted = before

    def note_absent(self, owner: nn.Module) -> None:
        """Note the owner's own tensors that are None, the first time only."""
        if self.absent is None:
            held = {**owner._parameters, **owner._buffers}
            self.absent = frozenset(name for name, tensor in held.items() if tensor is None)

    def may_note(self, path: str, name: str, value: object) -> bool:
        """Whether a private attribute may be set: no call reads it, as far as is known."""
        if self.reads is not None:
            return self.reads.isdisjoint((joined(path, name), joined(path, ALL)))
        return not isinstance(value, DATA)

    def mode_set(self, path: str, training: bool) -> None:
        """Note that a submodule's flag was set on its own."""
        self.own.add(path)
        of_owner = self.owners[path].training
        apart = training is not of_owner and (path, of_owner) not in self.usual
        if apart and self.matters(path):
            self.apart.add(path)
        else:
            self.apart.discard(path)

    def owner_set(self, owner: nn.Module) -> None:
        """Note that the flag of a module that other flags follow was set."""
        for path, part in self._owned(owner):
            if path in self.own:
                self.mode_set(path, part.training)
            else:
                part.__dict__["training"] = owner.training

    def all_set(self, owner: nn.Module) -> None:
        """Note that `train()` set the flags of a module and of all its submodules.

        Those that the source's own `train` keeps in another mode were set on their own.
        """
        alike = {path for path, part in self._owned(owner) if part.training is owner.training}
        self.own -= alike
        self.apart -= alike

    def refuse_apart(self) -> None:
        """Raise if a submodule is in another mode than the module, and its part differs by mode."""
        if self.apart:
            path = min(self.apart)
            owner = self.owners[path]
            raise self._apart(path, owner, *_as_module(self, path))
        for path in self.following:
            if self.owner.get_submodule(path).training is not self.owner.training:
                raise self._apart(path, self.owner)

    def _apart(self, path: str, owner: nn.Module, *ways: str) -> SubmoduleError:
        mode = "eval" if owner.training else "train"
        return SubmoduleError(
            f"'{path}' was set to {mode} mode apart from the module around it, and their graph is "
            f"of one mode. {one_of(*ways, 'set the mode of the whole module')}"
        )

    def _owned(self, owner: nn.Module) -> list[tuple[str, nn.Module]]:
        return [
            (path, part)
            for path, part in self.owner.named_modules()
            if self.owners.get(path) is owner
        ]

    def outside(self, path: str, name: str, value: Any) -> Any:
        """Return an attribute as Python outside of the graph is to see it.

        Called by `__getattr__` only.
        """
        compute = self.adapted.get(joined(path, name)) if self.adapted else None
        as_it_is = self.open and not self.reads_adapted
        if compute is None or as_it_is or reads_as_it_is(sys._getframe(1)):
            return value
        adapted = compute()
        return adapted.as_subclass(AdaptedTensor) if type(adapted) is torch.Tensor else adapted


def refusal(seal: Seal | None, path: str, action: str) -> SubmoduleError:
    """Return the error for an action on a submodule that no graph can honour."""
    advice = one_of(
        *_as_module(seal, path),
        "give the source model the folded weights (fxlora.merged), and change that",
        "change the source's computation, and capture it afterwards",
    )
    return SubmoduleError(
        f"'{path}' of a captured module is a part of a graph, so {action} would have no effect. "
        f"{advice}"
    )


def call_refusal(seal: Seal | None, path: str) -> SubmoduleError:
    """Return the error for a call of a submodule that only a graph computes."""
    advice = one_of(
        *_as_method(seal, path),
        *_as_module(seal, path),
        "give the source model the folded weights (fxlora.merged), and call that",
    )
    return SubmoduleError(
        f"'{path}' of a captured module cannot be called: a graph computes it. {advice}"
    )


def _as_method(seal: Seal | None, path: str) -> list[str]:
    """Return the advice that captures a submodule's calls from outside, if there can be any."""
    if not (kind := _class_of(seal, path)) or not is_called(kind):
        return []
    return [f"capture its calls too: capture(model, …, methods={{{path!r}: (args, kwargs)}})"]


def _as_module(seal: Seal | None, path: str) -> list[str]:
    """Return the advice that makes a submodule one that is called, if there is a way."""
    if not (kind := _class_of(seal, path)):
        return []
    if seal and path in seal.called:
        return [f"do so on the captured module, which the host runs: get_submodule({path!r}) of it"]
    if is_called(kind):
        return [f"make it a module of its own: capture(model, …, modules={path!r})"]
    return [f"make those in it modules of their own: capture(model, …, modules='{path}.*')"]


def _class_of(seal: Seal | None, path: str) -> type[nn.Module] | None:
    """Return the source's class of a submodule in a whole graph, or None if there is none."""
    part = dict(seal.owner.named_modules()).get(path) if seal else None
    if seal is None or part is None or seal.regions:
        return None
    return getattr(part, "source_class", type(part))


def one_of(*ways: str) -> str:
    """Return a sentence that advises one of some ways."""
    said = "; or ".join(ways)
    return f"{said[0].upper()}{said[1:]}."
