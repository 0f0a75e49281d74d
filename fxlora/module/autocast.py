"""The autocasts under which a graph may be called: those in which it does what its source does.

torch.export writes the dtypes that the source read from tensors into the graph, and the branches
that it took for them. Under autocast the source may read others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..fx.autocast import Context, current_autocast, described


@dataclass(frozen=True)
class Autocasts:
    """The callers' autocasts that a graph holds for.

    Attributes:
        proved: those in which the graph is known to do what the source does.
        differs: for other autocasts, where the source is not known to do the same.
        otherwise: why nothing is known of any others.
        every: whether the graph holds for all, because it only calls Python.
    """

    proved: tuple[Context, ...] = ()
    differs: tuple[tuple[Context, str], ...] = ()
    otherwise: str = "capture did not try this autocast"
    every: bool = False

    def check(self) -> None:
        """Raise InputError under an autocast that the graph does not hold for."""
        context = current_autocast()
        if context and not self.every and context not in self.proved:
            raise InputError(self._refusal(context))

    def _refusal(self, context: Context) -> str:
        why = dict(self.differs).get(context, self.otherwise)
        return (
            f"called under {described(context)}, where the graph is not known to do what its "
            f"source does: {why}. Capture inside this torch.autocast block: the graph is then made "
            "for it. Or call the graph outside of it."
        )

    def moved(self, moves: Mapping[Any, Any]) -> Autocasts:
        """Return what is known after the weights moved to other devices or dtypes: nothing."""
        to = ", ".join(map(str, moves.values()))
        why = f"its weights were moved to {to} after capture (capture the source there instead)"
        return self if self.every else Autocasts(otherwise=why)


EVERY = Autocasts(every=True)
UNKNOWN = Autocasts(otherwise="it was captured without examples of a call")
