"""Rows of a weight that train alone: those of new tokens, in an embedding and a head tied to it.

They are an adapter like any other, W0 + BA with s = 1: for an embedding, whose rows are inputs, A
(tokens, rows) has a 1 for each token and is frozen, and B (features, tokens) trains from zero.
Where rows are outputs, as of a linear layer, it is the other way round.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from ..config import LoraConfig, Rule
from ..errors import ConfigError, NoMatchError, UnsupportedOpError
from ..lora.dtypes import name_of
from ..module import CapturedModule
from ..plan import Entry
from ..reads.sites import Site
from ..tables import did_you_mean, some
from .choice import Choice, Chosen
from .forms import choose_form, notes
from .targets import is_suffix

_EMBEDDING = "embed_tokens"  # where PEFT looks for rows in a model that does not say where


def tokens_entry(site: Site, number: int, rule: Rule, adapter_name: str) -> Entry:
    """Return the entry of a site whose rows train alone.

    Raises:
        ConfigError: the weight does not have these rows, or one of them never trains.
        UnsupportedOpError: the weight is no matrix.
    """
    tokens = tuple(rule.tokens or ())
    if len(site.shape) != 2:
        raise UnsupportedOpError(
            f"tokens= of rule {number}: '{site.name}' is {site.shape}, and rows of a matrix train "
            "alone. Adapt the whole weight, or parts of its outputs (parts=)."
        )
    if beyond := [token for token in tokens if token >= site.shape[0]]:
        raise ConfigError(
            f"tokens of rule {number}: '{site.name}' has {site.shape[0]} rows, so no row "
            f"{some(map(str, beyond))}. Resize the embedding before you capture the model."
        )
    if site.padding_idx in tokens:
        raise ConfigError(
            f"tokens of rule {number}: row {site.padding_idx} of '{site.name}' is its padding_idx, "
            "which no gradient reaches. Leave it out."
        )
    lora = rule.lora or LoraConfig()
    form = choose_form(site, len(tokens), 0.0)
    trained = f"rows {_listed(tokens)} train alone"
    return Entry(
        site=site.name,
        parameter=site.parameter,
        names=site.names,
        op=site.op,
        shape=site.shape,
        layout=site.layout,
        padding_idx=site.padding_idx,
        tied=site.tied,
        form=form.name,
        reason="; ".join(filter(None, (trained, notes(site, form)))),
        r=len(tokens),
        alpha=float(len(tokens)),
        scaling=1.0,
        dropout=0.0,
        init=True,
        adapter=adapter_name,
        rule=number,
        autocast_adapter_dtype=lora.dtype_rule,
        weight_dtype=name_of(site.dtype),
        tokens=tokens,
    )


def _listed(tokens: Sequence[int]) -> str:
    whole = tokens == tuple(range(tokens[0], tokens[-1] + 1))
    if whole and len(tokens) > 2:
        return f"{tokens[0]} to {tokens[-1]}"
    return some(map(str, tokens))


def check_tokens(choice: Choice, chosen: Chosen) -> None:
    """Raise if another rule takes a weight of which a rule trains rows.

    Raises:
        ConfigError: names the weight and both rules.
    """
    for number, rule in enumerate(choice.rules, 1):
        if rule.tokens is None:
            continue
        for site, taken in chosen:
            other = choice.rule(taken)
            if taken != number and other is not None and choice.holds(number, site):
                raise ConfigError(
                    f"rule {taken} takes the whole of '{site.name}', and rule {number} trains rows "
                    "of it alone: leave it out of one of the two (trainable_token_indices, tokens=)"
                )


# ---- PEFT's trainable_token_indices -------------------------------------------------------------


def with_tokens(
    rules: Sequence[Rule], module: CapturedModule, sites: Sequence[Site]
) -> tuple[Rule, ...]:
    """Return the rules, with a rule of its own for the `trainable_token_indices` of each weight.

    Raises:
        NoMatchError: there is no such module, or no input embedding.
        ConfigError: PEFT takes a name for more modules.
    """
    found: list[Rule] = []
    after: list[Rule] = []
    for rule in rules:
        lora, given = rule.lora, rule.lora and rule.lora.trainable_token_indices
        if lora is None or given is None:
            found.append(rule)
            continue
        found.append(
            dataclasses.replace(rule, lora=dataclasses.replace(lora, trainable_token_indices=None))
        )
        after += _rules(lora, _by_path(given, module, sites), module, sites)
    return (*found, *after)


def _by_path(
    given: Sequence[int] | Mapping[str, Sequence[int]],
    module: CapturedModule,
    sites: Sequence[Site],
) -> dict[str, tuple[int, ...]]:
    """Return the rows of each module, by its path."""
    if not isinstance(given, Mapping):
        given = {module.known.embedding or _EMBEDDING: given}
    paths = list(dict.fromkeys(path for site in sites for path in site.modules))
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in given.items():
        ends = [path for path in paths if path.endswith(name)]
        mine = [path for path in ends if is_suffix(name, path)]
        if not mine:
            raise NoMatchError(
                f"trainable_token_indices: no weight that is read belongs to a module '{name}'."
                + (did_you_mean(name, paths) or f" There are: {some(paths)}.")
                + ' Give the rows by name: {"…": […]}.'
            )
        if len(ends) > len(mine):
            others = [path for path in ends if path not in mine]
            raise ConfigError(
                f"trainable_token_indices: '{name}' is {some(mine)}, and for PEFT also "
                f"{some(others)}, whose name ends in its letters. Write a longer name."
            )
        found |= dict.fromkeys(mine, tuple(tokens))
    return found


def _rules(
    lora: LoraConfig,
    by_path: Mapping[str, tuple[int, ...]],
    module: CapturedModule,
    sites: Sequence[Site],
) -> Iterable[Rule]:
    """Yield a rule for each weight. As in PEFT, the head of a tied embedding has its rows."""
    source = module.known.embedding
    tied = next((site.tied for site in sites if f"{source}.weight" in site.names), ())
    heads = {name.rpartition(".")[0] for name in tied}
    asked = {tokens for path, tokens in by_path.items() if path == source or path in heads}
    follows = module.known.model_type != "" and source in by_path and len(asked) == 1
    for path, tokens in by_path.items():
        if follows and path in heads:
            continue
        share = lora.tied == "share" or lora.ensure_weight_tying or (follows and path == source)
        config = LoraConfig(
            tied="share" if share else lora.tied,
            inference_mode=lora.inference_mode,
            autocast_adapter_dtype=lora.dtype_rule,
        )
        yield Rule(f"re:{re.escape(path)}", tokens=tokens, lora=config)
