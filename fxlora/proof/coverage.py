"""Coverage: the reads of every adapted weight, found anew in the graphs without adapters.

`graph_checks.check_modes` then proves that each of these reads has its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import VerificationError
from ..module import CapturedModule
from ..reads.readers import Reader, readers_and_writers


@dataclass(frozen=True)
class AdaptedRead:
    """One read of an adapted weight.

    Attributes:
        mode: "train" or "eval".
        op: kind of the reading op.
        through: the first op between the weight and the reading op, or "" if it reads the weight
            directly.
        call_site: path of the module whose forward makes the call, as far as capture knows.
        line: `file:line` of the call, or "".
        region: path of the captured submodule, or "" if the whole model is one graph.
    """

    mode: str
    op: str
    through: str
    call_site: str
    line: str
    region: str


def prove_coverage(module: CapturedModule, base: CapturedModule) -> list[tuple[AdaptedRead, ...]]:
    """Return every read of the adapted weight, for each entry of the plan.

    Args:
        module: an adapted module.
        base: the same module without adapters.

    Raises:
        VerificationError: a weight is read by no graph, by Python outside of every graph, or in
            the train graphs only by ops that pass no gradient back; names the site.
    """
    for entry in module.plan or ():
        if place := module.uncovered.get(entry.parameter):
            raise VerificationError(
                f"coverage: Python reads '{entry.site}' at {place}, outside of every graph."
            )
    readers, _ = readers_and_writers(base)
    names = adapted_names(module)
    found: list[tuple[AdaptedRead, ...]] = []
    for entry in module.plan or ():
        reads = list(_reads(base, names[entry.name_a], readers))
        if not reads:
            raise VerificationError(f"coverage: the adapter on '{entry.site}' is in no graph.")
        training = [reader for mode, _, reader in reads if mode == "train"]
        if training and all(reader.untrained for reader in training):
            raise VerificationError(
                f"gradient: in the train graph '{entry.site}' is read only {training[0].untrained}."
            )
        found.append(
            tuple(
                AdaptedRead(mode, r.kind, r.through, r.call_site, r.line, region)
                for mode, region, r in reads
            )
        )
    return found


def adapted_names(module: CapturedModule) -> dict[str, list[str]]:
    """Return the names under which each entry adapts its weight, by the name of the entry's A."""
    return {entry.name_a: list(entry.names) for entry in module.plan or ()}


def _reads(
    module: CapturedModule, names: list[str], readers: dict[str, list[Reader]]
) -> Iterator[tuple[str, str, Reader]]:
    """Yield (mode, region, reader) for every read of a weight under these names."""
    found = [reader for name in names for reader in readers.get(name, ())]
    for program in module.programs:
        for mode, graph in program.graphs.items():
            yield from ((mode, program.path, reader) for reader in found if reader.graph is graph)
