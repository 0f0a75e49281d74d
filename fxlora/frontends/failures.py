"""Capture errors that name the cause, the line of the model's code and a remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from .places import defined_at, raised_at

_GRAPH_VALUES = (
    *(torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool),
    *(int, float, complex, bool, str, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def capture_error(
    model: nn.Module,
    mode: str,
    error: BaseException,
    *,
    values: Any = (),
    otherwise: str = "",
) -> CaptureError:
    """Return the CaptureError for a failed capture, with advice on how to proceed.

    Args:
        model: the source model.
        mode: the mode that was captured, for the message.
        error: the exception that ended the capture.
        values: the model's inputs and outputs, some types of which no graph can hold.
        otherwise: the advice if none fits the error.
    """
    advice = _advice(error, list(pytree.tree_leaves(values)), model) or otherwise
    return unable(model, f"could not be captured in {mode} mode", error, advice)


def _advice(error: BaseException, leaves: Iterable[Any], model: nn.Module) -> str:
    violated = UserErrorType.CONSTRAINT_VIOLATION
    if isinstance(error, UserError) and error.error_type is violated:
        return (
            "Use Dim.AUTO for that dimension, or a Dim whose whole range the model treats the same "
            "way."
        )
    if kinds := {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _GRAPH_VALUES)}:
        return (
            f"Inputs and outputs must be tensors in containers registered with pytree, not "
            f"{', '.join(sorted(kinds))}: register the class (torch.export.register_dataclass(…, "
            "serialized_type_name=…) for a dataclass, else torch.utils._pytree."
            "register_pytree_node; with that name a file can hold it), or have the model return no "
            "cache (transformers: use_cache=False, or a release whose exporters register its "
            "caches)."
        )
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if kinds := {*map(_unsupported_kind, (*tensors, *model.parameters(), *model.buffers()))} - {""}:
        return (
            "A graph can hold dense tensors only; among the inputs and weights are "
            f"{', '.join(sorted(kinds))} ones. Convert those (to_dense, "
            "torch.nested.to_padded_tensor, dequantize)."
        )
    if any(not tensor.is_meta for tensor in tensors) and (offloaded := _offloaded(model)):
        return (
            f"The weight '{offloaded}' is on the meta device: hooks that load weights for each "
            "call (accelerate's offloading) cannot be in a graph. Take them off first: "
            "accelerate.hooks.remove_hook_from_submodules(model)."
        )
    if packed := _packed(model):
        return (
            f"'{packed}' packs its weights in a TorchScript object: capture the model before they "
            "are packed."
        )
    return ""


def _unsupported_kind(tensor: torch.Tensor) -> str:
    """Return "nested", "quantized" or a layout for a tensor that a trace may not support, or ""."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    return "" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def _offloaded(model: nn.Module) -> str:
    """Return the name of the first weight on the meta device, or ""."""
    return next((name for name, p in model.named_parameters() if p.is_meta), "")


def _packed(model: nn.Module) -> str:
    """Return the first submodule that holds a TorchScript object (quantized ones do), or ""."""
    for path, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            return path or type(model).__name__
    return ""


def unable(model: nn.Module, failure: str, error: BaseException, advice: str) -> CaptureError:
    """Return a CaptureError that names the line of the model's code where `error` was raised.

    Args:
        model: the source model.
        failure: the failure, as the predicate of a sentence about the model.
        error: the exception, which becomes the cause.
        advice: how to proceed, or "".
    """
    lines = str(error).strip().splitlines() or [""]
    reason = " ".join([lines[0][:300], *(x.strip() for x in lines[1:] if x.startswith("  - "))])
    place = raised_at(error)
    where = f", at {place}" if place else f", in the forward at {defined_at(model.forward)}"
    reason = reason.rstrip(".")
    message = f"{type(error).__name__}{f': {reason}' if reason else ''}. {advice}"
    result = CaptureError(f"{type(model).__name__} {failure}{where}: {message}".rstrip())
    result.__cause__ = error
    return result
