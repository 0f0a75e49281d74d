"""Which tensors share memory, and copies of tensors that share memory as the originals do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .quantised import is_quantised, stored, with_parts

Span = tuple[int, int]  # the first address, and the one after the last


def span_of(tensor: torch.Tensor) -> Span | None:
    """Return the addresses that a tensor lies within, or None if it has no memory.

    A quantised tensor lies where the first of its parts does.
    """
    tensor = next(stored(tensor), tensor)
    if is_lazy(tensor) or tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (last + 1) * tensor.element_size()) if start else None


def memory_id(tensor: torch.Tensor) -> int:
    """Return an id of a tensor's storage, or of the tensor itself if it is not strided."""
    tensor = next(stored(tensor), tensor)
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def held_alone(module: nn.Module) -> set[int]:
    """Return the ids of a module's parameters that nothing else is known to hold.

    Nothing else may hold the Parameter itself (another module, a list, an optimizer), its memory
    (another tensor, an array, a process) or its storage.
    """
    held: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for parameters in {id(m._parameters): m._parameters for m in module.modules()}.values():
        for name, parameter in parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), []).append((parameters, name))
    probe = {"alone": nn.Parameter(torch.empty(1), requires_grad=False)}
    usual = sys.getrefcount(probe["alone"]) - 1
    alone = set[int]()
    for key, places in held.items():
        parameters, name = places[0]
        objects = sys.getrefcount(parameters[name]) - usual == len(places)
        if objects and _has_own_memory(parameters[name], probe["alone"]):
            alone.add(key)
    return alone


def _has_own_memory(tensor: torch.Tensor, alone: torch.Tensor) -> bool:
    """Whether as much holds a tensor's storage as that of another one, which is alone."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    if not issubclass(type(tensor), nn.Parameter):
        return False
    storage = tensor.untyped_storage()
    if not storage.resizable() or (tensor.device.type == "cpu" and storage.is_shared()):
        return False  # memory of a file, of an array, or of several processes
    other = alone.untyped_storage()
    count: Any = torch._C._storage_Use_Count
    return count(storage._cdata) == count(other._cdata) and (
        sys.getrefcount(storage) == sys.getrefcount(other)
    )


def overlaps_of(module: nn.Module) -> dict[str, list[str]]:
    """Return, by parameter name, the other parameters that are tensors over the same memory."""
    spans = [
        (*span, name)
        for name, parameter in module.named_parameters()
        if (span := span_of(parameter))
    ]
    found: dict[str, list[str]] = {}
    open_: list[tuple[int, str]] = []  # (end, name) of the spans that reach the current start
    for start, end, name in sorted(spans):
        open_ = [(last, other) for last, other in open_ if start < last]
        for _, other in open_:
            found.setdefault(name, []).append(other)
            found.setdefault(other, []).append(name)
        open_.append((end, name))
    return found


def overlapping(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group tensors by memory: those in different groups share none."""
    different = {id(tensor): tensor for tensor in tensors}
    spans = {key: span for key, tensor in different.items() if (span := span_of(tensor))}
    groups = [[tensor] for key, tensor in different.items() if key not in spans]
    end = 0
    for key in sorted(spans, key=spans.__getitem__):
        start, last = spans[key]
        if start >= end:
            groups.append([])
        groups[-1].append(different[key])
        end = max(end, last)
    return groups


def copied_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy a group of tensors over one memory: the copies are views of one memory, too.

    Raises:
        CaptureError: torch has no view like one of the tensors.
    """
    if len(tensors) == 1:
        return [with_parts(tensors[0], lambda part: part.detach().clone())]
    if any(map(is_quantised, tensors)):
        raise CaptureError("quantised tensors share memory, which a call writes to.")
    spans = [span for tensor in tensors if (span := span_of(tensor))]
    first = min(start for start, _ in spans) // _ALIGNED * _ALIGNED
    size = max(end for _, end in spans) - first
    memory = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    copies: list[torch.Tensor] = []
    for tensor, (start, end) in zip(tensors, spans, strict=True):
        offset = start - first
        if tensor.is_conj() or tensor.is_neg() or offset % tensor.element_size():
            raise CaptureError(
                f"a tensor {tuple(tensor.shape)} of the model shares memory with another one, "
                "which the forward writes to, in a way that cannot be copied. Give it memory of "
                "its own (clone)."
            )
        given = tensor.untyped_storage()
        held = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        held.set_(given, start - given.data_ptr(), (end - start,), (1,))
        memory[offset : offset + end - start].copy_(held)
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        place = offset // tensor.element_size()
        copies.append(view.set_(memory.untyped_storage(), place, tensor.shape, tensor.stride()))
    return copies


def copied_values(values: Any) -> Any:
    """Copy all tensors in some values, as leaves with the same requires_grad.

    A tensor that occurs twice stays one, and views of one memory stay views of one.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    copies: dict[int, torch.Tensor] = {}
    for group in overlapping(tensors):
        copies |= zip(map(id, group), copied_together(group), strict=True)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return copies[id(tensor)].requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, copied, values)


_ALIGNED = 16  # bytes: a multiple of every dtype's size
