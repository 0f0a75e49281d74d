"""The rank of experts: r divided by the number of those that a token reaches (`r="r/topk"`).

Then the adapters that act on a token have as many parameters as one of rank r on a dense layer of
the same size (Schulman et al. 2025, "LoRA Without Regret").

What looks like experts (a stack of matrices, or modules in a list of experts) is experts if a graph
shows that a topk over as many selects from them: its result chooses the matrices or the inputs of
their product, or it chooses or weighs the product's outputs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from ..config import LoraConfig
from ..errors import ConfigError, NoMatchError
from ..fx.calls import argument, example_value, kind_of
from ..reads.readers import Reader
from ..reads.sites import Site
from ..tables import some

_LISTED = re.compile(r"(?P<list>(?:.*\.)?[^.]*experts?)\.\d+(?P<inside>\..*|$)")
# Ops whose result has entries of one operand only where, or as far as, another one says.
_SELECT = frozenset(
    [
        *("mul", "mul_", "bmm", "mm", "matmul", "einsum", "baddbmm", "where", "masked_fill"),
        *("index", "index_select", "gather", "take_along_dim", "index_add", "index_add_"),
        *("index_put", "index_put_", "scatter", "scatter_add", "scatter_add_", "masked_fill_"),
    ]
)
Nodes = set[fx.Node]


@dataclass(frozen=True)
class Experts:
    """The experts among the sites of a module."""

    sites: tuple[Site, ...]

    def rank_at(self, site: Site, r: int, config: LoraConfig) -> int:
        """Return the rank of a site: r, or that of experts.

        Raises:
            ConfigError: the graphs have several numbers of experts that a token reaches.
        """
        active = set[int]() if config.expert_rank == "r" else self._active(site)
        if len(active) > 1:
            found = " and ".join(map(str, sorted(active)))
            raise ConfigError(_not_known(site, f"it is selected from by a top-k of {found}"))
        return max(1, r // active.pop()) if active else r

    def check_met(self, config: LoraConfig, number: int, adapted: Sequence[Site]) -> str:
        """Return a remark on what looks like experts and has the rank r; raise if no site is one.

        Args:
            config: the configuration of a rule.
            number: its number.
            adapted: the sites that it adapts.
        """
        if config.expert_rank == "r":
            return ""
        candidates = [site for site in adapted if self._number(site)]
        if not candidates:
            raise NoMatchError(
                f'r="r/topk" of rule {number} has no effect: none of the weights that it adapts is '
                "of experts (a stack of matrices, or a module in a list of experts). Give r as a "
                "number."
            )
        others = [site for site in candidates if not self._active(site)]
        if len(others) == len(candidates):
            raise ConfigError(_not_known(others[0], "no top-k of a graph selects from it"))
        if not others:
            return ""
        names = some([repr(site.name) for site in others])
        return f'r="r/topk": r is not divided at {names}, from which no top-k of a graph selects.'

    def _active(self, site: Site) -> set[int]:
        """Return the numbers of experts that a token reaches; none if the graphs do not show it."""
        number = self._number(site)
        return {
            choice.k
            for reader in site.readers
            for choice in self._choices.get(reader.node.graph, ())
            if choice.among == number and choice.selects(reader)
        }

    def _number(self, site: Site) -> int:
        """Return how many there are of a site: matrices, or modules in its list; else 0."""
        if site.layout.stacked:
            return site.layout.sizes(site.shape)[0][0]
        return self._lists.get(_place(site), 0)

    @cached_property
    def _lists(self) -> Mapping[Any, int]:
        """The number of modules in each list of experts, by the place of a weight in them."""
        return Counter(filter(None, map(_place, self.sites)))

    @cached_property
    def _choices(self) -> Mapping[fx.Graph, list[_TopK]]:
        """The calls of topk in the graphs that read what may be experts."""
        reads = [r.node for s in self.sites if self._number(s) for r in s.readers]
        by_graph = {node.graph: [n for n in reads if n.graph is node.graph] for node in reads}
        return {
            graph: list(filter(None, (_TopK.of(node, mine) for node in graph.nodes)))
            for graph, mine in by_graph.items()
        }


@dataclass(frozen=True)
class _TopK:
    """A call of topk.

    Attributes:
        k: how many it chooses.
        among: how many it chooses from.
        chosen: what depends on its result, as far as the outputs of experts, on which all that
            comes later depends.
        later: what depends on outputs of experts that are not before it.
    """

    k: int
    among: int
    chosen: Nodes
    later: Nodes

    @classmethod
    def of(cls, node: fx.Node, reads: Iterable[fx.Node]) -> _TopK | None:
        """Return a node as a call of topk; None if it is none, or its numbers are not known.

        Args:
            node: the node.
            reads: the nodes of its graph that read what may be experts.
        """
        if node.op != "call_function" or kind_of(node) != "topk":
            return None
        scores, k, dim = example_value(node.args[0]), argument(node, 1), argument(node, 2, -1)
        if scores is None or not scores.ndim or not isinstance(k, int) or not isinstance(dim, int):
            return None
        before = _reached([node], lambda n: n.all_input_nodes)
        later = _reached((n for n in reads if n not in before), lambda n: n.users)
        chosen = _reached([node], lambda n: () if n in later else n.users)
        return cls(k, scores.shape[dim], chosen, later)

    def selects(self, reader: Reader) -> bool:
        """Whether it chooses the matrices or the inputs of a read, or chooses or weighs outputs."""
        if reader.weight in self.chosen or reader.node in self.chosen:
            return True
        weighing = (n for n in self.chosen & self.later if self._weighs(n))
        return any(reader.node in self._from(node) for node in weighing)

    def _weighs(self, node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and kind_of(node) in _SELECT
            and any(n in self.chosen and n not in self.later for n in node.all_input_nodes)
        )

    def _from(self, node: fx.Node) -> Nodes:
        """Return what a node is computed from, as far back as experts' own reads."""
        return _reached([node], lambda n: [i for i in n.all_input_nodes if i in self.later])


def _place(site: Site) -> tuple[str, str] | None:
    """Return the list of experts that a weight belongs to, and its path in a module of it."""
    found = next(filter(None, map(_LISTED.fullmatch, site.aliases)), None)
    return (found["list"], found["inside"]) if found else None


def _not_known(site: Site, why: str) -> str:
    return (
        f"r=\"r/topk\": how many experts a token reaches at '{site.name}' is not known: {why}. "
        "Give r as a number, and that of experts in "
        f'rank_pattern={{r".*{re.escape(site.name.rpartition(".")[2])}": …}}.'
    )


def _reached(nodes: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]) -> Nodes:
    """Return nodes and all that are reached from them."""
    ahead = list(nodes)
    found = set(ahead)
    while ahead:
        for node in further(ahead.pop()):
            if node not in found:
                found.add(node)
                ahead.append(node)
    return found
