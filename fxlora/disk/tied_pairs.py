"""Pairs that PEFT trains as one: those of an embedding and of the head that is tied to it.

With `ensure_weight_tying`, the head's A is the embedding's B, transposed, and its B the other A.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ..matching.choice import by_pattern
from ..module import CapturedModule
from ..plan import Entry, Plan
from ..reads.sites import Site, find_sites, merged
from .folder import Folder
from .peft_tensors import Pair, PeftTensors
from .reading import Reading
from .values import same


def joined(
    content: Folder, tensors: PeftTensors, sites: Mapping[str, Site]
) -> tuple[PeftTensors, dict[str, Site]]:
    """Return the tensors with one pair for each tie that PEFT adapts as one, and the sites then.

    Pairs of a tie that are not alike are left as they are: PEFT did not train them as one.

    Args:
        content: the folder.
        tensors: its tensors.
        sites: the module's sites, by every name.
    """
    found = dict(sites)
    if not content.config.get("ensure_weight_tying"):
        return tensors, found
    pairs = {pair.parameter: pair for pair in tensors.pairs}
    adapted = {id(s): s for name, s in sites.items() if name in pairs}
    dropped: set[str] = set()
    for site in adapted.values():
        tie = [s for s in adapted.values() if s is site or s.parameter in site.tied]
        mine = [pairs[name] for s in tie for name in s.names if name in pairs]
        if found[site.parameter] is not site or len(tie) < 2 or not _are_one(content, mine):
            continue
        whole = merged(tie)
        found |= dict.fromkeys(whole.names, whole)
        of_layout = (p for p in mine if ("lora_embedding_A" in p.tensors) == whole.layout.in_first)
        one = next(of_layout, mine[0])
        dropped |= {pair.parameter for pair in mine if pair is not one}
    kept = tuple(pair for pair in tensors.pairs if pair.parameter not in dropped)
    return dataclasses.replace(tensors, pairs=kept), found


def _are_one(content: Folder, pairs: list[Pair]) -> bool:
    """Whether pairs are one pair, with one scaling."""
    numbers = {
        tuple(
            by_pattern(content.config.get(f"{name}_pattern") or {}, pair.target, 0)
            for name in ("rank", "alpha")
        )
        for pair in pairs
    }
    (first, *others) = [_as_linear(pair) for pair in pairs]
    alike = first is not None and all(
        other is not None and all(map(same, first, other)) for other in others
    )
    return alike and len(numbers) == 1


def _as_linear(pair: Pair) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return A (r, features) and B (rows, r) of a pair on rows of features; None for other ones."""
    held = dict(pair.tensors)
    if held.keys() == {"lora_embedding_A", "lora_embedding_B"}:
        return held["lora_embedding_B"].mT, held["lora_embedding_A"].mT
    if held.keys() == {"lora_A.weight", "lora_B.weight"}:
        return held["lora_A.weight"], held["lora_B.weight"]
    return None


def wrapped(tensors: PeftTensors, sites: Mapping[str, Site]) -> dict[str, tuple[str, ...]]:
    """Return the names under which PEFT has pairs, by the name of the site that they are for."""
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(pair.parameter for pair in tensors.pairs):
        if site := sites.get(name):
            found[site.parameter] = (*found.get(site.parameter, ()), name)
    return found


def by_layer(module: CapturedModule, reading: Reading) -> Plan:
    """Return the plan of PEFT's folder with an entry for each layer that PEFT wraps."""
    sites = {name: site for site in find_sites(module) for name in site.names}
    entries: list[Entry] = []
    for entry in reading.plan:
        names = reading.wrapped.get(entry.parameter, (entry.parameter,))
        whole = entry.tokens or sites[names[0]].names == entry.names
        if whole and names == (entry.parameter,):
            entries.append(entry)
        else:
            entries += [_under(entry, name, sites[name]) for name in names]
    return dataclasses.replace(reading.plan, entries=tuple(entries))


def _under(entry: Entry, name: str, site: Site) -> Entry:
    return dataclasses.replace(
        entry,
        site=f"{site.name}.{entry.part}" if entry.part else site.name,
        parameter=name,
        names=site.names,
        tied=site.tied,
        op=site.op,
        layout=site.layout,
        padding_idx=site.padding_idx,
    )
