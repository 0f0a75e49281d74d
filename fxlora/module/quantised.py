"""Quantised weights: tensor subclasses that store a weight in fewer bits than its dtype has.

A subclass (torchao's, NF4) looks like a tensor of the weight's shape and dtype, and holds inner
tensors. It is told by being a traceable wrapper subclass, not by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import QuantisedError
from .sharded import is_sharded


def is_quantised(tensor: object) -> bool:
    """Whether a tensor is of a subclass over inner tensors, and not one that processes share."""
    if not isinstance(tensor, torch.Tensor) or is_sharded(tensor):
        return False
    return is_traceable_wrapper_subclass(tensor)


def stored(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor is stored in: itself, or its inner tensors."""
    if not is_quantised(tensor):
        yield tensor
        return
    held: Any = tensor
    for name in held.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the size of a tensor as it is stored, in bytes."""
    return sum(part.numel() * part.element_size() for part in stored(tensor))


def with_parts(
    tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return a tensor whose stored parts are changed (cloned, detached), with the same values.

    A subclass may do something else in `clone()`: that of NF4 quantises anew.
    """
    if not is_quantised(tensor):
        return change(tensor)
    held: Any = tensor
    names, context = held.__tensor_flatten__()
    parts = {name: with_parts(getattr(tensor, name), change) for name in names}
    made: Any = type(tensor).__tensor_unflatten__  # pyright: ignore[reportAttributeAccessIssue]
    return made(parts, context, tensor.shape, tensor.stride())


def dequantised(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as a plain tensor in its dtype; the tensor itself if it is plain.

    Raises:
        QuantisedError: the subclass has none of torch's ways to give them.
    """
    if not is_quantised(tensor):
        return tensor
    for values in _WAYS:
        try:
            found = values(tensor.detach())
        except Exception:  # noqa: BLE001 - a subclass raises anything for what it does not have
            continue
        if type(found) is torch.Tensor and found.shape == tensor.shape:
            return found.to(tensor.dtype)
    raise QuantisedError(
        f"{type(tensor).__name__} does not tell its values: neither dequantize(), nor to(dtype), "
        "nor a product with the identity gives a plain tensor."
    )


def _of_identity(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix (out, in) as the product that layers compute has it."""
    identity = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
    return F.linear(identity, tensor).T.contiguous()  # (in, in) @ (in, out) -> (in, out)


# Ways to the values of a quantised tensor: torchao's, that of NF4, and any that a layer can read.
_WAYS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda tensor: tensor.dequantize(),
    lambda tensor: tensor.to(tensor.dtype),
    _of_identity,
)
