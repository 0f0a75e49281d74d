"""Find the linear heads whose logits only a loss reads, or their log-probabilities of some tokens.

One call of `chunks.py` takes the place of the head and of the nodes behind it: a cross-entropy,
also one written as log_softmax and nll_loss, or log_softmax and gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from ..fx.calls import argument, example_value, flat_inputs
from ..fx.marks import ADAPTER, CHUNKED
from ..lora.ops import times_matrix
from .chunks import MEAN, NO_LOSS, SUM, ChunkedLoss, Chunks, LogProbabilities
from .layers import NotJoinable, between, is_barrier, layer_of

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_COPIES = (aten.contiguous.default, aten.clone.default)
_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
# The number of arguments, from the second one on, that are dimensions.
_OF_DIMENSIONS = {aten.slice.Tensor: 1, aten.select.int: 1, aten.flatten.using_ints: 2}


class _NotChunked(Exception):
    """The reason why a loss is not computed for some rows at a time."""


@dataclass(frozen=True)
class _End:
    """A loss of logits, or their log-probabilities of some tokens.

    Attributes:
        loss: the last node.
        logits: what it is computed from.
        targets: the tokens.
        log_softmax: the node between, or None.
    """

    loss: fx.Node
    logits: Any
    targets: Any
    log_softmax: fx.Node | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.loss,) if self.log_softmax is None else (self.log_softmax, self.loss)

    @classmethod
    def of(cls, node: fx.Node) -> _End | None:
        """Return the end that a node is, or None."""
        if node.target == aten.cross_entropy_loss.default:
            return cls(node, argument(node, 0), argument(node, 1))
        targets = {aten.nll_loss_nd.default: 1, aten.nll_loss.default: 1, aten.gather.default: 2}
        position = targets.get(cast("Any", node.target))
        given = node.args[0] if node.args else None
        if position is None or not isinstance(given, fx.Node):
            return None
        if given.target != aten.log_softmax.int:
            return None
        return cls(node, argument(given, 0), argument(node, position), given)


@dataclass(frozen=True)
class _Tail:
    """The end of a graph, as its nodes.

    Attributes:
        weight: the name of the head's weight.
        x: the input of the head.
        head: the nodes of the head, which is linear, with its adapter.
        shaping: the nodes behind it that choose or arrange rows, in order.
        casts: the nodes behind it that cast.
        end: the loss, with what it reads.
    """

    weight: str
    x: fx.Node
    head: tuple[fx.Node, ...]
    shaping: tuple[fx.Node, ...]
    casts: tuple[fx.Node, ...]
    end: _End

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of them, the last one first."""
        order = {node: number for number, node in enumerate(self.end.loss.graph.nodes)}
        found = (*self.head, *self.shaping, *self.casts, *self.end.nodes)
        return tuple(sorted(found, key=lambda node: -order[node]))


def chunk_losses(graph: fx.Graph, fast: Callable[[fx.Graph], fx.Graph]) -> None:
    """Replace each linear head with its cross-entropy by a call that takes some rows at a time.

    Args:
        graph: the graph, which is changed.
        fast: makes the graph of a part, with the head, a fast one.
    """
    found = [end for node in graph.nodes if (end := _End.of(node))]
    for end in found:
        try:
            _replace(_tail_of(end), fast)
        except _NotChunked as reason:
            end.loss.meta[CHUNKED] = ChunkedLoss(reason=str(reason))
    if not found:
        (output,) = graph.find_nodes(op="output")
        output.meta[CHUNKED] = NO_LOSS


# ---- where that is possible ---------------------------------------------------------------------


def _tail_of(end: _End) -> _Tail:
    _check_end(end)
    shaping: list[fx.Node] = []
    casts: list[fx.Node] = []
    node = end.logits
    while not (isinstance(node, fx.Node) and _is_head(node)):
        if not isinstance(node, fx.Node) or not node.args:
            raise _NotChunked("is not of the outputs of a linear layer")
        if node.target in _CASTS and node.all_input_nodes == [node.args[0]]:
            casts.insert(0, node)
        elif node.target in _COPIES or _keeps_rows(node):
            shaping.insert(0, node)
        else:
            raise _NotChunked(f"is not of the outputs of a linear layer, but of {node.target}")
        node = node.args[0]
    tail = _Tail(*_head(node), tuple(shaping), tuple(casts), end)
    twice = any(flat_inputs(n).count(tail.x) > 1 for n in tail.head)
    if twice or any(_is_computed_from(given, tail.x) for given in _operands(tail)):
        raise _NotChunked("is of a head whose weight or bias depends on its input")
    _check(tail)
    return tail


def _check_end(end: _End) -> None:
    """Raise _NotChunked unless each row of logits has targets of its own."""
    loss, logits, softmax = end.loss, example_value(end.logits), end.log_softmax
    targets = example_value(end.targets)
    last = None if logits is None else (-1, logits.ndim - 1)
    if softmax is not None and (last is None or argument(softmax, 1) not in last):
        raise _NotChunked("is not over the last dimension")
    if loss.target == aten.gather.default:
        if last is None or targets is None or argument(loss, 1) not in last or argument(loss, 3):
            raise _NotChunked("is not over the last dimension")
    elif argument(loss, 2) is not None or argument(loss, 3) not in (MEAN, SUM):
        raise _NotChunked("weighs the classes, or has no mean and no sum")
    elif _dims(end.logits) != 2 or _dims(end.targets) != 1:
        raise _NotChunked("is not of one row of logits for each target")


def _operands(tail: _Tail) -> list[fx.Node]:
    """Return what the head reads besides the rows of x."""
    given = [node for n in tail.head for node in n.all_input_nodes]
    return [node for node in dict.fromkeys(given) if node is not tail.x and node not in tail.head]


def _is_computed_from(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node depends on another, or is it."""
    seen: set[fx.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node is source:
            return True
        if node not in seen:
            seen.add(node)
            left += node.all_input_nodes
    return False


def _is_head(node: fx.Node) -> bool:
    return ADAPTER in node.meta or times_matrix(node.target) is not None


def _head(node: fx.Node) -> tuple[str, fx.Node, tuple[fx.Node, ...]]:
    """Return the weight, the input and the nodes of the linear layer that ends at a node."""
    if ADAPTER in node.meta:
        try:
            layer = layer_of(node)
        except NotJoinable as reason:
            raise _NotChunked(f"is of a head whose adapter {reason}") from None
        return _name(layer.weight), layer.x, layer.nodes
    found = times_matrix(node.target)
    assert found is not None
    at, row = found
    x, weight = argument(node, row.input), argument(node, at)
    bias = None if row.bias is None else argument(node, row.bias)
    if not isinstance(x, fx.Node) or _dims(weight) != 2 or (bias is not None and _dims(bias) != 1):
        raise _NotChunked("is not of the outputs of a linear layer")
    return _name(weight), x, (node,)


def _name(weight: fx.Node) -> str:
    """Return the name of a weight, which may be transposed or cast."""
    while weight.op != "get_attr" and len(weight.all_input_nodes) == 1:
        (weight,) = weight.all_input_nodes
    return str(weight.target if weight.op == "get_attr" else weight)


def _keeps_rows(node: fx.Node) -> bool:
    """Whether a node chooses or arranges rows of its input, and leaves each row as it is."""
    given, found = example_value(node.args[0]), example_value(node)
    if given is None or found is None or not given.ndim or not found.ndim:
        return False
    if node.target in _VIEWS:
        sizes: Any = node.args[1]
        last = given.shape[-1]
        return isinstance(last, int) and list(sizes)[-1:] == [last] == list(found.shape[-1:])
    target: Any = node.target
    count = _OF_DIMENSIONS.get(target, 0)
    declared = [argument(node, 1 + n) for n in range(count)]
    return bool(declared) and all(
        isinstance(dim, int) and dim % given.ndim < given.ndim - 1 for dim in declared
    )


def _check(tail: _Tail) -> None:
    """Raise _NotChunked if somebody else reads a value of the tail, or may write to one."""
    own = set(tail.nodes)
    if any(not own.issuperset(node.users) for node in tail.nodes[1:]):
        raise _NotChunked("is of logits that are also returned, or read elsewhere")
    order = {node: number for number, node in enumerate(tail.end.loss.graph.nodes)}
    barriers = [number for node, number in order.items() if is_barrier(node)]
    if between(barriers, order[tail.nodes[-1]], order[tail.end.loss]):
        raise _NotChunked("has nodes in front of it that may write to a tensor")
    if _dims(tail.x) is None or not isinstance(_width(tail.x), int):
        raise _NotChunked("is of a head whose input has no known width")


def _dims(value: Any) -> int | None:
    example = example_value(value)
    return None if example is None else example.ndim


def _width(node: fx.Node) -> Any:
    example = example_value(node)
    return None if example is None or not example.ndim else example.shape[-1]


# ---- the call -----------------------------------------------------------------------------------


def _replace(tail: _Tail, fast: Callable[[fx.Graph], fx.Graph]) -> None:
    end = tail.end
    graph, loss = end.loss.graph, end.loss
    operands = _operands(tail)
    found = ChunkedLoss(tail.weight, int(_width(end.logits)))
    inner = fx.GraphModule(nn.Module(), fast(_part(tail, operands)))
    dtype = None if end.log_softmax is None else argument(end.log_softmax, 2)
    if loss.target == aten.gather.default:
        function: Any = LogProbabilities(inner, found, dtype)
    else:
        smoothing = argument(loss, 5) if end.log_softmax is None else 0.0
        function = Chunks(inner, found, argument(loss, 3), argument(loss, 4), smoothing, dtype)
    with graph.inserting_before(loss):
        call = graph.call_function(function, (_rows(tail), end.targets, *operands))
    call.meta = {**loss.meta, CHUNKED: found}
    loss.replace_all_uses_with(call)
    for node in tail.nodes:
        graph.erase_node(node)


def _rows(tail: _Tail) -> fx.Node:
    """Choose and arrange the rows of x as the tail does those of the logits."""
    graph, rows = tail.end.loss.graph, tail.x
    for node in tail.shaping:
        target, sizes = cast("tuple[Any, Any]", (node.target, argument(node, 1)))
        if target in _VIEWS:
            rows = graph.call_function(aten.reshape.default, (rows, [*sizes[:-1], _width(tail.x)]))
        elif target not in _COPIES:
            rows = graph.call_function(target, (rows, *node.args[1:]), dict(node.kwargs))
    return rows


def _part(tail: _Tail, operands: list[fx.Node]) -> fx.Graph:
    """Return the graph of some rows: (rows, *operands) → logits."""
    graph = fx.Graph()
    made = {node: graph.placeholder(f"given_{n}") for n, node in enumerate((tail.x, *operands))}
    for node, given in made.items():
        given.meta = _known(node)
    head = [node for node in reversed(tail.nodes) if node in tail.head]
    for node in head:
        made[node] = graph.node_copy(node, made.__getitem__)
    logits = made[head[-1]]
    for node in tail.casts:
        cast_: Any = node.target
        logits = graph.call_function(cast_, (logits, *node.args[1:]), dict(node.kwargs))
    graph.output(logits)
    return graph


def _known(node: Any) -> dict[str, Any]:
    value = example_value(node)
    return {} if value is None else {"val": value}
