"""Names in a graph that torch.fx can write into the code that it generates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ..errors import CaptureError
from ..names import is_path, shown


def refuse_unwritable(graph: fx.Graph) -> None:
    """Raise where torch.fx would write a name into source that means something else there.

    Raises:
        CaptureError: a name in the graph could run as code, or not be found again.
    """
    refuse_unwritable_names(
        node.args[1] if node.target is getattr and len(node.args) > 1 else node.target
        for node in graph.nodes
        if node.op in ("get_attr", "call_module") or node.target is getattr
    )


def refuse_unwritable_names(names: Iterable[Any]) -> None:
    """The same for names that torch is about to put into a graph; None is no name."""
    for name in names:
        if name is not None and not is_path(name):
            raise CaptureError(
                f"the model has a part called {shown(name)}, which torch.fx cannot write into "
                "its code: no quotes, backslashes or ends of lines, no keyword of Python's. Give "
                "it another name."
            )
