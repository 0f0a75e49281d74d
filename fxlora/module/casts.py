"""Casts in the graphs, where A and B are held in another dtype than the weight that they adapt.

A pass marks the nodes whose users need the dtype of another tensor (`mark`). From these marks and
the present dtypes of the tensors, `set_casts` makes the casts: one node each, and none where the
dtypes are equal. It also updates them when the module moves to another dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .routing import dropout_of, scaling_of

if TYPE_CHECKING:
    from .captured import CapturedModule

aten = torch.ops.aten

_POINT = "fxlora_cast_point"  # key in a node's meta; the value is a _Point
_CAST = "fxlora_cast"  # key in the meta of a cast

Fn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Point:
    """A place for a cast: after a node.

    Attributes:
        source: name of the parameter whose dtype the node's result has.
        target: name of the parameter whose dtype the node's users need.
        widens: whether the users also take the result in its own dtype if that is wider.
    """

    source: str
    target: str
    widens: bool

    def dtype(self, module: CapturedModule) -> torch.dtype | None:
        """Return the dtype to cast to, or None if none is needed."""
        source = module.get_parameter(self.source).dtype
        target = base_dtype(module, self.target)
        if self.widens:
            target = torch.promote_types(source, target)
        return None if source == target else target


def base_dtype(module: CapturedModule, name: str) -> torch.dtype:
    """Return a parameter's dtype in the graphs: if it trains in full, that of its original."""
    held = module.known.originals.get(name) if name in module.trained else None
    return module.get_parameter(name).dtype if held is None else held.dtype


def mark(value: Any, source: str, target: str, widens: bool = False) -> Any:
    """Mark a node as a place for a cast; return the value unchanged.

    Args:
        value: the node, or a proxy of it. Tensors are computed with as they are.
        source: name of the parameter whose dtype it has.
        target: name of the parameter whose dtype its users need.
        widens: whether only a cast to a wider dtype is needed.
    """
    node = value.node if isinstance(value, fx.Proxy) else value
    if isinstance(node, fx.Node):
        node.meta[_POINT] = _Point(source, target, widens)
    return value


def set_casts(module: CapturedModule) -> None:
    """Cast every marked node of the graphs to the dtype that its users need, if it has another."""
    for graph in _every_graph(module):
        drop_casts(graph)
        for node in list(graph.nodes):
            point: _Point | None = node.meta.get(_POINT)
            if point and node.users and (dtype := point.dtype(module)):
                with graph.inserting_before(min(node.users)):
                    cast = graph.call_function(aten.to.dtype, (node, dtype))
                cast.meta[_CAST] = True
                node.replace_all_uses_with(cast, delete_user_cb=_is_no_cast)


def _is_no_cast(user: fx.Node) -> bool:
    return not is_cast(user)


def unmark(module: CapturedModule) -> None:
    """Take all casts and their marks out of the graphs."""
    for graph in _every_graph(module):
        drop_casts(graph)
        for node in graph.nodes:
            node.meta.pop(_POINT, None)


def drop_casts(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if is_cast(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)


def is_cast(node: fx.Node) -> bool:
    """Whether a node is a cast that `set_casts` made."""
    return _CAST in node.meta


def _every_graph(module: CapturedModule) -> Iterator[fx.Graph]:
    yield from module.distinct_graphs()
    yield from (nested.graph for nested in module.nested_graphs())


# ---- moves of the module ------------------------------------------------------------------------


def base_tensors(module: CapturedModule) -> list[torch.Tensor]:
    """Return the tensors of the model itself, in the dtypes that the graphs were made for."""
    own = {id(module.get_parameter(n)) for n in module.adapter_parameters() | module.trained}
    held = [parameter for parameter in module.parameters() if id(parameter) not in own]
    aside = (tensor for kept in module.known.buffers.values() for tensor in kept.values())
    return [*held, *module.buffers(), *module.known.originals.values(), *aside]


def keeping_dtypes(module: CapturedModule, fn: Fn) -> Fn:
    """Return a function that moves a module's tensors as `fn` does, but keeps the plan's dtypes.

    If `fn` would cast a tensor that trains, the tensor is cast to its dtype in the plan instead,
    and never by way of the model's dtype, which may be narrower.
    """
    plan, known = module.plan, module.known
    wanted: dict[int, torch.dtype] = {}

    def want(name: str, dtype: torch.dtype) -> None:
        parameter = module.get_parameter(name)
        wanted[id(parameter)] = dtype
        if parameter.grad is not None:
            wanted[id(parameter.grad)] = dtype

    routing = known.routing
    adapters = [entry for each in known.adapters.values() for entry in each]
    for entry in (*adapters, *(routing.entries if routing else ())):
        weight = _moved_empty(module.get_parameter(entry.parameter), fn).dtype
        for name in entry.tensors:
            want(name, entry.dtype_over(weight))
    for entry in routing.entries if routing else ():
        weight = _moved_empty(module.get_parameter(entry.parameter), fn).dtype
        for name in (scaling_of(entry), *((dropout_of(entry),) if entry.dropout else ())):
            want(name, torch.promote_types(weight, torch.float32))
    for name in module.trained:
        weight = _moved_empty(module.known.originals[name], fn).dtype
        want(name, plan.trained_dtype(name, weight) if plan else weight)
    for held, (adapter, name) in known.kept_aside.items():
        weight = _moved_empty(known.originals.get(name, module.get_parameter(name)), fn).dtype
        want(held, known.adapters[adapter].trained_dtype(name, weight))

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        moved = _moved_empty(tensor, fn) if id(tensor) in wanted else None
        if moved is None or moved.dtype == tensor.dtype:
            return fn(tensor)
        return tensor.to(moved.device, wanted[id(tensor)])

    return kept


def _moved_empty(tensor: torch.Tensor, fn: Fn) -> torch.Tensor:
    return fn(torch.empty(0, device=tensor.device, dtype=tensor.dtype))
