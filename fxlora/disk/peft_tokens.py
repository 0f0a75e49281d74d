"""Rows that train alone in PEFT's files: `trainable_token_indices` and `trainable_tokens_delta`.

PEFT's "delta" (tokens, features) holds the trained rows, not what is added to the base's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..module import CapturedModule
from ..module.sharded import whole
from ..plan import Entry
from .peft import owner_of

WRAPPER = "token_adapter"
END = f"{WRAPPER}.trainable_tokens_delta"

Rows = Mapping[str, torch.Tensor]  # the base's rows (tokens, features), by the name of A


def rows_of(module: CapturedModule, plan: Iterable[Entry]) -> Rows:
    """Return the base's values of the rows that train alone."""
    return {
        entry.name_a: whole(module.get_parameter(entry.parameter).detach())[list(entry.tokens)]
        for entry in plan
        if entry.tokens
    }


def indices_of(plan: Iterable[Entry]) -> dict[str, list[int]] | None:
    """Return PEFT's `trainable_token_indices` for a plan, or None if it has no such rows."""
    return {owner_of(entry): list(entry.tokens) for entry in plan if entry.tokens} or None


def indices_in(config: Mapping[str, Any], path: str) -> list[int] | None:
    """Return the rows that a configuration of PEFT's gives for a module of the file, or None."""
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        return next((rows for name, rows in given.items() if path.endswith(name)), None)
    return given


def encoded(
    entry: Entry, values: Mapping[str, torch.Tensor], rows: torch.Tensor | None
) -> torch.Tensor:
    """Return the trained rows (tokens, features), as PEFT holds them.

    Args:
        entry: the entry.
        values: its tensors by name.
        rows: the base's rows; not needed on the meta device.
    """
    change = values[entry.name_b].mT if entry.layout.in_first else values[entry.name_a]
    if rows is None:
        return change
    wide = torch.promote_types(rows.dtype, change.dtype)
    return rows.to(change.device, wide) + entry.scaling * change.to(wide)


def decoded(entry: Entry, stored: torch.Tensor, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the trained one of A and B by name, from the rows that PEFT holds."""
    wide = torch.promote_types(rows.dtype, stored.dtype)
    change = (stored.to(wide) - rows.to(stored.device, wide)) / entry.scaling
    if entry.layout.in_first:
        return {entry.name_b: change.mT}
    return {entry.name_a: change}
