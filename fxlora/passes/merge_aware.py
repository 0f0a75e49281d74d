"""MergeAware: run graphs with the quantised weights that a fold gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, InjectError, QuantisedError
from ..module import CapturedModule
from ..module.quantised import is_quantised
from ..module.quantiser import Quantiser, quantiser_of
from ..module.state import State
from ..plan import Entry
from ..tables import some
from .base import Pass
from .structure import insertions


@dataclass(frozen=True)
class MergeAware(Pass):
    """Choose that a module's calls read Q(W + s·BA); the explicit graphs stay.

    Attributes:
        quantiser: the quantiser that made the base, or None to find it.
    """

    quantiser: Any = None

    def check(self, module: CapturedModule) -> None:
        entries = list(_quantised(module))
        if not entries:
            raise QuantisedError("no adapted weight is quantised.")
        if dropped := [entry.site for entry in entries if entry.dropout]:
            raise ConfigError(
                f"lora_dropout on {some(dropped)}: with s·BA in the quantised weight there is no "
                "input to drop. Match with lora_dropout=0."
            )
        if module.known.outlined or module.parent_module or module.known.optimized:
            raise InjectError(
                "merge_aware takes a module of whole, explicit graphs: capture without modules=, "
                "and call fxlora.explicit on an optimized module."
            )
        names = {entry.name_a for entry in entries}
        found = [i for graph in module.distinct_graphs() for i in insertions(module, graph)]
        if any(i.path and i.entry.name_a in names for i in found):
            raise InjectError(
                "merge_aware cannot reach a weight inside a nested graph (a checkpoint, a branch)."
            )

    def rewrite(self, module: CapturedModule) -> State:
        quantisers: dict[str, Quantiser] = {}
        for entry in _quantised(module):
            weight = module.get_parameter(entry.parameter).detach()
            if entry.parameter not in quantisers:
                quantisers[entry.parameter] = quantiser_of(weight, self.quantiser)
        return replace(module.known, merge_aware=quantisers)


def _quantised(module: CapturedModule) -> Iterator[Entry]:
    for entry in module.plan or ():
        if is_quantised(module.get_parameter(entry.parameter)):
            yield entry
