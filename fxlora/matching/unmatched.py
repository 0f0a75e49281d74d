"""Errors for rules, and names in them, that match nothing: no rule is ignored silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import ALL_LINEAR, LoraConfig, Rule
from ..errors import NoMatchError, warn
from ..plan import Entry
from ..tables import count, did_you_mean, some
from .choice import Choice, Chosen, matches, matches_name, pattern_holds


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
                names = [entry.site for entry in entries]
                if not any(pattern_holds(pattern, name) for name in names):
                    near = did_you_mean(pattern, names) or f" They are: {some(names)}."
                    raise NoMatchError(
                        f"{key} of rule {number} ('{pattern}') matched none of the "
                        f"{count(len(names), 'site')} that the rule adapts.{near}"
                    )

    def _check_layers(self, number: int, config: LoraConfig) -> None:
        for layer in config.layers_to_transform or ():  # pyright: ignore[reportGeneralTypeIssues]
            one = dataclasses.replace(config, layers_to_transform=(layer,))
            if not any(self.choice.targeted(one, site) for site in self.choice.sites):
                raise NoMatchError(
                    f"layers_to_transform of rule {number}: layer {layer} has none of its targets."
                )

    def no_match(self, what: str, name: str, candidates: Iterable[str]) -> None:
        message = f"{what} matched none of {len(self.choice.sites)} sites."
        sites = f" The sites: {some(site.name for site in self.choice.sites)}."
        why = self._no_site(name) or did_you_mean(name, candidates) or sites
        raise NoMatchError(message + why)

    def _no_site(self, name: str) -> str:
        """Return why the tensors of this name are not a site, with advice, or "" for no reason."""
        module = self.choice.module
        if any(matches_name(name, site) for site in self.choice.sites):
            return ""
        buffers = {n: b for n, b in module.named_buffers(remove_duplicate=False) if _calls(name, n)}
        held = module.named_parameters(remove_duplicate=False)
        parameters = {n: p for n, p in held if _calls(name, n)}
        for full, buffer in buffers.items():
            if buffer.ndim > 1 and matches(name, (full,)):
                return (
                    f" '{full}' is a buffer: only parameters take adapters. Make it one before you "
                    "capture (del the buffer, then set nn.Parameter(tensor, requires_grad=False)); "
                    "it stays frozen."
                )
        if parameters and all(p.ndim < 2 for p in parameters.values()):
            return (
                f" '{name}' has only parameters of less than two dimensions "
                f"({some(parameters)}), which take no adapter. Rule({name!r}, train=True) trains "
                "them in full."
            )
        if buffers and not parameters:
            are = "is a buffer" if len(buffers) == 1 else "are buffers"
            return f" {some(buffers)} {are}: only parameters can be adapted or trained."
        for full, parameter in parameters.items():
            if parameter.ndim > 1 and not parameter.is_floating_point():
                return f" '{full}' holds {parameter.dtype}; adapters are for real numbers."
        if not parameters:
            return ""
        return (
            f" '{name}' is in the model, but no graph reads a weight of two or more dimensions "
            "there"
            + ("." if module.exported else ": capture with example inputs to trace more of it.")
        )


def _calls(name: str, full: str) -> bool:
    """Whether a name in a rule is that of a tensor, or of the module that holds it."""
    return matches(name, (full, full.rpartition(".")[0]))


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


def warn_of_uncovered(sites: Sequence[str]) -> None:
    """Warn of weights that no region covers, which rules by op cannot match."""
    if sites:
        warn(
            f"no rule can adapt {count(len(sites), 'weight')}, which no region covers: "
            f"{some(sites)}. The plan's skipped says why."
        )
