"""Outlining, the opposite of inlining: submodules as modules of their own, which a graph calls.

Outlining does not change the graph itself, which passes rewrite, and fold, verify and save read. A
copy of it is split, and runs instead: the nodes of each outlined call become a graph of their own,
and one call of a module replaces them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.node import base_types
from torch.utils import _pytree as pytree

from ...errors import SubmoduleError
from ...fx.calls import example_value, is_in, named_argument
from ...fx.effects import written_nodes
from ...fx.literals import literal
from ...fx.nested import call_of, every_call
from ...fx.trials import memory_use
from ..constants import EqualConstants
from ..contract import ConstantInput, Dimension, Input, InputSpec, IntegerInput, TensorInput
from ..tensor_state import Gradient, Order
from .checks import check_sizes, check_unchanged, leaves_of
from .contract import dimension_of

aten = torch.ops.aten

CALLS = "module_calls"  # key in a node's meta: the recorded calls around it, outermost first
VALUES = "module_values"  # key in a node's meta: the inputs and outputs of calls that it is

MOVED = "module_moved"  # key in a node's meta: the dtype of its example may not be its dtype now

# Names under which a graph's code finds two modules besides its tensors. FACADE is the module as
# its user has it: outlined submodules are called through it, and so with the hooks, wrappers and
# replacements that the user gave them. OUTER, in the graph of an outlined submodule only, is the
# whole model, for all that is outside of that submodule.
FACADE = "facade"
OUTER = "outer"

CallKey = tuple[str, int]  # a submodule's path, and the number of its call


@dataclass(frozen=True)
class Value:
    """A leaf of a call's inputs or outputs that a node computes.

    Attributes:
        call: the call.
        output: whether it is an output.
        index: its index among the leaves.
    """

    call: CallKey
    output: bool
    index: int


@dataclass(frozen=True, eq=False)
class Leaves:
    """The inputs or the output of a call: its structure, and its leaves.

    Attributes:
        structure: the pytree structure.
        constants: the leaves; None where a node computes the leaf.
        computed: indices of the leaves that a node computes.
        tensors: those of them that are tensors; the others are sizes.
    """

    structure: Any
    constants: tuple[Any, ...]
    computed: tuple[int, ...]
    tensors: frozenset[int]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Leaves) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self.computed)

    def _key(self) -> tuple[Any, ...]:
        return self.structure, literal(self.constants), self.computed, self.tensors


@dataclass(frozen=True)
class ModuleCall:
    """A call of a submodule, as capture recorded it.

    Attributes:
        key: path and number of the call.
        names: names of its arguments, positional ones first.
        positional: number of positional arguments.
        by_position: number of leading arguments that may be given by position.
        structures: the pytree structure of each argument.
        inputs: the leaves of the list of arguments.
        output: the leaves of the result.
        asks: whether it reads if gradients are enabled, or if tensors have one.
        gradients: the gradient state of each leaf of the arguments, if it reads whether tensors
            have a gradient; None for a leaf that is no tensor.
    """

    key: CallKey
    names: tuple[str, ...]
    positional: int
    by_position: int
    structures: tuple[Any, ...]
    inputs: Leaves
    output: Leaves
    asks: bool = False
    gradients: tuple[Gradient | None, ...] = ()

    @property
    def path(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class OutlinedGraph:
    """The graph of an outlined call.

    Attributes:
        call: the call.
        graph: its graph: one placeholder for each computed leaf of the arguments; it returns the
            leaves of the output. Names of tensors are relative to the submodule, or start with
            "outer." and are relative to the whole model.
        inputs: its input contract.
        alike: pairs of indices among the arguments' leaves that were one value.
    """

    call: ModuleCall
    graph: fx.Graph
    inputs: InputSpec
    alike: frozenset[tuple[int, int]]


def split_at_calls(
    graph: fx.Graph,
    calls: Sequence[ModuleCall],
    paths: Iterable[str],
    equal: EqualConstants,
    ordered: bool,
) -> tuple[fx.Graph, dict[str, list[OutlinedGraph]]]:
    """Split a graph at the calls of submodules.

    Args:
        graph: the graph, which stays as it is.
        calls: all recorded calls in it.
        paths: the submodules to outline.
        equal: the names of constants in the submodules' graphs.
        ordered: whether the forward reads how its tensors lie in memory.

    Returns:
        A graph that calls the submodules, as "facade.<path>", and the graph of each call of each
        submodule.

    Raises:
        SubmoduleError: a submodule has a part in the graph other than by its calls, or it shares
            more than arguments and results with the code around it.
    """
    rest, repeatable = _prepared_copy(graph)
    made: dict[str, list[OutlinedGraph]] = {}
    for path in sorted(paths, key=lambda path: (-path.count("."), path)):  # the innermost first
        own = [call for call in calls if call.path == path]
        if _is_called_otherwise(graph, path, recorded=bool(own)):
            raise SubmoduleError(
                f"'{path}' cannot be a module of its own: it is called under torch.no_grad or "
                "torch.autocast in the forward, or only by one of its methods. Outline the module "
                "around it, or those inside."
            )
        made[path] = [_Outliner(rest, call, repeatable, equal, ordered).outline() for call in own]
    _lint(rest, "the graph around the submodules")
    return rest, made


def _lint(graph: fx.Graph, what: str) -> None:
    """Raise SubmoduleError for a graph in which a value is used before it is computed."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise SubmoduleError(
            f"{what} cannot be split from the rest ({str(error).splitlines()[0]}). Outline other "
            "modules, or none, and report this to fxlora."
        ) from error


def _prepared_copy(graph: fx.Graph) -> tuple[fx.Graph, frozenset[fx.Node]]:
    """Return a copy of a graph that can be split, and its nodes that can be recomputed."""
    rest = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    rest.output(rest.graph_copy(graph, copies))
    rest.set_codegen(graph._codegen)
    written = _written(graph, copies)
    _bypass_in_place_results(rest)
    _annotate(rest)
    return rest, _repeatable_nodes(rest, written)


def _is_called_otherwise(graph: fx.Graph, path: str, recorded: bool) -> bool:
    """Whether a submodule has a part in a graph that no recorded call has.

    Args:
        graph: the graph.
        path: the submodule's path.
        recorded: whether there are recorded calls of it; else each node of it counts.
    """
    owner = graph.owning_module
    assert owner is not None
    for node in graph.nodes:
        if not recorded and is_in(node, path):
            return True
        call = call_of(node, owner)
        if call and path not in {key[0] for key in node.meta.get(CALLS, ())}:
            deeper = (inner for g in call.graphs for inner in every_call(g.graph, g))
            graphs = (*call.graphs, *(g for inner in deeper for g in inner.graphs))
            if any(is_in(found, path) for g in graphs for found in g.graph.nodes):
                return True
    return False


def _annotate(graph: fx.Graph) -> None:
    """Record the calls around each node that a pass inserted: those that all its users are in."""
    for node in reversed(list(graph.nodes)):
        if CALLS not in node.meta and node.op not in ("placeholder", "output"):
            around = [user.meta.get(CALLS, ()) for user in node.users]
            node.meta = {**node.meta, CALLS: _common(around)}


def _common(stacks: Sequence[tuple[CallKey, ...]]) -> tuple[CallKey, ...]:
    shared = list(zip(*stacks, strict=False))
    count = next((i for i, keys in enumerate(shared) if len(set(keys)) > 1), len(shared))
    return tuple(stacks[0][:count]) if stacks else ()


def same_graph(one: OutlinedGraph, other: OutlinedGraph) -> bool:
    """Whether two calls of a submodule have the same graph and structure."""
    if one is other:
        return True
    same = one.call.inputs == other.call.inputs and one.call.output == other.call.output
    if not same or one.call.names != other.call.names:
        return False
    ours, theirs = (made.graph.python_code("self") for made in (one, other))
    return (ours.src, ours.globals) == (theirs.src, theirs.globals)


class _Outliner:
    """Replaces the nodes of one call by a call of the submodule.

    Attributes:
        rest: the graph around the call, which is rewritten.
        call: the call.
        repeatable: the nodes that can be computed again (see `_repeatable_nodes`).
        equal: the names of constants.
        ordered: whether the contract asks for the order of tensors in memory.
        inside: the nodes of the call.
        given: the nodes of the computed leaves of its arguments, by index.
        results: the nodes of the computed leaves of its output, by index.
        graph: the submodule's graph.
        copies: its nodes, by the nodes of `rest` that they are copied from.
    """

    def __init__(
        self,
        rest: fx.Graph,
        call: ModuleCall,
        repeatable: frozenset[fx.Node],
        equal: EqualConstants,
        ordered: bool,
    ) -> None:
        self.rest = rest
        self.call = call
        self.repeatable = repeatable
        self.equal = equal
        self.ordered = ordered
        self.inside = {node for node in rest.nodes if call.key in node.meta.get(CALLS, ())}
        self.given = self._values(output=False)
        self.results = self._values(output=True)
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def outline(self) -> OutlinedGraph:
        inside = [node for node in self.rest.nodes if node in self.inside]
        if all(node.op == "get_attr" for node in inside):
            raise self._refusal("computes nothing: it returns its arguments, or parameters")
        self._check_results(inside)
        for index in self.call.inputs.computed:
            node = self.given[index]
            placeholder = self.graph.placeholder(f"given_{index}")
            placeholder.meta = {k: v for k, v in node.meta.items() if k == "val"}
            self.copies.setdefault(node, placeholder)
        for node in inside:
            at_use = node.op == "get_attr" or node in self.repeatable or _is_size(node)
            if not at_use:  # those are copied at their first use, so that equal calls are alike
                self._copy_of(node)
        returned = [
            self._copy_of(self.results[index]) if index in self.results else constant
            for index, constant in enumerate(self.call.output.constants)
        ]
        self.graph.output(returned)
        _lint(self.graph, f"'{self.call.path}'")
        inputs = self._contract()
        self._replace(inside)
        return OutlinedGraph(self.call, self.graph, inputs, self._alike())

    def _alike(self) -> frozenset[tuple[int, int]]:
        """Return pairs of arguments that are one value: the graph has the first for both."""
        first: dict[fx.Node, int] = {}
        for index in self.call.inputs.computed:
            first.setdefault(self.given[index], index)
        pairs = ((first[self.given[i]], i) for i in self.call.inputs.computed)
        return frozenset(pair for pair in pairs if pair[0] != pair[1])

    def _values(self, output: bool) -> dict[int, fx.Node]:
        """Return the node of each computed leaf.

        An adapter inserted after a node copies its meta, so the last match wins.
        """
        leaves = self.call.output if output else self.call.inputs
        found: dict[int, fx.Node] = {}
        for node in self.rest.nodes:
            for value in node.meta.get(VALUES, ()):
                if value.call == self.call.key and value.output is output:
                    found[value.index] = node
        missing = set(leaves.computed) - found.keys()
        if missing:
            what = "returns" if output else "gets"
            raise self._refusal(f"{what} a value that is not in the graph")
        return found

    # ---- the submodule's graph --------------------------------------------------------------

    def _copy(self, node: fx.Node) -> fx.Node:
        args = fx.map_arg(node.args, self._copy_of)
        kwargs = fx.map_arg(node.kwargs, self._copy_of)
        target = node.target
        if node.op == "call_module":
            prefix = f"{FACADE}." if str(target).startswith(f"{FACADE}.") else ""
            target = self._relative(str(target).removeprefix(prefix), prefix)
        copied = self.graph.create_node(node.op, target, args, kwargs, type_expr=node.type)
        copied.meta = dict(node.meta)
        self.copies[node] = copied
        return copied

    def _copy_of(self, node: fx.Node) -> fx.Node:
        """Return the submodule's node for a node of the whole graph."""
        if node in self.copies:
            return self.copies[node]
        if node.op == "get_attr":
            fetched = self.graph.get_attr(self._relative(str(node.target), ""))
            fetched.meta = dict(node.meta)
            self.copies[node] = fetched
            return fetched
        if _is_size(node):
            return self._size(node)
        if node in self.inside or node in self.repeatable:
            return self._copy(node)
        raise self._refusal(f"takes the value of '{node.name}' other than as an argument")

    def _size(self, node: fx.Node) -> fx.Node:
        """Return a size, taken from a tensor that the submodule is given where one has it.

        torch.export takes a size from an input of the whole model, at its first use anywhere.
        """
        for index in self.call.inputs.computed:
            given = self.given[index]
            if (axis := _axis(given, node.meta["val"])) is not None:
                size = self.graph.call_function(aten.sym_size.int, (self.copies[given], axis))
                size.meta["val"] = node.meta["val"]
                self.copies[node] = size
                return size
        return self._copy(node)

    def _relative(self, name: str, prefix: str) -> str:
        own = f"{self.call.path}."
        if name.startswith(own):
            return prefix + name.removeprefix(own)
        return f"{OUTER}.{prefix}{self.equal.name_of(name)}"

    def _contract(self) -> InputSpec:
        """Return the contract: names, structure, constants, shapes and dtypes."""
        groups: list[tuple[Input, ...]] = []
        begin = 0
        for name, structure in zip(self.call.names, self.call.structures, strict=True):
            end = begin + structure.num_leaves
            indices = range(begin, end)
            named = [name] if len(indices) == 1 else [f"{name}[{i - begin}]" for i in indices]
            groups.append(tuple(map(self._leaf, indices, named)))
            begin = end
        call = self.call
        return InputSpec(call.names, call.structures, tuple(groups), positional=call.by_position)

    def _leaf(self, index: int, name: str) -> Input:
        constant = self.call.inputs.constants[index]
        if index not in self.call.inputs.computed:
            return ConstantInput(name, constant)
        value = example_value(self.given[index])
        if value is None:
            size = dimension_of(self.given[index].meta.get("val"))
            known = isinstance(size, Dimension)
            return IntegerInput(name, size if known else Dimension(f"size_{index}"))
        dtype = None if self.given[index].meta.get(MOVED) else value.dtype
        dims = tuple(map(dimension_of, value.shape))
        order = self._order(value) if self.ordered else None
        return TensorInput(name, dims, dtype, order, self._gradient(index))

    def _gradient(self, index: int) -> Gradient | None:
        """Return the gradient state that a tensor must have, or None if it does not matter."""
        known = self.call.gradients[index] if self.call.gradients else None
        computed = self.given[index].op == "call_function"
        return replace(known, computed=computed) if known else None

    def _order(self, value: torch.Tensor) -> Order:
        if order := Order.of(value, offset=True):
            return order
        raise self._refusal(
            "may read how a tensor lies in memory, where the order is not the same for every size"
        )

    # ---- the graph around it ----------------------------------------------------------------

    def _check_results(self, inside: Sequence[fx.Node]) -> None:
        """Raise SubmoduleError if a value that the submodule does not return is used outside it.

        Values that can be recomputed outside are exempt. A size is computed from an input instead.
        """
        returned = set(self.results.values())
        for node in inside:
            outside = [user for user in node.users if user not in self.inside]
            if not outside or node in returned or node.op == "get_attr":
                continue
            if node in self.repeatable:
                continue
            if _is_size(node):
                self._move_size(node, outside)
                continue
            line = f" ('{node.name}', used by '{outside[0].name}')"
            raise self._refusal(f"hands a value out other than by its return{line}")

    def _move_size(self, node: fx.Node, users: Sequence[fx.Node]) -> None:
        """Compute a size that the submodule computed from inputs of the whole graph instead."""
        with self.rest.inserting_before(node):
            size = self._size_outside(node)
        node.replace_all_uses_with(size, delete_user_cb=lambda user: user in users)

    def _size_outside(self, node: fx.Node) -> fx.Node:
        if node not in self.inside:
            return node
        for source in self.rest.find_nodes(op="placeholder"):
            if (axis := _axis(source, node.meta["val"])) is not None:
                size = self.rest.call_function(aten.sym_size.int, (source, axis))
                size.meta = {"val": node.meta["val"], CALLS: ()}
                return size
        if node.op != "call_function" or not all(map(_is_size, node.all_input_nodes)):
            raise self._refusal(f"computes the size '{node.name}', which is used outside")
        size = self.rest.node_copy(node, self._size_outside)
        size.meta = {"val": node.meta["val"], CALLS: ()}
        return size

    def _replace(self, inside: Sequence[fx.Node]) -> None:
        leaves: list[Any] = [
            self.given.get(index, constant)
            for index, constant in enumerate(self.call.inputs.constants)
        ]
        given: Any = pytree.tree_unflatten(leaves, self.call.inputs.structure)
        self._check_plain(given)
        args = tuple(given[: self.call.positional])
        kwargs = dict(
            zip(self.call.names[self.call.positional :], given[self.call.positional :], strict=True)
        )
        around = _prefix(inside, self.call.key)
        place = self._place(inside)
        used = {index: self._users_after(old, place) for index, old in self.results.items()}
        with self.rest.inserting_before(place):
            node = self.rest.call_module(f"{FACADE}.{self.call.path}", args, kwargs)
            node.meta[CALLS] = around
            results = self._unpacked(node, around)
            taken: dict[fx.Node, fx.Node] = {}  # by result: the node that replaces it outside
            for index, old in self.results.items():
                new = results[index]
                if old in self.inside and old not in taken:
                    new.meta = {**old.meta, CALLS: around}
                    taken[old] = new
                elif used[index]:
                    expected = taken.get(old) or self._before(old, node, around)
                    self._insert_check(check_unchanged, around, index, new, expected)
                if any(user.op != "output" for user in used[index]):
                    self._insert_size_check(index, new, around)
        for old, new in taken.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.inside)
        for old in reversed(inside):
            if not old.users:
                self.rest.erase_node(old)

    def _before(self, value: fx.Node, call: fx.Node, around: tuple[CallKey, ...]) -> fx.Node:
        """Return a value from outside of the submodule, or a copy of it where it comes too late.

        A pass may have moved the submodule's ops before the size that the submodule returns.
        """
        if value < call:
            return value
        if not (value.op == "get_attr" or value in self.repeatable or _is_size(value)):
            raise self._refusal(f"returns '{value.name}', which is computed after it")
        copied = self.rest.node_copy(value, lambda given: self._before(given, call, around))
        copied.meta = {**{k: v for k, v in value.meta.items() if k != VALUES}, CALLS: around}
        return copied

    def _users_after(self, result: fx.Node, place: fx.Node) -> list[fx.Node]:
        """Return a result's users that are outside the submodule and after its call."""
        same = [result]
        if result.op == "get_attr":
            same = self.rest.find_nodes(op="get_attr", target=result.target)
        users = [user for node in same for user in node.users if user not in self.inside]
        checks = (check_sizes, check_unchanged)
        return [user for user in users if not user < place and user.target not in checks]

    def _insert_check(
        self, check: Any, around: tuple[CallKey, ...], index: int, leaf: fx.Node, *expected: Any
    ) -> None:
        node = self.rest.call_function(check, (leaf, self.call.path, index, *expected))
        node.meta[CALLS] = around

    def _insert_size_check(self, index: int, new: fx.Node, around: tuple[CallKey, ...]) -> None:
        """Insert a check of a result's shape, as the code around takes its sizes from elsewhere."""
        value = example_value(self.results[index])
        if value is None:
            return
        sizes = tuple(s if isinstance(s, int) else None for s in value.shape)
        sources = [self.given[i] for i in self.call.inputs.computed]
        if not around:  # a submodule around this one cannot take the whole model's inputs
            sources += self.rest.find_nodes(op="placeholder")
        equal: list[tuple[int, fx.Node, int]] = []
        for axis, size in enumerate(value.shape):
            found = ((source, _axis(source, size)) for source in sources)
            first = next(((node, other) for node, other in found if other is not None), None)
            equal += [(axis, *first)] if first else []
        self._insert_check(check_sizes, around, index, new, sizes, tuple(equal))

    def _place(self, inside: Sequence[fx.Node]) -> fx.Node:
        """Return the node before which to insert the call, after the nodes of all arguments."""
        nodes = [node for node in inside if node.op != "get_attr" and not _is_size(node)]
        place = nodes[0] if nodes else inside[0]
        for node in self.given.values():
            if node not in self.inside and place <= node:
                place = node.next
        users = [u for n in self.results.values() if n in self.inside for u in n.users]
        first = min((user for user in users if user not in self.inside), default=None)
        if first is not None and first < place:
            raise self._refusal("is not one stretch of the graph")
        return place

    def _unpacked(self, node: fx.Node, around: tuple[CallKey, ...]) -> dict[int, fx.Node]:
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
        flat.meta[CALLS] = around
        found = {i: self.rest.call_function(_leaf_of, (flat, i)) for i in self.results}
        for leaf in found.values():  # of a value from outside, too: else it counts as outside
            leaf.meta[CALLS] = around
        return found

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
                raise self._refusal(f"takes a {type(value).__name__} as an argument")

    def _refusal(self, why: str) -> SubmoduleError:
        return SubmoduleError(
            f"'{self.call.path}' cannot be a module of its own: it {why}. Outline the module "
            "around it, or those inside."
        )


def _is_plain(structure: Any) -> bool:
    """Whether a structure of indices can be an argument of a node: dicts, lists and tuples."""
    if type(structure) is dict:
        return all(isinstance(k, str) and _is_plain(value) for k, value in structure.items())
    return type(structure) is int or (
        type(structure) in (list, tuple) and all(map(_is_plain, structure))
    )


def _leaf_of(leaves: Sequence[Any], index: int) -> Any:
    return leaves[index]


def _prefix(inside: Sequence[fx.Node], key: CallKey) -> tuple[CallKey, ...]:
    stack = inside[0].meta[CALLS] if inside else ()
    return tuple(stack[: stack.index(key)]) if key in stack else ()


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _repeatable_nodes(graph: fx.Graph, written: frozenset[object]) -> frozenset[fx.Node]:
    """Return the nodes that depend on parameters and constants only, so that copies are the same.

    Without values that are written to, and anything computed from one.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            fixed = node.target not in written
        else:
            fixed = node.op == "call_function" and node not in written and _repeatable(node)
        if fixed and found.issuperset(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _repeatable(node: fx.Node) -> bool:
    """Whether a call does the same each time: it writes nothing, and draws no random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # a nested graph may draw, or write
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _written(graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> frozenset[object]:
    """Return the tensors that a graph writes to: names of fetched ones, copied nodes of others."""
    owner = graph.owning_module
    assert owner is not None
    roots = {root for node in graph.nodes for root in written_nodes(node, owner)}
    roots |= {root for node in graph.nodes for root in _statistics(node, owner)}
    return frozenset(root.target if root.op == "get_attr" else copies[root] for root in roots)


def _statistics(node: fx.Node, owner: Any) -> list[fx.Node]:
    """Return the tensors that an op writes to although its schema does not say so (batch_norm)."""
    if node.op != "call_function" or named_argument(node, "running_mean") is None:
        return []
    return [given for given in memory_use(node, owner).written if given.op == "get_attr"]


def _bypass_in_place_results(graph: fx.Graph) -> None:
    """Have the users of an in-place op's result use the op's first argument: it is the same tensor.

    So a buffer that a submodule updates can be read outside of it, and is updated once.
    """
    for node in graph.nodes:
        given = node.args[0] if _in_place(node) else None
        if isinstance(given, fx.Node) and VALUES not in node.meta:
            node.replace_all_uses_with(given)


def _in_place(node: fx.Node) -> bool:
    """Whether a call returns its first argument, which it wrote to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    declared = node.target._schema
    results = [result.alias_info for result in declared.returns]
    first = declared.arguments[0].alias_info if declared.arguments else None
    if len(results) != 1 or first is None or not first.is_write or results[0] is None:
        return False
    return bool(results[0].is_write) and results[0].before_set == first.before_set


def _axis(node: fx.Node, size: Any) -> int | None:
    """Return a dimension of a node's tensor that has this size, or None."""
    value = example_value(node)
    if value is None or not isinstance(size, torch.SymInt):
        return None
    for axis, found in enumerate(value.shape):
        if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
            return axis
    return None
