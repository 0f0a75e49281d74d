"""Inject: low-rank branches as explicit nodes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ..errors import InjectError
from ..initialize import new_pair
from ..module import CapturedModule
from ..nested import nested_graph
from ..plan import Entry, Plan
from ..program import Program
from ..sites import Site, find_sites
from .structure import insert_branch, insert_weight, weight_nodes


@dataclass(frozen=True)
class Inject(PassBase):
    """Put a plan's adapters into every graph, and freeze everything else."""

    plan: Plan

    def requires(self, graph_module: fx.GraphModule) -> None:
        if not isinstance(graph_module, CapturedModule):
            raise InjectError("inject takes a captured module: fxlora.capture(model, args).")
        if graph_module.plan is not None:
            raise InjectError("the module has adapters already: fold or remove them first.")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        assert isinstance(graph_module, CapturedModule)
        result = graph_module.derive()
        sites = {site.parameter: site for site in find_sites(result)}
        for entry in self.plan:
            _check_fits(result, entry, sites.get(entry.parameter))
        _keep_originals(result, self.plan)
        _freeze(result, self.plan)
        if any(entry.dropout for entry in self.plan):
            _split_modes(result)
            sites = {site.parameter: site for site in find_sites(result)}
        for entry in self.plan:
            _add_pair(result, entry)
            for program in result.programs:
                _insert(program, entry, sites[entry.parameter])
        result.plan = self.plan
        result.take_fingerprints()
        result.refresh()
        return PassResult(result, True)


def _check_fits(module: CapturedModule, entry: Entry, site: Site | None) -> None:
    if site is None:
        raise InjectError(
            f"the plan adapts '{entry.site}', but no graph of this module reads a parameter "
            f"'{entry.parameter}'. Make the plan with match(module, …) on this module."
        )
    if site.shape != entry.shape or site.in_first != entry.in_first:
        raise InjectError(
            f"'{entry.site}': the plan was made for a weight {entry.shape}, the module's is "
            f"{site.shape}. Make the plan with match(module, …) on this module."
        )
    if entry.form == "branch" and any(r.branch is None or r.shared for r in site.readers):
        raise InjectError(
            f"'{entry.site}': the plan says branch, but a reader here has none. Match again."
        )
    owner = module.get_submodule(entry.site if _is_module(entry) else "")
    for name in ("lora_A", "lora_B"):
        if _is_module(entry) and hasattr(owner, name):
            raise InjectError(
                f"'{entry.site}' has an attribute '{name}' of its own, where the adapter would "
                "go. Merge the model's own adapters first."
            )


def _is_module(entry: Entry) -> bool:
    return entry.prefix == entry.site


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


def _add_pair(module: CapturedModule, entry: Entry) -> None:
    a, b = new_pair(entry, module.get_parameter(entry.parameter))
    module.set_parameter(entry.name_a, a)
    module.set_parameter(entry.name_b, b)


def _insert(program: Program, entry: Entry, site: Site) -> None:
    for graph in program.distinct_graphs():
        if entry.form == "weight":
            for node in weight_nodes(graph, site.names):
                if node.users:
                    insert_weight(graph, entry, node)
            continue
        dropout = 0.0 if graph is program.graphs["eval"] else entry.dropout
        for reader in site.readers:
            if reader.graph is graph:
                insert_branch(entry, reader, dropout)
