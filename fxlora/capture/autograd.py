"""What torch.export leaves out of a graph: custom backwards and checkpointed regions."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from ..errors import FxLoraWarning

_FRAME: Any = getattr(checkpoint, "_CheckpointFrame")  # noqa: B009 - one per region in every release


@contextmanager
def watch_autograd(model: nn.Module) -> Generator[None]:
    """Trace a forward with its gradients, and warn of what the graph's will do differently.

    torch.export traces through an `autograd.Function`. Of a reentrant checkpoint, that would leave
    its `no_grad`, and everything below it without a gradient: its function is run instead.
    """
    functions: set[str] = set()
    regions: set[str] = set()
    original_apply: Any = torch.autograd.Function.__dict__["apply"]
    original_init: Any = _FRAME.__init__

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is checkpoint.CheckpointFunction:
            regions.add("checkpoint")
            function, _preserve_rng_state, *inputs = args
            return function(*inputs)
        if cls.__module__.partition(".")[0] != "torch":
            functions.add(cls.__qualname__)
        return original_apply.__get__(None, cls)(*args, **kwargs)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        regions.add("checkpoint")
        original_init(self, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    _FRAME.__init__ = init
    try:
        yield
    finally:
        torch.autograd.Function.apply = original_apply
        _FRAME.__init__ = original_init
    _warn(model, functions, regions)


def _warn(model: nn.Module, functions: set[str], regions: set[str]) -> None:
    if functions:
        warnings.warn(
            f"{type(model).__name__} runs {', '.join(sorted(functions))}, whose own backward is "
            "not part of the graph: gradients through the captured module are those of its "
            "forward. Outputs are not affected.",
            FxLoraWarning,
            stacklevel=6,
        )
    if regions:
        warnings.warn(
            f"{type(model).__name__} checkpoints activations, which the graph does not: outputs "
            "and gradients are the same, the memory that checkpointing saves is not saved.",
            FxLoraWarning,
            stacklevel=6,
        )
