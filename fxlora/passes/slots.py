"""The nodes that choose among slots, in one graph: gathered branches, and values once per slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree

from ..errors import UnsupportedOpError
from ..fx.calls import example_value
from ..fx.effects import written_nodes
from ..fx.marks import ROUTED
from ..lora.gathered import BatchDim, Samples
from ..lora.row import Read, aten
from ..lora.variants import VARIANTS
from ..module.adapted_weight import adapted_weight, rank, to_weights
from ..module.blocks.recorded import CALLS
from ..module.casts import mark
from ..module.routing import INPUT, INPUTS, WEIGHTS, owned_of, scaling_of
from ..plan import Entry, scales_outputs
from ..reads.facts import padding_row
from ..reads.readers import Reader

KEPT = None  # the mark of a node that replaces no other


class SlotGraph:
    """A graph that gets the input `adapter_ids`, and the nodes that depend on it."""

    def __init__(self, graph: fx.Graph, slots: int, weights: bool, mixture: int) -> None:
        self.graph, self.slots, self.mixture = graph, slots, mixture
        self._tracer = _Tracer(graph)
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        ids = self._input(INPUT, last)
        self.weights = self._input(WEIGHTS, ids) if weights else None
        extend_inputs(graph, INPUTS if weights else (INPUT,))
        with self._before((self.weights or ids).next):
            self.rows = self._checked(self.proxy(ids)).node
        node = self.rows  # of no block, though one may be all that uses it
        while node is not (self.weights or ids):
            node.meta[CALLS], node = (), node.prev

    def _input(self, name: str, before: fx.Node) -> fx.Node:
        with self.graph.inserting_after(before):
            node = self.graph.placeholder(name)
        node.meta[ROUTED] = KEPT
        return node

    def _checked(self, ids: Any) -> Any:
        """Return the rows of the stacks that ids choose: -1 chooses the last.

        The assertion has a message; ONNX has none. There, an id out of range is an index that the
        table does not have, which a runtime refuses.
        """
        outside = aten.logical_or.default(aten.lt.Scalar(ids, -1), aten.ge.Scalar(ids, self.slots))
        message = f"adapter_ids must be from -1 (the base) to {self.slots - 1}"
        aten._assert_async.msg(aten.logical_not.default(aten.any.default(outside)), message)
        ones = aten.new_ones.default(ids, [self.slots + 1])
        table = aten.sub.Tensor(aten.cumsum.default(ones, 0), 1)  # 0 … slots
        return aten.index.Tensor(table, [aten.masked_fill.Scalar(ids, outside, self.slots + 1)])

    def proxy(self, node: fx.Node) -> Any:
        return fx.Proxy(node, self._tracer)

    def _before(self, node: fx.Node) -> Any:
        return self.graph.inserting_before(node)

    def _fetch(self, name: str) -> Any:
        node = self.graph.create_node("get_attr", name)
        node.meta[ROUTED] = KEPT
        return self.proxy(node)

    def _replace(self, base: fx.Node, output: fx.Node, at: int, users: set[fx.Node]) -> None:
        """Replace a node in its earlier users by one that has it as an argument."""
        output.meta = {**base.meta, ROUTED: at}
        base.replace_all_uses_with(output, delete_user_cb=lambda user: user in users)

    # ---- gathered branches ----------------------------------------------------------------------

    def add_branch(self, entry: Entry, reader: Reader, batch: BatchDim, dropout: float) -> None:
        """Rewrite op(x, W) to op(x, W) + s_i·B_i(A_i(dropout(x))) for sample i, at one read."""
        op, node = reader.op, reader.node
        assert op is not None and op.gathered is not None
        base, users = node, set(node.users)
        with self._before(node.next):
            samples = self._samples(entry, reader, batch, dropout)
            branch = op.gathered(samples)
            if entry.rows is not None:
                assert op.output is not None
                behind = entry.shape[entry.layout.part_dim] - entry.rows[1]
                pad = [0, 0] * (-1 - op.output) + [entry.rows[0], behind]
                branch = aten.constant_pad_nd.default(branch, pad)
            output = self._sum(self.proxy(base), branch).node
        self._replace(base, output, 0, users)

    def _sum(self, base: Any, branch: Any) -> Any:
        """Add a branch; one that ends in a product in the shape of the sum is added in it."""
        if branch.node.target is not aten.bmm.default:
            return aten.add.Tensor(base, branch)
        factors = [self.proxy(factor) for factor in branch.node.args]
        self.graph.erase_node(branch.node)
        return aten.baddbmm.default(base, *factors)

    def _samples(self, entry: Entry, reader: Reader, batch: BatchDim, dropout: float) -> Samples:
        op, node = reader.op, reader.node
        assert op is not None
        given = op.input_of(node, reader.weight)
        value = example_value(given)
        assert value is not None
        x = self.proxy(given)
        if dropout and op.dropout:
            x = aten.dropout.default(x, dropout, True)
        layout = reader.layout or entry.layout
        down, up = self._fetch(entry.name_a), self._fetch(entry.name_b)
        for variant, held in entry.variant_tensors.items():
            more = [self._fetch(name) for name in held]
            down, up = VARIANTS[variant].factors(entry.layout, down, up, *more)
        size_i, size_o = entry.layout.features(entry.adapted_shape)
        if layout.in_first != entry.layout.in_first:  # (BA)^T = A^T B^T
            down, up = aten.transpose.int(up, 1, 2), aten.transpose.int(down, 1, 2)
            size_i, size_o = size_o, size_i
        trains = entry.padding_idx is None and padding_row(node, entry.shape[0]) is not None
        return Samples(
            Read(node, reader.weight, x, layout, entry.shape, rank(entry), 1.0, trains),
            self.proxy(self.rows),
            down,
            up,
            self._fetch(scaling_of(entry)),
            (size_i, size_o),
            batch,
            value.ndim,
            lambda factor: to_weights(entry, factor),
            self.proxy(self.weights) if self.weights else None,
            self.mixture,
        )

    # ---- values once per slot -------------------------------------------------------------------

    def compute_per_slot(
        self,
        sources: Mapping[fx.Node, list[Entry] | str],
        full: Mapping[str, str],
        batch: Mapping[fx.Node, BatchDim],
        writers: Collection[fx.Node],
    ) -> None:
        """Compute all that depends on some weights once per slot, and choose where samples are.

        Args:
            sources: the nodes that fetch the weights, with the entries that adapt them, or with
                the name of the parameter that an adapter trains in full.
            full: the stack of each parameter that trains in full.
            batch: where the samples are in the nodes.
            writers: nodes that write to buffers.

        Raises:
            UnsupportedOpError: a value that depends on a weight writes to memory, or leaves the
                graph before the samples can be told apart; names the weight.
        """
        if sources and (self.weights or self.mixture > 1):
            name = next(iter(sources)).target
            raise UnsupportedOpError(
                f"'{name}' is not adapted by a gathered branch, so it takes no weights and no "
                "mixture for each sample. Route without weights= and mixture=, or combine the "
                "adapters into one (fxlora.combine)."
            )
        copies: dict[fx.Node, list[fx.Node]] = {}  # of a node, by slot
        origin: dict[fx.Node, str] = {}
        for node in list(self.graph.nodes):
            if node in sources:
                copies[node] = self._weights(node, sources[node], full)
                origin[node] = str(node.target)
                continue
            inside = [given for given in node.all_input_nodes if given in copies]
            if not inside:
                continue
            weight = origin[inside[0]]
            self._refuse(node, weight, node in writers)
            made = [self._copied(node, copies, slot) for slot in range(self.slots)]
            if node in batch:
                self._choose(node, made, batch[node])
            else:
                copies[node], origin[node] = made, weight

    def _weights(
        self, node: fx.Node, adapted: list[Entry] | str, full: Mapping[str, str]
    ) -> list[fx.Node]:
        """Return the weight of each slot."""
        with self._before(node.next):
            if isinstance(adapted, str):
                stack = self._fetch(full[adapted])
                flags = self._fetch(owned_of(full[adapted]))
                return [
                    aten.where.self(
                        _number(flags, slot),
                        mark(aten.select.int(stack, 0, slot), full[adapted], adapted),
                        self.proxy(node),
                    ).node
                    for slot in range(self.slots)
                ]
            names = [n for entry in adapted for n in (*entry.tensors, scaling_of(entry))]
            names += [owned_of(entry) for entry in adapted if scales_outputs(entry)]
            stacks = {name: self._fetch(name) for name in names}
            found: list[fx.Node] = []
            for slot in range(self.slots):
                weight = self.proxy(node)
                for entry in adapted:
                    numbers = {scaling_of(entry), owned_of(entry)}
                    row = {
                        name: _number(stack, slot)
                        if name in numbers
                        else aten.select.int(stack, 0, slot)
                        for name, stack in stacks.items()
                    }
                    before, weight = weight, _adapted(entry, weight, row)
                    if scales_outputs(entry):
                        weight = aten.where.self(row[owned_of(entry)], weight, before)
                found.append(weight.node)
            return found

    def _refuse(self, node: fx.Node, weight: str, writes: bool) -> None:
        """Raise UnsupportedOpError for a node that cannot be computed once per slot."""
        owner = self.graph.owning_module
        assert owner is not None
        writes = writes or bool(written_nodes(node, owner))
        if node.op != "call_function" or writes:
            what = "writes to memory" if writes else "leaves the graph"
            raise UnsupportedOpError(
                f"'{weight}': a value that depends on it {what} ('{node.name}') where the samples "
                "of the batch cannot be told apart, so they cannot have different adapters. Route "
                "adapters that leave this weight alone, or capture the model without that output."
            )

    def _copied(self, node: fx.Node, copies: Mapping[fx.Node, list[fx.Node]], slot: int) -> fx.Node:
        with self._before(node.next):
            copied = self.graph.node_copy(
                node, lambda given: copies[given][slot] if given in copies else given
            )
        copied.meta = {**node.meta, ROUTED: KEPT}
        return copied

    def _choose(self, node: fx.Node, made: list[fx.Node], batch: BatchDim) -> None:
        """Give each sample the value of its slot."""
        value = example_value(node)
        assert value is not None
        users, chosen = set(node.users), node
        for slot, copied in enumerate(made):
            with self._before(max(copied, chosen).next):
                mine = aten.eq.Scalar(self.proxy(self.rows), slot)
                mine = batch.along(mine, self.proxy(node), value.ndim)
                args = (mine, self.proxy(copied), self.proxy(chosen))
                output = aten.where.self(*args).node
            output.meta = {**node.meta, ROUTED: 2}
            chosen = output
        node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user in users)


def _number(stack: Any, slot: int) -> Any:
    """Return the number of a slot, from a stack (slots, 1)."""
    return aten.select.int(aten.select.int(stack, 0, slot), 0, 0)


def _adapted(entry: Entry, weight: Any, row: Mapping[str, Any]) -> Any:
    """Return the adapted weight of one slot, from a row of the entry's stacks."""
    down, up = row[entry.name_a], row[entry.name_b]
    for variant, held in entry.variant_tensors.items():
        more = [row[name] for name in held]
        down, up = VARIANTS[variant].factors(entry.layout, down, up, *more)
    # s is no number here, so it goes into B: W0 + (s·B)·A
    up = aten.type_as.default(aten.mul.Tensor(up, row[scaling_of(entry)]), up)
    gains = tuple(name for name in entry.variants if VARIANTS[name].gain)
    plain = dataclasses.replace(entry, variants=gains, r=rank(entry))
    return adapted_weight(plain, weight, {**row, entry.name_a: down, entry.name_b: up})


class _Tracer(GraphAppendingTracer):
    """Tracer that marks the nodes it emits."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[ROUTED] = KEPT
        return node


# ---- the graph's arguments ----------------------------------------------------------------------


def extend_inputs(graph: fx.Graph, inputs: Sequence[str]) -> None:
    """Have the graph's code take further keyword arguments."""
    leaf = pytree.tree_structure(0)
    more = dict.fromkeys(inputs, leaf)
    _set_inputs(graph, lambda names, named: ([*names, *more], {**named, **more}))


def shorten_inputs(graph: fx.Graph) -> None:
    """Undo `extend_inputs`."""

    def without(names: list[str], named: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        kept = {name: spec for name, spec in named.items() if name not in INPUTS}
        return [name for name in names if name not in INPUTS], kept

    _set_inputs(graph, without)


def _set_inputs(
    graph: fx.Graph,
    change: Callable[[list[str], dict[str, Any]], tuple[list[str], dict[str, Any]]],
) -> None:
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    info = codegen.pytree_info
    positional, named = info.in_spec.children()
    names, specs = change(
        list(info.orig_args), dict(zip(named.context, named.children(), strict=True))
    )
    made = pytree.TreeSpec(dict, list(specs), list(specs.values()))
    in_spec = pytree.TreeSpec(tuple, None, [positional, made])
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, info.out_spec)))


def remove_slots(graph: fx.Graph) -> None:
    """Take all nodes that `SlotGraph` added out of a graph again."""
    for node in reversed(list(graph.nodes)):
        if ROUTED not in node.meta:
            continue
        if (at := node.meta[ROUTED]) is not KEPT:
            node.replace_all_uses_with(node.args[at])
        graph.erase_node(node)
    shorten_inputs(graph)
