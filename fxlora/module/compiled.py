"""Models in the wrapper of torch.compile, whose names have "_orig_mod." in them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from ..errors import FxLoraError, warn


def uncompiled(model: Any, error: type[FxLoraError]) -> Any:
    """Return the model inside of `torch.compile(model)`, with a warning; any other as it is.

    Args:
        model: the user's argument.
        error: the error to raise if a submodule is such a wrapper.
    """
    if isinstance(model, OptimizedModule):
        warn(
            "the model is the wrapper of torch.compile: fxlora takes the model inside of it, under "
            "its own names. Compile the captured module instead."
        )
        model = model._orig_mod
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    wrapped = [path for path, part in parts if isinstance(part, OptimizedModule)]
    if wrapped:
        raise error(
            f"'{wrapped[0]}' is the wrapper of torch.compile. Put the module inside of it back: "
            f"model.set_submodule({wrapped[0]!r}, model.get_submodule({wrapped[0]!r})._orig_mod)."
        )
    return model
