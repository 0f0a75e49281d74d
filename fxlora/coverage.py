"""The coverage proof: an adapter stands at every read of every adapted weight, in every mode.

The reads are enumerated anew on the graphs without adapters. In a copy of the graphs with them,
each read that an adapter stands at is then cut off its weight: what still reads one reads it bare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .errors import VerificationError
from .module import CapturedModule
from .nested import grad_enabled
from .passes.structure import Insertion, insertions
from .plan import Entry
from .readers import Reader, readers_and_writers


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
        VerificationError: an adapter stands nowhere, or where it cannot train; names the site.
    """
    readers, _ = readers_and_writers(base)
    found: list[tuple[Read, ...]] = []
    for entry in module.plan or ():
        reads = list(_to_adapt(base, entry, readers))
        if not reads:
            raise VerificationError(f"coverage: the adapter on '{entry.site}' stands in no graph.")
        training = [reader for mode, _, reader in reads if mode == "train"]
        if training and not any(grad_enabled(reader.path) for reader in training):
            raise VerificationError(
                f"gradient: in the train graph '{entry.site}' is read under torch.no_grad() alone."
            )
        found.append(
            tuple(
                Read(mode, reader.kind, reader.through, reader.call_site, reader.line, region)
                for mode, region, reader in reads
            )
        )
    return found


def refuse_bare_reads(module: CapturedModule) -> None:
    """Check that no adapted weight is read where its adapter does not stand.

    Raises:
        VerificationError: names the site, and the mode, op and line of the bare read.
    """
    cut = module.derive()
    adapted = {pair for graph in cut.distinct_graphs() for pair in _cut_off(cut, graph)}
    readers, _ = readers_and_writers(cut)
    for entry in module.plan or ():
        for mode, region, reader in _to_adapt(cut, entry, readers):
            if (entry.parameter, reader.node) not in adapted:
                where = f" of '{region}'" if region else ""
                raise VerificationError(
                    f"coverage: '{entry.site}': no adapter stands where {reader.describe()} in "
                    f"the {mode} graph{where}."
                )
        if place := module.uncovered.get(entry.parameter):
            raise VerificationError(
                f"coverage: Python reads '{entry.site}' at {place}, outside of every graph."
            )


def _to_adapt(
    module: CapturedModule, entry: Entry, readers: dict[str, list[Reader]]
) -> Iterator[tuple[str, str, Reader]]:
    """What an entry has to adapt, with mode and region: every read, under every name."""
    names = module.aliases()[entry.parameter]
    own = [reader for name in names for reader in readers.get(name, ())]
    for program in module.programs:
        for mode, graph in program.graphs.items():
            yield from ((mode, program.path, reader) for reader in own if reader.graph is graph)


def _cut_off(module: CapturedModule, graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """Take the weight away from what an adapter stands between.

    Yields:
        what keeps the weight and is adapted all the same: the parameter, and the op beside
        which the branch stands.
    """
    found = insertions(module, graph)
    before = {insertion.output: insertion.base for insertion in found}
    for insertion in found:
        root = _root(insertion, before)
        passing_by = [u for u in insertion.base.users if not _leads_to(u, insertion.output)]
        for user in passing_by:  # of several adapters in a row it has the first ones alone
            user.replace_input_with(insertion.base, root)
    for insertion in found:
        root = _root(insertion, before)
        inside = [user for user in root.users if _leads_to(user, insertion.output)]
        if insertion.form == "branch" and len(inside) == len(root.users):
            yield insertion.entry.parameter, root
        if insertion.form == "weight":
            with graph.inserting_before(root):
                nothing = graph.create_node("get_attr", insertion.entry.name_a)
            for user in inside:
                user.replace_input_with(root, nothing)


def _root(insertion: Insertion, before: dict[fx.Node, fx.Node]) -> fx.Node:
    """What was there before the first of several adapters in a row."""
    node = insertion.base
    while node in before:
        node = before[node]
    return node


def _leads_to(node: fx.Node, target: fx.Node) -> bool:
    """Whether a node is another or feeds it; both in one graph."""
    reached: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        node = ahead.pop()
        if node is target:
            return True
        if node not in reached and node < target:
            reached.add(node)
            ahead.extend(node.users)
    return False
