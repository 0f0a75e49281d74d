"""Helpers for a single call node: its arguments by name, its op, and its place in the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from .dispatched import overload_of
from .literals import literal


def argument(node: fx.Node, position: int, default: Any = None) -> Any:
    """Return the argument at a position of the op's schema, whether passed by position or name.

    An argument that the call does not pass has the schema's default. `default` is returned for a
    target without a schema, and for a position that the schema does not have.
    """
    if position < len(node.args):
        return node.args[position]
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None or position >= len(schema.arguments):
        return default
    declared = schema.arguments[position]
    return node.kwargs.get(declared.name, declared.default_value)


def named_argument(node: fx.Node, *names: str) -> Any:
    """Return the argument for the first of the names that the op's schema has, or None."""
    schema: Any = getattr(node.target, "_schema", None)
    declared = [a.name for a in schema.arguments] if schema else []
    position = next((declared.index(name) for name in names if name in declared), None)
    return None if position is None else argument(node, position)


def example_value(node: Any) -> torch.Tensor | None:
    """Return the example tensor of a node, or None; the tracer records none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def flat_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among a node's arguments, each as often as it occurs."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def is_torch_call(node: fx.Node) -> bool:
    """Whether a call's target is an op, function or method of torch, or a Python operator.

    A user's function, op, module or autograd.Function of the same name may do something else. A
    higher-order op does not count.
    """
    if node.op == "call_method":
        return True
    if node.op != "call_function":
        return False
    target = overload_of(node.target)
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target).partition(".")[0] in ("aten", "prims")
    root = str(getattr(node.target, "__module__", "")).partition(".")[0]
    higher_order = isinstance(node.target, torch._ops.OperatorBase)
    return not higher_order and (root in ("torch", "_operator") or node.target is getattr)


def torch_kind(node: fx.Node) -> str:
    """Return the kind of a call whose target is torch's (see `is_torch_call`), else ""."""
    return kind_of(node) if is_torch_call(node) else ""


def qualified_kind(node: fx.Node) -> str:
    """Return the kind of a call of a registered op, with its namespace ("aten.add"), else ""."""
    target = overload_of(node.target)
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{kind_of(node)}"
    return ""


def frozen(node: fx.Node, name: Callable[[fx.Node], Hashable]) -> Hashable:
    """Return a call's arguments as a hashable value, with `name(node)` for each node in them.

    Raises:
        TypeError: an argument cannot be hashed.
    """
    key: Hashable = literal((node.args, dict(node.kwargs)), name)
    hash(key)
    return key


def kind_of(node: fx.Node) -> str:
    """Return the name of a call's op (without its overload), function, method or module."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", None) or getattr(node.target, "__name__", None)
    return str(name or node.target)


def call_site(node: fx.Node) -> str:
    """Return the path of the module whose forward made the call, or "" (the model, or unknown)."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def part_of(graph: fx.Graph, path: str) -> list[Hashable]:
    """Return the calls of a graph that are in the forward of the module at a path, as data.

    A call of which that is unknown is included.
    """
    return [
        (
            node.op,
            str(node.target),
            repr(fx.map_arg((node.args, dict(node.kwargs)), lambda n: None)),
        )
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr", "output") and _may_be_in(node, path)
    ]


def is_in(node: fx.Node, path: str) -> bool:
    """Whether a node is known to be of a call in the forward of the module at a path."""
    return bool(_stack(node)) and _may_be_in(node, path)


def places(node: fx.Node) -> list[str]:
    """Return the paths of the modules whose forwards made the call, outermost first."""
    return [str(place).partition("@")[0] for place, _ in _stack(node)]


def _may_be_in(node: fx.Node, path: str) -> bool:
    stack = places(node)
    return not stack or any(place == path or place.startswith(f"{path}.") for place in stack)


def _stack(node: fx.Node) -> list[tuple[Any, Any]]:
    return list(node.meta.get("nn_module_stack", {}).values())


def source_line(node: fx.Node) -> str:
    """Return the last `file:line` of the call's stack trace, or ""; generated code is skipped."""
    places = re.findall(r'File "([^"<]+)", line (\d+)', node.stack_trace or "")
    return ":".join(places[-1]) if places else ""


def module_classes(node: fx.Node) -> list[str]:
    """Return the classes of the modules around a call, outermost first, as far as known."""
    kinds = [kind for _, kind in node.meta.get("nn_module_stack", {}).values()]
    return [k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}" for k in kinds]
