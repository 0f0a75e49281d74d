"""The ways in which a module's graphs call a block: the graph and the contract of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from ...errors import SubmoduleError
from ...fast import Fast, fast_graph
from ...fx.compare import same_graph_except_sizes
from ..autocasts import UNKNOWN, Autocasts
from ..constants import EqualConstants
from ..contract import InputSpec, TensorInput
from ..program import MODES, Program
from .contract import contract_of_both, under_autocast, within
from .outlining import OutlinedGraph, same_graph, split_at_calls
from .overlap import may_overlap, symbols_of_both
from .recorded import ModuleCall

Calls = Mapping[str, Sequence["BlockCall"]]  # by mode


@dataclass(frozen=True)
class BlockCall:
    """One way of calling a block in one mode.

    Attributes:
        outlined: its graph.
        inputs: its contract, with the bounds and guards of the whole model's.
        any_float: the contract under autocast, which determines the dtypes of floats.
        autocasts: the callers' autocasts that the graph holds for.
    """

    outlined: OutlinedGraph
    inputs: InputSpec
    any_float: InputSpec
    autocasts: Autocasts

    @property
    def graph(self) -> fx.Graph:
        return self.outlined.graph

    @property
    def recorded(self) -> ModuleCall:
        """The call as capture recorded it."""
        return self.outlined.call

    @property
    def alike(self) -> Sequence[tuple[int, int]]:
        """Pairs of leaves of the arguments, by index, that were one value at capture."""
        return sorted(self.outlined.alike)

    @classmethod
    def of(cls, outlined: OutlinedGraph, whole: Program, mode: str) -> BlockCall:
        call, contract = outlined.call, whole.inputs[mode]
        inputs = within(outlined.inputs, outlined.graph, contract, call.path)
        autocasts = whole.autocasts.get(mode, UNKNOWN)
        if not call.asks:  # code around the block may ask, and is checked by the whole model
            autocasts = replace(autocasts, gradients=())
        return cls(outlined, inputs, under_autocast(inputs), autocasts)


def outline(
    owner: nn.Module, programs: Sequence[Program], paths: Collection[str], fast: Fast | None = None
) -> tuple[dict[int, fx.Graph], dict[str, Calls]]:
    """Outline submodules in the graphs of all programs.

    Args:
        owner: the captured module.
        programs: its programs, whose graphs stay as they are.
        paths: the submodules.
        fast: how the graphs that run are made faster (see fast/), or None.

    Returns:
        By the id of each graph, the graph that calls the submodules; by path, the submodule's calls
        in each mode, without duplicates.

    Raises:
        SubmoduleError: no graph calls a submodule, or one does not do so as a module could be
            called, or two calls with different graphs have arguments that do not tell them apart.
    """
    running: dict[int, fx.Graph] = {}
    split: dict[int, dict[str, list[OutlinedGraph]]] = {}
    equal = EqualConstants(owner, (g for program in programs for g in program.distinct_graphs()))
    found = {path: {mode: list[BlockCall]() for mode in MODES} for path in paths}
    for program in programs:
        for mode in MODES:
            graph = program.graphs[mode]
            if id(graph) not in running:
                running[id(graph)], split[id(graph)] = _split(
                    owner, program, mode, paths, equal, fast
                )
            for path, outlined in split[id(graph)].items():
                made = _merged(BlockCall.of(one, program, mode) for one in outlined)
                _add(found[path][mode], made)
    for path, calls in found.items():
        if not any(calls.values()):
            raise SubmoduleError(
                f"'{path}' has no call in the graph: it is not called. Outline the module around "
                "it, or those inside."
            )
    return running, dict(found)


def _split(
    owner: nn.Module,
    program: Program,
    mode: str,
    paths: Collection[str],
    equal: EqualConstants,
    fast: Fast | None,
) -> tuple[fx.Graph, dict[str, list[OutlinedGraph]]]:
    """Return a mode's graph with calls of submodules, and these by path."""
    ordered = _ordered(program.inputs[mode])
    calls = program.calls[mode]
    rest, made = split_at_calls(program.graphs[mode], calls, paths, equal, ordered)
    if not fast:
        return rest, made
    return fast_graph(rest, fast, owner), {
        # equal submodules share their nested graphs, which stay explicit
        path: [replace(call, graph=fast_graph(call.graph, fast)) for call in of_path]
        for path, of_path in made.items()
    }


def _ordered(inputs: InputSpec | None) -> bool:
    leaves = [leaf for group in inputs.leaves for leaf in group] if inputs else []
    return any(isinstance(leaf, TensorInput) and leaf.order for leaf in leaves)


def _merged(calls: Iterable[BlockCall]) -> list[BlockCall]:
    """Return the calls in one graph, with one contract for those that do the same."""
    made: list[BlockCall] = []
    for found in calls:
        for index, known in enumerate(made):
            if both := _of_both(known, found):
                made[index] = both
                break
        else:
            made.append(found)
    return made


def _of_both(one: BlockCall, other: BlockCall) -> BlockCall | None:
    """Return a call that holds wherever one of two does, or None if these differ."""
    same = one.autocasts == other.autocasts and same_graph(one.outlined, other.outlined)
    inputs = contract_of_both(one.inputs, other.inputs) if same else None
    if inputs is None:
        return None
    outlined = replace(one.outlined, alike=one.outlined.alike & other.outlined.alike)
    return BlockCall(outlined, inputs, under_autocast(inputs), one.autocasts)


def _add(known: list[BlockCall], calls: Iterable[BlockCall]) -> None:
    """Add calls, unless they are known.

    Raises:
        SubmoduleError: a call's arguments could be those of a known one that has another graph.
    """
    for call in calls:
        same = next((n for n, other in enumerate(known) if _same(call, other)), None)
        if same is not None:
            alike = known[same].outlined.alike & call.outlined.alike
            known[same] = replace(known[same], outlined=replace(known[same].outlined, alike=alike))
            continue
        for other in known:
            if may_overlap(call.any_float, other.any_float) and not _do_the_same(
                call.outlined, other.outlined
            ):
                raise SubmoduleError(
                    f"'{call.recorded.path}' is called in several ways, which have different "
                    "graphs and are not told apart by the arguments. Outline the module around "
                    "it, or those inside."
                )
        known.append(call)


def _same(one: BlockCall, other: BlockCall) -> bool:
    same_terms = (one.inputs, one.autocasts) == (other.inputs, other.autocasts)
    return same_terms and same_graph(one.outlined, other.outlined)


def _do_the_same(one: OutlinedGraph, other: OutlinedGraph) -> bool:
    """Whether two calls do the same where both contracts hold: either may then be run."""
    pairs = (one, other), (other, one)
    return same_graph(one, other) or any(_same_on_sizes_of(*pair) for pair in pairs)


def _same_on_sizes_of(one: OutlinedGraph, other: OutlinedGraph) -> bool:
    """Whether two graphs have the same ops and sizes on the sizes that the first was made with."""
    if one.call.names != other.call.names or one.call.output != other.call.output:
        return False
    symbols = symbols_of_both(one.graph, other.graph)
    return symbols is not None and same_graph_except_sizes(one.graph, other.graph, *symbols)
