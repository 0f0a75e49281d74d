"""Refuse names in a graph that torch.fx cannot write into the code that it generates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ..errors import CaptureError
from ..names import is_path, shown


def refuse_unwritable(graph: fx.Graph) -> None:
    """Raise if torch.fx would write a name into generated code with another meaning.

    Raises:
        CaptureError: a name in the graph could run as code, or would not be found again.
    """
    refuse_unwritable_names(
        node.args[1] if node.target is getattr and len(node.args) > 1 else node.target
        for node in graph.nodes
        if node.op in ("get_attr", "call_module") or node.target is getattr
    )


def refuse_unwritable_names(names: Iterable[Any]) -> None:
    """Raise as `refuse_unwritable` does, for names that torch will put into a graph; skip None."""
    for name in names:
        if name is not None and not is_path(name):
            raise CaptureError(
                f"the model has a part named {shown(name)}, which torch.fx cannot write into its "
                "code: a name must not contain quotes, backslashes or line breaks, and must not "
                "be a Python keyword. Rename the part."
            )
