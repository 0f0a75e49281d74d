"""Route: one graph for several adapters, with an input that chooses one for each sample.

A weight whose reads all have a gathered branch, and whose inputs hold the samples in a known
dimension, gets that branch: op(x, W) + s_i·B_i(A_i(x)) for sample i. Any other weight gets the
general form: all that depends on it is computed once per slot, up to the first value that holds
the samples, and there each sample takes the value of its slot. So does a parameter trained in full.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import InjectError, UnsupportedOpError, warn
from ..fx.calls import example_value
from ..lora.gathered import BatchDim
from ..matching.forms import branch_obstacle
from ..module import CapturedModule
from ..module.casts import set_casts
from ..module.contract import InputSpec, SlotsInput, TensorInput
from ..module.fsdp import mesh_of
from ..module.program import MODES, Program
from ..module.routing import INPUT, INPUTS, WEIGHTS, Routing
from ..module.state import State
from ..plan import Entry, Plan, scales_outputs
from ..reads.readers import Reader
from ..reads.sites import Site
from ..tables import some
from .active import split_modes
from .base import Pass
from .batch import downstream, facts_about
from .batch_inputs import Batch
from .batch_runs import Facts, sized_like
from .fits import check_fits
from .gathered_branches import add_branch
from .per_slot import compute_per_slot
from .route_blocks import pass_to_blocks
from .slots import SlotGraph
from .stacks import Values, add_stacks, stacked_entries

Sites = Mapping[tuple[str, ...], Site]
BatchArgument = str | Mapping[str, int] | None


@dataclass(frozen=True)
class Route(Pass):
    """Add adapters in slots to every graph, and an input with the slot of each sample.

    Attributes:
        adapters: the plan and the tensors, by name, of the adapter in each slot; None if empty.
        rank: the least rank for which every place has room, or None.
        batch: the dimension of each argument that counts the samples; or the argument whose first
            dimension does, or None if that is clear.
        weights: whether to add an input with a further factor for each adapter of a sample.
        mixture: the number of adapters of each sample.
    """

    adapters: Sequence[tuple[Plan, Values] | None]
    rank: int | None = None
    batch: BatchArgument = None
    weights: bool = False
    mixture: int = 1

    def check(self, module: CapturedModule) -> None:
        if module.plan is not None:
            raise InjectError("the module has adapters already: fold or remove them first.")
        if module.parent_module:
            raise UnsupportedOpError(
                "only a module of whole graphs can be routed: here Python code runs between them, "
                "and may reorder the samples. Capture the submodule that has the adapted layers, "
                "and route that; or hold the adapters in one module (inject under several names), "
                "and run activate(module, name) on the samples of each."
            )
        if not module.exported:
            raise UnsupportedOpError(
                "the module was captured without example inputs, which tell where the samples are "
                "in its graph: capture(model, args)."
            )
        if mesh_of(module) is not None:
            raise UnsupportedOpError(
                "the module is sharded over processes, and stacks of adapters are whole: route the "
                "modules before they are sharded."
            )
        specs = [spec for program in module.programs for spec in program.inputs.values()]
        if taken := next((n for n in INPUTS if any(s and n in s.names for s in specs)), None):
            raise UnsupportedOpError(f"the model has an argument named {taken} of its own.")

    def rewrite(self, module: CapturedModule) -> State:
        plans = [adapter and adapter[0] for adapter in self.adapters]
        given = [plan for plan in plans if plan is not None]  # a plan without entries is falsy
        sites: dict[tuple[str, ...], Site] = {}
        for plan in given:
            sites |= check_fits(module, plan)
        trained = {name for plan in given for name in plan.trained}
        full = {
            name: _stack_name(first)
            for first, names in module.aliases().items()
            for name in (names if trained.intersection(names) else ())
        }
        routing = Routing(tuple(plans), stacked_entries(plans, self.rank), full)
        module.requires_grad_(False)
        if any(entry.dropout for entry in routing.entries):
            split_modes(module)
            module.look()  # at the nested graphs that this added
            for plan in given:
                sites |= check_fits(module, plan)
        ways = [_way(module, program, routing, sites, self.batch) for program in module.programs]
        add_stacks(module, routing, self.adapters)
        for program, of_program in zip(module.programs, ways, strict=True):
            made: dict[fx.Graph, SlotGraph] = {}
            for graph, way in of_program.items():
                dropout = graph is not program.graphs["eval"]
                made[graph] = SlotGraph(graph, routing.slots, self.weights, self.mixture)
                way.insert(made[graph], module, routing, dropout)
            if module.known.outlined:
                spec = program.inputs["eval"]
                assert spec is not None
                pass_to_blocks(program, made, Batch.of(spec, self.batch))
            self._add_inputs(program)
        if any(
            of_program[program.graphs["eval"]].mixes
            for program, of_program in zip(module.programs, ways, strict=True)
        ):
            warn(
                "in eval mode, a sample of the output depends on the other samples of its batch "
                "(as with attention between samples, or a choice by all of them). With other "
                "adapters for those, it is not what its own adapter gives alone."
            )
        _warn_of_dropout(ways)
        module.known = dataclasses.replace(module.known, routing=routing)
        set_casts(module)
        return module.known

    def _add_inputs(self, program: Program) -> None:
        """Add the inputs to the contracts; the graphs have them already."""
        for mode, spec in program.inputs.items():
            assert spec is not None
            samples = Batch.of(spec, self.batch)
            dims = (samples.size, self.mixture) if self.mixture > 1 else (samples.size,)
            slots, symbols = len(self.adapters), samples.symbols
            leaves: list[TensorInput] = [
                SlotsInput(INPUT, dims, torch.int64, slots=slots, symbols=symbols)
            ]
            if self.weights:
                leaves.append(TensorInput(WEIGHTS, dims, torch.float32))
            most = len(spec.names) if spec.positional is None else spec.positional
            program.inputs[mode] = dataclasses.replace(
                spec,
                names=(*spec.names, *(leaf.name for leaf in leaves)),
                structures=(*spec.structures, *(pytree.tree_structure(0) for _ in leaves)),
                leaves=(*spec.leaves, *((leaf,) for leaf in leaves)),
                positional=most,
            )


def _stack_name(name: str) -> str:
    owner, _, last = name.rpartition(".")
    return ".".join(filter(None, (owner, "lora_full", last)))


# ---- the way of each read -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """How the reads of one graph are routed.

    Attributes:
        gathered: each read that gets a gathered branch, with its entry, and with where the samples
            are in its input.
        sources: the nodes that fetch a weight that is computed once per slot, each with the
            entries that adapt it, or with the name of the parameter that trains in full.
        facts: where the samples are in the nodes of the graph.
        mixes: whether a sample of an output depends on other samples.
    """

    gathered: list[tuple[Reader, Entry, BatchDim]]
    sources: dict[fx.Node, list[Entry] | str]
    facts: Facts
    mixes: bool

    def insert(
        self, slots: SlotGraph, module: CapturedModule, routing: Routing, training: bool
    ) -> None:
        for reader, entry, batch in self.gathered:
            add_branch(slots, entry, reader, batch, training)
        dims, writers = self.facts.dims, self.facts.writers
        compute_per_slot(slots, module, self.sources, routing.full, dims, writers)


def _warn_of_dropout(ways: Sequence[Mapping[fx.Graph, _Way]]) -> None:
    """Warn of adapters with dropout on weights that are computed once per slot."""
    held = [way.sources.values() for of_program in ways for way in of_program.values()]
    entries = [e for found in itertools.chain(*held) if not isinstance(found, str) for e in found]
    if sites := sorted({entry.site for entry in entries if entry.dropout}):
        warn(
            f"{some(sites)}: the routed graph computes these weights once per slot, where there is "
            "no input to drop, so lora_dropout does not apply to them in training."
        )


def _way(
    module: CapturedModule, program: Program, routing: Routing, sites: Sites, batch: BatchArgument
) -> dict[fx.Graph, _Way]:
    """Return how to route each graph of a program.

    Raises:
        UnsupportedOpError: the samples of the batch cannot be told apart where a weight is read.
    """
    found: dict[fx.Graph, _Way] = {}
    for mode in MODES:
        graph, spec = program.graphs[mode], program.inputs[mode]
        if graph not in found:
            assert spec is not None
            found[graph] = _way_of(module, graph, spec, routing, sites, batch)
    return found


def _way_of(
    module: CapturedModule,
    graph: fx.Graph,
    spec: InputSpec,
    routing: Routing,
    sites: Sites,
    batch: BatchArgument,
) -> _Way:
    readers = {
        entry.names: [reader for reader in sites[entry.names].readers if reader.graph is graph]
        for entry in routing.entries
    }
    possible = dict(readers)
    for entry in routing.entries:  # all places of a weight in one way
        site = sites[entry.names]
        if not all(_may_gather(site, entry, reader) for reader in readers[entry.names]):
            possible.pop(entry.names, None)
    fetched = _fetched(graph, routing)
    inputs = {_input(reader) for found in possible.values() for reader in found}
    outputs = set(graph.output_node().all_input_nodes)
    wanted = inputs | outputs | downstream(_general(fetched, routing, possible))
    samples = Batch.of(spec, batch)
    facts = facts_about(module, graph, spec, samples, wanted)
    fits = {key: f for key, f in possible.items() if all(_fits(r, facts.dims) for r in f)}
    if left := downstream(_general(fetched, routing, fits)) - wanted:
        more = facts_about(module, graph, spec, samples, left)
        facts.dims |= more.dims
        facts.writers |= more.writers
    sources: dict[fx.Node, list[Entry] | str] = {}
    for node in _general(fetched, routing, fits):
        name = fetched[node]
        entries = [e for e in routing.entries if name in e.names and e.names not in fits]
        if name in routing.full and any(name in e.names for e in routing.entries):
            raise UnsupportedOpError(
                f"'{name}' is trained in full by one adapter, and adapted by another. Route them "
                "apart, in a graph each."
            )
        sources[node] = entries or name
    gathered = [
        (reader, entry, facts.dims[_input(reader)])
        for entry in routing.entries
        for reader in fits.get(entry.names, ())
    ]
    mixes = any(node in facts.mixed and sized_like(node, samples) for node in outputs)
    return _Way(gathered, sources, facts, mixes)


def _fetched(graph: fx.Graph, routing: Routing) -> dict[fx.Node, str]:
    """Return the nodes that fetch parameters that adapters change, with the names."""
    changed = {*routing.full, *(name for entry in routing.entries for name in entry.names)}
    nodes = graph.find_nodes(op="get_attr")
    return {node: str(node.target) for node in nodes if node.users and node.target in changed}


def _general(
    fetched: Mapping[fx.Node, str], routing: Routing, gathered: Collection[tuple[str, ...]]
) -> list[fx.Node]:
    """Return the nodes whose parameters are not adapted by gathered branches only."""
    apart = {n for entry in routing.entries if entry.names not in gathered for n in entry.names}
    apart.update(routing.full)
    return [node for node, name in fetched.items() if name in apart]


def _input(reader: Reader) -> fx.Node:
    assert reader.op is not None
    return reader.op.input_of(reader.node, reader.weight)


def _may_gather(site: Site, entry: Entry, reader: Reader) -> bool:
    """Whether a read has a gathered branch, if its input holds the samples."""
    op = reader.branch
    if (
        not all(call.runs_once for call in reader.path)
        or op is None
        or op.gathered is None
        or (entry.rows is not None and reader.layout != entry.layout)  # no gathered row pads inputs
        or branch_obstacle(site, entry.rows, entry.variants)
    ):
        return False
    one_matrix = not (reader.layout or entry.layout).stacked
    return one_matrix and not scales_outputs(entry) and isinstance(_input(reader), fx.Node)


def _fits(reader: Reader, dims: Mapping[fx.Node, BatchDim]) -> bool:
    """Whether the samples are in a dimension of the input that the gathered branch can take."""
    op, x = reader.op, _input(reader)
    value, batch = example_value(x), dims.get(x)
    if op is None or value is None or batch is None:
        return False
    if op.kernel:
        return batch.plain and value.ndim == op.kernel + 2
    return not op.dropout or batch.dim < value.ndim - 1  # indices have no dimension of features
