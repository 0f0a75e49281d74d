"""The layers of a file: the tensors under one name, each of which must be used."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch

from ...errors import AdapterError
from ...names import shown
from ...tables import some


@dataclass
class Layer:
    """The tensors of one layer in a file.

    Attributes:
        name: its name in the file, without the ends of the keys.
        tensors: the tensors by the ends of their keys.
        used: the ends that were asked for.
    """

    name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    used: set[str] = field(default_factory=set[str])

    def has(self, *ends: str) -> bool:
        """Whether the file has all of these tensors of the layer."""
        return all(end in self.tensors for end in ends)

    def take(self, end: str) -> torch.Tensor:
        """Return a tensor in float64.

        Raises:
            AdapterError: the file does not have it, or it is not of floating point.
        """
        self.used.add(end)
        found = self.tensors.get(end)
        if found is None:
            raise AdapterError(f"'{self.name}' has no '{end}', only {some(self.tensors)}.")
        if not found.is_floating_point():
            raise AdapterError(f"'{self.name}': '{end}' is {found.dtype}, not a weight.")
        return found.double()

    def matrix(self, end: str) -> torch.Tensor:
        """Return a tensor with all dimensions after the first flattened, in float64.

        Raises:
            AdapterError: the file does not have it, or it is a scalar or a vector.
        """
        found = self.take(end)
        if found.dim() < 2:
            raise AdapterError(f"'{self.name}': '{end}' is {tuple(found.shape)}, not a matrix.")
        return found.flatten(1)

    def vector(self, end: str) -> torch.Tensor:
        """Return a tensor of one dimension, in float64.

        Raises:
            AdapterError: the file does not have it, or it has other dimensions.
        """
        found = self.take(end)
        if found.dim() != 1:
            raise AdapterError(f"'{self.name}': '{end}' is {tuple(found.shape)}, not a vector.")
        return found

    def number(self, end: str) -> float | None:
        """Return a tensor of one number, or None if the file does not have it.

        Raises:
            AdapterError: it is not one finite number.
        """
        found = self.tensors.get(end)
        self.used.add(end)
        if found is None:
            return None
        if found.numel() != 1 or not math.isfinite(found.double().item()):
            raise AdapterError(
                f"'{self.name}': '{end}' must be a finite number, not {shown(found)}."
            )
        return found.double().item()

    def check_used(self) -> None:
        """Raise AdapterError if a tensor has no place in what was made of the others."""
        if left := sorted(self.tensors.keys() - self.used):
            raise AdapterError(
                f"'{self.name}' has {some(left)}, which has no meaning beside {some(self.used)}."
            )

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of the layer's tensors."""
        held = [t.dtype for t in self.tensors.values() if t.is_floating_point() and t.dim()]
        held = [dtype if dtype.itemsize > 1 else torch.float32 for dtype in held]  # float8
        return functools.reduce(torch.promote_types, held)
