"""The reads of every adapted weight, enumerated anew on the graphs without adapters.

`graph_checks.check_modes` proves that the adapters are there at each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import VerificationError
from ..module import CapturedModule
from ..reads.readers import Reader, readers_and_writers


@dataclass(frozen=True)
class Read:
    """One read of an adapted weight, at which its adapter was found to stand.

    Attributes:
        mode: "train" or "eval".
        op: kind of the op that reads.
        through: the first op on the way there from the weight, or "" where it reads the weight.
        call_site: path of the module whose forward makes the call, as far as capture knows.
        line: `file:line` of the call, or "".
        region: path of the captured submodule; "" where the graph is whole.
    """

    mode: str
    op: str
    through: str
    call_site: str
    line: str
    region: str


def prove_coverage(module: CapturedModule, base: CapturedModule) -> list[tuple[Read, ...]]:
    """Every read of the adapted weight, for each entry of the plan.

    Args:
        module: with adapters.
        base: the same without them.

    Raises:
        VerificationError: a weight is read nowhere, outside of every graph, or where no adapter
            can train; names the site.
    """
    for entry in module.plan or ():
        if place := module.uncovered.get(entry.parameter):
            raise VerificationError(
                f"coverage: Python reads '{entry.site}' at {place}, outside of every graph."
            )
    readers, _ = readers_and_writers(base)
    names = adapted_names(module)
    found: list[tuple[Read, ...]] = []
    for entry in module.plan or ():
        reads = list(_reads(base, names[entry.name_a], readers))
        if not reads:
            raise VerificationError(f"coverage: the adapter on '{entry.site}' stands in no graph.")
        training = [reader for mode, _, reader in reads if mode == "train"]
        if training and all(reader.untrained for reader in training):
            raise VerificationError(
                f"gradient: in the train graph '{entry.site}' is read only {training[0].untrained}."
            )
        found.append(
            tuple(
                Read(mode, reader.kind, reader.through, reader.call_site, reader.line, region)
                for mode, region, reader in reads
            )
        )
    return found


def adapted_names(module: CapturedModule) -> dict[str, list[str]]:
    """The names in the graphs under which each entry adapts its weight, by the name of its A."""
    return {entry.name_a: list(entry.names) for entry in module.plan or ()}


def _reads(
    module: CapturedModule, names: list[str], readers: dict[str, list[Reader]]
) -> Iterator[tuple[str, str, Reader]]:
    """Every read of a weight under some names, with its mode and its region."""
    found = [reader for name in names for reader in readers.get(name, ())]
    for program in module.programs:
        for mode, graph in program.graphs.items():
            yield from ((mode, program.path, reader) for reader in found if reader.graph is graph)
