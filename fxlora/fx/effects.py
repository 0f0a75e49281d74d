"""Find the parameters and buffers that a call writes to, through views and nested graphs."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from .calls import named_argument
from .dispatched import overload_of
from .nested import call_of
from .trials import memory_use

# ---- writes -------------------------------------------------------------------------------------


def written_attributes(node: fx.Node, owner: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that a call writes to, or may write to.

    Writes through views, in nested graphs (whose graph modules `owner` holds) and in Python's
    forms count: `x.add_()`, `x += y`, `out=x`.
    """
    return [str(root.target) for root in written_nodes(node, owner) if root.op == "get_attr"]


def written_nodes(node: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """Return the nodes whose tensors a call may write to, directly or through a view."""
    found: dict[fx.Node, None] = {}
    for value in _written(node, owner):
        found |= dict.fromkeys(alias_roots(value, owner))
    return list(found)


def _written(node: fx.Node, owner: nn.Module) -> Iterator[fx.Node]:
    """Yield the arguments that a call may write to; they may be views of other nodes."""
    if node.op == "call_method":
        name, target = str(node.target), node.args[0]
        in_place = name.endswith("_") and not name.endswith("__")
        if (in_place or name in _IN_PLACE_METHODS) and isinstance(target, fx.Node):
            yield target
    if node.op != "call_function":
        return
    if node.target in _IN_PLACE_OPERATORS and isinstance(node.args[0], fx.Node):
        yield node.args[0]
    yield from _nodes(node.kwargs.get("out"))
    for argument, value in _schema_arguments(node):
        if argument.alias_info and argument.alias_info.is_write:
            yield from _nodes(value)
    if is_python_function(node) and not call_of(node, owner):
        yield from memory_use(node, owner).written
    yield from _written_by_nested(node, owner)


def statistics_written(node: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """Return the running statistics that norms write to, although their schemas do not say so.

    Those in the nested graphs of a call count, whose operands they are.
    """
    if node.op != "call_function":
        return []
    found: list[fx.Node] = []
    call = call_of(node, owner)
    for nested in call.graphs if call else ():
        given = dict(call.given(nested)) if call else {}
        inside = (root for one in nested.graph.nodes for root in statistics_written(one, nested))
        found += [value for root in inside if isinstance(value := given.get(root), fx.Node)]
    if named_argument(node, *_OF_THE_BATCH) is not False:
        named = [named_argument(node, name) for name in ("running_mean", "running_var")]
        found += [value for value in named if isinstance(value, fx.Node)]
    return found


# The arguments of norms that say whether they compute with the statistics of the batch.
_OF_THE_BATCH = ("training", "train", "use_input_stats")


def is_python_function(node: fx.Node) -> bool:
    """Whether a call is of a function that has no schema, so that it may have any effect.

    Python's own operators have their effects by definition. A function may say that it writes to
    none of its arguments, by an attribute `writes_nothing`.
    """
    registered = (torch._ops.OperatorBase, torch._ops.OpOverloadPacket)
    if node.op != "call_function" or isinstance(node.target, registered):
        return False
    if node.target is getattr or getattr(node.target, "writes_nothing", False):
        return False
    return getattr(node.target, "__module__", "") != "_operator"


def _written_by_nested(node: fx.Node, owner: nn.Module) -> Iterator[fx.Node]:
    """Yield the operands of a call that its nested graphs write to."""
    call = call_of(node, owner)
    for nested in call.graphs if call else ():
        given = dict(call.given(nested)) if call else {}
        for inner in nested.graph.nodes:
            for value in _written(inner, nested):
                for root in alias_roots(value, nested):
                    if isinstance(outside := given.get(root), fx.Node):
                        yield outside


def alias_roots(node: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """Return the nodes whose tensors this one may alias, or the node itself."""
    found: dict[fx.Node, None] = {}
    ahead, met = [node], set[fx.Node]()
    while ahead:
        value = ahead.pop()
        if value in met:
            continue
        met.add(value)
        sources = _aliased(value, owner)
        ahead += sources
        if not sources:
            found[value] = None
    return list(found)


def _aliased(node: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """Return the inputs of a call that its result may share memory with."""
    if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
        return [_passed_through(source, node.args[1], owner) or source]
    if node.op == "call_method" or node.target is getattr:  # .t(), .view(), .data: may be views
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    if node.op != "call_function" or call_of(node, owner):
        return []
    declared = [
        given
        for argument, value in _schema_arguments(node)
        if argument.alias_info
        for given in _nodes(value)
    ]
    if declared or not _may_return_input(node):
        return declared
    return list(memory_use(node, owner).returned)


def _may_return_input(node: fx.Node) -> bool:
    """Whether a call may return an input although its schema, if any, does not say so."""
    target = overload_of(node.target)
    if isinstance(target, torch._ops.OpOverload):
        return target.has_kernel_for_dispatch_key(_COMPOSED)
    if target is operator.pos or isinstance(target, torch._ops.OpOverloadPacket):
        return True
    return is_python_function(node) or hasattr(target, "writes_nothing")


_COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd


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
            for root in alias_roots(results[index], nested):
                if isinstance(outside := given.get(root), fx.Node):
                    return outside
    return None


_IN_PLACE = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior"),
    *("ixor", "ilshift", "irshift", "iconcat", "setitem", "delitem"),
)
_IN_PLACE_OPERATORS = frozenset(getattr(operator, name) for name in _IN_PLACE)
_IN_PLACE_METHODS = frozenset(f"__{name}__" for name in _IN_PLACE)


def _schema_arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    target: Any = node.target
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    overloads = [getattr(target, name) for name in target.overloads()] if packet else [target]
    for overload in overloads if node.op == "call_function" else ():
        yield from arguments_of(overload, node.args, node.kwargs)


def arguments_of(
    op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Any, Any]]:
    """Yield each argument in an op's schema with the value that a call passes for it, or None."""
    schema = getattr(op, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema else ()):
        given = position < len(args)
        yield argument, args[position] if given else kwargs.get(argument.name)
