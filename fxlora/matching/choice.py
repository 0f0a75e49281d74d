"""The rule that matches each site, and the sites of a tied weight that are adapted as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..config import ALL_LINEAR, LoraConfig, Names, Rule
from ..errors import ConfigError
from ..lora.ops import in_all_linear, is_lookup
from ..module import CapturedModule
from ..reads.sites import Site, merged
from ..tables import some

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
        for number, rule in enumerate(self.rules, 1):
            if self.holds(rule, site):
                return number
        return 0

    def holds(self, rule: Rule, site: Site) -> bool:
        return (
            (rule.name is None or any(matches_name(p, site) for p in rule.name))
            and (rule.op is None or any(fnmatchcase(site.op, kind) for kind in rule.op))
            and holds_shape(rule, site)
            and (rule.lora is None or self.targeted(rule.lora, site))
            and (rule.where is None or holds_where(rule.where, site))
        )

    def targeted(self, config: LoraConfig, site: Site) -> bool:
        if config.has_targets:
            by_module = self.in_targets(config.target_modules, site)
            by_parameter = any(
                is_suffix(t, n) for t in config.target_parameters or () for n in site.names
            )
            if not (by_module or by_parameter):
                return False
        if config.exclude_modules is not None and self.in_targets(config.exclude_modules, site):
            return False
        return config.layers_to_transform is None or in_layers(config, site)

    def in_targets(self, targets: Names, site: Site) -> bool:
        """Whether targets include a site, as in PEFT: one regex for the whole name, or a list."""
        if isinstance(targets, str) and targets != ALL_LINEAR:
            return any(re.fullmatch(targets, alias) for alias in site.aliases)
        names = (targets,) if isinstance(targets, str) else targets or ()
        return any(
            self._in_all_linear(site) if name == ALL_LINEAR else is_called(name, site)
            for name in names
        )

    def _in_all_linear(self, site: Site) -> bool:
        """Whether "all-linear" includes the site.

        It includes weights of matrix products, but not factors from which a weight is computed,
        except the main tensor of a torch parametrization. It leaves out output embeddings and
        weights that are also looked up (embeddings).
        """
        spared = self.module.known.outputs & set(site.names)
        looked_up = any(is_lookup(reader.kind) for reader in site.readers)
        layer, behind, _ = site.parameter.partition(".parametrizations.")
        read = any(r.kind == site.op and r.moved and r.moved.intact for r in site.readers)
        own = read or (behind and layer in site.aliases)
        return bool(in_all_linear(site.op) and own and not spared and not looked_up)

    def _tied(self, chosen: Chosen) -> Chosen:
        """Merge the sites of one tied weight that one rule matches into one site.

        A rule with `tied="share"` adapts all of them, including those that no rule matches.
        """
        found: Chosen = []
        done: set[str] = set()
        for site, number in chosen:
            if site.parameter in done:
                continue
            others = [(s, n) for s, n in chosen if s.parameter in site.tied] if site.tied else []
            sharing = next((n for _, n in [(site, number), *others] if self._shares(n)), None)
            if sharing is not None:
                self._check_shared(sharing, [(site, number), *others])
                number, together = sharing, [s for s, _ in others]
            else:
                together = [s for s, n in others if n == number and number]
            found.append((merged([site, *together]), number))
            done |= {s.parameter for s in (site, *together)}
        return found

    def _shares(self, number: int) -> bool:
        rule = self.rule(number)
        lora = rule and rule.lora
        return lora is not None and lora.tied == "share"

    def _check_shared(self, sharing: int, tied: Sequence[tuple[Site, int]]) -> None:
        names = some(f"'{site.name}'" for site, _ in tied)
        for number in {number for _, number in tied} - {0, sharing}:
            raise ConfigError(
                f'{names} are one tied weight. Rule {sharing} says tied="share", but rule '
                f"{number} matches one of them: let one rule match all of them."
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


def is_called(name: str, site: Site) -> bool:
    return any(is_suffix(name, alias) for alias in site.aliases)


def is_suffix(target: str, name: str) -> bool:
    """Whether a name is the target, or ends with it after a dot."""
    return name == target or name.endswith(f".{target}")


def in_layers(config: LoraConfig, site: Site) -> bool:
    """Whether the layer number in a site's name is one of `layers_to_transform`."""
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", site.name)
        if found:
            layers = config.layers_to_transform
            assert isinstance(layers, tuple)
            return int(found.group(1)) in layers
    return False


def pattern_holds(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the end of a site's name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def by_pattern(patterns: object, site: Site, default: float) -> float:
    """Return the value of the first pattern that matches the site's name, or the default."""
    assert isinstance(patterns, dict)
    for pattern, value in patterns.items():
        if pattern_holds(pattern, site.name):
            return value
    return default


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
