"""Lower the Python calls of ops that read weights to aten overloads.

After capture, the ops that read weights are aten overloads. torch.export emits them itself;
graphs from the symbolic tracer hold functions and methods, which `lower` replaces.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer

aten = torch.ops.aten

# Modules whose forward is a single op that reads a weight: the tracer goes inside them.
WEIGHT_MODULES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
)


Bound = dict[str, Any]


def _as_given(bound: Bound) -> None:
    return None


@dataclass(frozen=True)
class Spelling:
    """A Python function or method, and the aten overload that replaces calls of it.

    Attributes:
        parameters: names of the function's parameters, in order.
        overload: returns the overload for a call's arguments.
        order: the overload's arguments, by the names in `parameters` or added by `prepare`.
        defaults: default values of the parameters.
        prepare: repeats the function's steps before its call of the overload: changes the
            arguments, whose nodes are torch.fx proxies, in place.
        result: index of the overload's result that the function returns, if it has several.
    """

    parameters: tuple[str, ...]
    overload: Callable[[Bound], Any]
    order: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    prepare: Callable[[Bound], None] = _as_given
    result: int | None = None

    def bind(self, node: fx.Node) -> Bound | None:
        """Return the arguments of a call by name, or None if it has others (beta=, out=)."""
        given = dict(zip(self.parameters, node.args, strict=False))
        bound = {**self.defaults, **given, **node.kwargs}
        fits = len(node.args) <= len(self.parameters) and set(bound) == set(self.parameters)
        return bound if fits else None


def _plain(overload: Any, *names: str, **defaults: Any) -> Spelling:
    return Spelling(names, lambda _: overload, names, defaults)


def _convolution(dims: int) -> Spelling:
    packet = getattr(aten, f"conv{dims}d")

    def overload(bound: Bound) -> Any:
        return packet.padding if isinstance(bound["padding"], str) else packet.default

    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    one = (1,) * dims
    defaults = {"bias": None, "stride": one, "padding": (0,) * dims, "dilation": one, "groups": 1}
    return Spelling(names, overload, names, defaults)


def _transposed_convolution(dims: int) -> Spelling:
    packet = getattr(aten, f"conv_transpose{dims}d")
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    one, none = (1,) * dims, (0,) * dims
    values = (None, one, none, none, 1, one)
    overload = packet.default if dims == 1 else packet.input
    return _plain(overload, *names, **dict(zip(names[2:], values, strict=True)))


def _two_operands(bound: Bound) -> None:
    bound["operands"] = [bound.pop("first"), bound.pop("second")]


def _renormed(bound: Bound) -> None:
    if bound["max_norm"] is not None:
        weight = aten.detach.default(bound["weight"])
        aten.embedding_renorm_.default(
            weight, bound["input"], bound["max_norm"], bound["norm_type"]
        )


def _look_up(bound: Bound) -> None:
    _renormed(bound)
    row = bound["padding_idx"]
    if row is None:
        bound["padding_idx"] = -1
    elif row < 0:  # F.embedding counts it from the end
        bound["padding_idx"] = row + aten.sym_size.int(bound["weight"], 0)


def _bags(bound: Bound) -> None:
    if bound["offsets"] is None:  # each row is a bag
        index = bound["input"]
        size, like = index.size(1), {"dtype": index.dtype, "device": index.device}
        bound["offsets"] = aten.arange.start_step(0, index.numel(), size, **like)
        bound["input"] = index.reshape(-1)
        if bound["per_sample_weights"] is not None:
            bound["per_sample_weights"] = bound["per_sample_weights"].reshape(-1)
        bound["include_last_offset"] = False
    _renormed(bound)
    bound["mode"] = ("sum", "mean", "max").index(bound["mode"])


_LINEAR = _plain(aten.linear.default, "input", "weight", "bias", bias=None)
_MATMUL = _plain(aten.matmul.default, "input", "other")
_MM = _plain(aten.mm.default, "input", "mat2")
_ADDMM = _plain(aten.addmm.default, "input", "mat1", "mat2")
_BMM = _plain(aten.bmm.default, "input", "mat2")
_BADDBMM = _plain(aten.baddbmm.default, "input", "batch1", "batch2")
# With three or more operands, torch.einsum chooses the order of the contractions.
_EINSUM = Spelling(
    ("equation", "first", "second"),
    lambda _: aten.einsum.default,
    ("equation", "operands"),
    prepare=_two_operands,
)
_OF_LOOK_UPS = {"max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
_EMBEDDING = Spelling(
    ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    lambda _: aten.embedding.default,
    ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    {"padding_idx": None, **_OF_LOOK_UPS},
    _look_up,
)
_EMBEDDING_BAG = Spelling(
    (
        *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode"),
        *("sparse", "per_sample_weights", "include_last_offset", "padding_idx"),
    ),
    lambda _: aten.embedding_bag.padding_idx,
    (
        *("weight", "input", "offsets", "scale_grad_by_freq", "mode", "sparse"),
        *("per_sample_weights", "include_last_offset", "padding_idx"),
    ),
    {
        **_OF_LOOK_UPS,
        "offsets": None,
        "mode": "mean",
        "per_sample_weights": None,
        "include_last_offset": False,
        "padding_idx": None,
    },
    _bags,
    result=0,
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
    "addmm": _ADDMM,
    torch.bmm: _BMM,
    "bmm": _BMM,
    torch.baddbmm: _BADDBMM,
    "baddbmm": _BADDBMM,
    torch.einsum: _EINSUM,
    F.embedding: _EMBEDDING,
    F.embedding_bag: _EMBEDDING_BAG,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
}


def lower(graph: fx.Graph) -> None:
    """Replace the calls in a traced graph that `SPELLINGS` lists by their aten overloads, in place.

    A call with arguments that its `Spelling` lacks is kept: the weight form works for any function.
    """
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method") and node.target in SPELLINGS:
            spelling = SPELLINGS[node.target]
            if bound := spelling.bind(node):
                _replace(graph, node, spelling, bound)


def _as_declared(overload: Any, given: list[Any]) -> list[Any]:
    """Convert arguments to the schema's types: Python accepts one integer for a list of n."""
    declared = overload._schema.arguments
    return [
        _repeated(value, argument.N) if _wants_integers(argument.type) else value
        for argument, value in zip(declared, given, strict=False)
    ]


def _wants_integers(kind: Any) -> bool:
    if isinstance(kind, torch.OptionalType):
        kind = kind.getElementType()
    element = kind.getElementType() if isinstance(kind, torch.ListType) else None
    return isinstance(element, torch.IntType | torch.SymIntType)


def _repeated(value: Any, number: int | None) -> Any:
    """Expand one integer, or a sequence of one, to a list of n integers."""
    if not number or value is None or isinstance(value, fx.Proxy):
        return value
    if isinstance(value, list | tuple):
        return value * number if len(value) == 1 < number else value
    return [value] * number


def _replace(graph: fx.Graph, node: fx.Node, spelling: Spelling, bound: Bound) -> None:
    tracer = GraphAppendingTracer(graph)

    def proxied(given: fx.Node) -> Any:
        return fx.Proxy(given, tracer)

    with graph.inserting_before(node):
        bound = {name: fx.map_arg(given, proxied) for name, given in bound.items()}
        spelling.prepare(bound)
        overload = spelling.overload(bound)
        new: Any = overload(*_as_declared(overload, [bound[name] for name in spelling.order]))
        new.node.meta = node.meta
        returned = new if spelling.result is None else new[spelling.result]
    node.replace_all_uses_with(returned.node)
    graph.erase_node(node)
