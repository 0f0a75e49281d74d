"""Merge the graph that a source has under autocast into its graph without autocast.

The two have the same calls in the same order, but for casts that one of them lacks; they differ in
dtypes and other constants, and in whether a call reads a tensor or a cast of it. (Without autocast,
such a cast may return its very input, and torch.export then takes one for the other.) Each
difference becomes a choice by the caller's autocast. Whether the result is right, a proof must say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..fx.autocast import by_autocast
from ..fx.calls import example_value
from ..fx.nested import nested_graph


def choose(module: fx.GraphModule, other: fx.GraphModule, device: str, dtype: torch.dtype) -> None:
    """Make a graph, in place, do what another does under the autocast that it was made under.

    Without autocast, the graph does what it did. It is left as it is from the first call on that
    has no counterpart.
    """
    _Merge(module, other, device, dtype).run()


class _Merge:
    def __init__(
        self, module: fx.GraphModule, other: fx.GraphModule, device: str, dtype: torch.dtype
    ) -> None:
        self.module, self.other, self.device, self.dtype = module, other, device, dtype
        self.ours: dict[fx.Node, fx.Node] = {}  # of each node of the other graph

    def run(self) -> None:
        mine = [node for node in self.module.graph.nodes if not _is_added(node)]
        theirs = list(self.other.graph.nodes)
        while mine and theirs:
            if self._same_call(mine[0], theirs[0]):
                self._merge(mine.pop(0), theirs.pop(0))
            elif _is_cast(theirs[0]) and theirs[0].args[0] in self.ours:
                self._add_cast(theirs.pop(0), mine[0])
            elif _is_cast(mine[0]):
                self._undo_cast(mine.pop(0))
            else:
                break
        self.module.recompile()

    def _same_call(self, mine: fx.Node, theirs: fx.Node) -> bool:
        named = mine.op in ("placeholder", "get_attr") and not nested_graph(mine, self.module)
        if mine.op != theirs.op or (mine.op != "get_attr" and mine.target != theirs.target):
            return False
        if named and mine.op == "placeholder":
            return mine.name == theirs.name
        ours, others = _leaves(mine), _leaves(theirs)
        return len(ours) == len(others) and all(map(self._same_leaf, ours, others))

    def _same_leaf(self, mine: Any, theirs: Any) -> bool:
        if isinstance(theirs, fx.Node) and isinstance(mine, fx.Node):
            return theirs in self.ours and _root(mine) is _root(self.ours[theirs])
        return isinstance(mine, fx.Node) == isinstance(theirs, fx.Node) or _is_choice(mine)

    def _merge(self, mine: fx.Node, theirs: fx.Node) -> None:
        """Make our call choose the constants and inputs of theirs under the autocast."""
        self.ours[theirs] = mine
        if mine.op == "get_attr":
            self._merge_constants(mine, theirs)
            return
        leaves, structure = pytree.tree_flatten((mine.args, dict(mine.kwargs)), _is_leaf)
        found = list(map(self._chosen, [mine] * len(leaves), leaves, _leaves(theirs)))
        if any(a is not b for a, b in zip(leaves, found, strict=True)):
            mine.args, mine.kwargs = pytree.tree_unflatten(found, structure)

    def _chosen(self, call: fx.Node, mine: Any, theirs: Any) -> Any:
        if isinstance(theirs, fx.Node):
            wanted = self.ours[theirs]
            chosen = isinstance(mine, fx.Node) and mine.target is by_autocast
            return mine if chosen and mine.args[1] is wanted else wanted
        if _is_choice(mine):
            if not _equal(theirs, mine.args[1]):
                mine.args = (*mine.args, (self.dtype, theirs))
            return mine
        if _equal(mine, theirs):
            return mine
        with call.graph.inserting_before(call):
            node = call.graph.call_function(by_autocast, (self.device, mine, (self.dtype, theirs)))
        node.meta = {**call.meta, "val": mine}
        return node

    def _add_cast(self, theirs: fx.Node, before: fx.Node) -> None:
        """Add a cast that only the source under autocast does; without, it does nothing."""
        source = self.ours[theirs.args[0]]  # pyright: ignore[reportArgumentType]
        usual, value = example_value(source), example_value(theirs)
        assert usual is not None and value is not None
        graph = self.module.graph
        with graph.inserting_before(before):
            dtype = graph.call_function(
                by_autocast, (self.device, usual.dtype, (self.dtype, value.dtype))
            )
            cast = graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
        dtype.meta = {**theirs.meta, "val": usual.dtype}
        cast.meta = {**theirs.meta, "val": usual}
        self.ours[theirs] = cast

    def _undo_cast(self, mine: fx.Node) -> None:
        """Have a cast that the source under autocast does not do keep the dtype of its input."""
        source: Any = mine.args[0]
        given = next((t for t, ours in reversed(self.ours.items()) if ours is source), None)
        value = example_value(given)
        if value is not None and len(mine.args) > 1:
            dtype = self._chosen(mine, mine.args[1], value.dtype)
            mine.args = (source, dtype, *mine.args[2:])

    def _merge_constants(self, mine: fx.Node, theirs: fx.Node) -> None:
        first, second = nested_graph(mine, self.module), nested_graph(theirs, self.other)
        if first and second:
            choose(first, second, self.device, self.dtype)
            return
        ours, other = _fetched(self.module, mine), _fetched(self.other, theirs)
        if isinstance(ours, nn.Parameter) or _equal(ours, other):
            return
        name = f"{str(mine.target).replace('.', '_')}_{str(self.dtype).rpartition('.')[2]}"
        self.module.register_buffer(name, other, persistent=False)
        choice = next((user for user in mine.users if _is_choice(user)), None)
        with self.module.graph.inserting_after(mine):
            constant = self.module.graph.get_attr(name)
        constant.meta = {**mine.meta, "val": theirs.meta.get("val")}
        if choice is not None:
            choice.args = (*choice.args, (self.dtype, constant))
            return
        users = list(mine.users)
        with self.module.graph.inserting_after(constant):
            choice = self.module.graph.call_function(
                by_autocast, (self.device, mine, (self.dtype, constant))
            )
        choice.meta = dict(mine.meta)
        for user in users:
            user.replace_input_with(mine, choice)


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)), _is_leaf)


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict)


def _is_choice(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is by_autocast


def _is_added(node: fx.Node) -> bool:
    """Whether a node is a choice, or a constant that only choices under autocast are between."""
    others = bool(node.users) and all(_is_choice(u) and u.args[1] is not node for u in node.users)
    return _is_choice(node) or (node.op == "get_attr" and others)


def _is_cast(node: fx.Node) -> bool:
    """Whether a call casts its one input. Where one is not recognised, nothing is merged."""
    return node.target is torch.ops.aten.to.dtype


def _root(node: fx.Node) -> fx.Node:
    """Return the node whose very tensor a node returns without autocast."""
    while isinstance(source := node.args[1] if _is_choice(node) else _uncast(node), fx.Node):
        node = source
    return node


def _uncast(node: fx.Node) -> Any:
    """Return the input of a cast to the dtype that it has, else None."""
    value = example_value(node)
    source: Any = node.args[0] if _is_cast(node) else None
    before = example_value(source)
    if value is None or before is None or before.dtype != value.dtype:
        return None
    return source


def _fetched(owner: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        return a is b or (same and (a.is_meta or bool(torch.equal(a, b))))
    return type(a) is type(b) and bool(a == b)
