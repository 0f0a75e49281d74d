"""Capture through torch.fx's symbolic tracer, for a model without example inputs."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from ..fx.autocast import Context, current_autocast
from ..fx.compare import alike
from ..fx.targets import refuse_unwritable
from ..module.autocasts import Autocasts
from ..module.memory import memory_id
from .caller_modes import accelerator, contexts, under
from .failures import capture_error
from .kept.functions import FunctionCall, opaque_functions
from .kept.generators import refuse_constant_draws
from .kept.undisturbed import mode_of
from .spellings import WEIGHT_MODULES, lower
from .tree import separate_copy


class WeightTracer(fx.Tracer):
    """A torch.fx tracer that goes inside modules whose forward is one op that reads a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.around = current_autocast()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) not in WEIGHT_MODULES and super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Create a proxy, but raise RuntimeError under autocast, no_grad or inference_mode.

        The graph would lose these contexts. Under no_grad, the call of an autograd.Function is
        allowed, because the Function's forward runs under no_grad by itself.
        """
        hidden = not torch.is_grad_enabled() and not isinstance(target, FunctionCall)
        if hidden or current_autocast() != self.around:
            context = "autocast" if torch.is_grad_enabled() else "no_grad (or inference_mode)"
            raise RuntimeError(
                f"the forward runs ops under torch.{context}, which the tracer does not record."
            )
        return super().create_proxy(kind, target, *args, **kwargs)


def trace_mode(model: nn.Module, mode: str, context: Context = ()) -> fx.GraphModule:
    """Trace one mode to a lowered graph, over the model's parameters and the traced constants.

    Args:
        model: the source model.
        mode: "train" or "eval".
        context: the autocast to trace under; none by default.

    Raises:
        CaptureError: the model's forward cannot run on symbolic values, or it computes with its
            parameters where the tracer does not record the ops.
    """
    try:
        traced = separate_copy(model)
        with ExitStack() as stack:
            stack.enter_context(mode_of(traced, mode == "train"))
            stack.enter_context(opaque_functions())
            stack.enter_context(refuse_constant_draws(type(traced).__name__))
            stack.enter_context(_Watch(traced))
            stack.enter_context(under(context))
            graph = WeightTracer().trace(traced, _defaults(traced))
            refuse_unwritable(graph)
            module = fx.GraphModule(traced, graph)  # copies the constants from `traced`, too
    except CaptureError:
        raise
    except Exception as error:
        raise capture_error(
            model, mode, error, otherwise="Give example inputs: capture(model, args)."
        ) from error
    lower(graph)
    return module


def traced_autocasts(model: nn.Module, mode: str, module: fx.GraphModule) -> Autocasts:
    """Return the autocasts under which a mode's trace is the same; its graph reads dtypes itself.

    Only Python code that asks for the autocast itself makes a trace differ.
    """
    proved: list[Context] = []
    differs: dict[Context, str] = {}
    device = accelerator()
    devices = ["cpu", *([device.type] if device else [])]
    for context in contexts(devices):
        try:
            if alike(module, trace_mode(model, mode, context)):
                proved.append(context)
            else:
                differs[context] = "the source's Python code asks which autocast is on"
        except CaptureError as error:
            differs[context] = str(error)
    facts = tuple(proved), tuple(differs.items())
    held = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    # Elsewhere the source's Python code may do something else under the same autocast.
    return Autocasts(*facts, by_device=tuple((device, facts) for device in held if len(held) == 1))


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the defaults that are None, a bool or a string: the forward may branch on those."""
    parameters = inspect.signature(model.forward).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is None or isinstance(parameter.default, bool | str)
    }


class _Watch(TorchDispatchMode):
    """Refuses ops whose results would be constants of the graph.

    These are ops on real parameters or buffers, and ops that draw random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self.storages = {memory_id(t) for t in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and memory_id(value) in self.storages:
                raise RuntimeError(
                    f"{func} runs on a parameter or buffer while the model is traced, so its "
                    "result would be a constant. Give example inputs: capture(model, args)."
                )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(
                f"{func} draws random numbers while the model is traced, so they would be "
                "constants. Give example inputs: capture(model, args)."
            )
        return func(*args, **kwargs)
