"""Errors for rules, and names in them, that match nothing: no rule is ignored silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import ALL_LINEAR, LoraConfig, Rule
from ..errors import NoMatchError, warn
from ..plan import Entry
from ..tables import some
from .choice import Choice, Chosen, is_suffix, matches, matches_name, nearest, pattern_holds


@dataclass(frozen=True)
class Unmatched:
    """Finds the rules of a choice, and the names in them, that match nothing."""

    choice: Choice

    def check(self, chosen: Chosen, entries: Sequence[Entry], saved: Sequence[str]) -> None:
        """Raise for the first rule, or the first name in a rule, that matches nothing.

        Args:
            chosen: every site with the number of its rule.
            entries: the entries made from these.
            saved: paths of the modules and parameters that train in full.

        Raises:
            NoMatchError: names the rule, and the nearest names.
        """
        taken = {number for _, number in chosen}
        for number, rule in enumerate(self.choice.rules, 1):
            self._check_names(number, rule, saved)
            mine = [entry for entry in entries if entry.rule == number]
            if number not in taken and not any(_saves(rule, n, saved) for n in rule.name or ()):
                self._rule_took_nothing(number, rule)
            if rule.lora is not None:
                self._check_patterns(number, rule.lora, mine)
                self._check_layers(number, rule.lora)

    def warn_of_uncovered(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Warn of weights that no region covers, which rules by op cannot match."""
        reasons = {s.name: s.why_outside for s in self.choice.sites if s.outside is not None}
        missed = [name for name, why in skipped if reasons.get(name) == why]
        if missed:
            warn(
                f"no rule can adapt {len(missed)} weights, which no region covers: "
                f"{some(missed)}. The plan's skipped says why."
            )

    def _check_names(self, number: int, rule: Rule, saved: Sequence[str]) -> None:
        """Raise unless every name matches a site, whatever the rule's other keys say."""
        candidates = [alias for site in self.choice.sites for alias in site.aliases]
        for name in rule.name or ():
            met = any(matches_name(name, site) for site in self.choice.sites)
            if not met and not _saves(rule, name, saved):
                self.no_match(f"rule {number} ('{name}')", name, candidates)
        for key in ("target_modules", "exclude_modules", "target_parameters"):
            targets = getattr(rule.lora, key) if rule.lora else None
            for name in (targets,) if isinstance(targets, str) else targets or ():
                one = name if isinstance(targets, str) or name == ALL_LINEAR else (name,)
                if not any(self.choice.in_targets(one, site) for site in self.choice.sites):
                    label = (
                        f"rule {number} ('{name}')"
                        if key != "exclude_modules"
                        else (f"exclude_modules of rule {number} ('{name}')")
                    )
                    self.no_match(label, name, candidates)

    def _rule_took_nothing(self, number: int, rule: Rule) -> None:
        earlier = [
            str(n)
            for n, other in enumerate(self.choice.rules[: number - 1], 1)
            if any(
                self.choice.holds(rule, site) and self.choice.holds(other, site)
                for site in self.choice.sites
            )
        ]
        why = ""
        if earlier:
            others = ", ".join(earlier)
            why = (
                f" Rule {others} already took the sites that rule {number} matches: put rule "
                f"{number} before rule {others}."
            )
        kinds = ", ".join(sorted({site.op for site in self.choice.sites}))
        raise NoMatchError(
            f"rule {number} ({rule.describe()}) matched none of {len(self.choice.sites)} "
            f"sites.{why} Kinds of op here: {kinds or 'none'}."
        )

    def _check_patterns(self, number: int, config: LoraConfig, entries: Sequence[Entry]) -> None:
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, key):
                if not any(pattern_holds(pattern, entry.site) for entry in entries):
                    names = [entry.site for entry in entries]
                    self.no_match(f"{key} of rule {number} ('{pattern}')", pattern, names)

    def _check_layers(self, number: int, config: LoraConfig) -> None:
        for layer in config.layers_to_transform or ():  # pyright: ignore[reportGeneralTypeIssues]
            one = dataclasses.replace(config, layers_to_transform=(layer,))
            if not any(self.choice.targeted(one, site) for site in self.choice.sites):
                raise NoMatchError(
                    f"layers_to_transform of rule {number}: layer {layer} has none of its targets."
                )

    def no_match(self, what: str, name: str, candidates: Iterable[str]) -> None:
        message = f"{what} matched none of {len(self.choice.sites)} sites."
        if near := nearest(name, candidates):
            message += f" Nearest: {', '.join(near)}."
        else:
            message += f" The sites: {some(site.name for site in self.choice.sites)}."
        held = [n for n, _ in self.choice.module.named_parameters(remove_duplicate=False)]
        if any(is_suffix(name, n) or is_suffix(name, n.rpartition(".")[0]) for n in held):
            message += (
                f" '{name}' is in the model, but no graph reads a weight of two or more "
                "dimensions there"
            )
            message += (
                "."
                if self.choice.module.exported
                else ": capture with example inputs to trace more of the model."
            )
        raise NoMatchError(message + self._no_site(name))

    def _no_site(self, name: str) -> str:
        """Return why a tensor of this name, though it looks like a weight, is no site, or ""."""
        for full, buffer in self.choice.module.named_buffers(remove_duplicate=False):
            if is_suffix(name, full) and buffer.ndim >= 2:
                return (
                    f" '{full}' is a buffer: only parameters take adapters. Make it one before you "
                    "capture (del the buffer, then set nn.Parameter(tensor, requires_grad=False)); "
                    "it stays frozen."
                )
        for full, parameter in self.choice.module.named_parameters(remove_duplicate=False):
            owner = full.rpartition(".")[0]
            called = is_suffix(name, full) or is_suffix(name, owner)
            if called and parameter.ndim >= 2 and not parameter.is_floating_point():
                return f" '{full}' holds {parameter.dtype}; adapters are for real numbers."
        return ""


def _saves(rule: Rule, name: str, saved: Sequence[str]) -> bool:
    """Whether the rule trains in full, and a name in it matches a path that does."""
    return rule.train and any(matches(name, (path,)) for path in saved)


def warn_of_large(entries: Sequence[Entry]) -> None:
    """Warn of adapters that have more parameters than their weights, and so save nothing."""
    large = [e.site for e in entries if e.adapter_parameters > e.weight_parameters]
    if large:
        have = "adapter has" if len(large) == 1 else "adapters have"
        its = "its weight" if len(large) == 1 else "their weights"
        warn(
            f"{len(large)} {have} more parameters than {its}: {some(large)}. Give a smaller r, or "
            "train in full (Rule(name, train=True))."
        )
