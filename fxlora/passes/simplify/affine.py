"""FoldAffine: scales and shifts into the layer before them, as batch norms in eval are.

Behind a layer W x + b, a call y = s·x + t is the layer (s·W) x + (s·b + t). Which calls are affine,
and which are layers, is known by definition: `affine_ops.py` and `AFFINE_READS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...fx.calls import argument, example_value, named_argument
from ...lora.layout import OUTPUT
from ...lora.ops import AFFINE_READS, OPS
from ...lora.row import Op
from ...module import CapturedModule
from ...module.state import State
from ..base import Pass
from .affine_ops import channelwise, is_bounded, scale_of
from .values import Constants, is_pure

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold affine calls into the layer before them, and consecutive scales into one."""

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            held = Constants(graph, module)
            for node in list(graph.nodes):
                source = _only_data(node, held)
                if source is None or list(source.users) != [node]:
                    continue
                if (layer := _Layer.of(source, held)) is not None:
                    _absorb(layer, node, held)
                elif (before := _only_data(source, held)) is not None:
                    _merge_scales(source, node, before, held)
        return module.known


def _only_data(node: fx.Node, held: Constants) -> fx.Node | None:
    """Return the only input of a pure call that is no constant, in its dtype and shape, or None."""
    if not is_pure(node) or node in held.nodes:
        return None
    data = [given for given in node.all_input_nodes if given not in held.nodes]
    if len(data) != 1:
        return None
    given, result = example_value(data[0]), example_value(node)
    if given is None or result is None or not given.is_floating_point():
        return None
    alike = given.dtype == result.dtype and given.ndim == result.ndim
    return data[0] if alike else None


@dataclass(frozen=True)
class _Layer:
    """A layer whose weight and bias are constants that the graph fetches.

    Attributes:
        node: its call.
        row: the row of its op.
        weight: the node of its weight.
        bias: the node of its bias, or None.
        dim: the dimension of the weight with the output features, those of one group.
        features: the number of output features.
        groups: the number of groups, in each of which the weight has inputs of its own.
    """

    node: fx.Node
    row: Op
    weight: fx.Node
    bias: fx.Node | None
    dim: int
    features: int
    groups: int

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight with the output features first, (out, …)."""
        if self.groups == 1:
            return weight.movedim(self.dim, 0)
        # (in, out / groups, …) -> (groups, in / groups, out / groups, …)
        return weight.unflatten(0, (self.groups, -1)).movedim(2, 1).flatten(0, 1)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the weight whose rows these are."""
        if self.groups == 1:
            return rows.movedim(0, self.dim)
        return rows.unflatten(0, (self.groups, -1)).movedim(1, 2).flatten(0, 1)

    @classmethod
    def of(cls, node: fx.Node, held: Constants) -> _Layer | None:
        ours = [(op, at) for op, at in AFFINE_READS if op is node.target and (op, at) in OPS]
        found = (cls._of_row(node, argument(node, at), OPS[op, at], held) for op, at in ours)
        return next(filter(None, found), None)

    @classmethod
    def _of_row(cls, node: fx.Node, weight: Any, row: Op, held: Constants) -> _Layer | None:
        example = example_value(node)
        bias = None if row.bias is None else argument(node, row.bias)
        fetched = [given for given in (weight, bias) if given is not None]
        if example is None or not all(held.fetches(given) for given in fetched):
            return None
        shape = tuple(held.of(weight).shape)
        layout = row.layout_of(node, weight, len(shape))
        if layout is None or row.output is None or row.result is not None:
            return None
        if layout.stacked or layout.roles.count(OUTPUT) > 1 or row.obstacle(node, weight, shape):
            return None
        groups = named_argument(node, "groups") if row.in_first and layout.part_dim == 1 else 1
        features = shape[layout.part_dim] * (groups or 1)
        if example.shape[row.output] != features:
            return None
        if bias is not None and tuple(held.of(bias).shape) != (features,):
            return None
        return cls(node, row, weight, bias, layout.part_dim, features, groups or 1)


def _absorb(layer: _Layer, after: fx.Node, held: Constants) -> None:
    """Fold a call after a layer into its weight and bias, if it is affine."""
    node, position, output = layer.node, layer.row.bias, layer.row.output
    example = example_value(node)
    assert example is not None and output is not None
    found = channelwise(after, node, example.ndim, output, layer.features, held)
    if found is None or (position is None and bool(found.shift.any())):
        return
    weight = held.of(layer.weight)
    scale, shift = (value.to(weight.device) for value in found)
    rows = layer.rows(weight.double())
    rounded = _rounded(rows * scale.reshape(-1, *[1] * (rows.ndim - 1)), weight.dtype)
    old = 0.0 if layer.bias is None else held.of(layer.bias).double()
    bias = (old * scale + shift).to(weight.dtype)
    if rounded is None or not bool(bias.isfinite().all()):
        return
    scaled = torch.empty_like(weight).copy_(layer.from_rows(rounded))  # with its strides
    if not torch.equal(scaled, weight):
        if held.takes_memory(layer.weight, scaled):
            return
        node.replace_input_with(layer.weight, held.replaced(layer.weight, node, scaled))
    if position is not None and layer.bias is not None:
        node.replace_input_with(layer.bias, held.replaced(layer.bias, node, bias))
    elif position is not None and bool(bias.any()):
        owner = str(layer.weight.target).rpartition(".")[0]
        name = f"{owner}.bias" if owner else "bias"
        _set_argument(node, position, held.new(name, bias, node))
    after.replace_all_uses_with(node)
    after.graph.erase_node(after)


def _rounded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the rows of a weight in a dtype; None if that changes one by more than rounding does.

    Numbers below the smallest normal one of the dtype lose digits, all of them in the end. Rows
    that are negligible beside the largest may.
    """
    rounded, eps = rows.to(dtype), torch.finfo(dtype).eps
    if not bool(rounded.isfinite().all()):
        return None
    sizes, errors = (
        torch.linalg.vector_norm(of.flatten(1), dim=1) for of in (rows, rounded.double() - rows)
    )
    negligible = eps * sizes.max() if sizes.numel() else sizes.sum()
    return rounded if bool((errors <= eps * sizes.clamp_min(negligible)).all()) else None


def _set_argument(node: fx.Node, position: int, value: fx.Node) -> None:
    """Set an argument of a call by its position in the schema; those before it get positions."""
    schema: Any = getattr(node.target, "_schema", None)
    before = [argument(node, place) for place in range(position)]
    taken = {declared.name for declared in schema.arguments[: position + 1]}
    node.args = (*before, value, *node.args[position + 1 :])
    node.kwargs = {name: given for name, given in node.kwargs.items() if name not in taken}


def _merge_scales(first: fx.Node, second: fx.Node, source: fx.Node, held: Constants) -> None:
    """Make two products with constants in a row one product."""
    example = example_value(source)
    scales = [scale_of(first, source, held), scale_of(second, first, held)]
    if example is None or scales[0] is None or scales[1] is None:
        return
    both = scales[0] * scales[1]
    if both.ndim > example.ndim or not _keeps(source, scales[0], scales[1], example.dtype):
        return
    graph = second.graph
    # The constants are in the dtype and on the device of now; the example may be of before a move.
    used = [held.of(n) for call in (first, second) for n in call.all_input_nodes if n in held.nodes]
    if (not used and both.ndim) or not all(tensor.is_floating_point() for tensor in used):
        return
    factor: Any = float(both) if not used else None
    if used:
        kind = max(used, key=lambda tensor: tensor.ndim > 0)  # without dimensions, none promotes
        value = both.to(kind.device, kind.dtype)
        errors, eps = (value.to(both) - both).abs(), torch.finfo(example.dtype).eps
        if bool((errors > eps * both.abs()).any()):
            return
        factor = held.new(f"_simplified.{second.name}", value, first)
    with graph.inserting_before(first):  # the source may be written to after it
        made = graph.create_node("call_function", aten.mul.Tensor, (source, factor))
    made.meta = dict(second.meta)
    second.replace_all_uses_with(made)
    for old in (second, first):
        graph.erase_node(old)


def _keeps(source: fx.Node, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether x·first·second is x·(first·second) for all x in a dtype, overflow included.

    The first product may overflow where both together do not, if it is larger and x is not bounded.
    Where it loses digits below the smallest normal number, so does the second, by up to ε² in all.
    """
    both, limits = first * second, torch.finfo(dtype)
    for scale in (first, second, both):
        rounded = scale.to(dtype)
        if not bool(rounded.isfinite().all()) or not torch.equal(rounded == 0, scale == 0):
            return False
    overflows = (first.abs() > 1) & (first.abs() > both.abs())
    lost = second.abs() * limits.tiny * limits.eps
    fits = is_bounded(source) or not bool(overflows.any())
    return fits and bool((lost <= limits.eps**2).all())
