"""Find the parameters that a tensor shares memory with: a graph may read them by other names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..module.memory import copied_together, overlapping, span_of
from ..module.quantised import stored, with_parts
from .kept.undisturbed import plain_tensors


class ParameterMemory:
    """The memory of a model's parameters, to recognize them among a graph's constants."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[Any, str] = {}
        self._spans: list[tuple[int, int, str]] = []
        for name, parameter in model.named_parameters():
            if span := span_of(parameter):
                self._names[_view(parameter)] = name
                self._spans.append((*span, name))
        # A plain tensor stored on a module (lin.weight.data) is a constant: no gradient reaches
        # the parameter through it.
        self._plain = {_view(tensor) for _, tensor in plain_tensors(model) if span_of(tensor)}

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of the parameter that a tensor is, or None.

        A parameter that a list or a closure held is a constant in a graph.
        """
        if not isinstance(tensor, torch.Tensor) or not span_of(tensor):
            return None
        view = _view(tensor)
        return None if view in self._plain else self._names.get(view)

    def under(self, tensor: Any) -> list[str]:
        """Return the names of parameters whose memory overlaps the tensor's."""
        span = span_of(tensor) if isinstance(tensor, torch.Tensor) else None
        if not span:
            return []
        return [name for start, end, name in self._spans if start < span[1] and span[0] < end]


def _view(tensor: torch.Tensor) -> Any:
    return next(stored(tensor)).data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def own_tensors(
    model: nn.Module, constants: Iterable[torch.Tensor], written: Iterable[torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Return the captured module's tensor for each tensor of a model, by its id.

    Parameters share storage with the model; buffers and constants are copies. All that shares
    memory with a tensor that a call writes to is copied with it, and shares memory with its copy.

    Args:
        constants: the tensors in graphs that are neither parameters nor buffers.
        written: the tensors that a graph, or Python around graphs, may write to.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    ours: dict[int, torch.Tensor] = {}
    marked = {id(tensor) for tensor in written}
    for group in overlapping([*parameters.values(), *model.buffers(), *constants]):
        copied = [t for t in group if id(t) not in parameters]
        if any(id(tensor) in marked for tensor in group):
            copied = group
        for together in overlapping(copied):
            ours |= zip(map(id, together), copied_together(together), strict=True)
    for key, parameter in parameters.items():
        own = ours[key] if key in ours else with_parts(parameter, torch.Tensor.detach)
        ours[key] = nn.Parameter(own, parameter.requires_grad)
    return ours
