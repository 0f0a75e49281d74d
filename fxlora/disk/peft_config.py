"""The configuration under which PEFT reads a plan's adapter."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ..module import CapturedModule
from ..plan import Entry, Plan
from .peft import groups_of, is_bare, owner_of, rank
from .peft_tokens import indices_of
from .saved import Saved, paths_of


def configuration(module: CapturedModule, plan: Plan, saved: Saved) -> dict[str, Any]:
    """Return the configuration under which PEFT reads the same adapter."""
    groups = groups_of(entry for entry in plan if not entry.tokens)
    # PEFT has one use_rslora for all sites. If they differ, it is off and alpha gives the scaling.
    rslora = bool(groups) and all(_is_rslora(entry) for group in groups for entry in group)
    ranks = {_target(g[0]): rank(g) for g in groups}
    alphas = {
        _target(g[0]): _whole(g[0].scaling * (math.sqrt(rank(g)) if rslora else rank(g)))
        for g in groups
    }
    r, alpha = (_commonest(ranks.values()), _commonest(alphas.values())) if groups else (8, 8)
    layers = [_target(g[0]) for g in groups if not is_bare(g[0])]
    bare = [_target(g[0]) for g in groups if is_bare(g[0])]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        **plan.descriptions,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": max((entry.dropout for entry in plan), default=0.0) if not bare else 0.0,
        "target_modules": _modules(module, layers) if layers or not bare else None,
        "target_parameters": bare or None,
        "rank_pattern": {exactly(site): n for site, n in ranks.items() if n != r},
        "alpha_pattern": {exactly(site): n for site, n in alphas.items() if n != alpha},
        "modules_to_save": list(saved.names) or None,
        "trainable_token_indices": indices_of(plan),
        "bias": _bias(module, plan, saved),
        "use_rslora": rslora,
        "use_dora": any("dora" in entry.variants for entry in plan),
        # PEFT sets this by itself for a Conv1D, and refuses it together with target_parameters.
        "fan_in_fan_out": not bare and any(entry.op == "addmm" for entry in plan),
        "init_lora_weights": True,
    }


def _bias(module: CapturedModule, plan: Plan, saved: Saved) -> str:
    """Return PEFT's mode of the biases that train, or "none" if they are those of no mode."""
    named = module.named_parameters(remove_duplicate=False)
    every = {n for n, _ in named if n.rpartition(".")[2] == "bias" and not saved.holds(n)}
    owners = {owner_of(entry) for entry in plan if not is_bare(entry) and not entry.tokens}
    mine = {name for name in every if name.rpartition(".")[0] in owners}
    trained = every.intersection(plan.trained)
    modes = {"none": set[str](), "lora_only": mine, "all": every}
    return next((mode for mode, names in modes.items() if names == trained), "none")


def _target(entry: Entry) -> str:
    """Return the name by which PEFT targets a weight: the parameter's, or the layer's path."""
    return entry.parameter if is_bare(entry) else owner_of(entry)


def _is_rslora(entry: Entry) -> bool:
    """Whether the scaling is that of rsLoRA, alpha/√r (for r = 1, the two are equal)."""
    return entry.r > 1 and math.isclose(entry.scaling, entry.alpha / math.sqrt(entry.r))


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _whole(value: float) -> float:
    """Return an alpha without the rounding of alpha / r * r, as an integer if it is whole."""
    near = round(float(value), 9)
    return int(near) if near.is_integer() else near


def _modules(module: CapturedModule, sites: list[str]) -> list[str] | str:
    """Return `target_modules` that match only these sites.

    PEFT matches each name in a list also as the end of a longer path, but a single regular
    expression only as a whole. So the list of names is used unless a name is such an end.
    """
    wanted = set(sites)
    if any(end in wanted for path in paths_of(module) for end in name_suffixes(path)):
        return "|".join(re.escape(site) for site in sites)
    return sites


def exactly(site: str) -> str:
    """Return a pattern for one site: PEFT would match the bare name as the end of a path, too."""
    return f"^{re.escape(site)}"


def name_suffixes(name: str) -> Iterator[str]:
    """Yield the shorter suffixes of a dotted name: "b.c" and "c" for "a.b.c"."""
    while "." in name:
        name = name.partition(".")[2]
        yield name
