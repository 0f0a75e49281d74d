"""The entries of a plan: one for each site that a rule adapts, or for each part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import LoraConfig, Rule
from ..errors import ConfigError, UnsupportedOpError, warn
from ..lora.dtypes import name_of
from ..lora.inits import STARTS, rank_multiple
from ..lora.parts import rows_of
from ..lora.variants import VARIANTS, variants_of
from ..plan import Entry, scales_outputs
from ..reads.sites import Site
from .budget import within
from .choice import Choice, by_pattern
from .forms import choose_form, notes
from .importance import Gains
from .part_dims import cut_along, cut_note
from .refusals import check_supported
from .tokens import tokens_entry


@dataclass(frozen=True)
class Entries:
    """Makes the entries of one plan.

    Attributes:
        choice: the rules and sites that the entries are made from.
        adapter_name: the adapter's name.
        adapted: the sites that `made` was called for.
    """

    choice: Choice
    adapter_name: str
    adapted: list[Site] = field(default_factory=list[Site])

    def made(self, site: Site, number: int, rule: Rule) -> list[Entry]:
        """Return an entry for a site, or one for each of its parts that the rule enables."""
        assert rule.lora is not None
        check_supported(site, number)
        if rule.tokens is not None:
            return [tokens_entry(site, number, rule, self.adapter_name)]
        self.adapted.append(site)
        if rule.parts is None:
            return [self._entry(site, number, rule.lora)]
        site = cut_along(site, number, rule)
        parts = rows_of(rule.parts, rule.enable, site.shape[site.layout.part_dim], site.name)
        for part, rows in parts.items():
            if not any(r.reaches(site.layout.part_dim, rows) for r in site.readers):
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
        key = self.choice.key(number, site)
        r = int(by_pattern(config.rank_pattern, key, config.rank))
        r = self.choice.experts.rank_at(site, r, config)
        alpha = by_pattern(config.alpha_pattern, key, config.lora_alpha)
        variants = variants_of(config.init_lora_weights, config.row)
        if (rows or any(VARIANTS[name].gain for name in variants)) and not site.layout_known:
            asked = f"part '{part}'" if rows else ", ".join(variants)
            raise UnsupportedOpError(
                f"{asked} of '{site.name}' (rule {number}): {site.readers[0].describe()}, and "
                "it is unknown which of its dimensions are the outputs. Adapt the whole weight "
                "with plain LoRA."
            )
        form = choose_form(site, r, config.lora_dropout, rows, variants)
        entry = Entry(
            site=f"{site.name}.{part}" if part else site.name,
            parameter=site.parameter,
            names=site.names,
            op=site.op,
            shape=site.shape,
            layout=site.layout,
            padding_idx=site.padding_idx,
            tied=site.tied,
            form=form.name,
            reason=notes(site, form, cut_note(site, rows)),
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
            autocast_adapter_dtype=config.dtype_rule,
            weight_dtype=name_of(site.dtype),
        )
        self._check_padding(entry)
        return entry

    def within_budget(
        self, entries: Sequence[Entry], budget: Any, gains: Gains | None
    ) -> list[Entry]:
        """Return the entries with the ranks of the budget, and the forms for these ranks."""
        sites = {site.names: site for site in self.adapted}
        found: list[Entry] = []
        whole = [entry for entry in entries if not entry.tokens]
        rows = [entry for entry in entries if entry.tokens]
        alone = sum(entry.adapter_parameters for entry in rows)
        for entry in within(whole, budget, self.choice.module, gains, alone):
            site, lora = sites[entry.names], self.choice.rules[entry.rule - 1].lora
            site = site.as_in(entry.layout)
            dropout = lora.lora_dropout if lora else 0.0
            form = choose_form(site, entry.r, dropout, entry.rows, entry.variants)
            kept = dropout if form.name == "branch" else 0.0
            reason = notes(site, form, cut_note(site, entry.rows))
            found.append(dataclasses.replace(entry, form=form.name, reason=reason, dropout=kept))
        return [*found, *rows]

    def _check_padding(self, entry: Entry) -> None:
        """Raise if a variant that scales outputs would change the padding_idx row."""
        weight = self.choice.module.get_parameter(entry.parameter)
        if entry.padding_idx is None or weight.is_meta or not scales_outputs(entry):
            return
        if bool(weight[entry.padding_idx].any()):
            raise UnsupportedOpError(
                f"'{entry.site}': {', '.join(entry.variants)} scales every row of the embedding, "
                f"including the row of padding_idx={entry.padding_idx}, which must not change and "
                "is not zero. Use plain LoRA for it in a separate rule, or set the row to zero."
            )


def check_rank(entry: Entry) -> None:
    """Check that the init allows the entry's rank, and that the weight can have it.

    Raises:
        ConfigError: the init needs an even rank, or starts from the weight and the rank is too
            large. A rank that is too large only warns with other inits.
    """
    if entry.r % rank_multiple(entry.init):
        raise ConfigError(
            f"init_lora_weights={entry.init!r} halves the rank: r={entry.r} for '{entry.site}' "
            "must be even."
        )
    largest = entry.layout.max_rank(entry.adapted_shape)
    if entry.r <= largest or entry.tokens:
        return
    said = (
        f"r={entry.r} for '{entry.site}' is more than the rank {largest} that its weight "
        f"{entry.adapted_shape} can have."
    )
    if entry.init in STARTS:
        raise ConfigError(f"{said} {entry.init!r} starts from it: give a smaller r.")
    warn(said)
