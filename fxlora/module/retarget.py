"""Update the devices and dtypes that a graph names when the weights move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ..errors import CaptureError
from ..fx.calls import example_value
from .casts import is_cast

MOVED = "module_moved"  # key in a node's meta: the dtype of its example may not be its dtype now

Moves = dict[Any, Any]  # old device → new device, old dtype → new dtype

_WIDTH = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}


def moves_of(tensors: Iterable[torch.Tensor], fn: Callable[[torch.Tensor], torch.Tensor]) -> Moves:
    """Return the devices and dtypes of a module's tensors that `fn` changes."""
    moves: Moves = {}
    kinds = {(t.device, t.dtype) for t in tensors}
    for device, dtype in kinds:
        old = torch.empty(0, device=device, dtype=dtype)
        new = fn(old)
        for before, after in ((old.device, new.device), (old.dtype, new.dtype)):
            if before != after:
                moves[before] = after
    return moves


def retarget(graph: fx.Graph, moves: Moves) -> None:
    """Replace the devices and dtypes in the arguments of a graph's calls.

    If dtypes change, each floating-point node is marked with `MOVED`: the dtype of its example
    value may no longer be that of its result.
    """
    casts = any(isinstance(old, torch.dtype) for old in moves)

    def moved(value: Any) -> Any:
        return moves.get(value, value) if isinstance(value, torch.device | torch.dtype) else value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)
        value = example_value(node)
        if casts and value is not None and (value.is_floating_point() or value.is_complex()):
            node.meta[MOVED] = True


def refuse_ambiguous_casts(graph: fx.Graph, moves: Moves) -> None:
    """Raise if the move would change a dtype that a call in the graph names to a narrower one.

    For `x.to(float32)` or `softmax(x, dtype=float32)`, the graph does not tell whether the source
    means float32 or the dtype of its weights, and a wrong guess would lose precision silently.

    Raises:
        CaptureError: names the call.
    """
    for node in (node for node in graph.nodes if not is_cast(node)):
        for old in (*node.args, *node.kwargs.values()):
            new = moves.get(old) if isinstance(old, torch.dtype) else None
            if new in _WIDTH and _WIDTH[new] < _WIDTH.get(old, 0) and _computes(node):
                line = (node.stack_trace or "").strip().splitlines()[-2:]
                raise CaptureError(
                    f"the captured graph computes in {old} at node '{node.name}' "
                    f"({' '.join(part.strip() for part in line)}); only the source model knows "
                    f"whether that should become {new}. Cast the source (model.to({new})) and "
                    "capture that."
                )


def _computes(node: fx.Node) -> bool:
    """Whether a call has a result, and does not only assert something about its inputs."""
    schema: Any = getattr(node.target, "_schema", None)
    return node.op == "call_function" and (schema is None or bool(schema.returns))
