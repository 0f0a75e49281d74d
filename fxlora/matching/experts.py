"""The rank of experts: r divided by the number of those that a token reaches (`r="r/topk"`).

Then the adapters that act on a token have as many parameters as one of rank r on a dense layer of
the same size (Schulman et al. 2025, "LoRA Without Regret").
"""

from __future__ import annotations

import re

from ..config import LoraConfig
from ..errors import ConfigError, NoMatchError
from ..fx.calls import argument, call_site, kind_of
from ..module import CapturedModule
from ..reads.sites import Site

_ATTRIBUTES = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token")
_LISTED = re.compile(r"(?:^|.*\.)[^.]*experts?\.\d+(?:\.|$)")  # an expert in a list of modules


def is_expert(site: Site) -> bool:
    """Whether a weight is a stack of matrices, or that of a module in a list of experts."""
    return site.layout.stacked or any(_LISTED.match(name) for name in site.aliases)


def rank_at(site: Site, r: int, config: LoraConfig, module: CapturedModule) -> int:
    """Return the rank of a site: r, or that of experts.

    Raises:
        ConfigError: the captured graphs do not tell how many experts a token reaches.
    """
    if config.expert_rank == "r" or not is_expert(site):
        return r
    active = _active(module, site)
    if len(active) != 1:
        found = f"top-k of {' and '.join(map(str, sorted(active)))}" if active else "no top-k"
        raise ConfigError(
            f"r=\"r/topk\": how many experts a token reaches at '{site.name}' is not known: the "
            f"router around it has {found}. Give r as a number, and that of experts in "
            f'rank_pattern={{r".*{re.escape(site.name.rpartition(".")[2])}": …}}.'
        )
    return max(1, r // active.pop())


def check_met(config: LoraConfig, number: int, adapted: list[Site]) -> None:
    """Raise if a rule gives experts a rank of their own and adapts none."""
    if config.expert_rank != "r" and not any(map(is_expert, adapted)):
        raise NoMatchError(
            f'r="r/topk" of rule {number} has no effect: none of the weights that it adapts is of '
            "experts (a stack of matrices, or a module in a list of experts). Give r as a number."
        )


def _active(module: CapturedModule, site: Site) -> set[int]:
    """Return the numbers of experts that a token reaches, by the model or else by its graphs.

    They are attributes that the capture saw read, and arguments of topk, in the module around the
    experts.
    """
    owner = site.parameter.rpartition(".")[0]
    listed = re.match(r"(.*?)\.?[^.]*experts?\.\d+(\.|$)", owner)
    around = listed[1] if listed else owner
    for path in dict.fromkeys((around, around.rpartition(".")[0])):
        if found := _said(module, path) or _computed(module, path):
            return found
    return set()


def _said(module: CapturedModule, around: str) -> set[int]:
    return {
        value
        for name, value in module.known.read_values.items()
        if _is_in(name, around) and name.rpartition(".")[2] in _ATTRIBUTES
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
    }


def _computed(module: CapturedModule, around: str) -> set[int]:
    found: set[int] = set()
    for graph in module.distinct_graphs():
        for node in graph.nodes:
            if node.op == "call_function" and kind_of(node) == "topk":
                k = argument(node, 1)
                if _is_in(call_site(node), around) and isinstance(k, int):
                    found.add(k)
    return found


def _is_in(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")
