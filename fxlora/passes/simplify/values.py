"""The constants of a graph: nodes that depend on parameters and buffers only, and their values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from ...fx.effects import statistics_written, written_nodes
from ...module import CapturedModule
from ...module.memory import memory_id
from ...module.quantised import is_quantised

SMALL = 2**20  # numbers: a constant up to this size may take further memory


def is_pure(node: fx.Node) -> bool:
    """Whether a node calls an op of torch that draws nothing and writes nothing."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    schema = target._schema  # one without results is called for its effect, as an assertion is
    fixed = not seeded and not schema.is_mutable and bool(schema.returns)
    return target.namespace in ("aten", "prims") and fixed


def call(node: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
    """Run a node's call with the given values for its input nodes."""

    def value(leaf: Any) -> Any:
        return given[leaf] if isinstance(leaf, fx.Node) else leaf

    function: Any = node.target
    args: Any = map_aggregate(node.args, value)
    kwargs: Any = map_aggregate(dict(node.kwargs), value)
    return function(*args, **kwargs)


class Constants:
    """The constants of a graph of a module; new ones can be put in the place of others.

    Quantised weights are none: their values take more memory than they do.

    Attributes:
        nodes: the nodes that depend only on parameters and buffers that no call writes to.
    """

    def __init__(self, graph: fx.Graph, module: CapturedModule) -> None:
        self._module, self._graph = module, graph
        self._known: dict[fx.Node, Any] = {}
        self._copies: dict[str, list[str]] = {}
        self.nodes = self._found()
        self._reads = Counter(
            str(node.target)
            for one in module.distinct_graphs()
            for node in one.find_nodes(op="get_attr")
            for _ in node.users
        )

    def _found(self) -> set[fx.Node]:
        module, held = self._module, dict[str, torch.Tensor]()
        changed: set[fx.Node] = set()
        for node in self._graph.nodes:
            changed.update(written_nodes(node, module), statistics_written(node, module))
        names = {str(node.target) for node in changed if node.op == "get_attr"}
        held |= dict(module.named_parameters(remove_duplicate=False))
        held |= dict(module.named_buffers(remove_duplicate=False))
        # Also under another name.
        written = {memory_id(held[n]) for n in module.known.written | names if n in held}
        found: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node.op == "get_attr":
                value = self._tensor(node)
                plain = isinstance(value, torch.Tensor) and not is_quantised(value)
                if plain and node not in changed and memory_id(value) not in written:
                    found.add(node)
            elif is_pure(node) and found.issuperset(node.all_input_nodes) and node not in changed:
                found.add(node)
        return found

    def _tensor(self, node: fx.Node) -> Any:
        value: Any = self._module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def fetches(self, node: Any) -> bool:
        """Whether an argument is a node that fetches a constant."""
        return isinstance(node, fx.Node) and node.op == "get_attr" and node in self.nodes

    def of(self, node: fx.Node) -> Any:
        """Return the value of a constant node."""
        if node.op == "get_attr":  # as it is now: it may have been replaced
            return self._tensor(node).detach()
        if node not in self._known:
            with torch.no_grad():
                self._known[node] = call(node, {n: self.of(n) for n in node.all_input_nodes})
        return self._known[node]

    def replaced(self, node: fx.Node, reader: fx.Node, value: torch.Tensor) -> fx.Node:
        """Return a node that fetches a new value for one reader of a constant.

        It is the same node, and the parameter keeps its name, if nothing else reads it. Else it
        fetches a copy, which readers of equal values share.
        """
        name = str(node.target)
        if self._is_read_once(name):
            self._module.set_parameter(name, nn.Parameter(value, requires_grad=False))
            return node
        self._reads[name] -= 1
        made = self._equal_copy(name, value)
        if made is None:
            fetched = self.new(name, value, reader)
            self._copies.setdefault(name, []).append(str(fetched.target))
        else:
            fetched = self._fetched(made, reader)
        fetched.meta = dict(node.meta)
        return fetched

    def takes_memory(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Whether a new value for one reader of a constant would be a large copy of its own."""
        name = str(node.target)
        if value.numel() <= SMALL or self._is_read_once(name):
            return False
        return self._equal_copy(name, value) is None

    def _is_read_once(self, name: str) -> bool:
        aliases = next((n for n in self._module.aliases().values() if name in n), None)
        return aliases is not None and sum(self._reads[alias] for alias in aliases) == 1

    def _equal_copy(self, name: str, value: torch.Tensor) -> str | None:
        made = self._copies.get(name, ())
        equal = (n for n in made if torch.equal(self._module.get_parameter(n), value))
        return next(equal, None)

    def new(self, name: str, value: torch.Tensor, before: fx.Node) -> fx.Node:
        """Register a frozen parameter under this name, or a free one like it; return its node."""
        held = {n for n, _ in (*self._module.named_parameters(), *self._module.named_buffers())}
        taken = held | {path for path, _ in self._module.named_modules()}
        free = next(one for one in _numbered(name) if one not in taken)
        self._module.set_parameter(free, nn.Parameter(value, requires_grad=False))
        return self._fetched(free, before)

    def _fetched(self, name: str, before: fx.Node) -> fx.Node:
        with self._graph.inserting_before(before):
            fetched = self._graph.create_node("get_attr", name)
        self.nodes.add(fetched)
        self._reads[name] += 1
        return fetched


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 1
    while True:
        yield f"{name}_{number}"
        number += 1
