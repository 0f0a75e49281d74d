"""The autocasts under which a graph may be called: those under which it equals its source.

torch.export evaluates the dtypes that the source reads from tensors, and the branches that depend
on them, without autocast. Under autocast the source may read other dtypes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from ..fx.autocast import Context, current_autocast, described

Facts = tuple[tuple[Context, ...], tuple[tuple[Context, str], ...]]  # proved; why not others


class GradientMode(NamedTuple):
    """A mode of autograd: whether gradients are enabled, and whether it is of inference."""

    enabled: bool
    inference: bool

    def may_be_here(self) -> bool:
        """Whether this is the caller's mode; torch.compile cannot ask for that of inference."""
        if self.enabled is not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():
            return not self.enabled
        return self.inference is torch.is_inference_mode_enabled()

    def described(self) -> str:
        if self.inference:
            return "torch.inference_mode" + (" and torch.enable_grad" if self.enabled else "")
        return "torch.enable_grad" if self.enabled else "torch.no_grad"


class OtherModeError(InputError):
    """A call under an autocast, or a mode of gradients, that the graph does not hold for."""


@dataclass(frozen=True)
class Autocasts:
    """The callers' autocasts that a graph holds for.

    Attributes:
        proved: those under which the graph is known to compute the same as the source.
        differs: others that were tried, each with the reason why it is not proved.
        otherwise: the reason for all others.
        every: whether the graph holds for all, because it only calls the source's Python code.
        by_device: `proved` and `differs` as they are when all weights are on one type of device,
            by that type.
        gradients: the callers' modes of gradients that the graph does not hold for, each with the
            reason.
    """

    proved: tuple[Context, ...] = ()
    differs: tuple[tuple[Context, str], ...] = ()
    otherwise: str = "capture did not try this autocast"
    every: bool = False
    by_device: tuple[tuple[str, Facts], ...] = ()
    gradients: tuple[tuple[GradientMode, str], ...] = ()

    def holds_where(self, other: Autocasts) -> bool:
        """Whether this holds for every caller that the other holds for."""
        here, there = dict(self.by_device), dict(other.by_device)
        pairs = [(self.proved, other.proved)]
        pairs += [(here[kind][0] if kind in here else (), there[kind][0]) for kind in there]
        refused = {mode for mode, _ in self.gradients} - {mode for mode, _ in other.gradients}
        return not refused and all(set(theirs) <= set(ours) for ours, theirs in pairs)

    def check(self) -> None:
        """Raise OtherModeError where the caller's mode is one that the graph does not hold for."""
        for mode, why in self.gradients:
            if mode.may_be_here() and not _assumed.get():
                raise OtherModeError(
                    f"called under {mode.described()}, where the source is not known to do what "
                    f"it does in the capture: {why}. Call it with gradients enabled and outside of "
                    "torch.inference_mode, or change the source: a graph cannot ask "
                    "torch.is_grad_enabled()."
                )
        context = current_autocast()
        if context and not self.every and context not in self.proved:
            raise OtherModeError(self._refusal(context))

    def _refusal(self, context: Context) -> str:
        why = dict(self.differs).get(context, self.otherwise)
        return (
            f"called under {described(context)}, where the graph is not known to do what its "
            f"source does: {why}. Capture inside this torch.autocast block: the graph is then made "
            "for it. Or call the graph outside of it."
        )

    def moved(self, moves: Mapping[Any, Any]) -> Autocasts:
        """Return the autocasts that the graph holds for after the weights moved.

        Args:
            moves: old to new devices, and old to new dtypes, of all weights that moved.
        """
        if self.every:
            return self
        only_devices = all(isinstance(device, torch.device) for device in moves)
        known = self.by_device if only_devices else ()
        reached = {device.type for device in moves.values()} if only_devices else set[str]()
        for device, (proved, differs) in known:
            if reached == {device}:
                return replace(self, proved=proved, differs=differs)
        to = ", ".join(map(str, moves.values()))
        why = f"its weights were moved to {to} after capture (capture the source there instead)"
        return replace(self, proved=(), differs=(), otherwise=why, by_device=known)


_assumed: ContextVar[bool] = ContextVar("gradients assumed", default=False)


@contextmanager
def no_gradients() -> Generator[None]:
    """Within the context, gradients are disabled, and calls are as if they were not."""
    token = _assumed.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _assumed.reset(token)


EVERY = Autocasts(every=True)
UNKNOWN = Autocasts(otherwise="it was captured without examples of a call")
