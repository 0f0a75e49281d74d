"""What `verify` found, as data and as text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from ..module.program import MODES
from ..tables import render
from .coverage import Read


@dataclass(frozen=True)
class SiteCheck:
    """What was found at one site.

    Attributes:
        site, form: as in the plan.
        reads: every read of the weight, in both modes; the adapter stands at each.
        effect: how far the outputs (their weighted sum) move with the adapter, to first order,
            A and B drawn at random.
        gradient_a, gradient_b: the largest gradient of the same by A and by B.
        weight_error: how far the folded weight is from W0 + s·BA, at the entry where that is
            the largest part of what rounding may do.
        weight_tolerance: what rounding may do there.
    """

    site: str
    form: str
    reads: tuple[Read, ...]
    effect: float
    gradient_a: float
    gradient_b: float
    weight_error: float
    weight_tolerance: float

    def reads_in(self, mode: str) -> int:
        """In how many places the adapter stands in the graphs of a mode."""
        return sum(read.mode == mode for read in self.reads)

    @property
    def modes(self) -> str:
        """Whether both modes read the weight ("agree"), or which of them alone."""
        reading = [mode for mode in MODES if self.reads_in(mode)]
        return "agree" if len(reading) == len(MODES) else f"{reading[0]} alone"


@dataclass(frozen=True)
class Verification:
    """The outcome of `verify`; printing it prints a table, `reads()` is the longer one.

    Attributes:
        sites: an item per site of the plan.
        output_error: of the folded module, as a part of the largest output.
        tolerance: of that error, for the dtypes that take part.
    """

    sites: tuple[SiteCheck, ...]
    output_error: float
    tolerance: float

    def __str__(self) -> str:
        header = (
            *("site", "form", "reads train/eval", "modes", "base", "effect", "grad A", "grad B"),
            *("folded: error", "tolerance"),
        )
        rows = [
            [
                check.site,
                check.form,
                "/".join(str(check.reads_in(mode)) for mode in MODES),
                check.modes,
                "unchanged",
                f"{check.effect:.1e}",
                f"{check.gradient_a:.1e}",
                f"{check.gradient_b:.1e}",
                f"{check.weight_error:.1e}",
                f"{check.weight_tolerance:.1e}",
            ]
            for check in self.sites
        ]
        count = sum(len(check.reads) for check in self.sites)
        return (
            f"{render(header, rows)}\n"
            f"An adapter stands at each of the {count} reads of these weights. The graph of each "
            "mode is the captured\none with these adapters and nothing else; with B = 0 the "
            "outputs are those without, bit for bit.\nThe folded graphs are the captured ones, "
            f"node for node; the outputs differ by {self.output_error:.1e} of the\nlargest "
            f"(tolerance {self.tolerance:.0e})."
        )

    def reads(self) -> str:
        """A table of every read that the adapters stand at."""
        header = ["site", "form", "mode", "op", "through", "called in", "line"]
        rows = [
            [c.site, c.form, r.mode, r.op, r.through, r.call_site or r.region, r.line]
            for c in self.sites
            for r in c.reads
        ]
        return render(header, rows)

    def to_data(self) -> dict[str, Any]:
        """All of it as plain data, every read with its line."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=2)
