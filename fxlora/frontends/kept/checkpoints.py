"""Keep activation checkpoints, which torch.export drops, in captured graphs.

torch.export traces through `torch.utils.checkpoint` and keeps only the ops: a captured model would
store every activation, and the ops of a reentrant checkpoint would run under no_grad permanently.
Here, the nodes traced inside a checkpoint are marked; the marked nodes then become a nested graph
that is called under `torch.utils.checkpoint.checkpoint`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as torch_checkpoint
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ...fx.effects import written_nodes
from ...fx.nested import call_of, checkpointed, nested_graph
from .patches import patched

_MARK = "fxlora_checkpoint"

# The generator that `checkpoint` runs around its function; the name depends on the torch version.
_AROUND = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)

Mark = tuple[int, ...]  # numbers of the checkpoints around a node, outermost first


@contextmanager
def marked_checkpoints() -> Generator[None]:
    """Within the context, mark each node that is traced inside a checkpoint."""
    numbers = itertools.count()

    @contextmanager
    def marks() -> Generator[None]:
        mode = get_proxy_mode()
        graph: fx.Graph = mode.tracer.graph if mode else fx.Graph()
        before = set(graph.nodes)
        yield
        number = next(numbers)
        for node in graph.nodes:
            if node not in before:
                custom = node.meta.get("custom", {})
                node.meta["custom"] = {**custom, _MARK: (number, *custom.get(_MARK, ()))}

    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        with marks():
            yield

    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        with marks():
            return function(*args)

    here = {name: around for name in _AROUND if hasattr(torch_checkpoint, name)}
    reentrant = patched(torch_checkpoint.CheckpointFunction, apply=staticmethod(apply))
    with reentrant, patched(torch_checkpoint, **here):
        yield


def marks_of(module: fx.GraphModule) -> list[Mark]:
    """Return the mark of each node of the module's graph, in graph order."""
    return [_mark(node, module) for node in module.graph.nodes]


def gather_checkpoints(
    module: fx.GraphModule, depth: int = 0, buffers: Collection[fx.Node] | None = None
) -> None:
    """Move the nodes of each checkpoint in a traced module into a nested graph, in place.

    Args:
        depth: number of checkpoints around the module's graph.
        buffers: nodes whose value is a parameter or buffer; by default the `get_attr` nodes. (In
            a nested graph, they are the inputs that receive one.)
    """
    regions: dict[Mark, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if len(mark := _mark(node, module)) > depth:
            regions.setdefault(mark[: depth + 1], []).append(node)
    if buffers is None:
        buffers = [node for node in module.graph.nodes if node.op == "get_attr"]
    cut = [
        _extract_region(module, nodes, buffers, f"checkpoint_{'_'.join(map(str, mark))}")
        for mark, marked in regions.items()
        if _can_be_one_call(nodes := _closed(marked, module))
    ]
    for call in filter(None, (call_of(node, module) for node in module.graph.nodes)):
        for nested in call.graphs:
            inside = [given for given, outside in call.given(nested) if outside in buffers]
            gather_checkpoints(nested, depth + (nested in cut), inside)
    if cut:
        module.graph.lint()
        module.recompile()


def _mark(node: fx.Node, module: nn.Module) -> Mark:
    """Return a node's mark; for a call of nested graphs, the common prefix of the inner marks."""
    if nested_graph(node, module):
        return _mark(next(iter(node.users)), module) if len(node.users) == 1 else ()
    if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node):
        return _mark(source, module)
    call = call_of(node, module)
    if call is None:
        return node.meta.get("custom", {}).get(_MARK, ()) if node.op == "call_function" else ()
    inner = [(n, graph) for graph in call.graphs for n in graph.graph.nodes]
    marks = [_mark(n, graph) for n, graph in inner if n.op == "call_function" and n.users]
    common = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*marks, strict=False))
    return tuple(same[0] for same in common)


def _closed(marked: list[fx.Node], module: nn.Module) -> list[fx.Node]:
    """Return marked nodes, and the nodes between that depend on them, such as assertions.

    With the nested graphs that these call: the branches of a cond have no marks.
    """
    nodes = dict.fromkeys(marked)
    between, last = marked[0], marked[-1]
    while between is not last:
        if any(source in nodes for source in between.all_input_nodes):
            nodes[between] = None
        between = between.next
    for graph in {given for node in nodes for given in node.all_input_nodes}:
        if nested_graph(graph, module) and nodes.keys() >= graph.users.keys():
            nodes[graph] = None
    return sorted(nodes)


def _can_be_one_call(nodes: list[fx.Node]) -> bool:
    """Whether the nodes can become one call, placed where the last of them is."""
    inside, last = set(nodes), nodes[-1]
    if last.op in ("placeholder", "output"):
        return False
    return all(user in inside or last < user for node in nodes for user in node.users)


def _extract_region(
    module: fx.GraphModule, nodes: list[fx.Node], buffers: Collection[fx.Node], name: str
) -> fx.GraphModule:
    """Replace nodes of a graph by a checkpointed call of a nested graph, and return that graph."""
    inside = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes)
    changed = {root for node in nodes for root in written_nodes(node, module)} & set(buffers)
    operands = [n for n in sources if n not in inside and n not in changed]
    written = tuple(n for n in sources if n in changed)
    results = [node for node in nodes if not set(node.users) <= inside]
    region = _copied(module, [*written, *operands], nodes, results)
    module.add_module(name, region)
    with module.graph.inserting_after(nodes[-1]):
        fetched = module.graph.create_node("get_attr", name)
    with module.graph.inserting_after(fetched):
        call = module.graph.call_function(checkpointed, (fetched, written, *operands))
    call.meta["val"] = tuple(node.meta.get("val") for node in results)
    with module.graph.inserting_after(call):
        for index, node in reversed(list(enumerate(results))):
            item = module.graph.call_function(operator.getitem, (call, index))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(nodes):
        module.graph.erase_node(node)
    return region


def _copied(
    module: fx.GraphModule, operands: list[fx.Node], nodes: list[fx.Node], results: list[fx.Node]
) -> fx.GraphModule:
    """Copy nodes into a new graph module, with the operands as its inputs."""
    graph, root = fx.Graph(), nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    for node in operands:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if nested := nested_graph(node, module):
            root.add_module(str(node.target), nested)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(root, graph)
