"""Checks of parameters and buffers: adapters, frozen base, folded weights and ties."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import VerificationError
from ..module import CapturedModule
from ..module.adapted_weight import factors
from ..module.casts import base_dtype
from ..module.memory import memory_id
from ..module.quantised import is_quantised
from ..module.sharded import whole
from ..plan import Entry
from ..tables import some
from .coverage import adapted_names
from .exact import exact_weight
from .runs import equal_tensors


def check_adapters(module: CapturedModule) -> None:
    """Raise unless the plan's tensors exist, can train, and leave padding rows unchanged."""
    padded = [e for e in module.plan or () if e.padding_idx is not None and _is_whole(module, e)]
    moved = {e.name_a for e in padded if _moves_padding(module, e, e.padding_idx or 0)}
    for entry in module.plan or ():
        for name, shape in entry.tensors.items():
            tensor = _parameter(module, name)
            if tensor is None or tensor.shape != shape:
                raise VerificationError(
                    f"adapter: '{name}' of '{entry.site}' is "
                    f"{'missing' if tensor is None else tuple(tensor.shape)}, where the plan has "
                    f"{shape}."
                )
        weight = _parameter(module, entry.parameter)
        if weight is not None:
            for name in entry.tensors:
                _check_dtype(module, name, entry.dtype_over(weight.dtype))
        if entry.name_a in moved:
            raise VerificationError(
                f"adapter: '{entry.name_a}' changes row {entry.padding_idx} of '{entry.site}', its "
                f"padding_idx, which no gradient reaches. Set column {entry.padding_idx} to zero."
            )
    if (plan := module.plan) is not None:
        for name in plan.trained:
            _check_dtype(module, name, plan.trained_dtype(name, base_dtype(module, name)))
    trains = [*(name for entry in module.plan or () for name in entry.trainable), *module.trained]
    frozen = [name for name in trains if not module.get_parameter(name).requires_grad]
    if frozen and len(frozen) < len(trains):  # if all are frozen, the module is for inference
        raise VerificationError(
            f"adapter: the plan trains {some(frozen)}, which does not require gradients: an "
            "optimizer would not change it. Call requires_grad_(True) on it."
        )


def _check_dtype(module: CapturedModule, name: str, expected: torch.dtype) -> None:
    """Raise if a tensor that trains is not in the dtype of the plan."""
    found = module.get_parameter(name).dtype
    if found != expected:
        raise VerificationError(
            f"adapter: '{name}' is {found}, where the plan has {expected}: it was converted by "
            f"hand. Make the adapter with inject(…, adapter_dtype={found}) instead, which also "
            "casts it in the graph."
        )


def _parameter(module: CapturedModule, name: str) -> Tensor | None:
    """Return a parameter by name, or None if the module has none of that name."""
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def _is_whole(module: CapturedModule, entry: Entry) -> bool:
    """Whether a module has all tensors of an entry, in the shapes of the plan."""
    found = {name: _parameter(module, name) for name in entry.tensors}
    return all(t is not None and t.shape == entry.tensors[n] for n, t in found.items())


def _moves_padding(module: CapturedModule, entry: Entry, row: int) -> bool:
    """Whether an embedding's adapter changes a row: whether that column of A is not zero."""
    a, _ = factors(
        entry, {name: whole(module.get_parameter(name).detach()) for name in entry.tensors}
    )
    return bool(a.select(-1, row).any())


def check_base(module: CapturedModule) -> None:
    """Raise if a weight that the plan does not train was written to, or requires gradients."""
    assert module.plan is not None
    if stray := module.unplanned():
        raise VerificationError(
            f"base unchanged: '{stray[0]}' requires gradients and is not in the plan, so training "
            "would change the base. Freeze it, or put its module into modules_to_save."
        )
    changed = module.changed_weights()
    sites = [entry.site for entry in module.plan if entry.parameter in changed]
    if sites:
        raise VerificationError(
            f"base unchanged: the weight under '{sites[0]}' was written to since the adapter was "
            "injected" + (f", and so were those under {some(sites[1:])}." if sites[1:] else ".")
        )
    if changed:
        raise VerificationError(
            f"base unchanged: {some(changed)} has no adapter, and was written to or untied since "
            "the injection. An adapter file would not contain that: put its module into "
            "modules_to_save, or load another base with load_state_dict."
        )


def check_finite(module: CapturedModule) -> None:
    """Raise if an adapter has NaN or infinities."""
    held = {name: module.get_parameter(name) for name in sorted(module.adapter_parameters())}
    finite = {name: bool(whole(t.detach()).isfinite().all()) for name, t in held.items()}
    if diverged := [name for name in finite if not finite[name]]:
        raise VerificationError(
            f"adapter: '{diverged[0]}' holds values that are not finite: the training diverged."
        )


def folded_weights(
    module: CapturedModule, folded: CapturedModule
) -> dict[str, tuple[float, float]]:
    """Return error and tolerance of each entry's folded weight, by the name of the entry's A.

    Raises:
        VerificationError: a folded weight has another dtype or shape, or an error above its
            tolerance; names the site.
    """
    found: dict[str, tuple[float, float]] = {}
    for names, entries in _kept(module):
        if entries:
            error = _weight_error(module, folded, names[0], entries)
            found |= {entry.name_a: error for entry in entries}
    return found


def _weight_error(
    module: CapturedModule, folded: CapturedModule, name: str, entries: list[Entry]
) -> tuple[float, float]:
    """Return error and tolerance of the entry whose error is largest relative to its tolerance."""
    site = entries[0].site
    weight, found = (m.get_parameter(name).detach() for m in (module, folded))
    if is_quantised(found):
        raise VerificationError(
            f"fold: '{site}' was quantised anew, so that its weight is not W0 + s·BA, and how far "
            "it is off is no error of rounding. folded.retention tells what is kept; verify the "
            "module without folded=."
        )
    if found.dtype != weight.dtype or found.shape != weight.shape:
        raise VerificationError(
            f"fold: '{site}' is folded to {found.dtype} {tuple(found.shape)} from {weight.dtype} "
            f"{tuple(weight.shape)}."
        )
    exact = exact_weight(module, entries)
    errors, bounds = (found.double() - exact.value).abs().flatten(), exact.bound.flatten()
    worst = int((errors / bounds).argmax())  # the index of a NaN, if there is one
    error, bound = float(errors[worst]), float(bounds[worst])
    if not error <= bound:
        raise VerificationError(
            f"fold: '{site}': its folded weight is not W0 + s·BA (off by {error:.3g} where "
            f"rounding allows {bound:.3g})."
        )
    return error, bound


def check_unadapted(module: CapturedModule, folded: CapturedModule) -> None:
    """Raise unless parameters and buffers without adapters are equal after the fold."""
    adapted = {name for names in adapted_names(module).values() for name in names}
    ours, theirs = _tensors(module), _tensors(folded)
    for names in module.aliases().values():
        for trained in module.trained.intersection(names):  # a fold rounds it, as its casts do
            rounded = ours[trained].detach().to(base_dtype(module, trained))
            ours |= dict.fromkeys(names, rounded)
    for name in sorted((ours.keys() | theirs.keys()) - adapted - _names_of_adapters(module)):
        if name not in ours or name not in theirs or not equal_tensors(ours[name], theirs[name]):
            raise VerificationError(
                f"fold: '{name}' has no adapter, and is another tensor in the folded module."
            )


def _names_of_adapters(module: CapturedModule) -> set[str]:
    """Return all names of adapter tensors: a module with two paths has its adapter under both."""
    own = module.adapter_parameters()
    groups = module.aliases().values()
    return {name for names in groups if not own.isdisjoint(names) for name in names}


def _tensors(module: CapturedModule) -> dict[str, Tensor]:
    """Return the parameters and buffers under all their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def check_shared_memory(module: CapturedModule, folded: CapturedModule) -> None:
    """Raise if training the folded module would change memory that it shares with the source."""
    ours = {memory_id(p) for p in module.parameters()}
    for name, parameter in folded.named_parameters():
        if parameter.requires_grad and memory_id(parameter) in ours:
            raise VerificationError(
                f"fold: '{name}' requires gradients in the folded module but shares memory with "
                "the source model, which training would change. Freeze it, or give it a copy."
            )


def check_ties(module: CapturedModule, folded: CapturedModule) -> None:
    """Raise unless the names of a weight that have the same adapters share one folded weight."""
    found = {name: names for names in folded.aliases().values() for name in names}
    for (first, *others), _ in _kept(module):
        there = set(found.get(first, ()))
        if there != {first, *others}:
            what = "lost" if set(others) - there else "made"
            raise VerificationError(
                f"fold: a tie is {what}. '{first}' is adapted like {some(others) or 'no other'}, "
                f"and is one folded parameter with {some(sorted(there - {first})) or 'no other'}."
            )


def _kept(module: CapturedModule) -> list[tuple[list[str], list[Entry]]]:
    """Return the parameters that a fold makes or keeps: their names, and the entries folded in."""
    names = adapted_names(module)
    adapters = _names_of_adapters(module)
    found: list[tuple[list[str], list[Entry]]] = []
    for aliases in module.aliases().values():
        entries = [e for e in module.plan or () if e.parameter in aliases]
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in aliases:
            into = tuple(e.name_a for e in entries if name in names[e.name_a])
            alike.setdefault(into, []).append(name)
        found += [
            (group, [e for e in entries if e.name_a in into])
            for into, group in alike.items()
            if group[0] not in adapters
        ]
    return found
