"""Find the parameters and buffers that a call writes to, through views and nested graphs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from .nested import call_of

# ---- writes -------------------------------------------------------------------------------------


def written_attributes(node: fx.Node, owner: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that a call writes to.

    Writes through views, in nested graphs (whose graph modules `owner` holds) and in Python's
    forms count: `x.add_()`, `x += y`, `out=x`.
    """
    return [str(root.target) for root in written_nodes(node, owner) if root.op == "get_attr"]


def written_nodes(node: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """Return the nodes whose tensors a call writes to, directly or through a view."""
    return [_alias_root(value, owner) for value in _written(node, owner)]


def _written(node: fx.Node, owner: nn.Module) -> Iterator[fx.Node]:
    """Yield the arguments that a call writes to; they may be views of other nodes."""
    if node.op == "call_method":
        name, target = str(node.target), node.args[0]
        in_place = name.endswith("_") and not name.endswith("__")
        if (in_place or name == "__setitem__") and isinstance(target, fx.Node):
            yield target
    if node.op != "call_function":
        return
    if node.target in _IN_PLACE_OPERATORS and isinstance(node.args[0], fx.Node):
        yield node.args[0]
    yield from _nodes(node.kwargs.get("out"))
    for argument, value in _schema_arguments(node):
        if argument.alias_info and argument.alias_info.is_write:
            yield from _nodes(value)
    yield from _written_by_nested(node, owner)


def _written_by_nested(node: fx.Node, owner: nn.Module) -> Iterator[fx.Node]:
    """Yield the operands of a call that its nested graphs write to."""
    call = call_of(node, owner)
    for nested in call.graphs if call else ():
        given = dict(call.given(nested)) if call else {}
        for inner in nested.graph.nodes:
            for value in _written(inner, nested):
                outside = given.get(_alias_root(value, nested))
                if isinstance(outside, fx.Node):
                    yield outside


def _alias_root(node: fx.Node, owner: nn.Module) -> fx.Node:
    """Return the node whose tensor this one may alias, by the ops' schemas, or the node itself."""
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


def _nodes(value: Any) -> Iterator[fx.Node]:
    """Yield the nodes of an argument: itself, or those in a list of tensors."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, fx.Node):
            yield item


def _passed_through(node: fx.Node, index: Any, owner: nn.Module) -> fx.Node | None:
    """Return the operand that result `index` of a call of nested graphs may alias, or None."""
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
    """Yield each argument in an op's schema with the value that a call passes for it, or None."""
    schema = getattr(op, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema else ()):
        given = position < len(args)
        yield argument, args[position] if given else kwargs.get(argument.name)
