"""Whether a plan fits a module: its sites, its forms, and room for the adapters' tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping

import torch
from torch import nn

from ..errors import InjectError, MisfitError, UnsupportedOpError
from ..lora.variants import variants_of
from ..matching.forms import branch_obstacle
from ..matching.full import check_own_memory
from ..matching.refusals import why_unsupported
from ..module import CapturedModule
from ..names import shown
from ..plan import Entry, Plan
from ..reads.readers import readers_and_writers
from ..reads.sites import Site, by_call_site, find_sites, merged
from ..tables import some


def check_fits(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
    """Return the site of each entry, by the entry's names.

    Raises:
        MisfitError: the plan does not describe this module.
        UnsupportedOpError: the module has a weight of the plan, but not one that can be adapted.
        InjectError: the model already has a module or attribute where an adapter would go.
    """
    sites = sites_of(module, plan)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if missing := [name for name in plan.trained if name not in held]:
        raise MisfitError(f"the plan trains {some(missing)}, which this module does not have.")
    check_own_memory(module, plan.trained)
    _check_untied(module, plan)
    ours = set(map(_place, module.adapter_parameters()))
    for entry in plan:
        _check_fits(module, entry, sites.get(entry.names))
        _check_free(module, entry.site, entry.tensors, ours)
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


def check_starts(plan: Plan, starts: Mapping[str, torch.Tensor]) -> None:
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


def sites_of(module: CapturedModule, plan: Plan) -> dict[tuple[str, ...], Site]:
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
    if entry.part is not None and entry.layout != site.layout:  # a part of a table's rows
        site = dataclasses.replace(site.as_in(entry.layout), padding_idx=entry.padding_idx)
    # W + s·BA is the same for all uses of it; the plan gives the meaning of BA's dimensions.
    same_layout = site.layout == entry.layout or entry.form == "weight"
    if site.shape != entry.shape or not same_layout:
        raise MisfitError(
            f"'{entry.site}': the plan was made for a weight {entry.shape}, the module's is "
            f"{site.shape} (laid out as {entry.layout.roles} and {site.layout.roles})."
        )
    needed = () if entry.tokens else variants_of(entry.init, None)
    if missing := set(needed) - set(entry.variants):
        raise MisfitError(
            f"'{entry.site}': init={entry.init!r} starts from the weight, and without the variant "
            f"{some(missing)} the initial pair would change the outputs. Match the plan again."
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


def _check_free(
    module: CapturedModule, site: str, tensors: Iterable[str], ours: Container[str]
) -> None:
    """Raise InjectError if the model has something of its own where the adapter's tensors go."""
    places = dict.fromkeys(map(_place, tensors))
    found = next(filter(None, (_occupied(module, p) for p in places if p not in ours)), None)
    if found:
        raise InjectError(
            f"the model has a '{found}' of its own, where the adapter of '{site}' would go. "
            "Merge the model's own adapters first, or name the part differently."
        )


def _place(name: str) -> str:
    """Return the path of the module with a kind of tensor of each adapter: "fc.lora_A"."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _occupied(module: CapturedModule, place: str) -> str | None:
    """Return the path of the model's own attribute that is where a module would go, if any."""
    owner, _, kind = place.rpartition(".")
    container: nn.Module = module
    for part in owner.split(".") if owner else ():
        if part not in container._modules:
            return owner if hasattr(container, part) else None
        container = container.get_submodule(part)
    return place if hasattr(container, kind) else None
