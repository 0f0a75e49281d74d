"""Inject: low-rank branches as explicit nodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..errors import InjectError, MisfitError
from ..fx.nested import nested_graph
from ..matching.forms import branch_obstacle
from ..module import CapturedModule
from ..module.program import Program
from ..module.state import State
from ..names import shown
from ..plan import Entry, Plan
from ..reads.sites import Site, find_sites, merged
from ..tables import some
from .base import Pass
from .initialize import new_tensors
from .structure import WeightNodes, insert_branch, insert_weight


@dataclass(frozen=True)
class Inject(Pass):
    """Put a plan's adapters into every graph, and freeze everything else.

    Attributes:
        plan: what to inject.
        starts: values of the adapters' tensors, by name, in place of fresh ones.
    """

    plan: Plan
    starts: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def check(self, module: CapturedModule) -> None:
        if module.plan is not None:
            raise InjectError("the module has adapters already: fold or remove them first.")

    def rewrite(self, module: CapturedModule) -> State:
        sites = check_fits(module, self.plan)
        originals = _originals(module, self.plan)
        _freeze(module, self.plan)
        if any(entry.dropout for entry in self.plan):
            _split_modes(module)
            sites = _sites(module, self.plan)
        for entry in self.plan:
            _add_tensors(module, entry, self.starts)
        for program in module.programs:
            _insert(program, self.plan, sites)
        state = replace(module.known, plan=self.plan, originals=originals)
        return replace(state, fingerprints=module.fingerprints_under(state))


def check_fits(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
    """The site of each entry, by the names that it covers.

    Raises:
        InjectError: the plan says of the module what is not so.
    """
    sites = _sites(module, plan)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if missing := [name for name in plan.trained if name not in held]:
        raise MisfitError(f"the plan trains {some(missing)}, which this module has not.")
    for entry in plan:
        _check_fits(module, entry, sites.get(entry.names))
    return sites


def _sites(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
    """The site of each entry, by the names that it covers; some entries cover several."""
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
    if site is None:
        raise MisfitError(
            f"the plan adapts '{entry.site}', but no graph of this module reads a parameter "
            f"'{entry.parameter}' that is one tensor under these names and is adapted under all of "
            f"them: {some(entry.names)}."
        )
    if site.shape != entry.shape or site.layout != entry.layout:
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
    """What of the model's own stands where a tensor's container would go."""
    owner, _, kind = name.rpartition(".")[0].rpartition(".")[0].rpartition(".")
    container: nn.Module = module
    for part in owner.split("."):
        if part not in container._modules:
            return owner if hasattr(container, part) else None
        container = container.get_submodule(part)
    return f"{owner}.{kind}" if hasattr(container, kind) else None


def _originals(module: CapturedModule, plan: Plan) -> dict[str, torch.Tensor]:
    """What training may change besides A and B, as it is now: `remove` puts it back."""
    buffers = module.named_buffers(remove_duplicate=False)
    kept = {name: buffer.detach().clone() for name, buffer in buffers}
    return kept | {name: module.get_parameter(name).detach() for name in plan.trained}


def _freeze(module: CapturedModule, plan: Plan) -> None:
    module.requires_grad_(False)
    aliases = module.aliases() if plan.trained else {}
    for name in plan.trained:
        copied = nn.Parameter(module.get_parameter(name).detach().clone())
        for alias in aliases[name]:
            module.set_parameter(alias, copied)


def _split_modes(module: CapturedModule) -> None:
    """Give the train graph a life of its own: dropout stands in it alone."""
    for program in module.programs:
        if program.graphs["train"] is program.graphs["eval"]:
            graph = program.graphs["train"] = copy.deepcopy(program.graphs["eval"])
            for node in graph.nodes:
                if nested := nested_graph(node, module):
                    node.target = f"{node.target}_in_training"
                    module.set_submodule(node.target, copy.deepcopy(nested))


def _add_tensors(module: CapturedModule, entry: Entry, starts: Mapping[str, torch.Tensor]) -> None:
    weight = module.get_parameter(entry.parameter)
    given = {
        name: nn.Parameter(
            starts[name].detach().to(weight.device, weight.dtype, copy=True).contiguous(),
            name in entry.trainable,
        )
        for name in entry.tensors
        if name in starts
    }
    fresh = {} if len(given) == len(entry.tensors) else new_tensors(entry, weight)
    for name, parameter in (fresh | given).items():
        module.set_parameter(name, parameter)


def _insert(program: Program, plan: Plan, sites: Mapping[tuple[str, ...], Site]) -> None:
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
