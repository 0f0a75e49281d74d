"""What a capture must neither see nor change: the model's state, autocast, torch's talk.

torch.export is not safe to call from two threads: one capture at a time.
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
from .generators import own_generators
from .patches import patched, torchs_own_patches_here

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Run a model's forward for its graph, and leave everything as it was.

    Gradients are on and autocast is off inside, whatever is in force around: a graph runs under
    the modes of its caller, as the source does.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(_state_of(model))
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
    """The model in one mode; flags that train() may touch are put back.

    In the mode that it is in, the model is taken as it stands, with the batch norms that the user
    froze by `eval()` frozen.
    """
    flags = [(module, module.training) for module in model.modules()]
    with undisturbed(model):
        try:
            if model.training != training:
                model.train(training)
            yield
        finally:
            for module, flag in flags:
                if isinstance(module, CapturedModule):  # its graph goes with the flag
                    module.train(flag)
                module.training = flag


# ---- the model ----------------------------------------------------------------------------------


@contextmanager
def _state_of(model: nn.Module) -> Generator[None]:
    """Attributes that a forward sets, and lists that it adds to, as they were before.

    They would hold tensors of the trace. Parameters, buffers and hooks are in such dicts, too.
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
            _put_back(module.__dict__, held)
        for container, before in containers:
            _put_back(container, before)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors on a model's modules that are neither parameters nor buffers, by dotted name."""
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            own = name not in ("_parameters", "_buffers", "_modules")
            for leaf in pytree.tree_leaves(value) if own else ():
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter):
                    yield (f"{path}.{name}" if path else name), leaf


@contextmanager
def refuse_state(model: nn.Module) -> Generator[set[str]]:
    """Raise where a forward keeps state in tensors that are no buffers.

    A graph would start from the same state at every call.

    Yields:
        names of the attributes that the forward gives another tensor: state, if it reads them.

    Raises:
        CaptureError: names the attribute that the forward writes to.
    """
    before = [(name, tensor, tensor._version) for name, tensor in plain_tensors(model)]
    assigned: set[str] = set()

    def compare(*_: Any) -> None:
        now = {(name, id(tensor)) for name, tensor in plain_tensors(model)}
        assigned.update(name for name, tensor, _ in before if (name, id(tensor)) not in now)

    handle = model.register_forward_hook(compare)
    try:
        with patched(warnings, warn=_without_assignments(warnings.warn)):
            yield assigned
    finally:
        handle.remove()
    for name, tensor, version in before:
        if tensor._version != version:
            raise CaptureError(
                f"{type(model).__name__} writes to its attribute '{name}' in place, which a graph "
                f"cannot keep from call to call: register_buffer('{name.rpartition('.')[2]}', …)."
            )


def _without_assignments(warn: Callable[..., None]) -> Callable[..., None]:
    """`warnings.warn` without what torch.export says of every attribute that a forward sets."""

    def chosen(
        message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **more: Any
    ) -> None:
        if sys._getframe(2).f_code.co_name != "_detect_attribute_assignment":  # pyright: ignore[reportPrivateUsage]
            warn(message, category, max(stacklevel, 1) + 2, source, **more)

    return chosen


def _put_back(container: Any, before: Any) -> None:
    same = len(container) == len(before) and all(
        a is b for a, b in zip(_items(container), _items(before), strict=True)
    )
    if not same:
        container.clear()
        (container.extend if isinstance(container, list) else container.update)(before)


def _items(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [item for pair in container.items() for item in pair]  # pyright: ignore[reportUnknownVariableType]
    return list(container)


# ---- inference mode ----------------------------------------------------------------------------


@contextmanager
def _inference_as_no_grad() -> Generator[None]:
    """What a forward runs in inference mode, torch.export records as if it were not.

    no_grad, which it records, is what is left of that mode in a graph: no gradient.
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


# ---- torch's talk -------------------------------------------------------------------------------

_LOGGERS = (
    "torch.export",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.fx.experimental.proxy_tensor",
)


@contextmanager
def _quiet() -> Generator[None]:
    """Keep torch.export from printing half a graph where it refuses a model: the error says it.

    A refusal may only mean that the next attempt is made. TORCH_LOGS shows all of it.
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
        # in that module alone; what the model prints is its own
        with patched(_trace, print=_nothing):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)


def _nothing(*_: object, **__: object) -> None:
    return None
