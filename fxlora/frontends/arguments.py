"""The arguments of capture: checks of the model, and its example calls in one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError
from ..module import CapturedModule
from ..module.example_calls import Call, calls_of, calls_of_methods
from ..module.fsdp import mesh_of
from ..module.program import MODES, Program
from .examples import in_signature_order
from .kept.hooks import refuse_backward_hooks
from .methods import method_of, own_name, signature_of
from .tree import refuse_lazy


def check_model(model: nn.Module) -> None:
    """Raise CaptureError for a model that neither torch.export nor the tracer can capture."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture takes an nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is compiled by TorchScript, and a graph cannot see inside. "
            "Capture the module that it was compiled from."
        )
    if isinstance(model, CapturedModule):
        raise CaptureError(
            "the module is captured already: pass it to match, inject, fold, … directly. To "
            "capture it for other inputs, capture the source model again."
        )
    if hidden := _hidden_name(model):
        raise CaptureError(
            f"{type(model).__name__} has a submodule or tensor named '{hidden}', which the "
            "captured module's attribute of that name would hide. Rename it, or wrap the model: "
            "capture(nn.Sequential(model), x) if it takes one input, else a module whose "
            "forward(self, *args, **kwargs) calls it. Names then start with that of the wrapper's "
            "attribute ('0.')."
        )
    refuse_backward_hooks(model)
    refuse_lazy(model)
    if mesh_of(model) is not None:
        raise CaptureError(
            f"{type(model).__name__} is sharded over processes, which torch.export cannot follow. "
            "Capture it before, and shard the captured module: fully_shard after inject, "
            "parallelize_module before."
        )
    if any(p.is_inference() for p in model.parameters()):
        raise CaptureError(
            f"{type(model).__name__} was created under torch.inference_mode, and inference "
            "tensors can never be trained. Create it outside, or capture copy.deepcopy(model)."
        )


def _hidden_name(model: nn.Module) -> str | None:
    """Return the first name of a child or tensor that CapturedModule already uses, or None."""
    taken = _empty()
    held = (
        *model.named_children(),
        *model.named_parameters(recurse=False),
        *model.named_buffers(recurse=False),
    )
    return next((name for name, _ in held if hasattr(taken, name)), None)


def _check_method(model: nn.Module, name: object) -> None:
    """Raise CaptureError unless a captured module can have the model's method or submodule."""
    called = method_of(model, name)
    if isinstance(called, nn.Module) or name == "forward":
        return
    assert isinstance(name, str)
    if hasattr(_empty(), name):
        raise CaptureError(
            f"{type(model).__name__}.{name} cannot be captured, because every captured module has "
            "an attribute of that name. Give the method another name in a subclass."
        )


def _empty() -> CapturedModule:
    """Return a captured module that computes nothing, to ask which attributes every one has."""
    graph = fx.Graph()
    graph.output(None)
    programs = [Program(dict.fromkeys(MODES, graph), dict.fromkeys(MODES))]
    return CapturedModule(nn.Module(), programs, class_name="Empty", training=False)


def given_calls(
    model: nn.Module, args: Any, kwargs: Any, calls: Any, methods: Any
) -> dict[str, list[Call]]:
    """Return the user's example calls of each method, with keywords in the order of its signature.

    Args:
        model, args, kwargs, calls, methods: as for `capture`.

    Raises:
        CaptureError: they are no example calls of the model.
    """
    named = {} if methods is None else calls_of_methods(methods, CaptureError)
    of_methods: dict[str, list[Call]] = {}
    for name, calls_of_one in named.items():
        _check_method(model, name)
        of_methods.setdefault(own_name(model, name), []).extend(calls_of_one)
    forward = _example_calls(args, kwargs, calls)
    if "forward" in of_methods:
        raise CaptureError("give the calls of the forward as args and kwargs, or as calls=[…].")
    given = {"forward": forward, **of_methods} if forward else of_methods
    signatures = {method: signature_of(model, method) for method in given}
    return {
        method: [(args, in_signature_order(signatures[method], kwargs)) for args, kwargs in of_one]
        for method, of_one in given.items()
    }


def _example_calls(args: Any, kwargs: Any, calls: Any) -> list[Call]:
    """Return the user's example calls; none if no inputs were given."""
    if calls is not None:
        if args is not None or kwargs is not None:
            raise CaptureError("give args and kwargs as one of calls=[(args, kwargs), …].")
        return calls_of(calls, CaptureError)
    if args is None and kwargs is None:
        return []
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, tuple | list | None):
        raise CaptureError(f"args must be a tuple of example inputs, not {type(args).__name__}.")
    if not isinstance(kwargs, Mapping | None):
        raise CaptureError(
            f"kwargs must be a mapping of names to inputs, not {type(kwargs).__name__}. "
            "Give several positional inputs as one tuple: capture(model, (a, b))."
        )
    return [(tuple(args or ()), dict(kwargs or {}))]


def shapes_of(number: int, dynamic_shapes: Any) -> list[Any]:
    """Return the specification of the dynamic dimensions for each of several calls."""
    if not isinstance(dynamic_shapes, list | tuple) or len(dynamic_shapes) != number:
        raise CaptureError(f"dynamic_shapes must be a list of {number}, one for each call.")
    return list(dynamic_shapes)
