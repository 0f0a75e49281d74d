"""The coverage proof: an adapter stands at every read of every adapted weight, in every mode.

The reads are enumerated anew on the graphs without adapters. In a copy of the graphs with them,
each read that an adapter stands at is then cut off its weight: what still reads one reads it bare.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from ..errors import VerificationError
from ..fx.nested import call_of
from ..module import CapturedModule
from ..passes.structure import insertions, take_out
from ..plan import Entry
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
        VerificationError: an adapter stands nowhere, or where it cannot train; names the site.
    """
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


def refuse_bare_reads(module: CapturedModule) -> None:
    """Check that no adapted weight is read where its adapter does not stand.

    Raises:
        VerificationError: names the site, and the mode, op and line of the bare read.
    """
    names = adapted_names(module)
    for entries in _layers(module):
        cut = module.derive()
        adapted = {node for graph in cut.distinct_graphs() for node in _cut(cut, graph, entries)}
        readers, _ = readers_and_writers(cut)
        for entry in entries:
            for mode, region, reader in _reads(cut, names[entry.name_a], readers):
                if reader.node not in adapted:
                    where = f" of '{region}'" if region else ""
                    raise VerificationError(
                        f"coverage: '{entry.site}': no adapter stands where {reader.describe()} "
                        f"in the {mode} graph{where}."
                    )
    for entry in module.plan or ():
        if place := module.uncovered.get(entry.parameter):
            raise VerificationError(
                f"coverage: Python reads '{entry.site}' at {place}, outside of every graph."
            )


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


def _layers(module: CapturedModule) -> list[list[Entry]]:
    """The plan's entries so that no two in a list adapt one weight: the proof is for each alone."""
    layers: list[list[Entry]] = []
    depth = Counter[str]()
    for entry in module.plan or ():
        if depth[entry.parameter] == len(layers):
            layers.append([])
        layers[depth[entry.parameter]].append(entry)
        depth[entry.parameter] += 1
    return layers


def _cut(module: CapturedModule, graph: fx.Graph, entries: list[Entry]) -> Iterator[fx.Node]:
    """Leave the adapters of some entries alone in a graph, and cut them off their weights.

    Yields:
        what is given a weight all the same and is no bare read: an op that a branch stands
        beside, and the nodes of the adapters.
    """
    for insertion in reversed(insertions(module, graph)):
        if insertion.entry not in entries:
            take_out(insertion)
    found = insertions(module, graph)
    for insertion in found:
        base, output = insertion.base, insertion.output
        inside = [user for user in base.users if _leads_to(user, output)]
        if insertion.form == "weight":
            with graph.inserting_before(base):
                nothing = graph.create_node("get_attr", insertion.entry.name_a)
            for user in inside:
                user.replace_input_with(base, nothing)
        elif len(inside) == len(base.users):  # nothing takes the op's result past the branch
            yield from (base, *base.all_input_nodes[: base.target is operator.getitem])
    tensors = module.adapter_parameters()
    starts = {node for node in graph.nodes if node.op == "get_attr" and node.target in tensors}
    yield from _of_adapters(module, graph, starts, {insertion.output for insertion in found})


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


def _of_adapters(
    module: nn.Module, graph: fx.Graph, starts: set[fx.Node], ends: set[fx.Node]
) -> Iterator[fx.Node]:
    """What depends on adapters' tensors, up to the nodes in which they end."""
    inside = set(starts)
    for node in graph.nodes:
        if inside.isdisjoint(node.all_input_nodes):
            continue
        if call := call_of(node, module):
            for nested in call.graphs:
                given = {i for i, o in call.given(nested) if o in inside}
                yield from _of_adapters(nested, nested.graph, given, ends)
        elif node in ends:
            yield node
        else:
            inside.add(node)
    yield from inside
