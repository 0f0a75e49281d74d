"""Find the parameters that a tensor shares memory with: a graph may read them by other names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .kept.undisturbed import plain_tensors


def storage_of(tensor: torch.Tensor) -> int:
    """Return a key for the storage of a tensor."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


class ParameterMemory:
    """The memory of a model's parameters, to recognize them among a graph's constants."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[Any, str] = {}
        self._spans: list[tuple[int, int, str]] = []
        for name, parameter in model.named_parameters():
            if span := _span(parameter):
                self._names[_view(parameter)] = name
                self._spans.append((*span, name))
        # A plain tensor stored on a module (lin.weight.data) is a constant: no gradient reaches
        # the parameter through it.
        self._plain = {_view(tensor) for _, tensor in plain_tensors(model) if _span(tensor)}

    def name_of(self, tensor: Any) -> str | None:
        """Return the name of the parameter that a tensor is, or None.

        A parameter that a list or a closure held is a constant in a graph.
        """
        if not isinstance(tensor, torch.Tensor) or not _span(tensor):
            return None
        view = _view(tensor)
        return None if view in self._plain else self._names.get(view)

    def under(self, tensor: Any) -> list[str]:
        """Return the names of parameters whose memory overlaps the tensor's."""
        span = _span(tensor) if isinstance(tensor, torch.Tensor) else None
        if not span:
            return []
        return [name for start, end, name in self._spans if start < span[1] and span[0] < end]


def _view(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return a tensor's first address and the one after its last, or None if it has no memory."""
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.element_size()) if start else None
