"""The autocasts under which a graph may be called: those under which it equals its source.

torch.export evaluates the dtypes that the source reads from tensors, and the branches that depend
on them, without autocast. Under autocast the source may read other dtypes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError
from ..fx.autocast import Context, current_autocast, described

Facts = tuple[tuple[Context, ...], tuple[tuple[Context, str], ...]]  # proved; why not others


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
        needs_gradients: why the graph does not hold where gradients are disabled, or "".
    """

    proved: tuple[Context, ...] = ()
    differs: tuple[tuple[Context, str], ...] = ()
    otherwise: str = "capture did not try this autocast"
    every: bool = False
    by_device: tuple[tuple[str, Facts], ...] = ()
    needs_gradients: str = ""

    def check(self) -> None:
        """Raise OtherModeError where the caller's mode is one that the graph does not hold for."""
        if self.needs_gradients and not (torch.is_grad_enabled() or _assumed.get()):
            raise OtherModeError(
                "called under torch.no_grad or inference_mode, where the source does something "
                f"else than in the capture: {self.needs_gradients}. Call it under "
                "torch.enable_grad(), or change the source: a graph cannot ask "
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
