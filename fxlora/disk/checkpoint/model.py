"""What `--model` tells about a checkpoint: the layers of its weights, and its ties."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ...errors import ConfigError
from .base import Checkpoint
from .prefix import Prefix

CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Skeleton:
    """A model without values.

    Attributes:
        module: the model; its tensors may be on the meta device.
    """

    module: nn.Module

    def transposed(self, owner: str) -> bool:
        """Whether a module is Hugging Face's Conv1D, whose weight is (in, out)."""
        classes = type(self._owner(owner)).__mro__
        return any(f"{c.__module__}.{c.__name__}" == CONV1D for c in classes)

    def transposes_stacks(self, owner: str) -> bool:
        """Whether a module tells PEFT that its stacks are (e, in, out)."""
        return getattr(self._owner(owner), "is_transposed", False) is True

    def order(self, owner: str) -> list[str]:
        """Return the names of a module's own parameters, in its order."""
        held = self._owner(owner)
        return [f"{owner}.{n}".removeprefix(".") for n, _ in held.named_parameters(recurse=False)]

    def _owner(self, path: str) -> nn.Module:
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            raise ConfigError(
                f"{type(self.module).__name__}, the given model, has no module '{path}', which the "
                "adapter names: it is not the checkpoint's model, or has another prefix."
            ) from error

    def tied(self, name: str) -> set[str]:
        """Return all names of a parameter."""
        held = self.module.state_dict(keep_vars=True)
        return {other for other, tensor in held.items() if tensor is held[name]}

    def fits(self, base: Checkpoint, prefix: Prefix) -> bool:
        """Whether the checkpoint's tensors are the model's, under the names that a prefix gives."""
        shapes = {prefix(n): tuple(t.shape) for n, t in self.module.state_dict().items()}
        return all(shapes.get(name) == t.shape for name, t in base.tensors.items())
