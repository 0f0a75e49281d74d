"""Plan: what match decided, as data. It can be printed, counted, written down and applied."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tomli_w

from .config import INITS, Rule, rule_to_data
from .ops import factor_shapes
from .tables import render

FORMS = ("branch", "weight")
IN_FULL = "trained in full"


@dataclass(frozen=True)
class Entry:
    """One site of a plan.

    Attributes:
        site: the site's name; its adapter parameters are called after it.
        parameter: the weight's name in `state_dict()`.
        op, shape, in_first, convolution, padding_idx: what kind of weight it is (see `Site`).
        form: "branch" (op(x, W) + s·B(A(x))) or "weight" (op(x, W + s·BA)).
        reason: why the weight form, or what else there is to know.
        r, alpha, scaling: rank, lora_alpha, and the factor s.
        dropout: probability on the branch's input, in the train graph.
        init: `init_lora_weights`.
        adapter: the adapter's name.
        rule: number of the rule that matched, from 1.
    """

    site: str
    parameter: str
    op: str
    shape: tuple[int, ...]
    in_first: bool
    convolution: bool
    form: str
    reason: str
    r: int
    alpha: float
    scaling: float
    dropout: float
    init: bool | str
    adapter: str
    rule: int
    padding_idx: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.alpha, self.scaling, self.dropout)
        if self.form not in FORMS or self.init not in INITS or self.r < 1 or self.rule < 1:
            raise ValueError(f"no such form, init, rank or rule in the entry for '{self.site}'")
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"alpha, scaling or dropout of '{self.site}' is no number")

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        return factor_shapes(self.shape, self.r, self.in_first, self.convolution)

    @property
    def weight_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def adapter_parameters(self) -> int:
        a, b = self.shapes
        return math.prod(a) + math.prod(b)

    @property
    def prefix(self) -> str:
        # A bare parameter occupies its own name in the tree; its adapter stands beside it.
        return self.site if self.parameter == f"{self.site}.weight" else f"{self.site}_adapter"

    @property
    def name_a(self) -> str:
        """Name of A in the adapted module's `state_dict()`."""
        return f"{self.prefix}.lora_A.{self.adapter}.weight"

    @property
    def name_b(self) -> str:
        """Name of B in the adapted module's `state_dict()`."""
        return f"{self.prefix}.lora_B.{self.adapter}.weight"

    def to_data(self) -> dict[str, Any]:
        data = {**dataclasses.asdict(self), "shape": list(self.shape)}
        return {key: value for key, value in data.items() if value is not None}  # TOML has no null

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Entry:
        values: dict[str, Any] = {**data, "shape": tuple(data["shape"])}
        return cls(**values)


@dataclass(frozen=True)
class Plan:
    """What `inject` will do: an entry per adapted site, and what is trained in full.

    Attributes:
        entries: the sites to adapt.
        trained: names of parameters to train in full.
        skipped: (site, reason) for every other site.
        modules_to_save: paths of the modules that `trained` comes from.
        model_parameters: how many parameters the model has.
        trained_parameters: how many of them are trained in full.
        rules: the rules it was made from (empty where it was read from an adapter).
    """

    entries: tuple[Entry, ...]
    trained: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    model_parameters: int = 0
    trained_parameters: int = 0
    rules: tuple[Rule, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def adapter_parameters(self) -> int:
        return sum(entry.adapter_parameters for entry in self)

    def __str__(self) -> str:
        header = ["site", "op", "weight", "form", "r", "alpha", "+parameters", "rule", "note"]
        rows = [
            [
                e.site,
                e.op,
                "x".join(map(str, e.shape)),
                e.form,
                e.r,
                f"{e.alpha:g}",
                f"{e.adapter_parameters:,}",
                e.rule,
                e.reason,
            ]
            for e in self
        ]
        lines = [render(header, rows)]
        lines.append(f"{_sites(len(self))} adapted with {self.adapter_parameters:,} parameters.")
        if self.modules_to_save:
            lines.append(f"Trained in full: {', '.join(self.modules_to_save)}.")
        alone = [f"  {site}: {reason}" for site, reason in self.skipped if reason != IN_FULL]
        if alone:
            lines += [f"{_sites(len(alone))} left alone:", *alone]
        return "\n".join(lines)

    def to_data(self) -> dict[str, Any]:
        """Rules and sites as plain data.

        Raises:
            ConfigError: a rule has a `where=` function.
        """
        return {
            "version": 1,
            "rule": [rule_to_data(rule) for rule in self.rules],
            "site": [entry.to_data() for entry in self],
        }

    def to_json(self) -> str:
        """The plan as JSON, which `match` takes back as rules (see `load_rules`)."""
        return json.dumps(self.to_data(), indent=2)

    def to_toml(self) -> str:
        """The plan as TOML, which `match` takes back as rules (see `load_rules`)."""
        return tomli_w.dumps(self.to_data())


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"
