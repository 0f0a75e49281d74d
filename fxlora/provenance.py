"""Where a node of a captured graph comes from: the module whose forward made it, and the line."""

from __future__ import annotations

import re

from torch import fx


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
