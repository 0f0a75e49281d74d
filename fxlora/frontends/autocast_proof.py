"""Prove that a graph computes the same as its source under the autocast of its caller.

torch.export evaluates every dtype that the source reads from a tensor, and every branch on one,
without autocast. So for each autocast that a caller may use, the source and its graph both run on
fake tensors, and must compute the same values (`run_values.py`). Where they do not, the source is
exported under that autocast too: a constant that differs between the two graphs becomes a choice by
the caller's autocast. Then the proof is tried again.

A model on the CPU may be moved to an accelerator after the capture. So where there is one, the
proofs are repeated with fake tensors on it.

torch.export also evaluates `torch.is_grad_enabled()` and `torch.is_inference_mode_enabled()`. A
source that asks is proved in the same way for calls in the other modes of gradients; its graph
cannot be repaired.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch.amp.autocast_mode import is_autocast_available
from torch.utils import _pytree as pytree

from ..fx.autocast import Context, current_autocast
from ..fx.compare import alike
from ..module.autocasts import Autocasts, Facts, GradientMode
from ..module.contract import first_difference
from .autocast_choices import choose
from .examples import Example
from .fake_moves import on_device, same_versions
from .kept.asked_modes import answered
from .kept.tensor_state import StateReads
from .kept.undisturbed import undisturbed
from .run_values import Run, Unknown, Values

_HALF = (torch.bfloat16, torch.float16)  # any other dtype of autocast is refused at the call
_caller: list[Context] = []  # a stack: the capture in progress is last


@contextmanager
def callers_autocast() -> Generator[None]:
    """Within the context, remember the caller's autocast, which a capture suspends."""
    _caller.append(current_autocast())
    try:
        yield
    finally:
        _caller.pop()


def wanted() -> Context:
    """Return the autocast that the caller of the capture is in, or ()."""
    return _caller[-1] if _caller else ()


def contexts(devices: Iterable[str]) -> list[Context]:
    """Return the autocasts to prove for some types of device."""
    usable = [device for device in devices if is_autocast_available(device)]
    return [((device, dtype),) for device in usable for dtype in _HALF]


def accelerator() -> torch.device | None:
    """Return the device that weights may be moved to from the CPU, if there is one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else torch.device(found.type, 0)


@contextmanager
def under(context: Context) -> Generator[None]:
    """Enable the autocast of a context, even where this machine lacks the device."""
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d, _ in context]
    cached = torch.is_autocast_cache_enabled()
    torch.autocast_increment_nesting()
    try:
        torch.set_autocast_cache_enabled(False)
        for device, dtype in context:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
        yield
    finally:
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


# The modes of gradients besides that of a capture. In the last, code is told that gradients are
# enabled, and no tensor has one: no run can be made that is like it.
_NO_GRADIENTS = GradientMode(enabled=False, inference=False)
_INFERENCE = GradientMode(enabled=False, inference=True)
_UNTRIED = GradientMode(enabled=True, inference=True)
_Mode = Context | GradientMode  # of the caller


@contextmanager
def _in_gradient_mode(mode: GradientMode) -> Generator[None]:
    """Within the context, gradients are as in a mode, and so is what code is told that asks.

    Inference mode itself is not entered: it would make tensors that no other run can use.
    """
    told = answered({"is_inference_mode_enabled": lambda _: mode.inference})
    with torch.set_grad_enabled(mode.enabled), told:
        yield


@contextmanager
def inside_autocast(model: nn.Module, context: Context) -> Generator[None]:
    """Within the context, a model's forward runs under an autocast, as a region of its graph."""
    forward = model.forward
    own = model.__dict__.get("forward")

    @functools.wraps(forward)
    def region(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for device, dtype in context:
                stack.enter_context(torch.autocast(device, dtype))
            return forward(*args, **kwargs)

    model.__dict__["forward"] = region
    try:
        with under(context):
            yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def remove_metadata_assertions(module: fx.GraphModule) -> None:
    """Remove torch.export's assertions that a tensor that is cast has the dtype of the capture.

    They compute nothing, and under autocast the dtype may be another.
    """
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            target = torch.ops.aten._assert_tensor_metadata.default
            for node in inner.graph.find_nodes(op="call_function", target=target):
                inner.graph.erase_node(node)
            inner.recompile()


# ---- the proof ----------------------------------------------------------------------------------


@dataclass
class Proof:
    """The proof for one mode's graph.

    Attributes:
        model: the source, in that mode.
        module: its graph, which a repair changes in place.
        example: the inputs that it was exported with.
        export: exports the source again, under the current autocast.
        values: shared by all proofs of a capture.
        reads: what the source reads of the state of tensors, and of gradients.
    """

    model: nn.Module
    module: fx.GraphModule
    example: Example
    export: Callable[[], fx.GraphModule]
    values: Values
    reads: StateReads = field(default_factory=StateReads)
    _expected: dict[_Mode, Any] = field(default_factory=dict[_Mode, Any])
    _found: dict[_Mode, Any] = field(default_factory=dict[_Mode, Any])
    _target: torch.device | None = None  # where the weights are moved to

    def autocasts(self) -> Autocasts:
        """Return the autocasts that the graph holds for, and why it does not for others."""
        gradients = tuple(self._gradient_modes())
        given = pytree.tree_leaves((self.example.args, self.example.kwargs))
        held = (*self.model.parameters(), *self.model.buffers(), *given)
        types = {tensor.device.type for tensor in held if isinstance(tensor, torch.Tensor)}
        for context in contexts(types):
            if isinstance(self._differs(context), tuple):
                self._repair(context)
        here = self._facts(types)
        known = [(device, here) for device in types if len(types) == 1]
        self._target = accelerator()
        if self._target and types == {"cpu"}:
            known.append((self._target.type, self._facts([self._target.type])))
        return Autocasts(*here, by_device=tuple(known), gradients=gradients)

    def _gradient_modes(self) -> Iterator[tuple[GradientMode, str]]:
        """Yield the modes of gradients that the graph is not proved for, each with the reason."""
        if self.reads.gradient or self.reads.mode:
            yield _UNTRIED, "it asks for gradients, and capture cannot try this mode"
            for mode in (_NO_GRADIENTS, _INFERENCE):
                if why := self._unproved(mode):
                    yield mode, why

    def _unproved(self, mode: GradientMode) -> str:
        """Return why the graph may differ from its source in a mode of gradients, or ""."""
        if mode is _INFERENCE and self.reads.inference:
            return "it asks whether a tensor that it computes is one of inference mode"
        why = self._differs(mode)
        if not isinstance(why, str):
            return self._told(mode, why) if why else ""
        try:  # they cannot be compared by their values
            with undisturbed(self.model), _in_gradient_mode(mode):
                return "" if alike(self.export(), self.module) else why
        except Exception:  # noqa: BLE001 - the source may raise anything
            return why

    def _facts(self, devices: Iterable[str]) -> Facts:
        """Return the autocasts proved with weights on types of device, and why others are not."""
        found = contexts(devices)
        differs = {context: why for context in found if (why := self._differs(context))}
        told = {context: self._told(context, why) for context, why in differs.items()}
        return tuple(c for c in found if c not in differs), tuple(told.items())

    def _repair(self, context: Context) -> None:
        """Merge the source's graph under an autocast into the module's, if it has one."""
        try:
            with undisturbed(self.model), under(context):
                other = self.export()
        except Exception:  # noqa: BLE001 - the source may raise anything; the graph is refused there
            return
        (autocast,) = context
        device = accelerator()
        devices = {autocast[0]} | ({device.type} if device else set[str]())
        guesses = [guess for (guess,) in contexts(devices) if guess != autocast]
        choose(self.module, other, autocast, guesses)
        self._found.clear()

    def _differs(self, mode: _Mode) -> Any:
        """Return None if graph and source compute the same; else a reason as text, or both runs."""
        if mode not in self._found:
            self._found[mode] = self._compared(mode)
        return self._found[mode]

    def _compared(self, mode: _Mode) -> Any:
        try:
            if mode not in self._expected:
                self._expected[mode] = self._run(self.model, mode)
            expected, run = self._expected[mode]
            found, own = self._run(self.module, mode)
            if expected[0] == found[0] and (where := self._structures(expected, found)):
                return f"what it returns has another attribute or structure: {where}"
        except Exception as error:  # noqa: BLE001 - the source may raise anything
            told = str(error) if isinstance(error, Unknown) else f"{type(error).__name__}: {error}"
            return f"they cannot be compared ({told.strip().splitlines()[0] if told else told})"
        return None if found == expected else (run, own)

    def _structures(self, expected: Any, found: Any) -> str:
        return "" if expected[1] == found[1] else first_difference(expected[1], found[1])

    def _run(self, call: nn.Module, mode: _Mode, locate: int = -1) -> Any:
        run = Run(self.values, locate)
        given, target = (self.example.args, self.example.kwargs), self._target
        kept = undisturbed(call) if call is self.model or target else nullcontext()
        constants = call is self.module  # `.to()` of a captured module moves them, too
        with (
            kept,
            same_versions((call, given)),
            on_device(call, given, target, self.values, constants=constants) as (args, kwargs),
            self._within(mode),
            _compiling_state_context(),
        ):
            return run.of(call, args, kwargs), run

    def _within(self, mode: _Mode) -> AbstractContextManager[None]:
        if isinstance(mode, GradientMode):
            return _in_gradient_mode(mode)
        return under(mode)

    def _told(self, mode: _Mode, why: Any) -> str:
        """Describe the first op of the source that the graph does not compute, with its line."""
        if isinstance(why, str):
            return why
        run, own = why
        done = {made for made, _ in own.ops}
        missing = (n for n, (made, real) in enumerate(run.ops) if real and made not in done)
        number = next(missing, None)
        if number is None:
            return "they return different results"
        try:
            _, again = self._run(self.model, mode, number)
        except Exception:  # noqa: BLE001 - only the place of the difference stays unknown
            again = run
        func = run.ops[number][0].made[0]
        return f"at {again.place or type(self.model).__name__}, the source's {func} differs"
