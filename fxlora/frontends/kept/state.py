"""What a capture must neither see nor change: the model's state, dice, autocast, torch's talk.

torch.export is not safe to call from two threads, and what is patched here is global: one capture
at a time.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import _trace
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from ...module import CapturedModule

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
        stack.enter_context(_dice())
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
def refuse_state(model: nn.Module) -> Generator[None]:
    """Raise where a forward keeps state in tensors that are no buffers.

    A graph would start from the same state at every call.

    Raises:
        CaptureError: names the attribute.
    """
    before = [(name, tensor, tensor._version) for name, tensor in plain_tensors(model)]
    yield
    for name, tensor, version in before:
        if tensor._version != version:
            raise CaptureError(
                f"{type(model).__name__} writes to its attribute '{name}' in place, which a graph "
                f"cannot keep from call to call: register_buffer('{name.rpartition('.')[2]}', …)."
            )


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
    inference: Any = torch.inference_mode
    enter, leave = inference.__enter__, inference.__exit__

    def enter_no_grad(self: Any) -> None:
        self.stand_in = torch.no_grad() if self.mode else None
        self.stand_in.__enter__() if self.stand_in else enter(self)

    def leave_no_grad(self: Any, *error: Any) -> None:
        self.stand_in.__exit__(*error) if self.stand_in else leave(self, *error)

    inference.__enter__, inference.__exit__ = enter_no_grad, leave_no_grad
    try:
        yield
    finally:
        inference.__enter__, inference.__exit__ = enter, leave


# ---- dice ---------------------------------------------------------------------------------------


@contextmanager
def _dice() -> Generator[None]:
    """Every generator as it was."""
    numpy: Any = sys.modules.get("numpy")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(arrays)


@contextmanager
def refuse_constant_dice(model: nn.Module) -> Generator[None]:
    """Raise where numbers that Python or numpy draws would be constants of a graph.

    (torch's own draws are nodes.)

    Raises:
        CaptureError: names the generators.
    """
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy and numpy.random.get_state()
    yield
    drawn = [] if random.getstate() == python else ["random"]
    if numpy and not _same_state(numpy.random.get_state(), arrays):
        drawn.append("numpy.random")
    if drawn:
        raise CaptureError(
            f"{type(model).__name__} draws numbers from {' and '.join(drawn)} in its forward, "
            "which a graph would repeat for ever. Draw them with torch (torch.rand), or turn "
            "what needs them off."
        )


def seed_all(seed: int = 0) -> None:
    """Every generator at the same place, for two runs to be compared."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def _same_state(first: Any, second: Any) -> bool:
    return all(
        bool((a == b).all()) if hasattr(a, "all") else a == b
        for a, b in zip(first, second, strict=True)
    )


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
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    exporting: Any = _trace
    for logger in loggers:
        logger.addFilter(_nothing)
    exporting.print = _nothing  # in that module alone; what the model prints is its own
    try:
        yield
    finally:
        del exporting.print
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(*_: object, **__: object) -> bool:
    return False
