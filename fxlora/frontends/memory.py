"""Which tensors are one memory: a graph may read a parameter by another name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .kept.undisturbed import plain_tensors


def storage_of(tensor: torch.Tensor) -> int:
    """A number for the memory that a tensor is in."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


class ParameterMemory:
    """The memory of a model's parameters, to find them again in what export made constants."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[Any, str] = {}
        self._spans: list[tuple[int, int, str]] = []
        for name, parameter in model.named_parameters():
            if span := _span(parameter):
                self._names[_view(parameter)] = name
                self._spans.append((*span, name))
        # On a module's own plain tensor (lin.weight.data) the model trains nothing: no parameter.
        self._plain = {_view(tensor) for _, tensor in plain_tensors(model) if _span(tensor)}

    def name_of(self, tensor: Any) -> str | None:
        """The parameter that a tensor is: a list or a closure held it."""
        if not isinstance(tensor, torch.Tensor) or not _span(tensor):
            return None
        view = _view(tensor)
        return None if view in self._plain else self._names.get(view)

    def under(self, tensor: Any) -> list[str]:
        """The parameters whose memory a tensor shows a part of."""
        span = _span(tensor) if isinstance(tensor, torch.Tensor) else None
        if not span:
            return []
        return [name for start, end, name in self._spans if start < span[1] and span[0] < end]


def _view(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The first address of a tensor, and the one behind its last; None where it has none."""
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.element_size()) if start else None
