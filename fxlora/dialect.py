"""The dialect: how Python spells the ops that read weights, and their aten overloads.

Everything after capture sees aten overloads only. torch.export emits them itself; graphs from
the symbolic tracer hold functions and methods, which `spelled` translates.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .nested import call_of

aten = torch.ops.aten

# Modules whose forward is one such op: the tracer goes inside them.
WEIGHT_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.Bilinear,
)


@dataclass(frozen=True)
class Spelling:
    """A Python function: its parameters in order, their defaults, the overload it stands for."""

    parameters: tuple[str, ...]
    overload: Callable[[dict[str, Any]], Any]
    order: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def bind(self, node: fx.Node) -> dict[str, Any]:
        given = dict(zip(self.parameters, node.args, strict=False))
        return {**self.defaults, **given, **node.kwargs}


def _convolution(dims: int) -> Spelling:
    packet = getattr(aten, f"conv{dims}d")

    def overload(bound: dict[str, Any]) -> Any:
        return packet.padding if isinstance(bound["padding"], str) else packet.default

    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    one = (1,) * dims
    defaults = {
        "bias": None,
        "stride": one,
        "padding": (0,) * dims,
        "dilation": one,
        "groups": 1,
    }
    return Spelling(names, overload, names, defaults)


def _plain(overload: Any, *names: str, **defaults: Any) -> Spelling:
    return Spelling(names, lambda _: overload, names, defaults)


_LINEAR = _plain(aten.linear.default, "input", "weight", "bias", bias=None)
_MATMUL = _plain(aten.matmul.default, "input", "other")
_MM = _plain(aten.mm.default, "input", "mat2")
_ADDMM = Spelling(
    ("input", "mat1", "mat2"), lambda _: aten.addmm.default, ("input", "mat1", "mat2")
)
_EMBEDDING = Spelling(
    (
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ),
    lambda _: aten.embedding.default,
    ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    {
        "padding_idx": None,
        "max_norm": None,
        "norm_type": 2.0,
        "scale_grad_by_freq": False,
        "sparse": False,
    },
)

SPELLINGS: dict[object, Spelling] = {
    F.linear: _LINEAR,
    torch.matmul: _MATMUL,
    operator.matmul: _MATMUL,
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    torch.mm: _MM,
    "mm": _MM,
    torch.addmm: _ADDMM,
    F.embedding: _EMBEDDING,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
}


def lower(graph: fx.Graph) -> None:
    """Rewrite every spelling in a traced graph as its aten overload, in place."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or node.target not in SPELLINGS:
            continue
        spelling = SPELLINGS[node.target]
        bound = spelling.bind(node)
        # A call with more than these (beta=, out=) stays: the weight form serves any function.
        if set(bound) == set(spelling.parameters):
            _replace(graph, node, spelling, bound)


def _replace(graph: fx.Graph, node: fx.Node, spelling: Spelling, bound: dict[str, Any]) -> None:
    with graph.inserting_before(node):
        if bound.get("max_norm") is not None:
            weight = graph.call_function(aten.detach.default, (bound["weight"],))
            renorm = (weight, bound["input"], bound["max_norm"], bound["norm_type"])
            graph.call_function(aten.embedding_renorm_.default, renorm)
        if spelling is _EMBEDDING and bound["padding_idx"] is None:
            bound["padding_idx"] = -1
        args = tuple(bound[name] for name in spelling.order)
        new = graph.call_function(spelling.overload(bound), args)
    new.meta = node.meta
    node.replace_all_uses_with(new)
    graph.erase_node(node)


# ---- writes -------------------------------------------------------------------------------------


def written_attributes(node: fx.Node, owner: nn.Module) -> list[str]:
    """Names of the parameters and buffers that a call writes to.

    Seen through views, nested graphs (of which `owner` holds the graph modules) and Python's
    spellings of writing: `x.add_()`, `x += y`, `out=x`.
    """
    return [str(root.target) for root in written_nodes(node, owner) if root.op == "get_attr"]


def written_nodes(node: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """The nodes whose tensors a call writes to, itself or through a view of theirs."""
    return [_alias_root(value, owner) for value in _written(node, owner)]


def _written(node: fx.Node, owner: nn.Module) -> Iterator[fx.Node]:
    if node.op == "call_method":
        name, target = str(node.target), node.args[0]
        in_place = name.endswith("_") and not name.endswith("__")
        if (in_place or name == "__setitem__") and isinstance(target, fx.Node):
            yield target
    if node.op != "call_function":
        return
    if node.target in _IN_PLACE_OPERATORS and isinstance(node.args[0], fx.Node):
        yield node.args[0]
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        yield out
    for argument, value in _schema_arguments(node):
        if argument.alias_info and argument.alias_info.is_write and isinstance(value, fx.Node):
            yield value
    yield from _written_by_nested(node, owner)


def _written_by_nested(node: fx.Node, owner: nn.Module) -> Iterator[fx.Node]:
    """What a call passes into nested graphs that write to it."""
    call = call_of(node, owner)
    for nested in call.graphs if call else ():
        given = dict(call.given(nested)) if call else {}
        for inner in nested.graph.nodes:
            for value in _written(inner, nested):
                outside = given.get(_alias_root(value, nested))
                if isinstance(outside, fx.Node):
                    yield outside


def _alias_root(node: fx.Node, owner: nn.Module) -> fx.Node:
    """The node whose tensor this one may be a view of, by the schemas on the way."""
    if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
        passed = _passed_through(source, node.args[1], owner) or source
        return _alias_root(passed, owner)
    if node.op == "call_method" or node.target is getattr:  # .t(), .view(), .data: may be views
        source = node.args[0]
        return _alias_root(source, owner) if isinstance(source, fx.Node) else node
    for argument, value in _schema_arguments(node):
        if argument.alias_info and isinstance(value, fx.Node):
            return _alias_root(value, owner)
    return node


def _passed_through(node: fx.Node, index: Any, owner: nn.Module) -> fx.Node | None:
    """What a call of nested graphs is given that its result `index` may be a view of."""
    call = call_of(node, owner)
    for nested in call.graphs if call else ():
        results: Any = nested.graph.output_node().args[0]
        if isinstance(results, list | tuple) and isinstance(results[index], fx.Node):
            given = dict(call.given(nested)) if call else {}
            outside = given.get(_alias_root(results[index], nested))
            if isinstance(outside, fx.Node):
                return outside
    return None


_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or")
) | {operator.setitem}


def _schema_arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    if node.op == "call_function":
        yield from arguments_of(node.target, node.args, node.kwargs)


def arguments_of(
    op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """The arguments that an op's schema declares, each with what a call gives for it."""
    schema = getattr(op, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema else ()):
        given = position < len(args)
        yield argument, args[position] if given else kwargs.get(argument.name)
