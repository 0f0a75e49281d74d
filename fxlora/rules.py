"""match: which sites the rules take, and in which form. Pure: nothing is changed."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from .adapted import scales_outputs
from .budget import within
from .config import ALL_LINEAR, LoraConfig, Names, Rule, Rules, as_rules
from .errors import ConfigError, FxLoraWarning, NoMatchError, UnsupportedOpError
from .extents import reads_any
from .forms import check_supported, choose_form
from .inits import STARTS
from .module import CapturedModule
from .ops import CASTS, MATRIX_PRODUCTS, SLICES, VIEWS
from .parts import rows_of
from .patterns import (
    by_pattern,
    holds_shape,
    holds_where,
    in_layers,
    is_called,
    is_suffix,
    matches_name,
    nearest,
    pattern_holds,
)
from .plan import IN_FULL, Entry, Plan
from .sites import Site, find_sites, merged
from .tables import some
from .variants import variants_of


def match(
    module: CapturedModule,
    rules: Rules | str | Path,
    *,
    adapter_name: str = "default",
    budget: int | str | None = None,
) -> Plan:
    """Work out what `inject` would do.

    Args:
        module: a captured module.
        rules: a LoraConfig, a Rule, a list of them (the first that matches a site wins), or
            the path of a rules file.
        adapter_name: the name that the adapter's parameters carry.
        budget: how many parameters A and B may have in all, a number or a share of the model's
            ("1%"). The ranks keep the proportions that the rules give them, and each site its
            factor s.

    Raises:
        NoMatchError: a rule, or a name in one, matches nothing; says the nearest names.
        UnsupportedOpError: a targeted weight is read in a way that no form can adapt.
        ConfigError: the rules contradict themselves or ask for what a site cannot have.
    """
    if not isinstance(module, CapturedModule):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"match takes a captured module, not {type(module).__name__}: capture first."
        )
    if module.plan is not None:
        raise ConfigError("the module has adapters already: fold or remove them first.")
    if not adapter_name or "." in adapter_name:
        raise ConfigError(f"adapter_name must be a name without dots, not {adapter_name!r}.")
    return _Matching(module, as_rules(rules), adapter_name, budget).plan()


@dataclass
class _Matching:
    """One run of match: the sites, the rules, and what has matched so far."""

    module: CapturedModule
    rules: tuple[Rule, ...]
    adapter_name: str
    budget: int | str | None
    sites: list[Site] = field(init=False)

    def __post_init__(self) -> None:
        self.sites = find_sites(self.module)

    def plan(self) -> Plan:
        chosen = self._tied([(site, self._first_rule(site)) for site in self.sites])
        saved = self._modules_to_save(chosen)
        trained = self._trained(saved)
        entries: list[Entry] = []
        skipped: list[tuple[str, str]] = []
        for site, number in chosen:
            rule = self.rules[number - 1] if number else None
            if set(site.names) & trained:
                skipped.append((site.name, IN_FULL))
            elif rule is None and site.outside is not None:
                skipped.append((site.name, site.why_outside))
            elif rule is None:
                skipped.append((site.name, f"no rule matches its {site.op}"))
            elif rule.lora is None:
                skipped.append((site.name, f"rule {number} leaves it alone"))
            else:
                entries += self._entries(site, number, rule)
        self._check_everything_matched(chosen, entries)
        if self.budget is not None:
            entries = within(entries, self.budget, self.module)
        _warn_of_large(entries)
        trained |= self._biases(entries)
        self._warn_of_uncovered(skipped)
        if not entries and not trained:
            raise NoMatchError(f"the rules adapt none of {len(self.sites)} sites.")
        sizes = {name: p.numel() for name, p in self.module.named_parameters()}
        return Plan(
            entries=tuple(entries),
            trained=tuple(name for name in sizes if name in trained),
            skipped=tuple(skipped),
            modules_to_save=tuple(saved),
            model_parameters=sum(sizes.values()),
            trained_parameters=sum(size for name, size in sizes.items() if name in trained),
            rules=self.rules,
        )

    def _first_rule(self, site: Site) -> int:
        """Number (from 1) of the first rule that takes the site, or 0."""
        for number, rule in enumerate(self.rules, 1):
            if self._holds(rule, site):
                return number
        return 0

    def _holds(self, rule: Rule, site: Site) -> bool:
        return (
            (rule.name is None or any(matches_name(p, site) for p in rule.name))
            and (rule.op is None or any(fnmatchcase(site.op, kind) for kind in rule.op))
            and holds_shape(rule, site)
            and (rule.lora is None or self._targeted(rule.lora, site))
            and (rule.where is None or holds_where(rule.where, site))
        )

    def _targeted(self, config: LoraConfig, site: Site) -> bool:
        if config.targets_anything:
            by_module = self._in_targets(config.target_modules, site)
            by_parameter = any(
                is_suffix(t, n) for t in config.target_parameters or () for n in site.names
            )
            if not (by_module or by_parameter):
                return False
        if config.exclude_modules is not None and self._in_targets(config.exclude_modules, site):
            return False
        return config.layers_to_transform is None or in_layers(config, site)

    def _in_targets(self, targets: Names, site: Site) -> bool:
        """PEFT's matching: one string is an expression for the whole name, a list has names."""
        if isinstance(targets, str) and targets != ALL_LINEAR:
            return any(re.fullmatch(targets, alias) for alias in site.aliases)
        names = (targets,) if isinstance(targets, str) else targets or ()
        return any(
            self._in_all_linear(site) if name == ALL_LINEAR else is_called(name, site)
            for name in names
        )

    def _in_all_linear(self, site: Site) -> bool:
        """Matrix products, less the output layer, embeddings, and factors of computed weights."""
        spared = self.module.outputs & set(site.names)
        kinds = {reader.kind for reader in site.readers}
        layer, behind, _ = site.parameter.partition(".parametrizations.")
        whole = {"", *CASTS, *VIEWS, *SLICES}
        read = any(r.kind == site.op and r.through in whole for r in site.readers)
        own = read or (behind and layer in site.aliases)
        return bool(site.op in MATRIX_PRODUCTS and own and not spared) and "embedding" not in kinds

    # ---- trained in full ------------------------------------------------------------------------

    def _modules_to_save(self, chosen: Iterable[tuple[Site, int]]) -> list[str]:
        """Paths of the modules that some rule trains in full."""
        holders = {
            path: module
            for path, module in self.module.named_modules()
            if path and next(module.parameters(), None) is not None
        }
        found: list[str] = []
        for number, rule in enumerate(self.rules, 1):
            for name in (rule.lora.modules_to_save if rule.lora else None) or ():
                paths = [path for path in holders if is_suffix(name, path)]
                if not paths:
                    self._no_match(f"modules_to_save of rule {number} ('{name}')", name, holders)
                found += paths
        for site, number in chosen:
            if number and self.rules[number - 1].train:
                found.append(site.parameter.rpartition(".")[0] or site.parameter)
        return list(dict.fromkeys(found))

    def _trained(self, modules: Iterable[str]) -> set[str]:
        """Names of the parameters below these modules, ties under every name they have."""
        tied = {name: names for names in self.module.aliases().values() for name in names}
        trained: set[str] = set()
        for path in modules:
            below = [n for n in tied if n == path or n.startswith(f"{path}.")]
            for name in below:
                if outside := [n for n in tied[name] if not n.startswith(f"{path}.") and n != path]:
                    warnings.warn(
                        f"modules_to_save '{path}': '{name}' is the same tensor as "
                        f"{', '.join(outside)}, which trains with it.",
                        FxLoraWarning,
                        stacklevel=5,
                    )
                trained |= set(tied[name])
        return trained

    def _biases(self, entries: Iterable[Entry]) -> set[str]:
        """The biases that `bias=` asks for."""
        every = {n for n, _ in self.module.named_parameters() if "bias" in n.rpartition(".")[2]}
        trained: set[str] = set()
        for entry in entries:
            lora = self.rules[entry.rule - 1].lora
            if lora and lora.bias == "all":
                trained |= every
            elif lora and lora.bias == "lora_only":
                owner = entry.parameter.rpartition(".")[0]
                trained |= {n for n in every if n.rpartition(".")[0] == owner}
        return trained

    # ---- entries --------------------------------------------------------------------------------

    def _entries(self, site: Site, number: int, rule: Rule) -> list[Entry]:
        """An entry for a site, or one for each part of it that the rule enables."""
        assert rule.lora is not None
        check_supported(site, number)
        if rule.parts is None:
            return [self._entry(site, number, rule.lora)]
        parts = rows_of(rule.parts, rule.enable, site.shape[site.layout.part_dim], site.name)
        for part, rows in parts.items():
            if not reads_any(site, rows):
                raise UnsupportedOpError(
                    f"part '{part}' of '{site.name}' (rule {number}): nothing reads the outputs "
                    f"{rows[0]} to {rows[1]} of its weight, so its adapter would do nothing."
                )
        return [self._entry(site, number, rule.lora, part, rows) for part, rows in parts.items()]

    def _entry(
        self,
        site: Site,
        number: int,
        config: LoraConfig,
        part: str | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Entry:
        r = int(by_pattern(config.rank_pattern, site, config.r))
        alpha = by_pattern(config.alpha_pattern, site, config.lora_alpha)
        variants = variants_of(config.init_lora_weights, config.variant)
        form = choose_form(site, r, config.lora_dropout, rows, variants)
        notes = [form.reason]
        if site.tied:
            notes.append(f"split from its tie with {', '.join(site.tied)}")
        elif len(site.names) > 1:
            notes.append("tied")
        entry = Entry(
            site=f"{site.name}.{part}" if part else site.name,
            parameter=site.parameter,
            names=site.names,
            op=site.op,
            shape=site.shape,
            layout=site.layout,
            padding_idx=site.padding_idx,
            form=form.name,
            reason="; ".join(filter(None, notes)),
            r=r,
            alpha=alpha,
            scaling=config.scaling(r, alpha),
            dropout=config.lora_dropout if form.name == "branch" else 0.0,
            init=config.init_lora_weights,
            variants=variants,
            part=part,
            rows=rows,
            adapter=self.adapter_name,
            rule=number,
        )
        self._check_rank(entry)
        self._check_padding(entry)
        return entry

    def _check_padding(self, entry: Entry) -> None:
        """The row of padding_idx stays as it is: a variant that scales outputs would scale it."""
        weight = self.module.get_parameter(entry.parameter)
        if entry.padding_idx is None or weight.is_meta or not scales_outputs(entry):
            return
        if bool(weight[entry.padding_idx].any()):
            raise UnsupportedOpError(
                f"'{entry.site}': {', '.join(entry.variants)} scales every row of the embedding, "
                f"also that of padding_idx={entry.padding_idx}, which must stay as it is and is "
                "not zero. Take plain LoRA for it in a rule of its own, or zero the row."
            )

    def _check_rank(self, entry: Entry) -> None:
        largest = min(entry.layout.sizes(entry.covered)[1:])
        if entry.r <= largest:
            return
        said = (
            f"r={entry.r} for '{entry.site}' is more than the rank {largest} that its weight "
            f"{entry.covered} can have."
        )
        if entry.init in STARTS:
            raise ConfigError(f"{said} {entry.init!r} starts from it: give a smaller r.")
        warnings.warn(said, FxLoraWarning, stacklevel=6)

    # ---- tied weights ---------------------------------------------------------------------------

    def _tied(self, chosen: Sequence[tuple[Site, int]]) -> list[tuple[Site, int]]:
        """The sites of one tied weight that one rule takes as one site.

        A rule with `tied="share"` takes all of them.
        """
        found: list[tuple[Site, int]] = []
        done: set[str] = set()
        for site, number in chosen:
            if site.parameter in done:
                continue
            others = [(s, n) for s, n in chosen if s.parameter in site.tied]
            sharing = next((n for _, n in [(site, number), *others] if self._shares(n)), None)
            if sharing is not None:
                self._check_shared(site, sharing, others)
                number, together = sharing, [s for s, _ in others]
            else:
                together = [s for s, n in others if n == number and number]
            found.append((merged([site, *together]), number))
            done |= {s.parameter for s in (site, *together)}
        return found

    def _shares(self, number: int) -> bool:
        lora = self.rules[number - 1].lora if number else None
        return lora is not None and lora.tied == "share"

    def _check_shared(self, site: Site, sharing: int, others: Sequence[tuple[Site, int]]) -> None:
        for other, number in others:
            if number not in (0, sharing):
                raise ConfigError(
                    f"'{site.name}' and '{other.name}' are one tied weight. Rule {sharing} says "
                    f'tied="share", and rule {number} takes one of them: let one rule take both.'
                )

    # ---- nothing is missed silently -------------------------------------------------------------

    def _check_everything_matched(
        self, chosen: Sequence[tuple[Site, int]], entries: Sequence[Entry]
    ) -> None:
        taken = {number for _, number in chosen}
        for number, rule in enumerate(self.rules, 1):
            self._check_names(number, rule)
            mine = [entry for entry in entries if entry.rule == number]
            if number not in taken:
                self._rule_took_nothing(number, rule)
            if rule.lora is not None:
                self._check_patterns(number, rule.lora, mine)
                self._check_layers(number, rule.lora)

    def _warn_of_uncovered(self, skipped: Sequence[tuple[str, str]]) -> None:
        """Rules by op cannot take what no region covers: say so."""
        reasons = {s.name: s.why_outside for s in self.sites if s.outside is not None}
        missed = [name for name, why in skipped if reasons.get(name) == why]
        if missed:
            warnings.warn(
                f"no rule can adapt {len(missed)} weights, which no region covers: "
                f"{some(missed)}. The plan's skipped says why.",
                FxLoraWarning,
                stacklevel=4,
            )

    def _check_names(self, number: int, rule: Rule) -> None:
        """Every single name must match a site, whatever the rule's other keys say."""
        candidates = [alias for site in self.sites for alias in site.aliases]
        for name in rule.name or ():
            if not any(matches_name(name, site) for site in self.sites):
                self._no_match(f"rule {number} ('{name}')", name, candidates)
        for key in ("target_modules", "exclude_modules", "target_parameters"):
            targets = getattr(rule.lora, key) if rule.lora else None
            for name in (targets,) if isinstance(targets, str) else targets or ():
                one = name if isinstance(targets, str) or name == ALL_LINEAR else (name,)
                if not any(self._in_targets(one, site) for site in self.sites):
                    label = (
                        f"rule {number} ('{name}')"
                        if key != "exclude_modules"
                        else (f"exclude_modules of rule {number} ('{name}')")
                    )
                    self._no_match(label, name, candidates)

    def _rule_took_nothing(self, number: int, rule: Rule) -> None:
        earlier = [
            str(n)
            for n, other in enumerate(self.rules[: number - 1], 1)
            if any(self._holds(rule, site) and self._holds(other, site) for site in self.sites)
        ]
        why = ""
        if earlier:
            others = ", ".join(earlier)
            why = f" Rule {others} took what it matches: put rule {number} before rule {others}."
        kinds = ", ".join(sorted({site.op for site in self.sites}))
        raise NoMatchError(
            f"rule {number} ({rule.describe()}) matched none of {len(self.sites)} sites.{why} "
            f"Kinds of op here: {kinds or 'none'}."
        )

    def _check_patterns(self, number: int, config: LoraConfig, entries: Sequence[Entry]) -> None:
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, key):
                if not any(pattern_holds(pattern, entry.site) for entry in entries):
                    names = [entry.site for entry in entries]
                    self._no_match(f"{key} of rule {number} ('{pattern}')", pattern, names)

    def _check_layers(self, number: int, config: LoraConfig) -> None:
        for layer in config.layers_to_transform or ():  # pyright: ignore[reportGeneralTypeIssues]
            one = dataclasses.replace(config, layers_to_transform=(layer,))
            if not any(self._targeted(one, site) for site in self.sites):
                raise NoMatchError(
                    f"layers_to_transform of rule {number}: layer {layer} has none of its targets."
                )

    def _no_match(self, what: str, name: str, candidates: Iterable[str]) -> None:
        message = f"{what} matched none of {len(self.sites)} sites."
        if near := nearest(name, candidates):
            message += f" Nearest: {', '.join(near)}."
        held = [n for n, _ in self.module.named_parameters(remove_duplicate=False)]
        if any(is_suffix(name, n) or is_suffix(name, n.rpartition(".")[0]) for n in held):
            message += (
                f" '{name}' is in the model, but no graph reads a weight of two or more "
                "dimensions there"
            )
            message += "." if self.module.exported else ": capture with example inputs sees more."
        raise NoMatchError(message + self._no_site(name))

    def _no_site(self, name: str) -> str:
        """Why a tensor of this name is no site although a weight might be meant."""
        for full, buffer in self.module.named_buffers(remove_duplicate=False):
            if is_suffix(name, full) and buffer.ndim >= 2:
                return (
                    f" '{full}' is a buffer: only parameters take adapters. Make it one before you "
                    "capture (del the buffer, then set nn.Parameter(tensor, requires_grad=False)), "
                    "and it is frozen all the same."
                )
        for full, parameter in self.module.named_parameters(remove_duplicate=False):
            owner = full.rpartition(".")[0]
            called = is_suffix(name, full) or is_suffix(name, owner)
            if called and parameter.ndim >= 2 and not parameter.is_floating_point():
                return f" '{full}' holds {parameter.dtype}; adapters are for real numbers."
        return ""


def _warn_of_large(entries: Sequence[Entry]) -> None:
    """An adapter that has more parameters than its weight saves nothing."""
    large = [e.site for e in entries if e.adapter_parameters > e.weight_parameters]
    if large:
        have = "adapter has" if len(large) == 1 else "adapters have"
        its = "its weight" if len(large) == 1 else "their weights"
        warnings.warn(
            f"{len(large)} {have} more parameters than {its}: {some(large)}. Give a smaller r, or "
            "train in full (Rule(name, train=True)).",
            FxLoraWarning,
            stacklevel=4,
        )
