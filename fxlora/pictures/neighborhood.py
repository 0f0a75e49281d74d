"""Which nodes of a graph belong in the picture of one site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from ..fx.calls import example_value
from ..module import CapturedModule
from ..passes.structure import Insertion, insertions
from ..plan import Entry
from ..reads.sites import Site, find_sites


@dataclass(frozen=True)
class Neighborhood:
    """Some nodes of one graph, in graph order.

    Attributes:
        nodes: the nodes to draw.
        adapter: those of them that an adapter added.
        weights: those that fetch the site's weight.
        border: those drawn only because a drawn node takes them or is taken by them.
        shapes: the shapes of the nodes' values, as far as known; "*" is a dynamic size.
    """

    nodes: tuple[fx.Node, ...]
    adapter: frozenset[fx.Node]
    weights: frozenset[fx.Node]
    border: frozenset[fx.Node]
    shapes: Mapping[fx.Node, str]


def around_site(module: CapturedModule, site: Site, mode: str) -> list[Neighborhood]:
    """Return the nodes around each read, in the graphs of a mode, of a weight without adapters."""
    graphs = {id(program.graphs[mode]) for program in module.programs}
    found: list[Neighborhood] = []
    for reader in site.readers:
        if id(reader.graph) in graphs:
            body = {reader.node} | _between(reader.weight, ())
            found.append(_framed(module, body, frozenset(), site.names))
    return found


def around_adapter(module: CapturedModule, entry: Entry, mode: str) -> list[Neighborhood]:
    """Return the nodes around each place where an entry's adapter is inserted."""
    found: list[Neighborhood] = []
    for program in module.programs:
        for insertion in insertions(module, program.graphs[mode]):
            if insertion.entry is entry:
                found.append(_around(module, insertion))
    return found


def site_of(module: CapturedModule, entry: Entry) -> Site | None:
    """Return the site of an entry's weight in a captured or folded module."""
    return next((s for s in find_sites(module) if entry.parameter in s.names), None)


def _around(module: CapturedModule, insertion: Insertion) -> Neighborhood:
    base, output = insertion.base, insertion.output
    added = _between(output, (base, *base.all_input_nodes)) - {base, *base.all_input_nodes}
    body = added | {base}
    if insertion.form == "branch":
        body |= {n for n in base.all_input_nodes if n.op == "get_attr"}
    else:
        body |= set(output.users)
    return _framed(module, body, frozenset(added), insertion.entry.names)


def _between(node: fx.Node, stop: Iterable[fx.Node]) -> set[fx.Node]:
    """Return a node and those that it is computed from, back to the nodes `stop` at most."""
    found: set[fx.Node] = set()
    above = [node]
    while above:
        current = above.pop()
        if current not in found:
            found.add(current)
            above += () if current in set(stop) else current.all_input_nodes
    return found


def _framed(
    module: nn.Module, body: set[fx.Node], adapter: frozenset[fx.Node], names: tuple[str, ...]
) -> Neighborhood:
    """Add the direct inputs and users of the nodes, and put all in graph order."""
    inputs = {n for node in body for n in node.all_input_nodes}
    users = {n for node in body for n in node.users}
    border = frozenset((inputs | users) - body)
    graph = next(iter(body)).graph
    nodes = tuple(node for node in graph.nodes if node in body or node in border)
    weights = frozenset(n for n in nodes if n.op == "get_attr" and str(n.target) in names)
    shapes = {node: _shape(module, node) for node in nodes}
    return Neighborhood(nodes, adapter, weights, border - weights, shapes)


def _shape(module: nn.Module, node: fx.Node) -> str:
    value = example_value(node)
    if value is None and node.op == "get_attr":
        held = dict(module.named_parameters(remove_duplicate=False)).get(str(node.target))
        value = held if held is not None else value
    if value is None:
        return ""
    sizes = [str(n) if isinstance(n, int) else "*" for n in value.shape]
    return "x".join(sizes) or "scalar"
