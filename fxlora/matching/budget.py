"""Parameter budgets: the largest ranks with which A and B stay within a budget."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..lora.inits import rank_multiple
from ..plan import Entry


def within(
    entries: Sequence[Entry],
    budget: Any,
    model: nn.Module,
    gains: Mapping[str, Sequence[float]] | None = None,
    rows: int = 0,
) -> list[Entry]:
    """Return the entries with the largest ranks for which A and B stay within a budget.

    Ranks keep their proportions, between 1 and the largest rank of the weight. Parameters that
    rounding leaves over go to the entries whose ranks it reduced most. Each entry keeps its
    scaling factor s.

    Args:
        entries: the entries, with the ranks that the rules give them.
        budget: a number of parameters, or a share of the model's such as "1%".
        model: the model whose parameters a share refers to.
        gains: what rank 1, 2, … of each entry's site is worth; then the ranks are those that are
            worth most per parameter, instead of in proportion.
        rows: the parameters of rows that train alone, which the budget is for, too.

    Raises:
        ConfigError: the budget is invalid, or too small for rank 1 everywhere.
    """
    limit = limit_of(budget, sum(p.numel() for p in model.parameters()))
    least = _cost(entries, [rank_multiple(entry.init) for entry in entries])
    if least + rows > limit:
        takes = [f"the least rank at all {len(entries)} sites takes {least:,}"] if entries else []
        takes += [f"the rows that train alone take {rows:,}"] if rows else []
        raise ConfigError(
            f"budget={budget!r} is {limit:,} parameters; {' and '.join(takes)}. Give more, or "
            "target fewer sites."
        )
    if not entries:
        return []
    limit -= rows
    if gains is None:
        ranks = _filled(entries, _proportional(entries, limit), limit)
    else:
        ranks = _worth_most(entries, [gains[entry.site] for entry in entries], limit)
    return [_with_rank(entry, r) for entry, r in zip(entries, ranks, strict=True)]


def limit_of(budget: Any, model: int) -> int:
    """Return the number of parameters in a budget, for a model with `model` parameters.

    Raises:
        ConfigError: the budget is neither a positive number nor a share.
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    if isinstance(budget, str) and budget.rstrip().endswith("%"):
        try:
            share = float(budget.rstrip()[:-1])
        except ValueError:
            share = math.nan
        if 0 < share <= 100:
            return int(model * share / 100)
    raise ConfigError(f'budget must be a number of parameters or a share such as "1%": {budget!r}.')


def _with_rank(entry: Entry, r: int) -> Entry:
    # s stays as the rules give it; alpha becomes the value that gives this s at the new rank.
    plain = math.isclose(entry.scaling, entry.alpha / entry.r)
    alpha = entry.scaling * (r if plain else math.sqrt(r))  # rsLoRA: s = alpha / √r
    return dataclasses.replace(entry, r=r, alpha=alpha)


def _cost(entries: Sequence[Entry], ranks: Sequence[int]) -> int:
    return sum(
        dataclasses.replace(entry, r=r).adapter_parameters
        for entry, r in zip(entries, ranks, strict=True)
    )


def _largest(entry: Entry) -> int:
    return entry.layout.max_rank(entry.adapted_shape)


def _scaled(entries: Sequence[Entry], factor: float) -> list[int]:
    return [_stepped(e, min(_largest(e), int(e.r * factor))) for e in entries]


def _stepped(entry: Entry, r: int) -> int:
    """Round a rank down to a multiple that the entry's init allows, but not to 0."""
    step = rank_multiple(entry.init)
    return max(step, r // step * step)


def _proportional(entries: Sequence[Entry], limit: int) -> list[int]:
    """Return the ranks times the largest common factor that the limit allows, by bisection."""
    low, high = 0.0, float(max(_largest(entry) / entry.r for entry in entries))
    if _cost(entries, _scaled(entries, high)) <= limit:
        return _scaled(entries, high)
    for _ in range(60):
        middle = (low + high) / 2
        if _cost(entries, _scaled(entries, middle)) <= limit:
            low = middle
        else:
            high = middle
    return _scaled(entries, low)


def _filled(entries: Sequence[Entry], ranks: list[int], limit: int) -> list[int]:
    """Increase ranks step by step while the limit allows, first those that rounding cut most."""
    left = limit - _cost(entries, ranks)
    growing = set(range(len(ranks)))
    while growing:
        index = min(growing, key=lambda i: (ranks[i] / entries[i].r, i))
        entry, r = entries[index], ranks[index]
        higher = r + rank_multiple(entry.init)
        more = _cost([entry], [higher]) - _cost([entry], [r])
        if more <= left and higher <= _largest(entry):
            ranks[index] = higher
            left -= more
        else:
            growing.remove(index)
    return ranks


def _worth_most(
    entries: Sequence[Entry], gains: Sequence[Sequence[float]], limit: int
) -> list[int]:
    """Return ranks, at least the least, that grow where a step is worth most per parameter.

    As gains fall with the rank, a step that is left out for its cost leaves out those behind it.
    """
    steps = [rank_multiple(entry.init) for entry in entries]
    ranks = list(steps)
    left = limit - _cost(entries, ranks)
    growing: list[tuple[float, int]] = []

    def push(index: int) -> None:
        entry, r, higher = entries[index], ranks[index], ranks[index] + steps[index]
        worth = sum(gains[index][r:higher])
        if higher <= _largest(entry) and worth > 0:
            cost = _cost([entry], [higher]) - _cost([entry], [r])
            heapq.heappush(growing, (-worth / cost, index))

    for index in range(len(entries)):
        push(index)
    while growing:
        _, index = heapq.heappop(growing)
        higher = ranks[index] + steps[index]
        cost = _cost([entries[index]], [higher]) - _cost([entries[index]], [ranks[index]])
        if cost <= left:
            ranks[index], left = higher, left - cost
            push(index)
    return ranks
