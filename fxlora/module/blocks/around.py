"""The graph around an outlined submodule: one call of a module replaces the nodes of the call.

Hooks, wrappers or a replacement may change a submodule's outputs. Checks after the call raise where
the graph around it takes such a value from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import base_types
from torch.utils import _pytree as pytree

from ...fx.calls import example_value
from ...tables import a
from ..program import FACADE
from .checks import check_sizes, check_unchanged, leaves_of
from .part import CallPart, axis_of, is_size
from .recorded import CALLS, VALUES

aten = torch.ops.aten


def keep_inside(part: CallPart) -> None:
    """Raise SubmoduleError if a value that the submodule does not return is used outside it.

    Values that can be recomputed outside are exempt. A size is computed from an input instead.
    """
    returned = set(part.results.values())
    for node in part.nodes:
        outside = [user for user in node.users if user not in part.inside]
        if not outside or node in returned or node.op == "get_attr":
            continue
        if node in part.repeatable:
            continue
        if is_size(node):
            _move_size(part, node, outside)
            continue
        line = f" ('{node.name}', used by '{outside[0].name}')"
        raise part.refusal(f"hands a value out other than by its return{line}")


def _move_size(part: CallPart, node: fx.Node, users: Sequence[fx.Node]) -> None:
    """Compute a size that the submodule computed from inputs of the whole graph instead."""
    with part.rest.inserting_before(node):
        size = _size_outside(part, node)
    node.replace_all_uses_with(size, delete_user_cb=lambda user: user in users)


def _size_outside(part: CallPart, node: fx.Node) -> fx.Node:
    if node not in part.inside:
        return node
    for source in part.rest.find_nodes(op="placeholder"):
        if (axis := axis_of(source, node.meta["val"])) is not None:
            size = part.rest.call_function(aten.sym_size.int, (source, axis))
            size.meta = {"val": node.meta["val"], CALLS: ()}
            return size
    if node.op != "call_function" or not all(map(is_size, node.all_input_nodes)):
        raise part.refusal(f"computes the size '{node.name}', which is used outside")
    size = part.rest.node_copy(node, lambda given: _size_outside(part, given))
    size.meta = {"val": node.meta["val"], CALLS: ()}
    return size


def put_call(part: CallPart) -> None:
    """Replace the nodes of a call by a call of the submodule, as "facade.<path>"."""
    _Around(part).put_call()


class _Around:
    """Puts the call of a submodule into the graph around it.

    Attributes:
        part: the part of the graph that the call replaces.
        rest: that graph.
        call: the call, as recorded.
        around: the calls around it.
    """

    def __init__(self, part: CallPart) -> None:
        self.part = part
        self.rest = part.rest
        self.call = part.call
        self.around = part.around

    def put_call(self) -> None:
        results, inside = self.part.results, self.part.inside
        args, kwargs = self._arguments()
        place = self._place()
        used = {index: self._users_after(old, place) for index, old in results.items()}
        with self.rest.inserting_before(place):
            node = self.rest.call_module(f"{FACADE}.{self.call.path}", args, kwargs)
            node.meta[CALLS] = self.around
            leaves = self._unpacked(node)
            taken: dict[fx.Node, fx.Node] = {}  # by result: the node that replaces it outside
            for index, old in results.items():
                new = leaves[index]
                if old in inside and old not in taken:
                    new.meta = {**old.meta, CALLS: self.around}
                    taken[old] = new
                elif used[index]:
                    expected = taken.get(old) or self._before(old, node)
                    self._insert_check(check_unchanged, index, new, expected)
                if any(user.op != "output" for user in used[index]):
                    self._insert_size_check(index, new)
        for old, new in taken.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
        for old in reversed(self.part.nodes):
            if not old.users:
                self.rest.erase_node(old)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves: list[Any] = [
            self.part.given.get(index, constant)
            for index, constant in enumerate(self.call.inputs.constants)
        ]
        given: Any = pytree.tree_unflatten(leaves, self.call.inputs.structure)
        self._check_plain(given)
        count = self.call.positional
        named = zip(self.call.names[count:], given[count:], strict=True)
        return tuple(given[:count]), dict(named)

    def _check_plain(self, given: Any) -> None:
        """Raise SubmoduleError for an argument that a graph's node cannot hold, such as a cache."""
        ahead = [given]
        while ahead:
            value = ahead.pop()
            if type(value) in (list, tuple):
                ahead += value
            elif type(value) is dict:
                ahead += value.values()
            elif not isinstance(value, (*base_types, fx.Node, type(None))):
                raise self.part.refusal(f"takes {a(type(value).__name__)} as an argument")

    def _place(self) -> fx.Node:
        """Return the node before which to insert the call, after the nodes of all arguments."""
        inside, results = self.part.inside, self.part.results
        nodes = [node for node in self.part.nodes if node.op != "get_attr" and not is_size(node)]
        place = nodes[0] if nodes else self.part.nodes[0]
        for node in self.part.given.values():
            if node not in inside and place <= node:
                place = node.next
        users = [user for node in results.values() if node in inside for user in node.users]
        first = min((user for user in users if user not in inside), default=None)
        if first is not None and first < place:
            raise self.part.refusal("is not one stretch of the graph")
        return place

    def _users_after(self, result: fx.Node, place: fx.Node) -> list[fx.Node]:
        """Return a result's users that are outside the submodule and after its call."""
        same = [result]
        if result.op == "get_attr":
            same = self.rest.find_nodes(op="get_attr", target=result.target)
        users = [user for node in same for user in node.users if user not in self.part.inside]
        checks = (check_sizes, check_unchanged)
        return [user for user in users if not user < place and user.target not in checks]

    def _before(self, value: fx.Node, call: fx.Node) -> fx.Node:
        """Return a value from outside of the submodule, or a copy of it where it comes too late.

        A pass may have moved the submodule's ops before the size that the submodule returns.
        """
        if value < call:
            return value
        if not (value.op == "get_attr" or value in self.part.repeatable or is_size(value)):
            raise self.part.refusal(f"returns '{value.name}', which is computed after it")
        copied = self.rest.node_copy(value, lambda given: self._before(given, call))
        copied.meta = {**{k: v for k, v in value.meta.items() if k != VALUES}, CALLS: self.around}
        return copied

    # ---- the call's result ------------------------------------------------------------------

    def _unpacked(self, node: fx.Node) -> dict[int, fx.Node]:
        """Return the nodes of the leaves of a call's result."""
        if self.call.output.structure.is_leaf():
            return {0: node}
        output = self.call.output
        structure: Any = pytree.tree_unflatten(range(len(output.constants)), output.structure)
        constants = tuple(
            (index, value)
            for index, value in enumerate(output.constants)
            if index not in output.computed and isinstance(value, (int, float, str, type(None)))
        )
        plain = structure if _is_plain(structure) else None
        given = (node, self.call.path, plain, len(output.constants), constants)
        flat = self.rest.call_function(leaves_of, given)
        flat.meta[CALLS] = self.around
        found = {i: self.rest.call_function(_leaf_of, (flat, i)) for i in self.part.results}
        for leaf in found.values():  # of a value from outside, too: else it counts as outside
            leaf.meta[CALLS] = self.around
        return found

    def _insert_check(self, check: Any, index: int, leaf: fx.Node, *expected: Any) -> None:
        node = self.rest.call_function(check, (leaf, self.call.path, index, *expected))
        node.meta[CALLS] = self.around

    def _insert_size_check(self, index: int, new: fx.Node) -> None:
        """Insert a check of a result's shape, as the code around takes its sizes from elsewhere."""
        value = example_value(self.part.results[index])
        if value is None:
            return
        sizes = tuple(s if isinstance(s, int) else None for s in value.shape)
        sources = [self.part.given[i] for i in self.call.inputs.computed]
        if not self.around:  # a submodule around this one cannot take the whole model's inputs
            sources += self.rest.find_nodes(op="placeholder")
        equal: list[tuple[int, fx.Node, int]] = []
        for axis, size in enumerate(value.shape):
            found = ((source, axis_of(source, size)) for source in sources)
            first = next(((node, other) for node, other in found if other is not None), None)
            equal += [(axis, *first)] if first else []
        self._insert_check(check_sizes, index, new, sizes, tuple(equal))


def _is_plain(structure: Any) -> bool:
    """Whether a structure of indices can be an argument of a node: dicts, lists and tuples."""
    if type(structure) is dict:
        return all(isinstance(k, str) and _is_plain(value) for k, value in structure.items())
    return type(structure) is int or (
        type(structure) in (list, tuple) and all(map(_is_plain, structure))
    )


def _leaf_of(leaves: Sequence[Any], index: int) -> Any:
    return leaves[index]
