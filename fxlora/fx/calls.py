"""One call in a graph: its arguments by name, its op, and where in the model it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx


def argument(node: fx.Node, position: int, default: Any = None) -> Any:
    """An argument of a call, by the position that it has in the schema."""
    if position < len(node.args):
        return node.args[position]
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None or position >= len(schema.arguments):
        return default
    declared = schema.arguments[position]
    return node.kwargs.get(declared.name, declared.default_value)


def named_argument(node: fx.Node, *names: str) -> Any:
    """An argument of a call by its name in the schema (the first name that it has), or None."""
    schema: Any = getattr(node.target, "_schema", None)
    declared = [a.name for a in schema.arguments] if schema else []
    position = next((declared.index(name) for name in names if name in declared), None)
    return None if position is None else argument(node, position)


def example_value(node: Any) -> torch.Tensor | None:
    """The example value of a node; the tracer leaves none."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def flat_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, as often as they stand there."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def is_torchs(node: fx.Node) -> bool:
    """Whether a call is of an op, a function or a method of torch's own, or a Python operator.

    What a user's function, op, module or autograd.Function of the same name does is another thing.
    """
    if node.op == "call_method":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(node.target).partition(".")[0] in ("aten", "prims")
    root = str(getattr(node.target, "__module__", "")).partition(".")[0]
    higher_order = isinstance(node.target, torch._ops.OperatorBase)
    return not higher_order and (root in ("torch", "_operator") or node.target is getattr)


def torch_kind(node: fx.Node) -> str:
    """The kind of a call of torch's own, else ""."""
    return kind_of(node) if is_torchs(node) else ""


def qualified_kind(node: fx.Node) -> str:
    """The kind of a call of a registered op with its namespace ("aten.add"), else ""."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{kind_of(node)}"
    return ""


def frozen(node: fx.Node, name: Callable[[fx.Node], Hashable]) -> Hashable:
    """The arguments of a call as a value to compare by, with a name for each node in them.

    Raises:
        TypeError: an argument cannot be hashed.
    """

    def of(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return "node", name(value)
        if isinstance(value, list | tuple):
            return "sequence", tuple(map(of, value))
        if isinstance(value, dict):
            return "mapping", tuple((key, of(item)) for key, item in value.items())
        if isinstance(value, slice):
            return "slice", of((value.start, value.stop, value.step))
        hash(value)
        return type(value), value

    return of((node.args, dict(node.kwargs)))


def kind_of(node: fx.Node) -> str:
    """A name for a call that has no row: its op's."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", None) or getattr(node.target, "__name__", None)
    return str(name or node.target)


def call_site(node: fx.Node) -> str:
    """Path of the module whose forward made the call, as far as capture knows; "" is the model."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def source_line(node: fx.Node) -> str:
    """The last `file:line` of the call's stack trace, or "" (generated code is no place)."""
    places = re.findall(r'File "([^"<]+)", line (\d+)', node.stack_trace or "")
    return ":".join(places[-1]) if places else ""


def module_classes(node: fx.Node) -> list[str]:
    """The classes of the modules around a call, as far as capture knows, from the outermost in."""
    kinds = [kind for _, kind in node.meta.get("nn_module_stack", {}).values()]
    return [k if isinstance(k, str) else f"{k.__module__}.{k.__qualname__}" for k in kinds]
