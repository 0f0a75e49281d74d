"""Prove that a graph computes the same as its source in the modes of its caller.

torch.export evaluates every dtype that the source reads from a tensor, and every branch on one,
without autocast. So for each autocast that a caller may use, the source and its graph both run on
fake tensors, and must compute the same values (`run_values.py`). Where they do not, the source is
exported under that autocast too: a constant that differs between the two graphs becomes a choice by
the caller's autocast (`autocast_choices.py`). Then the proof is tried again.

A model on the CPU may be moved to an accelerator after the capture. So where there is one, the
proofs are repeated with fake tensors on it.

torch.export also evaluates `torch.is_grad_enabled()` and `torch.is_inference_mode_enabled()`. A
source that asks is proved in the same way for calls in autograd's other modes; its graph cannot be
repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch.utils import _pytree as pytree

from ..fx.autocast import Context
from ..fx.compare import alike
from ..module.autocasts import Autocasts, Facts, GradientMode
from ..module.contract import first_difference
from ..module.memory import memory_id
from .autocast_choices import bypass_regions, choose
from .caller_modes import (
    INFERENCE,
    NO_GRADIENTS,
    UNTRIED,
    accelerator,
    contexts,
    in_gradient_mode,
    under,
)
from .examples import Example
from .fake_moves import on_device, same_versions
from .fast_paths import other_numbers
from .kept.tensor_state import StateReads
from .kept.undisturbed import undisturbed
from .run_values import Outcome, Run, Unknown, Values


class Both(NamedTuple):
    """An autocast, and a mode of gradients."""

    context: Context
    gradients: GradientMode


Mode = Context | GradientMode | Both  # of the caller


@dataclass(frozen=True)
class _Difference:
    """Why a graph may not compute the same as its source.

    Attributes:
        reason: the reason, if the two cannot be compared by their values; else "".
        runs: the runs of the source and of the graph, if they computed different values.
    """

    reason: str = ""
    runs: tuple[Run, Run] | None = None


@dataclass
class Proof:
    """The proof for one mode's graph.

    Attributes:
        model: the source, in that mode.
        module: its graph, which a repair changes in place.
        example: the inputs that it was exported with.
        export: exports the source again with an example, under the current autocast; None for a
            graph that is not to be repaired.
        values: shared by all proofs of a capture.
        reads: what the source reads of the state of tensors, and of gradients.
        repairs: whether the graph may be changed.
    """

    model: nn.Module
    module: fx.GraphModule
    example: Example
    export: Callable[[Example], fx.GraphModule] | None
    values: Values
    reads: StateReads = field(default_factory=StateReads)
    repairs: bool = True
    _of_graph: dict[Any, tuple[Outcome, Run]] = field(default_factory=dict[Any, Any])
    _expected: dict[Mode, tuple[Outcome, Run]] = field(
        default_factory=dict[Mode, tuple[Outcome, Run]]
    )
    _found: dict[Mode, _Difference | None] = field(default_factory=dict[Mode, _Difference | None])
    _inputs_in: dict[Mode, tuple[tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=dict[Any, Any]
    )
    _target: torch.device | None = None  # where the weights are moved to

    def _autocasts(self) -> Autocasts:
        given = pytree.tree_leaves((self.example.args, self.example.kwargs))
        held = (*self.model.parameters(), *self.model.buffers(), *given)
        types = {tensor.device.type for tensor in held if isinstance(tensor, torch.Tensor)}
        gradients = dict(self._gradient_modes())
        for context in contexts(types):
            difference = self._difference(context)
            if difference and difference.runs:
                others = [c for c in contexts(types) if c != context]
                self._repair(context, [c for c in others if self._difference(c) is None])
        gradients |= self._modes_under(contexts(types), gradients)
        here = self._facts(types)
        known = [(device, here) for device in types if len(types) == 1]
        self._target = accelerator()
        if self._target and types == {"cpu"}:
            known.append((self._target.type, self._facts([self._target.type])))
        return Autocasts(*here, by_device=tuple(known), gradients=tuple(gradients.items()))

    def for_source(
        self, model: nn.Module, export: Callable[[Example], fx.GraphModule], reads: StateReads
    ) -> Proof:
        """Return the proof that another source computes the same as this proof's graph.

        The runs of the graph, which stays as it is, are this proof's.
        """
        changed = replace(self, model=model, export=export, reads=reads, repairs=False)
        return replace(changed, _expected={}, _found={}, _target=None)

    def is_as_good_as(self, other: Proof) -> bool:
        """Whether this holds where the other does, and a repair for this source has no place.

        It has none where both sources differ from the graph in the same op, which the other's
        repair could not mend.
        """
        if not self.found.holds_where(other.found):
            return False
        differs = any(difference and difference.runs for difference in self._found.values())
        return not differs or self.found.differs == other.found.differs

    @cached_property
    def found(self) -> Autocasts:
        """The autocasts that the graph holds for, after repairs, and why it does not for others."""
        return self._autocasts()

    def holds(self) -> bool:
        """Whether the graph computes the same as the source, outside of autocast."""
        return self._difference(()) is None

    def _gradient_modes(self) -> Iterator[tuple[GradientMode, str]]:
        """Yield the modes of gradients that the graph is not proved for, each with the reason."""
        if self.reads.gradient or self.reads.mode:
            yield UNTRIED, "it asks for gradients, and capture cannot try this mode"
            for mode in (NO_GRADIENTS, INFERENCE):
                if why := self._unproved(mode):
                    yield mode, why

        if self.reads.fast and not self.model.training:
            yield from other_numbers(self.model, self.module, self.example)

    def _modes_under(
        self, given: Iterable[Context], refused: Container[GradientMode]
    ) -> dict[GradientMode, str]:
        """Return the modes of gradients in which the source differs under an autocast only."""
        asks = self.reads.gradient or self.reads.mode
        modes = [m for m in (NO_GRADIENTS, INFERENCE) if asks and m not in refused]
        held = [context for context in given if modes and self._difference(context) is None]
        found: dict[GradientMode, str] = {}
        for both in (Both(context, mode) for mode in modes for context in held):
            difference = self._difference(both)
            if difference and difference.runs:
                found[both.gradients] = self._described(both, difference)
        return found

    def _unproved(self, mode: GradientMode) -> str:
        """Return why the graph may differ from its source in a mode of gradients, or ""."""
        if mode is INFERENCE and self.reads.inference:
            return "it asks whether a tensor that it computes is one of inference mode"
        difference = self._difference(mode)
        if difference is None:
            return ""
        if difference.runs is None and self._exports_alike(mode):
            return ""
        return self._described(mode, difference)

    def _exports_alike(self, mode: GradientMode) -> bool:
        """Whether the source has the same graph when it is exported in a mode."""
        if self.export is None:
            return False
        try:
            with undisturbed(self.model), in_gradient_mode(mode):
                return alike(self.export(self.example), self.module)
        except Exception:  # noqa: BLE001 - the source may raise anything
            return False

    def _facts(self, devices: Iterable[str]) -> Facts:
        """Return the autocasts proved with weights on types of device, and why others are not."""
        found = contexts(devices)
        differs = {c: self._described(c, why) for c in found if (why := self._difference(c))}
        return tuple(c for c in found if c not in differs), tuple(differs.items())

    def _repair(self, context: Context, held: Sequence[Context]) -> None:
        """Merge the source's graph under an autocast into the module's, if it has one.

        Args:
            held: autocasts that the graph holds for, whose constants stay.
        """
        if self.export is None or not self.repairs:
            return
        try:
            with undisturbed(self.model), under(context):
                other = self.export(self.example.under(context))
        except Exception:  # noqa: BLE001 - the source may raise anything; the graph is refused there
            return
        (autocast,) = context
        device = accelerator()
        devices = {autocast[0]} | ({device.type} if device else set[str]())
        others = [other for other in contexts(devices) if other != context and other not in held]
        guesses = [guess for (guess,) in others]
        choose(self.module, other, autocast, guesses)
        self._forget()
        if self._difference(context) and bypass_regions(self.module):
            choose(self.module, other, autocast, guesses)
            self._forget()

    def _forget(self) -> None:
        """Forget what was found about a graph that is now another one."""
        self._found.clear()
        self._of_graph.clear()

    def _difference(self, mode: Mode) -> _Difference | None:
        """Return None if graph and source compute the same in a mode."""
        if mode not in self._found:
            self._found[mode] = self._compared(mode)
        return self._found[mode]

    def _compared(self, mode: Mode) -> _Difference | None:
        try:
            if mode not in self._expected:
                self._expected[mode] = self._run(self.model, mode)
            key = mode, self._target
            if key not in self._of_graph:
                self._of_graph[key] = self._run(self.module, mode)
            (expected, run), (found, own) = self._expected[mode], self._of_graph[key]
        except Exception as error:  # noqa: BLE001 - the source may raise anything
            text = str(error) if isinstance(error, Unknown) else f"{type(error).__name__}: {error}"
            first_line = next(iter(text.strip().splitlines()), "")
            return _Difference(f"they cannot be compared ({first_line})")
        if expected.leaves == found.leaves and expected.structure != found.structure:
            where = first_difference(expected.structure, found.structure)
            if where:
                return _Difference(f"what it returns has another attribute or structure: {where}")
        return None if found == expected else _Difference(runs=(run, own))

    def _run(self, call: nn.Module, mode: Mode, locate: int = -1) -> tuple[Outcome, Run]:
        """Run the source or the graph on fake tensors, in a mode."""
        run = Run(self.values, locate)
        given, target = self._inputs(mode), self._target
        kept = undisturbed(call) if call is self.model or target else nullcontext()
        constants = call is self.module  # `.to()` of a captured module moves them, too
        with (
            kept,
            same_versions((call, given)),
            on_device(call, given, target, self.values, constants=constants) as (args, kwargs),
            _in_mode(mode),
            _compiling_state_context(),
        ):
            return run.of(call, args, kwargs), run

    def _inputs(self, mode: Mode) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs in a mode, the same tensors for both runs, which know their memory."""
        if mode not in self._inputs_in:
            context = mode.context if isinstance(mode, Both) else mode
            given = self.example
            if not isinstance(context, GradientMode):
                given = given.under(context)
            self._inputs_in[mode] = given.args, given.kwargs
            leaves = pytree.tree_leaves((given.args, given.kwargs))
            self.values.held |= _memory(t for t in leaves if isinstance(t, torch.Tensor))
            self.values.held |= _memory(self.model.buffers()) & _memory(self.module.buffers())
        return self._inputs_in[mode]

    def _described(self, mode: Mode, difference: _Difference) -> str:
        """Describe the first op of the source that the graph does not compute, with its line."""
        if difference.runs is None:
            return difference.reason
        run, own = difference.runs
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


def computes_the_same(
    model: nn.Module, module: fx.GraphModule, example: Example, values: Values
) -> bool:
    """Whether a graph is proved to compute the same as its source on an example."""
    return Proof(model, module, example, None, values).holds()


def _memory(tensors: Iterable[torch.Tensor]) -> set[int]:
    return set(map(memory_id, tensors))


@contextmanager
def _in_mode(mode: Mode) -> Generator[None]:
    if isinstance(mode, Both):
        with under(mode.context), in_gradient_mode(mode.gradients):
            yield
    else:
        with in_gradient_mode(mode) if isinstance(mode, GradientMode) else under(mode):
            yield
