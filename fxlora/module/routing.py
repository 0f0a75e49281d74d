"""Routing: the adapters of a routed module, as stacks of tensors with a row for each slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..plan import Entry, Plan, scales_outputs

ROUTED = "routed"  # name of the adapter in the names of stacks
INPUT = "adapter_ids"  # name of the input that chooses the adapters of each sample
WEIGHTS = "adapter_weights"  # name of the input that multiplies their effects
INPUTS = (INPUT, WEIGHTS)
ROWS = "adapter_rows"  # name of the argument of blocks: the row of the stacks for each sample
BLOCK_INPUTS = (ROWS, WEIGHTS)


@dataclass(frozen=True)
class Routing:
    """The adapters that a routed module holds.

    Attributes:
        plans: the plan of the adapter in each slot; None for an empty slot.
        entries: the adapted places. An entry's tensors are stacks (slots + 1, …) of the tensors
            that it describes, with ranks padded by zeros; the last row is the base's, without
            effect. Their scaling is in `scaling_of`, and not in the entry. Its dropout is the
            largest of theirs, which are in `dropout_of`.
        full: by each name of a parameter that some adapter trains in full, the name of the stack
            (slots, …) of its values.
    """

    plans: tuple[Plan | None, ...]
    entries: tuple[Entry, ...]
    full: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def slots(self) -> int:
        return len(self.plans)

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the stacks that train."""
        return frozenset([*(n for e in self.entries for n in e.trainable), *self.full.values()])

    @property
    def names_of_full(self) -> dict[str, list[str]]:
        """The names of each parameter that some adapter trains in full, by the stack's name."""
        found: dict[str, list[str]] = {}
        for name, stack in self.full.items():
            found.setdefault(stack, []).append(name)
        return found

    @property
    def parameters(self) -> frozenset[str]:
        """Names of all stacks."""
        held = [n for e in self.entries for n in (*e.tensors, scaling_of(e))]
        return frozenset([*held, *self.full.values(), *self.owned, *self.dropouts])

    @property
    def dropouts(self) -> frozenset[str]:
        """Names of the stacks of dropout probabilities, which only train graphs read."""
        return frozenset(dropout_of(entry) for entry in self.entries if entry.dropout)

    @property
    def owned(self) -> dict[str, Entry | str]:
        """Names of the flags (slots, 1) that tell which slots have an adapter at a place.

        Of an entry that scales the outputs, and of the stack of a parameter that trains in full:
        another slot has the base's weight there, whatever training or weight decay does to its row.
        """
        scaling = {owned_of(entry): entry for entry in self.entries if scales_outputs(entry)}
        return {**scaling, **{owned_of(stack): stack for stack in self.full.values()}}


def owned_of(place: Entry | str) -> str:
    """Return the name of the flags of an entry, or of the stack of a parameter."""
    return f"{place}_owned" if isinstance(place, str) else place.name_of("lora_owned")


def scaling_of(entry: Entry) -> str:
    """Return the name of the stack (slots + 1, 1) of the scalings s."""
    return entry.name_of("lora_scaling")


def dropout_of(entry: Entry) -> str:
    """Return the name of the stack (slots + 1, 1) of the probabilities of dropout."""
    return entry.name_of("lora_dropout")
