"""What the nodes of an exported program say about the source, as torch.export itself writes it.

Quantizers and partitioners find the places of a model by the modules (`nn_module_stack`) and the
functions (`torch_fn`, `source_fn_stack`) in the meta of nodes. A captured graph has them from its
own export. torch.export copies them to a new program if an interpreter runs the graph in its trace.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx import traceback
from torch.utils import _pytree as pytree

from ..fx.marks import ADAPTER, ROUTED

_STACK, _FUNCTION = "nn_module_stack", "torch_fn"
_PREFIX = "L__self__"  # torch.export puts it in front of the keys of a stack, again at each export
# Where the nodes of an adapter are: in no module of the source. So a tool that matches the source's
# modules takes the base op alone, as it does in the source.
_PLACE = ("lora", "fxlora.Adapter")

Stack = dict[str, tuple[str, Any]]


def with_places(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph in which adapters, too, have a place in the source."""
    copied = fx.Graph(owning_module=graph.owning_module)
    copies: dict[fx.Node, fx.Node] = {}
    output = copied.graph_copy(graph, copies)
    last = next(iter(graph.find_nodes(op="output")))
    copied.output(output).meta = dict(last.meta)
    copied.set_codegen(graph._codegen)
    for node, stack in _stacks(graph).items():
        meta = {key: value for key, value in node.meta.items() if key != "custom"}
        if _inserted(node):
            meta.pop(_FUNCTION, None)  # the last node of a branch has that of the op before it
        meta.pop(_STACK, None)  # without one, torch.export writes the whole model's
        copies[node].meta = {**meta, _STACK: stack} if stack else meta
    return copied


def _stacks(graph: fx.Graph) -> dict[fx.Node, Stack]:
    """Return the modules around each call; an adapter is inside the module whose op it adapts."""
    found: dict[fx.Node, Stack] = {}
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        own: Stack | None = node.meta.get(_STACK)
        if not _inserted(node):
            found[node] = {key.removeprefix(_PREFIX): place for key, place in (own or {}).items()}
            continue
        users = (found[user] for user in node.users if user in found)
        stack = dict(own or next((stack for stack in users if stack), {}))
        found[node] = _inside({key.removeprefix(_PREFIX): at for key, at in stack.items()})
    return found


def _inserted(node: fx.Node) -> bool:
    """Whether a pass added a call to the source's."""
    return _STACK not in node.meta or ADAPTER in node.meta or ROUTED in node.meta


def _inside(stack: Stack) -> Stack:
    name, kind = _PLACE
    if not stack or list(stack.values())[-1][1] == kind:
        return stack
    key, (path, _) = list(stack.items())[-1]
    return {**stack, f"{key}.{name}": (f"{path}.{name}".removeprefix("."), kind)}


def root_class(graph: fx.Graph) -> tuple[str, str]:
    """Return the module and the name of the source's class, as far as the graph tells."""
    for node in graph.nodes:
        for path, kind in node.meta.get(_STACK, {}).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            if not path:
                return name.rpartition(".")[0], name.rpartition(".")[2]
    return "torch.nn", "Module"


class Tracer(fx.Interpreter):
    """Runs a graph inside an export, so that the new nodes keep the old ones' metadata.

    Attributes:
        given: values to use in place of tensors of the module, by name.
        assertions: whether to keep the assertions about values of tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        given: Mapping[str, torch.Tensor],
        assertions: bool = True,
    ) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.given, self.assertions = given, assertions

    def fetch_attr(self, target: str) -> Any:
        return self.given[target] if target in self.given else super().fetch_attr(target)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _ASSERTIONS and not self.assertions:
            return None
        if target in _REGIONS:  # torch.export inlines them, and finds them again
            args = tuple(map(_interpreted, args))
        return super().call_function(target, args, kwargs)

    def run_graph(self, values: list[Any]) -> Any:
        """Run the graph on a value for each placeholder; return the output as the source does."""
        graph: Any = self.graph
        with traceback.preserve_node_meta():
            return graph.process_outputs(self.run(*values, enable_io_processing=False))


_ASSERTIONS = (torch.ops.aten._assert_async.msg, torch.ops.aten._assert_async.default)
_REGIONS = (
    torch.ops.higher_order.wrap_with_autocast,
    torch.ops.higher_order.wrap_with_set_grad_enabled,
)


def _interpreted(argument: Any) -> Any:
    if not isinstance(argument, fx.GraphModule):
        return argument
    return Tracer(argument, with_places(argument.graph), {}).run


def plain(value: Any) -> Any:
    """Return a value with dicts and tuples in place of containers of other libraries."""
    kind = type(value)
    node = pytree.SUPPORTED_NODES.get(pytree._get_node_type(value))
    if node is None:
        return value
    children, context = node.flatten_fn(value)
    children = [plain(child) for child in children]
    if kind.__module__ == "torch.return_types":  # of topk and others: no file can name these
        return tuple(children)
    if kind.__module__.partition(".")[0] in ("builtins", "collections", "torch"):
        return node.unflatten_fn(children, context)
    if node.flatten_with_keys_fn is None:
        return tuple(children)
    keys = [key for key, _ in node.flatten_with_keys_fn(value)[0]]
    return dict(zip((_name(key) for key in keys), children, strict=True))


def _name(key: Any) -> Any:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return copy.copy(getattr(key, field))
    return str(key)
