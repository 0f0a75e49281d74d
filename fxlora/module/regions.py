"""The parameters that regions do not cover, and the text of a module captured by regions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..tables import render, some

if TYPE_CHECKING:
    from .captured import CapturedModule


def uncovered(module: CapturedModule) -> dict[str, str]:
    """Return the parameters whose reads are not all in graphs, and where Python reads them.

    Includes all names of tied parameters. The place is "" for a parameter that nothing was seen
    to read.
    """
    if not module.parent_module:
        return {}
    graphs = module.distinct_graphs()
    read = {str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")}
    python_reads = module.parent_module.reads
    found: dict[str, str] = {}
    for names in module.aliases().values():
        place = next((python_reads[name] for name in names if name in python_reads), None)
        if place is not None or read.isdisjoint(names):
            found |= dict.fromkeys(names, place or "")
    return found


def described(module: CapturedModule, why: str) -> str:
    """Return a table of the regions, and the parameters that no region covers."""
    table = render(
        ("region", "graphs", "nodes", "parameters"),
        [_row(module, path) for path in module.regions],
    )
    bare = [f"{name} ({place})" if place else name for name, place in uncovered(module).items()]
    return (
        f"{type(module).__name__}, captured by regions ({why})\n{table}\n"
        f"covered by no region: {some(bare, 20) or 'no parameter'}"
    )


def _row(module: CapturedModule, path: str) -> list[str]:
    programs = [program for program in module.programs if program.path == path]
    nodes = sum(len(graph.nodes) for p in programs for graph in p.distinct_graphs())
    size = sum(parameter.numel() for parameter in module.get_submodule(path).parameters())
    return [path, str(len(programs)), str(nodes), f"{size:,}"]
