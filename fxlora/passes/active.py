"""Which adapters are in the graphs: those that are active, and no others.

The tensors of an adapter that is not active are parameters of the module which no graph reads. A
parameter that it trains in full has the base's value then; the trained one is kept aside under
PEFT's name for it. So are the buffers that calls changed under it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.graph import _Namespace

from ..errors import ConfigError, InjectError
from ..fx.compare import alike_graphs
from ..fx.nested import nested_graph
from ..module import CapturedModule
from ..module.base import base_fingerprints
from ..module.casts import mark, set_casts, unmark
from ..module.copies import derived
from ..module.program import Program
from ..module.state import State, aside
from ..names import shown
from ..plan import Entry, Plan, overlap, scales_outputs
from ..reads.sites import Site
from ..tables import some
from .base import Pass
from .fits import sites_of
from .structure import WeightNodes, insert_branch, insert_weight, insertions, remove_insertion


@dataclass(frozen=True)
class Activate(Pass):
    """Put the branches of some of a module's adapters into its graphs, and take the others out.

    The result has the memory of the given module's adapters: what one trains, the other has.

    Attributes:
        names: the adapters, in any order.
    """

    names: Sequence[str]

    def check(self, module: CapturedModule) -> None:
        known = module.known.adapters
        if not known:
            raise InjectError("the module has no adapters: inject a plan first.")
        check_known(module, self.names)

    def rewrite(self, module: CapturedModule) -> State:
        names = tuple(name for name in module.known.adapters if name in self.names)
        check_together(module, [module.known.adapters[name] for name in names])
        take_out(module)
        put_in(module, names)
        return module.known

    def copied(self, module: CapturedModule) -> CapturedModule:
        return derived(module, same_adapters=True)


def chosen(module: CapturedModule, adapter: str | Sequence[str] | None) -> CapturedModule:
    """Return a module with these adapters active; the module itself, if `adapter` is None."""
    return module if adapter is None else Activate(as_names(adapter))(module)


def as_names(adapters: str | Sequence[str]) -> list[str]:
    """Return the names of adapters as a list.

    Raises:
        ConfigError: they are no names.
    """
    names = [adapters] if isinstance(adapters, str) else adapters
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"give the name of an adapter, or a list of names: {shown(adapters)}.")
    return list(names)


def check_known(module: CapturedModule, names: Sequence[str]) -> None:
    """Raise InjectError unless the module has adapters of these names."""
    known = module.known.adapters
    if unknown := [name for name in names if name not in known]:
        raise InjectError(f"no adapter {some(map(shown, unknown))}: the module has {some(known)}.")


# ---- several at once ----------------------------------------------------------------------------


def check_together(module: CapturedModule, plans: Sequence[Plan]) -> None:
    """Raise InjectError unless the sum of some adapters is what each of them adds to the base."""
    tied = {name: names[0] for names in module.aliases().values() for name in names}
    for one, other in itertools.combinations(plans, 2):
        if why := _apart(one, other, tied):
            raise InjectError(
                f"the adapters '{one.adapter}' and '{other.adapter}' cannot be active together: "
                f"{why}. activate(module, []) takes all out, to inject another; "
                f"activate(module, '{one.adapter}') runs one of them."
            )


def _apart(one: Plan, other: Plan, tied: Mapping[str, str]) -> str | None:
    """Return why two adapters have no sum, or None if they have."""

    def tensors(names: Sequence[str]) -> dict[str, str]:
        return {tied.get(name, name): name for name in names}

    full = [tensors(plan.trained) for plan in (one, other)]
    adapted = [tensors([n for entry in plan for n in entry.names]) for plan in (one, other)]
    for mine, theirs in ((full[0], full[1]), (full[0], adapted[1]), (full[1], adapted[0])):
        if both := sorted(mine.keys() & theirs.keys()):
            return f"'{mine[both[0]]}' is trained in full by one, and changed by the other"
    held: dict[str, list[Entry]] = {}  # a packed weight has an entry for each of its parts
    for entry in one:
        for name in entry.names:
            held.setdefault(name, []).append(entry)
    for entry in other:
        for first in itertools.chain(*(held.get(name, ()) for name in entry.names)):
            if set(first.names) != set(entry.names):
                return f"they adapt '{entry.site}' under different names of a tied weight"
            if overlap(first, entry) and (scales_outputs(first) or scales_outputs(entry)):
                return f"one of them scales the outputs of '{entry.site}' (DoRA), so it is no sum"
    return None


# ---- out of the graphs --------------------------------------------------------------------------


def take_out(module: CapturedModule) -> None:
    """Take the active adapters out of the graphs; the module keeps their tensors.

    Raises:
        InjectError: calls read weights with these adapters in them.
    """
    if module.known.merge_aware:
        raise InjectError(
            "the module is merge-aware for its active adapters: choose others on "
            "fxlora.explicit(module), and then call fxlora.merge_aware again."
        )
    if module.known.active:
        remove_nodes(module)
        _set_aside(module)
        leave_graphs(module)


def remove_nodes(module: CapturedModule) -> None:
    """Take the nodes of the active adapters out of the graphs."""
    for graph in module.distinct_graphs():
        for insertion in reversed(insertions(module, graph)):
            remove_insertion(insertion)
        free_names(graph)


def free_names(graph: fx.Graph) -> None:
    """Forget the names of erased nodes, so that nodes like them get the same names again."""
    graph._graph_namespace = _Namespace()
    for node in graph.nodes:
        graph._graph_namespace.create_name(node.name, node)


def leave_graphs(module: CapturedModule) -> None:
    """Undo what else adapters need: casts, graphs of their own for training, frozen weights."""
    unmark(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in module.known.grads)
    merge_modes(module)
    module.update_state(active=(), originals={})


def _set_aside(module: CapturedModule) -> None:
    """Keep what training changed besides A and B, and restore the base's values."""
    known, aliases, held = module.known, module.aliases(), module.state_tensors()
    plans = [known.adapters[name] for name in known.active]
    originals = {n: t for n, t in known.originals.items() if n not in module.trained}
    changed = {n: held[n].detach().clone() for n, t in originals.items() if not _same(held[n], t)}
    module.update_state(buffers={**known.buffers, **dict.fromkeys(known.active, changed)})
    with torch.no_grad():
        for name, original in originals.items():
            held[name].copy_(original)
    for plan in plans:
        for name in plan.trained:
            module.set_parameter(aside(plan.adapter, name), module.get_parameter(name))
            restored = nn.Parameter(known.originals[name])
            for alias in (*aliases[name], *plan.untied.get(name, ())):  # tied again
                module.set_parameter(alias, restored)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or one is other:
        return True
    if one.layout is not torch.strided:  # which torch.equal does not know
        one, other = one.to_dense(), other.to_dense()
    return torch.equal(one, other)


def merge_modes(module: CapturedModule) -> None:
    """Share one graph between the modes again where only dropout on branches made them differ."""
    for program in module.programs:
        train, evaluation = program.graphs["train"], program.graphs["eval"]
        if train is not evaluation and alike_graphs(train, evaluation):
            program.graphs["train"] = evaluation
            for path in _nested_paths(module, train) - _nested_paths(module, evaluation):
                module.delete_submodule(path)


def _nested_paths(module: CapturedModule, graph: fx.Graph) -> set[str]:
    """Return the paths of the nested graphs that a graph fetches."""
    return {str(node.target) for node in graph.nodes if nested_graph(node, module)}


# ---- into the graphs ----------------------------------------------------------------------------


def put_in(module: CapturedModule, names: tuple[str, ...]) -> None:
    """Put adapters into the graphs, in which none is; only they train then."""
    known = module.known
    plans = [known.adapters[name] for name in names]
    originals = {name: t.detach().clone() for name, t in module.state_tensors().items()}
    _restore_buffers(module, names)
    module.requires_grad_(False)
    for plan in plans:
        _use_trained(module, plan, originals)
    module.update_state(active=names, originals=originals if names else {})
    if (plan := module.plan) is None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in known.grads)
        return
    if any(entry.dropout for entry in plan):
        split_modes(module)
    sites = sites_of(module, plan)
    for each in reversed(plans):  # the next adapter's branch goes before those at its op
        for program in module.programs:
            _insert(program, each, sites)
    _set_dtypes(module, plan)
    set_casts(module)
    for each in plans:
        for name in (*(n for entry in each for n in entry.trainable), *each.trained):
            module.get_parameter(name).requires_grad_(not each.inference_mode)
    marks = base_fingerprints(module, known.base_fingerprints)
    module.update_state(base_fingerprints=marks)


def _restore_buffers(module: CapturedModule, names: tuple[str, ...]) -> None:
    """Give buffers the values that they had under some adapters, which must be the same ones."""
    kept = [module.known.buffers.get(name, {}) for name in names]
    for one, other in itertools.pairwise(kept):
        if one.keys() != other.keys() or not all(_same(one[n], other[n]) for n in one):
            raise InjectError(
                f"calls changed {some({**one, **other})} in the training of one of the adapters "
                f"{some(names)}, and a graph with all of them has only one. Run them one at a time "
                "(activate(module, []) takes all out, to inject another), or train them in eval()."
            )
    held = module.state_tensors()
    with torch.no_grad():
        for name, value in (kept[0] if kept else {}).items():
            held[name].copy_(value)


def _use_trained(module: CapturedModule, plan: Plan, originals: dict[str, torch.Tensor]) -> None:
    """Use an adapter's values of the parameters that it trains in full; note the base's."""
    tied = {name: names for names in module.aliases().values() for name in names}
    for name in plan.trained:
        originals[name] = module.get_parameter(name).detach()
        own = module.get_parameter(held := aside(plan.adapter, name))
        module.remove_parameter(held)
        for alias in set(tied[name]).difference(plan.untied.get(name, ())):
            module.set_parameter(alias, own)


def split_modes(module: CapturedModule) -> None:
    """Copy each graph that both modes share, so that only the train graph gets dropout."""
    for program in module.programs:
        if program.graphs["train"] is program.graphs["eval"]:
            graph = program.graphs["train"] = copy.deepcopy(program.graphs["eval"])
            for node in graph.nodes:
                if nested := nested_graph(node, module):
                    node.target = f"{node.target}_in_training"
                    module.set_submodule(node.target, copy.deepcopy(nested))


def _insert(program: Program, plan: Plan, sites: Mapping[tuple[str, ...], Site]) -> None:
    """Insert the plan's adapters into a program's graphs, with dropout only in train graphs."""
    for graph in program.distinct_graphs():
        weights = WeightNodes(graph)
        for entry in plan:
            if entry.form == "weight":
                for node in weights.read(entry.names):
                    insert_weight(graph, entry, node)
                continue
            dropout = 0.0 if graph is program.graphs["eval"] else entry.dropout
            for reader in sites[entry.names].readers:
                if reader.graph is graph:
                    insert_branch(entry, reader, dropout)


def _set_dtypes(module: CapturedModule, plan: Plan) -> None:
    """Convert the parameters that train in full, and mark their reads as places for casts."""
    aliases = module.aliases() if plan.trained else {}
    for name in plan.trained:
        parameter = module.get_parameter(name)
        dtype = plan.trained_dtype(name, parameter.dtype)
        converted = nn.Parameter(parameter.detach().to(dtype)) if dtype != parameter.dtype else None
        for alias in aliases[name]:
            if converted is not None:
                module.set_parameter(alias, converted)
            for graph in module.distinct_graphs():
                for node in graph.find_nodes(op="get_attr", target=alias):
                    if plan.trained_dtypes.get(name, True) is not False:
                        mark(node, name, name)
