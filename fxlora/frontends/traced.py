"""Capture through torch.fx's symbolic tracer: the road for a model without example inputs."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from ..fx.targets import refuse_unwritable
from .failures import capture_error
from .kept.functions import FunctionCall, opaque_functions
from .kept.generators import refuse_constant_draws
from .kept.undisturbed import mode_of
from .memory import storage_of
from .spellings import WEIGHT_MODULES, lower
from .tree import separate_copy


class WeightTracer(fx.Tracer):
    """torch.fx's tracer, which goes inside the modules that are one weight-reading op."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) not in WEIGHT_MODULES and super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch.fx's, where no context stands around a call: the graph would not have it.

        (An autograd.Function's forward runs under no_grad by itself.)
        """
        hidden = not torch.is_grad_enabled() and not isinstance(target, FunctionCall)
        if hidden or torch.is_autocast_enabled("cpu"):
            context = "autocast" if torch.is_grad_enabled() else "no_grad (or inference_mode)"
            raise RuntimeError(
                f"the forward computes under torch.{context}, which the tracer does not see."
            )
        return super().create_proxy(kind, target, *args, **kwargs)


def trace_mode(model: nn.Module, mode: str) -> fx.GraphModule:
    """The lowered graph of one mode, over the model's parameters and the constants it met.

    Raises:
        CaptureError: the model's forward cannot be run on symbolic values, or computes with its
            parameters out of the tracer's sight.
    """
    try:
        traced = separate_copy(model)
        with ExitStack() as stack:
            stack.enter_context(mode_of(traced, mode == "train"))
            stack.enter_context(opaque_functions())
            stack.enter_context(refuse_constant_draws(type(traced).__name__))
            stack.enter_context(_Watch(traced))
            graph = WeightTracer().trace(traced, _defaults(traced))
            refuse_unwritable(graph)
            module = fx.GraphModule(traced, graph)  # takes the constants along, which are on traced
    except CaptureError:
        raise
    except Exception as error:
        raise capture_error(
            model, mode, error, otherwise="Give example inputs: capture(model, args)."
        ) from error
    lower(graph)
    return module


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments that are None, a flag or a word unless given: the forward branches on those."""
    parameters = inspect.signature(model.forward).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is None or isinstance(parameter.default, bool | str)
    }


class _Watch(TorchDispatchMode):
    """Refuses what the tracer would bake into the graph: values of parameters, buffers, draws."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self.storages = {storage_of(t) for t in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and storage_of(value) in self.storages:
                raise RuntimeError(
                    f"{func} runs on a parameter or buffer while the model is traced, so its "
                    "result would be a constant. Give example inputs: capture(model, args)."
                )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(
                f"{func} draws random numbers while the model is traced, which would be constants. "
                "Give example inputs: capture(model, args)."
            )
        return func(*args, **kwargs)
