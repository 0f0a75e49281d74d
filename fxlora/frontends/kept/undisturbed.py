"""Isolate a capture: restore the model's state, suspend the caller's modes, silence torch.export.

torch.export is not thread-safe, so only one capture runs at a time.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import _trace
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from ...module import CapturedModule
from .caches import no_traces_in_caches
from .containers import put_back
from .generators import own_generators
from .patches import patched, torchs_own_patches_here

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Within the context, run a model's forward for its graph; afterwards restore all state.

    Inside, gradients are enabled and autocast is disabled, whatever modes the caller has set: the
    graph runs under the modes of its own caller, as the source does.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(_state_of(model))
        stack.enter_context(no_traces_in_caches(model))
        stack.enter_context(_quiet())
        stack.enter_context(own_generators())
        stack.enter_context(torchs_own_patches_here())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_inference_as_no_grad())
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Generator[None]:
    """Within the context, the model is in train or eval mode; afterwards restore its flags.

    If the model is in this mode already, the flags of its submodules are not changed: batch norms
    that the user froze by `eval()` stay frozen.
    """
    flags = [(module, module.training) for module in model.modules()]
    with undisturbed(model):
        try:
            if model.training != training:
                model.train(training)
            yield
        finally:
            for module, flag in flags:
                if isinstance(module, CapturedModule):  # its graph depends on the flag
                    module.train(flag)
                module.training = flag


# ---- the model ----------------------------------------------------------------------------------


@contextmanager
def _state_of(model: nn.Module) -> Generator[None]:
    """Restore the attributes, containers, plain tensors and `requires_grad` that a forward changes.

    They would otherwise hold tensors of the trace. Parameters, buffers and hooks are restored with
    them: these are in dicts among a module's attributes.
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    containers = [
        (value, copy.copy(value))
        for held in attributes
        for value in held.values()
        if isinstance(value, list | dict | set)
    ]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    contents = [(t, t._version, t.detach().clone()) for _, t in plain_tensors(model)]
    try:
        yield
    finally:
        for tensor, version, content in contents:
            if tensor._version != version:
                tensor.detach().copy_(content)
        for module, held in zip(modules, attributes, strict=True):
            put_back(module.__dict__, held)
        for container, before in containers:
            put_back(container, before)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model that are neither parameters nor buffers, with dotted names."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            own = name not in ("_parameters", "_buffers", "_modules")
            for leaf in pytree.tree_leaves(value) if own else ():
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter):
                    yield (f"{path}.{name}" if path else name), leaf


@contextmanager
def refuse_state(model: nn.Module) -> Generator[set[str]]:
    """Raise if a forward keeps state in tensors that are not buffers.

    A graph would start from the same state at every call.

    Yields:
        Names of the attributes to which the forward assigns another tensor: these are state if
        the forward also reads them.

    Raises:
        CaptureError: the forward writes in place to an attribute, or assigns another tensor to a
            buffer of a submodule, which torch.export loses. The message names it.
    """
    buffers: dict[str, torch.Tensor] = {}  # of the trace
    before = [(name, tensor, tensor._version) for name, tensor in plain_tensors(model)]
    assigned: set[str] = set()

    def remember(*_: Any) -> None:
        buffers.update(_buffers_of_submodules(model))

    def compare(*_: Any) -> None:
        now = {(name, id(tensor)) for name, tensor in plain_tensors(model)}
        assigned.update(name for name, tensor, _ in before if (name, id(tensor)) not in now)

        replaced = [n for n, b in _buffers_of_submodules(model) if buffers.get(n, b) is not b]
        if replaced:
            name = replaced[0].rpartition(".")[2]
            raise CaptureError(
                f"{type(model).__name__} assigns another tensor to its buffer '{replaced[0]}', and "
                f"a graph would lose it. Write to the buffer in place: self.{name}.copy_(…)."
            )

    handles = (
        model.register_forward_pre_hook(remember),
        model.register_forward_hook(compare),
    )
    try:
        with patched(warnings, warn=_without_assignments(warnings.warn)):
            yield assigned
    finally:
        for handle in handles:
            handle.remove()
    for name, tensor, version in before:
        if tensor._version != version:
            raise CaptureError(
                f"{type(model).__name__} writes to its attribute '{name}' in place, which a graph "
                "cannot keep from one call to the next. Make it a buffer: "
                f"register_buffer('{name.rpartition('.')[2]}', …)."
            )


def _buffers_of_submodules(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name, buffer)
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if "." in name
    ]


def _without_assignments(warn: Callable[..., None]) -> Callable[..., None]:
    """Return `warn` without torch.export's warning about attributes that a forward assigns."""

    def chosen(
        message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **more: Any
    ) -> None:
        if sys._getframe(2).f_code.co_name != "_detect_attribute_assignment":
            warn(message, category, max(stacklevel, 1) + 2, source, **more)

    return chosen


# ---- inference mode ----------------------------------------------------------------------------


@contextmanager
def _inference_as_no_grad() -> Generator[None]:
    """Replace inference mode by no_grad, which torch.export records.

    torch.export does not record inference mode. In a graph, its only effect is that of no_grad: no
    gradient.
    """
    enter, leave = torch.inference_mode.__enter__, torch.inference_mode.__exit__
    entered: dict[int, list[torch.no_grad]] = {}

    def enter_no_grad(self: Any) -> None:
        if not self.mode:
            return enter(self)
        entered.setdefault(id(self), []).append(torch.no_grad())
        return entered[id(self)][-1].__enter__()

    def leave_no_grad(self: Any, *error: Any) -> None:
        if not entered.get(id(self)):  # entered before the capture, or inference_mode(False)
            return leave(self, *error)
        return entered[id(self)].pop().__exit__(*error)

    with patched(torch.inference_mode, __enter__=enter_no_grad, __exit__=leave_no_grad):
        yield


# ---- messages of torch.export -------------------------------------------------------------------

_LOGGERS = (
    "torch.export",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.proxy_tensor",
)


@contextmanager
def _quiet() -> Generator[None]:
    """Hide the partial graph and the logs that torch.export prints when it refuses a model.

    The error gives the reason, and after a refusal the next attempt may succeed. With TORCH_LOGS
    set, everything is shown.
    """
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    thread = threading.get_ident()
    loggers = [logging.getLogger(name) for name in _LOGGERS]

    def of_others(_: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    for logger in loggers:
        logger.addFilter(of_others)
    try:
        # in that module only: the model's own prints are kept
        with patched(_trace, print=_nothing):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)


def _nothing(*_: object, **__: object) -> None:
    return None
