"""Merge the graph that a source has under autocast into its graph without autocast.

The two have the same calls in the same order, except for casts that one of them lacks. They differ
in dtypes and other constants, and in whether a call reads a tensor or a cast of it. (Without
autocast, such a cast may return its input itself, and torch.export then takes one for the other.)
Each difference becomes a choice by the caller's autocast. A proof then tells whether the result is
right (`mode_proof.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..fx.autocast import by_autocast
from ..fx.calls import example_value
from ..fx.nested import Call, call_of, nested_graph, operands_of
from ..module.blocks.recorded import VALUES

Autocast = tuple[str, torch.dtype]  # device type and dtype


def choose(
    module: fx.GraphModule,
    other: fx.GraphModule,
    autocast: Autocast,
    guesses: Sequence[Autocast],
) -> None:
    """Merge a graph made under autocast into one made without, in place, by choices.

    Without autocast, the graph still computes the same. From the first call on that has no
    counterpart in the other graph, it is left as it is.

    Args:
        module: the graph without autocast.
        other: the graph under autocast.
        autocast: the device type and dtype of this autocast.
        guesses: other autocasts, for which to guess the constants from those for this one.
    """
    _Merge(module, other, autocast, guesses).run()


class _Merge:
    def __init__(
        self,
        module: fx.GraphModule,
        other: fx.GraphModule,
        autocast: Autocast,
        guesses: Sequence[Autocast],
    ) -> None:
        self.module, self.other = module, other
        self.autocast, self.guesses = autocast, guesses
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
        """Give our call the inputs of theirs, and choices of their constants under the autocast."""
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
            return mine if chosen and mine.args[0] is wanted else wanted
        if _is_choice(mine):
            _set(mine, self.autocast, theirs)
            return mine
        if _equal(mine, theirs):
            return mine
        with call.graph.inserting_before(call):
            return self._choice(call, mine, theirs)

    def _choice(self, like: fx.Node, usual: Any, value: Any) -> fx.Node:
        """Insert a choice, of a constant or a dtype."""
        others = tuple((*autocast, v) for autocast, v in self._guessed(value).items())
        node = like.graph.call_function(by_autocast, (usual, *others))
        node.meta = {**like.meta, "val": usual}
        return node

    def _guessed(self, value: Any) -> dict[Autocast, Any]:
        """Return a constant under this autocast, with guesses of it under the others."""
        known = self.autocast[1]
        return {self.autocast: value} | {g: _guess(value, known, g[1]) for g in self.guesses}

    def _add_cast(self, theirs: fx.Node, before: fx.Node) -> None:
        """Add a cast that only the source under autocast makes; otherwise it does nothing."""
        source = self.ours[theirs.args[0]]  # pyright: ignore[reportArgumentType]
        usual, value = example_value(source), example_value(theirs)
        assert usual is not None and value is not None
        graph = self.module.graph
        with graph.inserting_before(before):
            dtype = self._choice(before, usual.dtype, value.dtype)
            cast = graph.call_function(torch.ops.aten.to.dtype, (source, dtype))
        cast.meta = {**theirs.meta, "val": usual}
        self.ours[theirs] = cast

    def _undo_cast(self, mine: fx.Node) -> None:
        """Make a cast that the source under autocast lacks keep its input's dtype there."""
        source: Any = mine.args[0]
        given = next((t for t, ours in reversed(self.ours.items()) if ours is source), None)
        value = example_value(given)
        if value is not None and len(mine.args) > 1:
            dtype = self._chosen(mine, mine.args[1], value.dtype)
            mine.args = (source, dtype, *mine.args[2:])

    def _merge_constants(self, mine: fx.Node, theirs: fx.Node) -> None:
        first, second = nested_graph(mine, self.module), nested_graph(theirs, self.other)
        if first and second:
            choose(first, second, self.autocast, self.guesses)
            return
        ours, other = _fetched(self.module, mine), _fetched(self.other, theirs)
        if isinstance(ours, nn.Parameter) or _equal(ours, other):
            return
        choice = next((user for user in mine.users if _is_choice(user)), None)
        if choice is not None:
            _set(choice, self.autocast, self._constant(mine, self.autocast, other))
            return
        users = list(mine.users)
        others = self._guessed(other).items()
        held = [(*autocast, self._constant(mine, autocast, value)) for autocast, value in others]
        with self.module.graph.inserting_after(held[0][-1]):  # the others are before it
            choice = self.module.graph.call_function(by_autocast, (mine, *held))
        choice.meta = dict(mine.meta)
        for user in users:
            user.replace_input_with(mine, choice)

    def _constant(self, like: fx.Node, autocast: Autocast, value: torch.Tensor) -> fx.Node:
        """Fetch a constant for one autocast, right after the usual one."""
        device, dtype = autocast
        name = f"{str(like.target).replace('.', '_')}_{device}_{str(dtype).rpartition('.')[2]}"
        self.module.register_buffer(name, value, persistent=False)
        with like.graph.inserting_after(like):
            node = like.graph.get_attr(name)
        node.meta = {**like.meta, "val": value}
        return node


def _set(choice: fx.Node, autocast: Autocast, value: Any) -> None:
    """Set the value that a choice has for one autocast."""
    usual, *others = choice.args
    values: dict[Any, Any] = {(device, dtype): v for device, dtype, v in others}  # pyright: ignore
    values[autocast] = value
    choice.args = (usual, *((*key, v) for key, v in values.items()))


def _guess(value: Any, known: torch.dtype, wanted: torch.dtype) -> Any:
    """Guess a constant under one autocast from its value under another; a proof follows."""
    if value is known:
        return wanted
    if isinstance(value, torch.Tensor) and value.dtype == known:
        return value.to(wanted)
    limits = ("min", "max", "eps", "tiny")
    if isinstance(value, float):
        names = [name for name in limits if getattr(torch.finfo(known), name) == value]
        return getattr(torch.finfo(wanted), names[0]) if names else value
    return value


def _leaves(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves((node.args, dict(node.kwargs)), _is_leaf)


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict)


def _is_choice(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is by_autocast


def _is_added(node: fx.Node) -> bool:
    """Whether a merge added a node: a choice, or a constant that choices take under autocast."""
    others = bool(node.users) and all(_is_choice(u) and u.args[0] is not node for u in node.users)
    return _is_choice(node) or (node.op == "get_attr" and others)


def _is_cast(node: fx.Node) -> bool:
    """Whether a call only casts its input. From an unrecognized cast on, nothing is merged."""
    return node.target is torch.ops.aten.to.dtype


def _root(node: fx.Node) -> fx.Node:
    """Return the node whose tensor a node returns, without a copy, if there is no autocast."""
    while isinstance(source := node.args[0] if _is_choice(node) else _uncast(node), fx.Node):
        node = source
    return node


def _uncast(node: fx.Node) -> Any:
    """Return the input of a cast that does not change the dtype; None for any other node."""
    value = example_value(node)
    source: Any = node.args[0] if _is_cast(node) else None
    before = example_value(source)
    if value is None or before is None or before.dtype != value.dtype:
        return None
    return source


# ---- regions that return what they were given ----------------------------------------------------


def bypass_regions(module: fx.GraphModule) -> bool:
    """Have calls read a region's input instead of a result that is this input, uncast.

    In `with torch.autocast(…, enabled=False): y = norm(u.float())`, the cast returns u itself in
    float32, and torch.export takes all later reads of u for reads of the region's result.

    Returns:
        Whether a graph was changed.
    """
    graphs = [m for m in module.modules() if isinstance(m, fx.GraphModule)]
    calls = [(owner, call_of(node, owner)) for owner in graphs for node in owner.graph.nodes]
    found = [_bypass(call) for _, call in calls if call and len(call.graphs) == 1]
    for owner in graphs:
        owner.recompile()
    return any(found)


def _bypass(call: Call) -> bool:
    """Drop the results of a region that are its inputs; return whether there are any."""
    (nested,) = call.graphs
    results, given = call.results(nested), operands_of(call, nested.graph)
    users = list(call.node.users)
    around = call.where is not None and call.where.spread  # a mode, not a loop
    if not around or any(user.target is not operator.getitem for user in users):
        return False
    roots = [_root(value) if isinstance(value, fx.Node) else None for value in results]
    kept = [n for n, root in enumerate(roots) if root is None or root not in given]
    for user in users:
        index: Any = user.args[1]
        if index in kept:
            user.args = (call.node, kept.index(index))
        else:
            root = roots[index]
            assert root is not None
            _take_place(given[root], user)
    nested.graph.output_node().args = (tuple(results[n] for n in kept),)
    if isinstance(values := call.node.meta.get("val"), tuple | list):
        call.node.meta["val"] = tuple(values[n] for n in kept)
    return len(kept) < len(results)


def _take_place(node: fx.Node, other: fx.Node) -> None:
    """Replace a node by one of equal value, also where calls of submodules get or return it."""
    values = (*node.meta.get(VALUES, ()), *other.meta.get(VALUES, ()))
    node.meta = {**node.meta, **({VALUES: values} if values else {})}
    other.replace_all_uses_with(node)
    other.graph.erase_node(other)


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


def remove_metadata_assertions(module: fx.GraphModule) -> None:
    """Remove torch.export's assertions that a tensor that is cast has the dtype of the capture.

    They compute nothing, and under autocast the dtype may be another.
    """
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            target = torch.ops.aten._assert_tensor_metadata.default
            found = inner.graph.find_nodes(op="call_function", target=target)
            for node in found:
                inner.graph.erase_node(node)
            if found:
                inner.recompile()
