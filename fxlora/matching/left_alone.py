"""A remark on plans that leave most of the layers that they adapt alone, as MLPs or experts."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from ..plan import Entry
from ..reads.sites import Site
from ..tables import some
from .choice import Chosen

_LAYER = re.compile(r"(.*?\.\d+)\.")  # the path of a numbered layer, in a name inside of it


def left_alone(
    chosen: Chosen, entries: Sequence[Entry], in_full: Collection[str]
) -> tuple[str, ...]:
    """Return what a plan leaves alone in the layers that it adapts, if that is most of them.

    LoRA on the attention alone learns less than LoRA on all matrices, or on the MLPs alone, also at
    equal numbers of parameters (Biderman et al. 2024, fig. 8; Schulman et al. 2025).
    """
    adapted = {name for entry in entries for name in entry.names}
    layers = {layer for name in adapted if (layer := _layer(name))}
    sites = [site for site, _ in chosen if _layer(site.parameter) in layers]
    alone = [site for site in sites if not {*site.names} & (adapted | {*in_full})]
    every, left = (sum(site.parameters for site in some_) for some_ in (sites, alone))
    if not alone or left <= every / 2:
        return ()
    stacks = [site.parameter.rpartition(".")[2] for site in alone if site.layout.stacked]
    names = some(repr(name) for name in dict.fromkeys(stacks))
    also = f", and target_parameters=[{names}] the stacks" if names else ""
    return (
        f"{left / every:.0%} of the parameters in the layers that it adapts are left alone: "
        f"{some(_by_size(alone), 4)}. MLPs and experts are most of a transformer, and LoRA that "
        f'leaves them out learns less: target_modules="all-linear" takes every linear layer{also}.',
    )


def _by_size(sites: Sequence[Site]) -> list[str]:
    """Return the last names of sites, those with most parameters first."""
    sizes: dict[str, int] = {}
    for site in sites:
        last = re.sub(r"\.\d+(?=\.|$)", "", site.name).rpartition(".")[2]
        sizes[last] = sizes.get(last, 0) + site.parameters
    return sorted(sizes, key=lambda name: -sizes[name])


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found[1] if found else ""
