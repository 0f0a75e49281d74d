"""The buffers of a PeftModel, of which each module has copies: one value serves all adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ..module import CapturedModule
from ..module.quantised import stored


class Buffers:
    """Where the values of buffers are held while other modules run: in the base.

    An adapter with a module that trains in full has buffers of its own there, as in PEFT.

    Args:
        base: the module without adapters.
        modules: the modules with one adapter each, by its name.
    """

    def __init__(self, base: CapturedModule, modules: Mapping[str, CapturedModule]) -> None:
        self.base = base
        self.modules = modules

    def keep(self, module: CapturedModule, adapters: Sequence[str], *, folded: bool) -> None:
        """Hold the values of a module that ran with some adapters."""
        names = module.written_tensors() if folded else None  # a fold changes codes, if held there
        for name, tensor, held in self._pairs(module, adapters):
            if names is None or name in names:
                copy_changed(held, tensor)

    def give(self, module: CapturedModule, adapters: Sequence[str]) -> None:
        """Give a module, which is to run with some adapters, the values that are held."""
        for _, tensor, held in self._pairs(module, adapters):
            copy_changed(tensor, held)

    def _pairs(
        self, module: CapturedModule, adapters: Sequence[str]
    ) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Yield the names of a module's buffers, with each and the one that holds its value."""
        base = self.base.state_tensors()
        own = {name: self.modules[name] for name in adapters if name in self.modules}
        for name, tensor in module.state_tensors().items():
            held = base.get(name)
            for other in own.values():
                if is_saved(other, name):
                    held = other.state_tensors()[name]
            trained = any(other.plan and name in other.plan.trained for other in own.values())
            if held is not None and held.shape == tensor.shape and not trained:
                yield name, tensor, held


def is_saved(module: CapturedModule, name: str) -> bool:
    """Whether a tensor is in a module that trains in full."""
    paths = () if module.plan is None else module.plan.modules_to_save
    return any(f"{name}.".startswith(f"{path}.") for path in paths)


def copy_changed(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a value into a tensor unless it has it: a backward may need what it has."""
    if not tensor.is_meta and not same(tensor, value):
        with torch.no_grad():
            tensor.copy_(value)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one kind have the same values."""
    if one is other:
        return True
    if one.layout is not torch.strided:  # which torch.equal does not know
        return torch.equal(one.to_dense(), other.to_dense())
    parts = zip(stored(one), stored(other), strict=True)
    return all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in parts)
