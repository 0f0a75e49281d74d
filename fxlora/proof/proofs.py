"""The laws that are proved without a run: about the graphs and the weights of a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from ..errors import VerificationError
from ..fx.alike import difference, first_difference
from ..module import CapturedModule
from ..module.program import MODES
from ..passes import Inject, Remove
from ..passes.structure import insertions
from ..plan import Entry
from ..tables import some
from .coverage import adapted_names
from .exact import exact_weight

# ---- graphs -------------------------------------------------------------------------------------


def without_adapters(module: CapturedModule) -> CapturedModule:
    """The module less its adapters; heads and buffers stay as they were trained."""
    try:
        return Remove(restore=False)(module).eval()
    except (AttributeError, RuntimeError) as error:  # fx's check of a graph
        raise VerificationError(
            f"coverage: the adapters cannot be taken out of the graphs again ({error})."
        ) from error


def check_modes(module: CapturedModule, base: CapturedModule) -> None:
    """Each mode's graph is what injection makes of the base, node for node."""
    assert module.plan is not None
    entries = tuple(dataclasses.replace(entry, init=True) for entry in module.plan)
    with own_dice(module):
        again = Inject(dataclasses.replace(module.plan, entries=entries))(base)
    for ours, theirs in zip(module.programs, again.programs, strict=True):
        for mode in MODES:
            if pair := first_difference(ours.graphs[mode], theirs.graphs[mode]):
                raise VerificationError(
                    f"modes agree: the {mode} graph{_of(ours.path)} is not the captured one with "
                    f"the plan's adapters; {_around(module, ours.graphs[mode], pair[0])} it has "
                    f"{pair[0].format_node()} for {pair[1].format_node()}."
                )


def _around(module: CapturedModule, graph: fx.Graph, node: fx.Node) -> str:
    """Which adapter a node is part of, or comes before."""
    for insertion in insertions(module, graph):
        if insertion.output.graph is node.graph and not insertion.output < node:
            return f"at '{insertion.entry.site}'"
    return "behind every adapter"


def check_folded_graphs(base: CapturedModule, folded: CapturedModule) -> None:
    """The folded graphs are the captured ones, node for node."""
    if [p.path for p in base.programs] != [p.path for p in folded.programs]:
        raise VerificationError("fold: the folded module has other regions than the captured one.")
    for before, after in zip(base.programs, folded.programs, strict=True):
        for mode in MODES:
            if found := difference(before.graphs[mode], after.graphs[mode]):
                raise VerificationError(
                    f"fold: the folded {mode} graph{_of(before.path)} is not the captured one "
                    f"node for node: {found}."
                )


def check_ties(module: CapturedModule, folded: CapturedModule) -> None:
    """Names of one weight are names of one folded weight where they are adapted alike."""
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
    """The parameters that a fold leaves: the names of each, and the entries folded into it."""
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


def _of(path: str) -> str:
    return f" of '{path}'" if path else ""


# ---- weights ------------------------------------------------------------------------------------


def check_base(module: CapturedModule) -> None:
    """Nothing has written to a weight under an adapter, and nothing is about to."""
    assert module.plan is not None
    if stray := module.unplanned():
        raise VerificationError(
            f"base unchanged: '{stray[0]}' requires gradients and is not in the plan, so that "
            "training changes the base. Freeze it, or put its module into modules_to_save."
        )
    changed = module.changed_weights()
    sites = [entry.site for entry in module.plan if entry.parameter in changed]
    if sites:
        raise VerificationError(
            f"base unchanged: the weight under '{sites[0]}' was written to since the adapter was "
            "injected" + (f", and so were those under {some(sites[1:])}." if sites[1:] else ".")
        )


def folded_weights(
    module: CapturedModule, folded: CapturedModule
) -> dict[str, tuple[float, float]]:
    """Error and tolerance of the folded weight of each entry, by the name of its A."""
    found: dict[str, tuple[float, float]] = {}
    for names, entries in _kept(module):
        if entries:
            error = _weight_error(module, folded, names[0], entries)
            found |= {entry.name_a: error for entry in entries}
    return found


def _weight_error(
    module: CapturedModule, folded: CapturedModule, name: str, entries: list[Entry]
) -> tuple[float, float]:
    """Where the error is the largest part of what rounding may do."""
    site = entries[0].site
    weight, found = (m.get_parameter(name).detach() for m in (module, folded))
    if found.dtype != weight.dtype or found.shape != weight.shape:
        raise VerificationError(
            f"fold: '{site}' is folded to {found.dtype} {tuple(found.shape)} from {weight.dtype} "
            f"{tuple(weight.shape)}."
        )
    for tensor in (name for entry in entries for name in entry.tensors):
        if not bool(module.get_parameter(tensor).isfinite().all()):
            raise VerificationError(
                f"adapter: '{tensor}' holds values that are not finite: the training diverged."
            )
    exact = exact_weight(module, entries)
    errors, bounds = (found.double() - exact.value).abs().flatten(), exact.bound.flatten()
    worst = int((errors / bounds).argmax())  # a NaN, if there is one
    error, bound = float(errors[worst]), float(bounds[worst])
    if not error <= bound:
        raise VerificationError(
            f"fold: '{site}': its folded weight is not W0 + s·BA (off by {error:.3g} where "
            f"rounding allows {bound:.3g})."
        )
    return error, bound


def check_the_rest(module: CapturedModule, folded: CapturedModule) -> None:
    """What is not adapted comes through the fold as it is, buffers too."""
    adapted = {name for names in adapted_names(module).values() for name in names}
    ours, theirs = _tensors(module), _tensors(folded)
    for name in sorted((ours.keys() | theirs.keys()) - adapted - _names_of_adapters(module)):
        if name not in ours or name not in theirs or not same(ours[name], theirs[name]):
            raise VerificationError(
                f"fold: '{name}' has no adapter, and is another tensor in the folded module."
            )


def _names_of_adapters(module: CapturedModule) -> set[str]:
    """All names of the adapters' tensors: a module with two names has its adapter under both."""
    own = module.adapter_parameters()
    groups = module.aliases().values()
    return {name for names in groups if not own.isdisjoint(names) for name in names}


def _tensors(module: CapturedModule) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


# ---- for both kinds of laws --------------------------------------------------------------------


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; NaN is NaN."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if (a.data_ptr(), a.stride()) == (b.data_ptr(), b.stride()):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def own_dice(module: CapturedModule) -> Generator[None]:
    """Every call throws the same, and the user's dice stay as they are."""
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
