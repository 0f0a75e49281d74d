"""Errors of a capture: what failed, at which line of the model's code, and what to do."""

from __future__ import annotations

from torch import nn

from ..errors import CaptureError
from .places import defined_at, raised_at


def capture_error(
    model: nn.Module, mode: str, error: BaseException, otherwise: str = ""
) -> CaptureError:
    """The error of a capture that failed, with what to do about it, or `otherwise`."""
    advice = next((advice for words, advice in _ADVICE.items() if words in str(error)), otherwise)
    return unable(model, f"could not be captured in {mode} mode", error, advice)


_ADVICE = {
    "pytree": "Inputs and outputs must be tensors in containers that pytree knows: register the "
    "class (torch.export.register_dataclass for a dataclass, else "
    "torch.utils._pytree.register_pytree_node), or have the model return no cache (transformers: "
    "use_cache=False, or a release whose exporters register its caches).",
    "Constraints violated": "Give Dim.AUTO for that dimension, or a Dim with a range that the "
    "model treats alike.",
}


def unable(model: nn.Module, what: str, error: BaseException, advice: str) -> CaptureError:
    """An error with the line of the model's code that another one came from."""
    lines = str(error).strip().splitlines() or [""]
    reason = " ".join([lines[0][:300], *(x.strip() for x in lines[1:] if x.startswith("  - "))])
    place = raised_at(error)
    where = f", at {place}" if place else f", in the forward at {defined_at(model.forward)}"
    message = f"{type(error).__name__}: {reason.rstrip('.')}. {advice}"
    result = CaptureError(f"{type(model).__name__} {what}{where}: {message}".rstrip())
    result.__cause__ = error
    return result
