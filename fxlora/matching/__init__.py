"""match: decide which sites the rules adapt, and in which form, without changing anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..config import Rule, Rules, as_rules
from ..errors import ConfigError, NoMatchError
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..names import ADAPTER_RULE, is_adapter, shown
from ..plan import IN_FULL, Entry, Plan
from ..reads.sites import find_sites
from .architectures import with_architecture
from .choice import Choice
from .entries import Entries, check_rank
from .full import (
    biases,
    check_own_memory,
    check_trained,
    check_trains,
    dtype_rules,
    modules_to_save,
    trained,
)
from .importance import Gains, Loss, check_rank_by, gains_of
from .left_alone import left_alone
from .stopped import check_gradients
from .tokens import check_tokens, with_tokens
from .unmatched import Unmatched, warn_of_large, warn_of_uncovered

__all__ = ["match"]


def match(
    module: CapturedModule,
    rules: Rules | str | Path,
    *,
    adapter_name: str = "default",
    budget: int | str | None = None,
    rank_by: str | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Plan:
    """Return the plan that `inject` can apply to a module; nothing is changed.

    Args:
        module: a captured module; of one with adapters, its base is matched.
        rules: a LoraConfig, a Rule, a list of these (the first that matches a site wins), or
            the path of a rules file. A LoraConfig without `target_modules` takes those that PEFT
            has for the model's architecture.
        adapter_name: the adapter's name, which is part of its parameters' names.
        budget: the most parameters that all A and B together may have, as a number or as a share
            of the model's parameters ("1%"). Rows that train alone count, too. The ranks keep the
            proportions that the rules give them, unless `rank_by` says otherwise, and each site
            keeps its scaling factor s.
        rank_by: share out the budget by what each further rank of a site is worth per parameter:
            by the singular values of its weight ("spectrum"), the variance of its inputs ("eva"),
            or the gradients of its weight ("fisher"); see `fxlora.matching.importance`.
        data: batches for "eva" and "fisher" to call the module with, in eval mode: each a tuple of
            arguments, a mapping of keyword arguments, or one argument.
        loss: function of the outputs for "fisher"; by default the loss that they have themselves.

    Returns:
        The plan: an entry per adapted weight, printable and countable before anything is changed.

    Raises:
        NotCapturedError: the module is not a captured one.
        NoMatchError: a rule, or a name in one, matches nothing; the message lists the nearest
            names.
        UnsupportedOpError: a targeted weight is read in a way that no form can adapt, or no
            gradient reaches a weight that is to train in full.
        ConfigError: the rules contradict themselves or ask for something that a site does not
            support.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
        >>> gm = fxlora.capture(model, torch.randn(3, 6))
        >>> plan = fxlora.match(gm, fxlora.Rule("0", lora=fxlora.LoraConfig(r=2)))
        >>> [(entry.site, entry.form, entry.shape) for entry in plan]
        [('0', 'branch', (8, 6))]
    """
    check_rank_by(rank_by, budget, data, loss)
    gains: Gains | None = None
    if rank_by is not None:
        plan = matched(module, rules, adapter_name, budget)
        entries = [entry for entry in plan if not entry.tokens]
        gains = gains_of(module, entries, rank_by, data, loss)
    plan = matched(module, rules, adapter_name, budget, gains)
    check_gradients(module, plan)
    return plan


@no_ambient_modes()
def matched(
    module: CapturedModule,
    rules: Rules | str | Path,
    adapter_name: str = "default",
    budget: int | str | None = None,
    gains: Gains | None = None,
) -> Plan:
    """Return the plan of rules, within a budget that is shared out by gains, if there are any.

    It may be of an adapter that is only to run, so that nothing is said about its training.
    """
    check_captured(module, "match")
    if module.plan is not None:
        raise ConfigError("the module has adapters already: fold or remove them first.")
    if not is_adapter(adapter_name):
        raise ConfigError(f"adapter_name must be {ADAPTER_RULE}, not {shown(adapter_name)}.")
    sites = tuple(find_sites(module))
    given = with_tokens(with_architecture(as_rules(rules), module, sites), module, sites)
    choice = Choice(module, given, sites)
    return _plan(choice, Entries(choice, adapter_name), Unmatched(choice), budget, gains)


def _plan(
    choice: Choice,
    planned: Entries,
    unmatched: Unmatched,
    budget: int | str | None,
    gains: Gains | None,
) -> Plan:
    """Make the plan of a choice: the entries of its sites, and the parameters trained in full.

    Args:
        choice: the module, its sites and the rules.
        planned: makes the entries of a site.
        unmatched: raises for rules and names that match nothing.
        budget: the most parameters that all A and B together may have.
        gains: what each rank of each entry is worth, or None.
    """
    chosen = choice.made()
    check_tokens(choice, chosen)
    saved = modules_to_save(choice, chosen, unmatched)
    in_full = trained(choice.module, saved)
    entries: list[Entry] = []
    skipped: list[tuple[str, str]] = []
    uncovered: list[str] = []
    for site, number in chosen:
        rule = choice.rule(number)
        if set(site.names) & in_full:
            check_trained(site, number, rule, saved)
            check_trains(site)
            skipped.append((site.name, IN_FULL))
        elif rule is None and site.outside is not None:
            skipped.append((site.name, site.why_outside))
            uncovered.append(site.name)
        elif rule is None:
            skipped.append((site.name, f"no rule matches its {site.op}"))
        elif rule.lora is None:
            skipped.append((site.name, f"rule {number} leaves it alone"))
        else:
            entries += planned.made(site, number, rule)
    unmatched.check(chosen, entries, list(saved))
    plain = [
        choice.experts.check_met(rule.lora, number, [s for s, mine in chosen if mine == number])
        for number, rule in enumerate(choice.rules, 1)
        if rule.lora is not None
    ]
    if budget is not None:
        entries = planned.within_budget(entries, budget, gains)
    for entry in entries:
        check_rank(entry)
    warn_of_large(entries)
    warn_of_uncovered(uncovered)
    biased = biases(choice, entries)
    in_full |= biased.keys()
    check_own_memory(choice.module, sorted(in_full))
    if not entries and not in_full:
        raise NoMatchError(f"the rules adapt none of {len(choice.sites)} sites.")
    sizes = {name: p.numel() for name, p in choice.module.named_parameters()}
    names = tuple(name for name in sizes if name in in_full)
    return Plan(
        entries=tuple(entries),
        trained=names,
        skipped=tuple(skipped),
        modules_to_save=tuple(saved),
        model_parameters=sum(sizes.values()),
        trained_parameters=sum(size for name, size in sizes.items() if name in in_full),
        rules=choice.rules,
        adapter=planned.adapter_name,
        trained_dtypes=dtype_rules(choice, names, saved, biased),
        descriptions=_descriptions(choice.rules),
        remarks=(*filter(None, plain), *left_alone(chosen, entries, in_full)),
    )


def _descriptions(rules: Sequence[Rule]) -> dict[str, Any]:
    """Return what the rules say of the adapter and its base; the first rule that does counts.

    Raises:
        ConfigError: some rules freeze their adapters and others do not.
    """
    configs = [rule.lora for rule in rules if rule.lora is not None and not rule.train]
    if len({config.inference_mode for config in configs}) > 1:
        raise ConfigError(
            "inference_mode must be the same in all rules: it is of the whole adapter."
        )
    found: dict[str, Any] = {}
    for config in configs:
        found = {**config.descriptions, **found}
    return found
