"""The constants of graphs: values other than the model's own tensors and nested graphs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from ..fx.compare import alike, equal_tensors
from ..fx.effects import written_attributes
from .memory import memory_id

CONSTANTS = "_constants"  # the container of all constants in a captured module


class EqualConstants:
    """Gives constants that are equal one name, so that equal graphs have equal code.

    A tensor that a graph may write to, directly or in the memory that it shares, equals no other.
    """

    def __init__(self, owner: nn.Module, graphs: Iterable[fx.Graph]) -> None:
        self._held = owner._modules.get(CONSTANTS) or nn.Module()
        self._names: dict[str, str] = {}
        nodes = (node for graph in graphs for node in graph.nodes)
        written = {name for node in nodes for name in written_attributes(node, owner)}
        own = [*owner.named_parameters(), *owner.named_buffers()]
        self._memory = {
            memory_id(tensor)
            for name, tensor in own
            if name in written or not name.startswith(f"{CONSTANTS}.")
        }

    def name_of(self, name: str) -> str:
        """Return the first of the names, among those asked for, of a constant equal to this one.

        The name of anything else stays.
        """
        if not name.startswith(f"{CONSTANTS}."):
            return name
        if name not in self._names:
            found = (
                first for first in dict.fromkeys(self._names.values()) if self._equal(name, first)
            )
            self._names[name] = next(found, name)
        return self._names[name]

    def _equal(self, name: str, other: str) -> bool:
        one, two = (getattr(self._held, n.removeprefix(f"{CONSTANTS}.")) for n in (name, other))
        if one is two:
            return True
        if isinstance(one, fx.GraphModule) and isinstance(two, fx.GraphModule):
            return not (_writes(one) or _writes(two)) and alike(one, two)
        if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
            return False
        same_strides = one.stride() == two.stride() and one.device == two.device
        fixed = self._memory.isdisjoint({memory_id(one), memory_id(two)})
        return same_strides and fixed and equal_tensors(one, two)


def _writes(nested: fx.GraphModule) -> bool:
    return any(written_attributes(node, nested) for node in nested.graph.nodes)
