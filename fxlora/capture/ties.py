"""Tied weights: each read goes by the name that its module has for the tensor.

torch.export fetches a tensor that has several names under any of them. Where each call site fetches
its own, an adapter can stand at one of them alone, and folding it changes constants only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..module import CapturedModule
from ..provenance import call_site


def read_by_own_names(module: CapturedModule) -> None:
    """Let every module's read of a tied weight fetch it under that module's name."""
    ties = [names for names in module.aliases().values() if len(names) > 1]
    for graph in module.distinct_graphs() if ties else ():
        for node in list(graph.nodes):
            names = next((n for n in ties if node.target in n), None)
            if node.op == "get_attr" and names:
                _split(graph, node, names)
    if ties:
        module.refresh()


def _split(graph: fx.Graph, node: fx.Node, names: Sequence[str]) -> None:
    own = {user: _own_name(call_site(user), names) or str(node.target) for user in node.users}
    for name in dict.fromkeys(own.values()):
        if name == node.target:
            continue
        with graph.inserting_after(node):
            fetched = graph.create_node("get_attr", name)
        fetched.meta = dict(node.meta)
        for user in [user for user, mine in own.items() if mine == name]:
            user.replace_input_with(node, fetched)
    if not node.users:
        graph.erase_node(node)


def _own_name(site: str, names: Sequence[str]) -> str | None:
    """The name that the module which calls has for the weight: of the innermost that has one."""
    owners = {name.rpartition(".")[0]: name for name in reversed(names)}
    around = [owner for owner in owners if owner and f"{site}.".startswith(f"{owner}.")]
    return owners[max(around, key=len)] if around else None
