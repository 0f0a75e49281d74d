"""Patterns: what a rule says of names, layers and shapes, held against a site."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from ..config import LoraConfig, Rule
from ..errors import ConfigError
from ..sites import Site


def matches_name(pattern: str, site: Site) -> bool:
    """Whether a Rule's name pattern matches any name of a site."""
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
    return name == target or name.endswith(f".{target}")


def in_layers(config: LoraConfig, site: Site) -> bool:
    patterns = config.layers_pattern or (r"[^.]*",)
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", site.name)
        if found:
            layers = config.layers_to_transform
            assert isinstance(layers, tuple)
            return int(found.group(1)) in layers
    return False


def pattern_holds(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def by_pattern(patterns: object, site: Site, default: float) -> float:
    assert isinstance(patterns, dict)
    for pattern, value in patterns.items():
        if pattern_holds(pattern, site.name):
            return value
    return default


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """The candidates most like a name, compared whole and by their last part."""
    names = list(dict.fromkeys(candidates))
    tail = name.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        last = candidate.rpartition(".")[2]
        pairs = ((name, candidate), (tail, last))
        return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)

    ranked = sorted(names, key=likeness, reverse=True)
    return [n for n in ranked[:limit] if likeness(n) > 0.5]


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
