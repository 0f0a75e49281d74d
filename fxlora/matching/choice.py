"""The rule that matches each site, and the sites of a tied weight that are adapted as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from ..config import LoraConfig, Rule
from ..errors import ConfigError, UnsupportedOpError, warn
from ..lora.ops import is_lookup
from ..lora.variants import VARIANTS, variants_of
from ..module import CapturedModule
from ..reads.sites import Site, merged
from ..tables import some
from .experts import Experts
from .targets import Targets, is_suffix

Chosen = list[tuple[Site, int]]  # each site with the number (from 1) of its rule, or 0


@dataclass(frozen=True)
class Choice:
    """The rules, and the sites of a module to match; the first rule that matches a site wins."""

    module: CapturedModule
    rules: tuple[Rule, ...]
    sites: tuple[Site, ...]

    def made(self) -> Chosen:
        """Return every site with its rule; sites of one tied weight under one rule are merged."""
        return self._tied([(site, self._first_rule(site)) for site in self.sites])

    def rule(self, number: int) -> Rule | None:
        return self.rules[number - 1] if number else None

    def _first_rule(self, site: Site) -> int:
        """Return the number (from 1) of the first rule that matches the site, or 0."""
        numbers = range(1, len(self.rules) + 1)
        return next((number for number in numbers if self.holds(number, site)), 0)

    def holds(self, number: int, site: Site) -> bool:
        """Whether all keys of a rule match a site."""
        rule = self.rules[number - 1]
        return (
            (rule.name is None or any(matches_name(p, site) for p in rule.name))
            and (rule.op is None or any(fnmatchcase(site.op, kind) for kind in rule.op))
            and holds_shape(rule, site)
            and (rule.lora is None or self.targets[number - 1].key(site) is not None)
            and (rule.where is None or holds_where(rule.where, site))
        )

    @cached_property
    def targets(self) -> tuple[Targets, ...]:
        """What the names in the configuration of each rule mean."""
        return tuple(
            Targets(rule.lora or LoraConfig(), self.module, self.sites) for rule in self.rules
        )

    @cached_property
    def experts(self) -> Experts:
        """The experts among the sites."""
        return Experts(self.sites)

    def key(self, number: int, site: Site) -> str:
        """Return the name under which a rule's configuration means a site."""
        return self.targets[number - 1].key(site) or site.name

    def _tied(self, chosen: Chosen) -> Chosen:
        """Merge the sites of one tied weight that one rule matches into one site.

        A rule that shares ties adapts all of them, including those that no rule matches; one with
        tied="each" leaves them apart.
        """
        found: Chosen = []
        done: set[str] = set()
        for site, number in chosen:
            if site.parameter in done:
                continue
            others = [(s, n) for s, n in chosen if s.parameter in site.tied] if site.tied else []
            tie = [(site, number), *others]
            sharing = next((n for _, n in tie if self._shares(n, [s for s, _ in tie])), None)
            if sharing is not None:
                self._check_shared(sharing, tie)
                number, together = sharing, [s for s, _ in others]
            else:
                apart = not number or self._parts_ties(number)
                together = [s for s, n in others if n == number and not apart]
            found.append((merged([site, *together]), number))
            done |= {s.parameter for s in (site, *together)}
        return found

    def _shares(self, number: int, tie: Sequence[Site]) -> bool:
        """Whether a rule adapts all reads of a tied weight (in PEFT: of a tied embedding)."""
        rule = self.rule(number)
        lora = rule and rule.lora
        if lora is None or lora.tied == "share":
            return lora is not None
        looked_up = any(is_lookup(reader.kind) for site in tie for reader in site.readers)
        if not (lora.ensure_weight_tying and looked_up):
            return False
        names = {name for site in tie for name in (*site.names, *site.tied)}
        if ties_as_peft(self.module, lora, names):
            _check_one_pair(lora, names)
            return True
        if len(names) > 1:
            warn(
                f"ensure_weight_tying has no effect on {some(sorted(names))}: as in PEFT, it is "
                "for the input embedding of a transformers model, with embed_tokens or lm_head in "
                'target_modules. To adapt the tied weight as one, say tied="share".'
            )
        return False

    def _parts_ties(self, number: int) -> bool:
        """Whether a rule gives each name of a tied weight an adapter of its own."""
        lora = self.rules[number - 1].lora
        return lora is not None and lora.tied == "each"

    def _check_shared(self, sharing: int, tied: Sequence[tuple[Site, int]]) -> None:
        names = some(f"'{site.name}'" for site, _ in tied)
        for number in {number for _, number in tied} - {0, sharing}:
            raise ConfigError(
                f'{names} are one tied weight. Rule {sharing} says tied="share", but rule '
                f"{number} matches one of them: let one rule match all of them."
            )


def ties_as_peft(module: CapturedModule, lora: LoraConfig, names: Collection[str]) -> bool:
    """Whether PEFT adapts a tied weight as one by `ensure_weight_tying`."""
    source = f"{module.known.embedding}.weight" if module.known.model_type else ""
    targets = lora.target_modules
    if targets is None:
        return True  # in a rule with a name, which PEFT does not have
    if isinstance(targets, str):
        named = any(re.fullmatch(targets, name) for name in _PEFTS_EMBEDDINGS)
    else:
        named = any(name.rpartition(".")[2] in _PEFTS_EMBEDDINGS for name in targets)
    return named and source in names


_PEFTS_EMBEDDINGS = ("embed_tokens", "lm_head")


def _check_one_pair(lora: LoraConfig, names: Collection[str]) -> None:
    variants = variants_of(lora.init_lora_weights, lora.row)
    if scaling := [name for name in variants if VARIANTS[name].gain]:
        raise UnsupportedOpError(
            f"{', '.join(scaling)} with ensure_weight_tying: PEFT trains one pair for "
            f"{some(sorted(names))}, and magnitudes for each. Instead, say tied='each', for a pair "
            "for each, or tied='share', for one pair and one magnitude."
        )


def matches_name(pattern: str, site: Site) -> bool:
    """Whether a Rule's name pattern matches any of a site's names."""
    return matches(pattern, site.aliases)


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a Rule's name pattern matches any of these names."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], name) for name in names)
    if any(character in pattern for character in "*?["):
        return any(fnmatchcase(name, pattern) for name in names)
    return any(is_suffix(pattern, name) for name in names)


def pattern_holds(pattern: str, name: str) -> bool:
    """Whether a pattern of `rank_pattern` or `alpha_pattern` matches the end of a name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def by_pattern(patterns: Mapping[str, float], key: str, default: float) -> float:
    """Return the value of the first pattern that matches the key of a site, or the default."""
    return next((v for pattern, v in patterns.items() if pattern_holds(pattern, key)), default)


def holds_where(function: Callable[[Site], bool], site: Site) -> bool:
    try:
        return bool(function(site))
    except Exception as error:
        raise ConfigError(
            f"where= raised for '{site.name}': {type(error).__name__}: {error}."
        ) from error


def holds_shape(rule: Rule, site: Site) -> bool:
    low, high = sorted((site.in_features, site.out_features))
    bounds = (
        (rule.min_features, low),
        (rule.min_in_features, site.in_features),
        (rule.min_out_features, site.out_features),
    )
    limits = (
        (rule.max_features, high),
        (rule.max_in_features, site.in_features),
        (rule.max_out_features, site.out_features),
    )
    if any(bound is not None and size < bound for bound, size in bounds):
        return False
    if any(limit is not None and size > limit for limit, size in limits):
        return False
    if rule.kernel_size is None:
        return True
    wanted = rule.kernel_size
    sizes = (wanted,) * len(site.kernel_size) if isinstance(wanted, int) else wanted
    return bool(site.kernel_size) and tuple(sizes) == site.kernel_size
