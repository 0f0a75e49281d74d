"""Errors for rules, and names in them, that match nothing: no rule is ignored silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import LoraConfig, Rule
from ..errors import NoMatchError, warn
from ..plan import Entry
from ..tables import count, did_you_mean, some
from .choice import Choice, Chosen, matches, matches_name, pattern_holds
from .targets import Target, Targets, is_suffix, listed


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
            if number not in taken and not any(_saves(rule, n, saved) for n in rule.name or ()):
                self._rule_took_nothing(number, rule)
            if rule.lora is not None:
                adapted = {entry.names for entry in entries if entry.rule == number}
                keys = [
                    self.choice.key(number, site)
                    for site, mine in chosen
                    if mine == number and site.names in adapted
                ]
                self._check_patterns(number, rule.lora, keys)
                self._check_layers(number, rule.lora)

    def _check_names(self, number: int, rule: Rule, saved: Sequence[str]) -> None:
        """Raise unless every name matches a site, whatever the rule's other keys say."""
        candidates = [alias for site in self.choice.sites for alias in site.aliases]
        for name in rule.name or ():
            met = any(matches_name(name, site) for site in self.choice.sites)
            if not met and not _saves(rule, name, saved):
                self.no_match(f"rule {number} ('{name}')", name, candidates)
        if rule.lora is None:
            return
        targets = self.choice.targets[number - 1]
        for key, label in (("target_modules", ""), ("exclude_modules", "exclude_modules of ")):
            for target in listed(getattr(rule.lora, key)):
                if not targets.meets(target):
                    self._check_parameter(target)
                    self.no_match(
                        f"{label}rule {number} ('{target.text}')", target.text, candidates
                    )
        for name in rule.lora.target_parameters or ():
            if not any(is_suffix(name, found) for found in targets.by_parameter):
                parameters = [name for site in self.choice.sites for name in site.names]
                self.no_match(f"target_parameters of rule {number} ('{name}')", name, parameters)

    def _check_parameter(self, target: Target) -> None:
        """Raise for a name of a parameter among those of modules, which PEFT would ignore."""
        named = [name for site in self.choice.sites for name in site.names if target.matches(name)]
        if named:
            raise NoMatchError(
                f"'{target.text}' means no module that takes an adapter, but the parameter "
                f"{some(named)}. Put it into target_parameters, or leave it out."
            )

    def _rule_took_nothing(self, number: int, rule: Rule) -> None:
        earlier = [
            str(n)
            for n in range(1, number)
            if any(
                self.choice.holds(number, site) and self.choice.holds(n, site)
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

    def _check_patterns(self, number: int, config: LoraConfig, keys: Sequence[str]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, field):
                if not any(pattern_holds(pattern, key) for key in keys):
                    near = did_you_mean(pattern, keys) or f" They are: {some(keys)}."
                    raise NoMatchError(
                        f"{field} of rule {number} ('{pattern}') matched none of the "
                        f"{count(len(keys), 'site')} that the rule adapts.{near}"
                    )

    def _check_layers(self, number: int, config: LoraConfig) -> None:
        """Raise for a layer that has none of the targets, apart from those named whole."""
        if config.layers_to_transform is not None and config.target_modules == ():
            raise NoMatchError(
                f"layers_to_transform of rule {number} has no effect on target_parameters, as in "
                "PEFT: write the layers in their names ('layers.0.q_proj.weight')."
            )
        whole = {target.text for target in listed(config.target_modules)}
        for layer in config.layers_to_transform or ():  # pyright: ignore[reportGeneralTypeIssues]
            one = dataclasses.replace(config, layers_to_transform=(layer,))
            targets = Targets(one, self.choice.module, self.choice.sites)
            if whole.issuperset(targets.by_module.values()):
                raise NoMatchError(
                    f"layers_to_transform of rule {number}: layer {layer} has none of its targets. "
                    "A layer's number is the first in a name."
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
