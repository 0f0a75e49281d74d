"""The result of `verify`, as data and as text."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from ..module import CapturedModule
from ..module.program import MODES
from ..tables import render
from .coverage import AdaptedRead


@dataclass(frozen=True)
class SiteCheck:
    """The result of the checks at one site.

    Attributes:
        site, form: as in the plan.
        reads: every read of the weight, in both modes; each has the adapter.
        effect: change of a weighted sum of the outputs by the adapter, to first order, with A and B
            as `proof.effects` draws them.
        gradient_a, gradient_b: largest absolute gradient of that sum with respect to A and to B.
        weight_error: difference between the folded weight and W0 + s·BA, at the entry where it is
            largest relative to its tolerance.
        weight_tolerance: largest difference that rounding may cause at that entry. Both are NaN if
            the module is sharded, so that its fold was not checked.
    """

    site: str
    form: str
    reads: tuple[AdaptedRead, ...]
    effect: float
    gradient_a: float
    gradient_b: float
    weight_error: float = math.nan
    weight_tolerance: float = math.nan

    def reads_in(self, mode: str) -> int:
        """Return the number of reads in the graphs of a mode."""
        return sum(read.mode == mode for read in self.reads)

    @property
    def modes(self) -> str:
        """Which modes read the weight: "agree" if both do, else "train only" or "eval only"."""
        reading = [mode for mode in MODES if self.reads_in(mode)]
        return "agree" if len(reading) == len(MODES) else f"{reading[0]} only"


@dataclass(frozen=True)
class Verification:
    """The result of `verify`. Print it for a table of the sites, `reads()` for one of all reads.

    Attributes:
        sites: one item per entry of the plan.
        output_error: largest difference between folded and unfolded outputs, relative to the
            largest entry of the output.
        tolerance: largest output_error that rounding may cause. Both are NaN if the module is
            sharded, so that its fold was not checked.
        trainable: number of parameters that train, of all processes together.
        parameters: number of all parameters.
    """

    sites: tuple[SiteCheck, ...]
    output_error: float = math.nan
    tolerance: float = math.nan
    trainable: int = 0
    parameters: int = 0

    @property
    def fold_checked(self) -> bool:
        """Whether the fold was checked, for which a process needs the whole weights."""
        return not math.isnan(self.output_error)

    def __str__(self) -> str:
        header = ["site", "form", "reads train/eval", "modes", "base", "effect", "grad A", "grad B"]
        folded = ["folded: error", "tolerance"] if self.fold_checked else []
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
                *(
                    f"{value:.1e}"
                    for value in (check.weight_error, check.weight_tolerance)
                    if folded
                ),
            ]
            for check in self.sites
        ]
        return f"{render([*header, *folded], rows)}\n{self._summary()}"

    def _summary(self) -> str:
        count = sum(len(check.reads) for check in self.sites)
        common = (
            f"Each of the {count} reads of these weights has its adapter. The graph of each mode "
            "is the captured one\nwith these adapters and nothing else; "
        )
        if not self.fold_checked:
            return (
                f"{common}the base is unchanged on every process.\n"
                f"{self.trainable:,} of {self.parameters:,} parameters train. The fold was not "
                "checked: it needs the whole weights."
            )
        return (
            f"{common}with B = 0 the outputs are "
            "bit for bit those without adapters.\nThe folded graphs are the captured ones, node "
            f"for node; their outputs differ by {self.output_error:.1e} of the\nlargest entry "
            f"(tolerance {self.tolerance:.0e})."
        )

    def reads(self) -> str:
        """Return a table of every read of the adapted weights."""
        header = ["site", "form", "mode", "op", "through", "called in", "line"]
        rows = [
            [c.site, c.form, r.mode, r.op, r.through, r.call_site or r.region, r.line]
            for c in self.sites
            for r in c.reads
        ]
        return render(header, rows)

    def to_data(self) -> dict[str, Any]:
        """Return everything as plain data, including each read with its line."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=2)


def sizes_of(module: CapturedModule) -> dict[str, int]:
    """Return how many of a module's parameters train, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    trains = sum(size for size, requires_grad in sizes if requires_grad)
    return {"trainable": trains, "parameters": sum(size for size, _ in sizes)}
