"""Inject: add a plan's adapters to the graphs as explicit nodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..errors import InjectError, MisfitError, UnsupportedOpError
from ..fx.effects import written_attributes
from ..fx.nested import nested_graph
from ..matching.forms import branch_obstacle
from ..matching.full import check_own_memory
from ..matching.refusals import why_unsupported
from ..module import CapturedModule
from ..module.base import base_fingerprints
from ..module.casts import mark, set_casts
from ..module.program import Program
from ..module.sharded import whole
from ..module.state import State
from ..names import shown
from ..plan import Entry, Plan
from ..reads.readers import readers_and_writers
from ..reads.sites import Site, by_call_site, find_sites, merged
from ..tables import some
from .base import Pass
from .initialize import new_tensors
from .shard_adapters import shard_like_weight, share_whole_adapters
from .structure import WeightNodes, insert_branch, insert_weight


@dataclass(frozen=True)
class Inject(Pass):
    """Add a plan's adapters to every graph, and freeze all parameters that the plan does not train.

    Attributes:
        plan: the plan to inject.
        starts: initial values of adapter tensors, by name; the others are initialized as the plan's
            entries say.
    """

    plan: Plan
    starts: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def check(self, module: CapturedModule) -> None:
        if module.plan is not None:
            raise InjectError("the module has adapters already: fold or remove them first.")

    def rewrite(self, module: CapturedModule) -> State:
        sites = check_fits(module, self.plan)
        _check_starts(self.plan, self.starts)
        plan = with_dtypes(module, self.plan)
        originals = _originals(module, plan)
        _freeze(module, plan)
        if any(entry.dropout for entry in plan):
            split_modes(module)
            sites = _sites(module, plan)
        for entry in plan:
            _add_tensors(module, entry, self.starts)
        for program in module.programs:
            _insert(program, plan, sites)
        _set_dtypes(module, plan)
        module.known = replace(module.known, plan=plan, originals=originals)
        set_casts(module)
        share_whole_adapters(module)
        if plan.inference_mode:
            for name in (*(n for entry in plan for n in entry.tensors), *plan.trained):
                module.get_parameter(name).requires_grad_(False)
        return replace(module.known, base_fingerprints=base_fingerprints(module))


def check_fits(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
    """Return the site of each entry, by the entry's names.

    Raises:
        MisfitError: the plan does not describe this module.
        UnsupportedOpError: the module has a weight of the plan, but not one that can be adapted.
        InjectError: the model already has a module or attribute where an adapter would go.
    """
    sites = _sites(module, plan)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if missing := [name for name in plan.trained if name not in held]:
        raise MisfitError(f"the plan trains {some(missing)}, which this module does not have.")
    check_own_memory(module, plan.trained)
    _check_untied(module, plan)
    for entry in plan:
        _check_fits(module, entry, sites.get(entry.names))
    return sites


def _check_untied(module: CapturedModule, plan: Plan) -> None:
    """Raise unless the reads of each parameter that trains apart from its tie are told apart.

    Raises:
        UnsupportedOpError: names the tie.
    """
    if not plan.untied:
        return
    readers, _ = readers_and_writers(module)
    tied = {name: names for names in module.aliases().values() for name in names}
    for name, others in plan.untied.items():
        mine = set(tied[name]).difference(others)
        for group in by_call_site(module, tied[name], readers):
            read = {alias for alias in group if readers.get(alias)}
            if (read & mine and read - mine) or not module.uncovered.keys().isdisjoint(group):
                raise UnsupportedOpError(
                    f"'{name}' is to train apart from {some(others)}, with which it is tied, and "
                    "not every read of it is in the forward of a module that holds it: the reads "
                    "cannot be told apart. Untie the two in the model before you capture it."
                )


def _check_starts(plan: Plan, starts: Mapping[str, torch.Tensor]) -> None:
    """Raise unless each initial value is one for a tensor of the plan, in its shape.

    Raises:
        InjectError: names the tensor.
    """
    shapes = {name: shape for entry in plan for name, shape in entry.tensors.items()}
    if unknown := [name for name in starts if name not in shapes]:
        raise InjectError(
            f"starts has {some(map(shown, unknown))}, which the plan does not add. It adds "
            f"{some(shapes)}."
        )
    for name, start in starts.items():
        if tuple(start.shape) != shapes[name]:
            raise InjectError(
                f"starts has '{name}' in the shape {tuple(start.shape)}; the plan has "
                f"{shapes[name]}."
            )
        if not start.is_floating_point():
            raise InjectError(f"starts has '{name}' in {start.dtype}: give a floating-point one.")


def _sites(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
    """Return the site of each entry, by the entry's names, as far as the module has it.

    An entry of a tied weight may cover several sites, which are merged into one. They must have
    exactly the entry's names and be one tensor.
    """
    by_name = {name: site for site in find_sites(module) for name in site.names}
    found: dict[tuple[str, ...], Site] = {}
    for names in {entry.names for entry in plan}:
        mine = {id(site): site for name in names if (site := by_name.get(name))}
        covered = {name for site in mine.values() for name in site.names}
        tensors = {id(module.get_parameter(name)) for name in covered}
        if covered == set(names) and len(tensors) == 1:
            found[names] = merged(list(mine.values()))
    return found


def _check_fits(module: CapturedModule, entry: Entry, site: Site | None) -> None:
    """Raise if the entry does not describe this site, or cannot be injected there."""
    if site is None:
        raise MisfitError(
            f"the plan adapts '{entry.site}', but no graph of this module reads a parameter "
            f"'{entry.parameter}' that is one tensor under these names and no others: "
            f"{some(entry.names)}."
        )
    # W + s·BA is the same for all uses of it; the plan gives the meaning of BA's dimensions.
    same_layout = site.layout == entry.layout or entry.form == "weight"
    if site.shape != entry.shape or not same_layout:
        raise MisfitError(
            f"'{entry.site}': the plan was made for a weight {entry.shape}, the module's is "
            f"{site.shape} (laid out as {entry.layout.roles} and {site.layout.roles})."
        )
    own = entry.site.removesuffix(f".{entry.part}") if entry.part else entry.site
    if own not in site.aliases:
        raise MisfitError(f"the plan calls '{entry.parameter}' '{own}', the module '{site.name}'.")
    for what, planned, held in (
        ("tied with", sorted(entry.tied), sorted(site.tied)),
        ("padded by row", entry.padding_idx, site.padding_idx),
    ):
        if planned != held:
            raise MisfitError(
                f"'{entry.site}' is {what} {shown(planned)} in the plan, and {shown(held)} in this "
                "module."
            )
    if why := why_unsupported(site):
        raise UnsupportedOpError(f"'{entry.site}' {why}")
    obstacle = branch_obstacle(site, entry.rows, entry.variants)
    if entry.form == "branch" and obstacle:
        raise MisfitError(
            f"'{entry.site}': the plan says branch, which this module does not allow ({obstacle})."
        )
    if entry.form == "weight" and entry.dropout:
        raise MisfitError(
            f"'{entry.site}': the plan says dropout={entry.dropout} on the weight form, which has "
            "no input to drop."
        )
    taken = next(filter(None, (_occupied(module, name) for name in entry.tensors)), None)
    if taken:
        raise InjectError(
            f"the model has a '{taken}' of its own, where the adapter of '{entry.site}' would go. "
            "Merge the model's own adapters first, or name the part differently."
        )


def _occupied(module: CapturedModule, name: str) -> str | None:
    """Return the path of the model's own attribute that is where a tensor's module would go.

    Returns None if the place is free.
    """
    owner, _, kind = name.rpartition(".")[0].rpartition(".")[0].rpartition(".")
    container: nn.Module = module
    for part in owner.split("."):
        if part not in container._modules:
            return owner if hasattr(container, part) else None
        container = container.get_submodule(part)
    return f"{owner}.{kind}" if hasattr(container, kind) else None


def with_dtypes(module: CapturedModule, plan: Plan) -> Plan:
    """Return the plan with the dtypes of this module's weights.

    A parameter that the plan trains in full keeps the model's dtype if Python reads it, or a graph
    writes to it: no cast in a graph would help there.
    """
    weights = dict(module.named_parameters(remove_duplicate=False))
    kept = _bare_names(module) if plan.trained else set[str]()
    names = {name: group for group in module.aliases().values() for name in group}
    fixed = {name: False for name in plan.trained if not kept.isdisjoint(names[name])}
    return replace(plan.over(weights), trained_dtypes={**plan.trained_dtypes, **fixed})


def _bare_names(module: CapturedModule) -> set[str]:
    """Return the names of parameters that Python or a module reads, or that a graph writes to."""
    found = set(module.uncovered)
    for graph in module.distinct_graphs():
        for node in graph.nodes:
            found.update(written_attributes(node, module))
            if node.op == "call_module":
                inside = module.get_submodule(str(node.target)).named_parameters()
                found.update(f"{node.target}.{name}" for name, _ in inside)
    return found


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


def _originals(module: CapturedModule, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors that calls change and those trained in full, with their present values.

    Training may change these besides the adapters; `remove` restores them.
    """
    kept = {name: tensor.detach().clone() for name, tensor in module.state_tensors().items()}
    return kept | {name: module.get_parameter(name).detach() for name in plan.trained}


def _freeze(module: CapturedModule, plan: Plan) -> None:
    """Freeze all parameters, and replace those that the plan trains in full by trainable copies."""
    module.requires_grad_(False)
    tied = {name: names for names in module.aliases().values() for name in names}
    for name in plan.trained:
        copied = nn.Parameter(module.get_parameter(name).detach().clone())
        for alias in set(tied[name]).difference(plan.untied.get(name, ())):
            module.set_parameter(alias, copied)


def split_modes(module: CapturedModule) -> None:
    """Copy each graph that both modes share, so that only the train graph gets dropout."""
    for program in module.programs:
        if program.graphs["train"] is program.graphs["eval"]:
            graph = program.graphs["train"] = copy.deepcopy(program.graphs["eval"])
            for node in graph.nodes:
                if nested := nested_graph(node, module):
                    node.target = f"{node.target}_in_training"
                    module.set_submodule(node.target, copy.deepcopy(nested))


def _add_tensors(module: CapturedModule, entry: Entry, starts: Mapping[str, torch.Tensor]) -> None:
    """Add an entry's parameters to the module: from `starts`, or else newly initialized."""
    weight = module.get_parameter(entry.parameter)
    dtype = entry.dtype_over(weight.dtype)
    given = {
        name: nn.Parameter(
            whole(starts[name]).detach().to(weight.device, dtype, copy=True).contiguous(),
            name in entry.trainable,
        )
        for name in entry.tensors
        if name in starts
    }
    fresh = {} if len(given) == len(entry.tensors) else new_tensors(entry, whole(weight))
    for name, parameter in (fresh | given).items():
        module.set_parameter(name, shard_like_weight(entry, name, parameter, weight))


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
