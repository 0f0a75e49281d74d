"""Schedule: which form the running graphs of an optimized module give to each adapter."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..fast import NO_LOSS, ChunkedLoss, Recomputed, Shapes, running_nodes, seconds
from ..fx.marks import ADAPTER, APART, CHUNKED, JOINED, MERGED, ONE_GRADIENT, RECOMPUTED
from ..plan import Entry, Plan, scales_outputs
from ..tables import render, some
from .program import MODES

Runs = Iterable[tuple[str, fx.Graph]]  # the graphs that run, with their modes


_NESTED = "is in a choice, a loop, or a region of a submodule that is a module"


@dataclass(frozen=True)
class Group:
    """Adapted reads that one node, or the explicit nodes, compute.

    Attributes:
        sites: the adapters' sites in the plan.
        modes: the modes in whose graph this is.
        reason: why these are the explicit nodes; "" for one node.
        merged: whether it is one layer with the weight W + s·BA, where that pays.
        explicit, fast: the numbers that are read and written for each row of x, forward and
            backward, by the explicit nodes and by the one node; 0 if not known.
        shapes: the sizes in the example, if one node computes them.
        seconds: what a forward and backward of the explicit nodes and of the one node took, if
            that was measured.
    """

    sites: tuple[str, ...]
    modes: tuple[str, ...]
    reason: str = ""
    merged: bool = False
    explicit: int = 0
    fast: int = 0
    shapes: Shapes | None = None
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Schedule:
    """The forms of all adapters. `str` makes a table of it.

    Attributes:
        groups: those that one node computes first.
        recomputed: what the backward computes again, and how often, in the mode where it is most.
        losses: the losses that were to be computed for some rows at a time, with their modes.
        one_gradient: the ops whose backward leaves out the gradient of a frozen weight, and how
            often, in the mode where it is most.
    """

    groups: tuple[Group, ...]
    recomputed: tuple[tuple[Recomputed, int], ...] = ()
    losses: tuple[tuple[ChunkedLoss, tuple[str, ...]], ...] = ()
    one_gradient: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, runs: Runs, plan: Plan | None) -> Schedule:
        """Return the schedule of the graphs that run."""
        entries = {entry.name_a: entry for entry in plan or ()}
        modes: dict[tuple[tuple[str, ...], str], dict[str, None]] = {}
        units: dict[tuple[str, ...], dict[str, Any]] = {}
        again = {mode: Counter[Recomputed]() for mode in MODES}
        losses: dict[ChunkedLoss, dict[str, None]] = {}
        frozen = {mode: Counter[str]() for mode in MODES}
        for mode, graph in runs:
            for node in running_nodes(graph):
                names: tuple[str, ...] = node.meta.get(JOINED, ())
                chain = node.meta.get(RECOMPUTED)
                if op := node.meta.get(ONE_GRADIENT):
                    frozen[mode][op] += 1
                if chain and (not names or any(_trains_a(entries[name]) for name in names)):
                    again[mode][chain] += 1
                if names:
                    modes.setdefault((names, ""), {})[mode] = None
                    adapted = [entries[name] for name in names]
                    explicit, fast = _traffic(adapted)
                    shapes = Shapes.of(node, _outputs(adapted))
                    units[names] = {"explicit": explicit, "fast": fast, "shapes": shapes}
                elif loss := node.meta.get(CHUNKED):
                    losses.setdefault(loss, {})[mode] = None
                elif name := node.meta.get(MERGED):
                    modes.setdefault(((name,), MERGED), {})[mode] = None
                elif ADAPTER in node.meta:
                    reason = node.meta.get(APART, "")
                    modes.setdefault(((node.meta[ADAPTER][0],), reason), {})[mode] = None
        if len(losses) > 1:  # of a graph without a loss, in a module that has one
            losses.pop(NO_LOSS, None)
        seen = {name for names, _ in modes for name in names}
        for name in entries:
            if name not in seen:
                modes[
                    (name,), "is in a choice, a loop, or a region of a submodule that is a module"
                ] = {}
        groups: list[Group] = []
        for (names, reason), found in modes.items():
            merged = reason == MERGED
            known: dict[str, Any] = {} if reason else units[names]
            adapted = tuple(entries[name].site for name in names)
            why = "" if merged else reason
            groups.append(Group(adapted, tuple(found), why, merged=merged, **known))
        most = functools.reduce(operator.or_, again.values())
        return cls(
            tuple(sorted(groups, key=lambda group: bool(group.reason))),
            tuple(sorted(most.items(), key=lambda item: len(item[0].ops))),
            tuple((loss, tuple(found)) for loss, found in losses.items()),
            tuple(functools.reduce(operator.or_, frozen.values()).items()),
        )

    def measured(self) -> Schedule:
        """Return the schedule with the seconds of each group, measured now, on random numbers.

        The sizes, dtypes and devices are those of the example that was captured; the threads are
        torch's now. What a graph does around a group is not in its seconds.

        Example:
            >>> import torch, fxlora
            >>> rule = fxlora.Rule(lora=fxlora.LoraConfig(r=2))
            >>> lora = fxlora.adapt(torch.nn.Linear(6, 4), torch.randn(2, 6), rules=rule)
            >>> schedule = fxlora.optimize(lora).schedule.measured()
            >>> [all(s > 0 for s in group.seconds) for group in schedule.groups]
            [True]
        """
        groups = (
            replace(group, seconds=seconds(group.shapes)) if group.shapes else group
            for group in self.groups
        )
        return replace(self, groups=tuple(groups))

    def __str__(self) -> str:
        header = ["sites", "modes", "form", "numbers per row of x", "explicit"]
        rows = [
            [
                some(group.sites),
                ", ".join(group.modes),
                _form(group),
                f"{group.fast:,}" if group.fast else "",
                f"{group.explicit:,}" if group.fast else "",
            ]
            for group in self.groups
        ]
        if any(group.seconds for group in self.groups):
            header += ["ms", "explicit"]
            for row, group in zip(rows, self.groups, strict=True):
                explicit, fast = group.seconds or (None, None)
                row += ["" if s is None else f"{1e3 * s:.3g}" for s in (fast, explicit)]
        tables = (render(header, rows), self._recomputations(), self._losses())
        return "\n\n".join(filter(None, (*tables, self._one_gradient())))

    def _one_gradient(self) -> str:
        if not self.one_gradient:
            return ""
        rows = [(op, f"{number:,}") for op, number in self.one_gradient]
        return render(("gradient of a frozen weight left out", "calls"), rows)

    def _losses(self) -> str:
        if not self.losses:
            return ""
        rows = [
            (
                loss.head,
                ", ".join(modes),
                f"explicit: {loss.reason}" if loss.reason else f"{loss.rows:,} rows at a time",
            )
            for loss, modes in self.losses
        ]
        return render(("cross-entropy of", "modes", "form"), rows)

    def _recomputations(self) -> str:
        if not self.recomputed:
            return ""
        header = ("recomputed in the backward", "chains", "saved bytes of each", "before")
        rows = [
            (some(chain.ops), f"{number:,}", f"{chain.after:,}", f"{chain.before:,}")
            for chain, number in self.recomputed
        ]
        return render(header, rows)


def _form(group: Group) -> str:
    if group.merged:
        return "one weight, W + s·BA"
    return f"explicit: {group.reason}" if group.reason else f"{len(group.sites)} in one op"


def _outputs(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """Return the output features and the rank of each entry."""
    return [(entry.layout.features(entry.adapted_shape)[1], entry.r) for entry in entries]


def _trains_a(entry: Entry) -> bool:
    """Whether A is trained, whose gradient reads x."""
    return entry.name_a in entry.trainable


def _traffic(entries: Sequence[Entry]) -> tuple[int, int]:
    """Return the numbers read and written per row of x, by the explicit nodes and by one op.

    Each is the sum over the products and sums of a forward and a backward, for layers of one x; the
    weights, A and B, which are read once for all rows, are not counted.
    """
    sizes = [entry.layout.features(entry.adapted_shape) for entry in entries]
    count, inputs = len(entries), sizes[0][0]
    outputs, rank = sum(out for _, out in sizes), sum(entry.r for entry in entries)
    scaled = sum(
        out for entry, (_, out) in zip(entries, sizes, strict=True) if scales_outputs(entry)
    )
    # x W^T and x A^T, s·, B, +; then the gradients by each, and all those of x added up
    explicit = (
        (2 * count * inputs + 5 * outputs + 4 * rank)
        + (3 * count * inputs + 3 * outputs + 6 * rank)
        + 3 * inputs * (2 * count - 1)
    )
    # one x A^T, x W^T, and B added to it; then G, dx with G A added to it, dA and dB
    fast = ((count + 1) * inputs + 3 * outputs + 2 * rank) + (
        (2 * count + 2) * inputs + 3 * outputs + 4 * rank
    )
    # y - b, + z, (g - 1)·, + z; then the gradients of g and of the sum, added to those of y and z
    explicit += (2 + 3 + 2 + 3) * scaled + (4 + 2 + 3 + 3) * scaled
    fast += 2 * scaled + (2 + 4) * scaled  # g·u + b; then the gradients of u and g
    return explicit, fast
