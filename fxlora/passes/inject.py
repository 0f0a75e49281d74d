"""Inject: low-rank branches as explicit nodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import InjectError
from ..fx.nested import nested_graph
from ..module import CapturedModule
from ..module.program import Program
from ..plan import Entry, Plan
from ..reads.sites import Site, find_sites, merged
from ..tables import some
from .initialize import new_tensors
from .structure import insert_branch, insert_weight, weight_nodes


@dataclass(frozen=True)
class Inject(PassBase):
    """Put a plan's adapters into every graph, and freeze everything else.

    Attributes:
        plan: what to inject.
        starts: values of the adapters' tensors, by name, in place of fresh ones.
    """

    plan: Plan
    starts: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not isinstance(graph_module, CapturedModule):
            raise InjectError("inject takes a captured module: fxlora.capture(model, args).")
        if graph_module.plan is not None:
            raise InjectError("the module has adapters already: fold or remove them first.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule)
        result = graph_module.derive()
        sites = check_fits(result, self.plan)
        _keep_originals(result, self.plan)
        _freeze(result, self.plan)
        if any(entry.dropout for entry in self.plan):
            _split_modes(result)
            sites = _sites(result, self.plan)
        for entry in self.plan:
            _add_tensors(result, entry, self.starts)
            for program in result.programs:
                _insert(program, entry, sites[entry.names])
        result.plan = self.plan
        result.take_fingerprints()
        result.refresh()
        return PassResult(result, True)


def check_fits(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
    """The site of each entry, by the names that it covers.

    Raises:
        InjectError: the plan says of the module what is not so.
    """
    sites = _sites(module, plan)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if missing := [name for name in plan.trained if name not in held]:
        raise InjectError(
            f"the plan trains {some(missing)}, which this module has not. Make the plan with "
            "match(module, …) on this module."
        )
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
        raise InjectError(
            f"the plan adapts '{entry.site}', but no graph of this module reads a parameter "
            f"'{entry.parameter}' that is one tensor under these names and is adapted under all of "
            f"them: {some(entry.names)}. Make the plan with match(module, …) on this module."
        )
    if site.shape != entry.shape or site.layout != entry.layout:
        raise InjectError(
            f"'{entry.site}': the plan was made for a weight {entry.shape}, the module's is "
            f"{site.shape} (laid out as {entry.layout.roles} and {site.layout.roles}). Make the "
            "plan with match(module, …) on this module."
        )
    own = entry.site.removesuffix(f".{entry.part}") if entry.part else entry.site
    ties = set(entry.tied) == set(site.tied)
    if own not in site.aliases or not ties or entry.padding_idx != site.padding_idx:
        raise InjectError(
            f"'{entry.site}': the plan names it, its ties or its padding_idx otherwise than the "
            f"module does ('{site.name}'). Make the plan with match(module, …) on this module."
        )
    if entry.form == "branch" and any(r.branch is None or r.shared for r in site.readers):
        raise InjectError(
            f"'{entry.site}': the plan says branch, but a reader here has none. Match again."
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


def _keep_originals(module: CapturedModule, plan: Plan) -> None:
    """What training may change besides A and B, as it is now: `remove` puts it back."""
    held: dict[str, torch.Tensor] = dict(module.named_buffers(remove_duplicate=False))
    trained = {name: module.get_parameter(name) for name in plan.trained}
    module.originals = {name: t.detach().clone() for name, t in held.items()}
    module.originals |= {name: p.detach() for name, p in trained.items()}


def _freeze(module: CapturedModule, plan: Plan) -> None:
    module.requires_grad_(False)
    aliases = module.aliases()
    for name in plan.trained:
        copied = nn.Parameter(module.get_parameter(name).detach().clone())
        for alias in aliases[name]:
            module.set_parameter(alias, copied)
    module.trained = frozenset(plan.trained)


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


def _insert(program: Program, entry: Entry, site: Site) -> None:
    for graph in program.distinct_graphs():
        if entry.form == "weight":
            for node in weight_nodes(graph, entry.names):
                if node.users:
                    insert_weight(graph, entry, node)
            continue
        dropout = 0.0 if graph is program.graphs["eval"] else entry.dropout
        for reader in site.readers:
            if reader.graph is graph:
                insert_branch(entry, reader, dropout)
