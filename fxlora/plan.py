"""Plan: what match decided, as data. It can be printed, counted, written down and applied."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tomli_w

from .config import Rule, rule_to_data
from .lora.inits import INITS
from .lora.layout import Layout, Shape
from .lora.variants import VARIANTS
from .tables import render


def scales_outputs(entry: Entry) -> bool:
    """Whether a variant multiplies the outputs with something."""
    return any(VARIANTS[variant].gain for variant in entry.variants)


FORMS = ("branch", "weight")
IN_FULL = "trained in full"


@dataclass(frozen=True)
class Entry:
    """One adapter of a plan: a site, or a part of one.

    Attributes:
        site: the site's name (and the part's); its adapter parameters are called after it.
        parameter: the weight's name in `state_dict()`.
        names: all the names under which its reads are adapted: a tied weight has several.
        tied: names of the same tensor whose reads it leaves: the fold splits the tie.
        op, shape, layout, padding_idx: what kind of weight it is (see `Site`).
        part: the name of the part of a packed weight, or None.
        rows: which of the outputs the part is, from and to.
        form: "branch" (op(x, W) + s·B(A(x))) or "weight" (op(x, W + s·BA)).
        reason: why the weight form, or what else there is to know.
        r, alpha, scaling: rank, lora_alpha, and the factor s.
        dropout: probability on the branch's input, in the train graph.
        init: `init_lora_weights`.
        variants: rows of the table of variants, in the order in which they apply.
        adapter: the adapter's name.
        rule: number of the rule that matched, from 1.
    """

    site: str
    parameter: str
    names: tuple[str, ...]
    op: str
    shape: Shape
    layout: Layout
    form: str
    reason: str
    r: int
    alpha: float
    scaling: float
    dropout: float
    init: bool | str
    adapter: str
    rule: int
    variants: tuple[str, ...] = ()
    part: str | None = None
    rows: tuple[int, int] | None = None
    padding_idx: int | None = None
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        numbers = (self.alpha, self.scaling, self.dropout)
        if self.form not in FORMS or self.init not in INITS or self.r < 1 or self.rule < 1:
            raise ValueError(f"no such form, init, rank or rule in the entry for '{self.site}'")
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
            raise ValueError(f"alpha, scaling or dropout of '{self.site}' is no number")
        if not set(self.variants) <= set(VARIANTS) or self.parameter not in self.names:
            raise ValueError(f"no such variant or name in the entry for '{self.site}'")
        if len(self.layout.roles) != len(self.shape):
            raise ValueError(f"layout and shape of '{self.site}' differ")
        self._check_ranges()

    def _check_types(self) -> None:
        """An entry may come from a file."""
        texts = (self.site, self.parameter, self.op, self.form, self.reason, self.adapter)
        lists = ((self.names, str), (self.tied, str), (self.variants, str), (self.shape, int))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"a name in the entry for {self.site!r} is no text")
        if not all(isinstance(v, tuple) and all(isinstance(i, t) for i in v) for v, t in lists):
            raise TypeError(f"names, ties, variants or shape of '{self.site}' are no lists of such")
        if not all(isinstance(n, int) for n in (self.r, self.rule)):
            raise TypeError(f"rank or rule of '{self.site}' is no whole number")

    def _check_ranges(self) -> None:
        if (self.part is None) != (self.rows is None):
            raise ValueError(f"'{self.site}' has a part without rows, or rows without a part")
        if self.rows is not None:
            start, stop = self.rows
            if not 0 <= start < stop <= self.shape[self.layout.part_dim]:
                raise ValueError(f"'{self.site}' has no rows {self.rows}")
            if not self.site.endswith(f".{self.part}"):
                raise ValueError(f"'{self.site}' is no part '{self.part}'")
        rows = self.layout.features(self.shape)[0] if self.layout.in_first else 0
        if self.padding_idx is not None and not 0 <= self.padding_idx < rows:
            raise ValueError(f"'{self.site}' has no row {self.padding_idx}")

    # ---- shapes -----------------------------------------------------------------------------

    @property
    def covered(self) -> Shape:
        """Shape of what is adapted: the weight's, or the part's."""
        if self.rows is None:
            return self.shape
        size = list(self.shape)
        size[self.layout.part_dim] = self.rows[1] - self.rows[0]
        return tuple(size)

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Shapes of A and B."""
        return self.layout.factor_shapes(self.covered, self.r)

    @property
    def weight_parameters(self) -> int:
        return math.prod(self.covered)

    @property
    def adapter_parameters(self) -> int:
        """How many parameters train."""
        return sum(math.prod(self.tensors[name]) for name in self.trainable)

    # ---- names ------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        # A bare parameter occupies its own name in the tree; its adapter stands beside it.
        owner = self.site.removesuffix(f".{self.part}") if self.part else self.site
        own = owner if f"{owner}.weight" in self.names else f"{owner}_adapter"
        return f"{own}.{self.part}" if self.part else own

    def name_of(self, kind: str) -> str:
        """Name of one of its tensors in the adapted module's `state_dict()`."""
        return f"{self.prefix}.{kind}.{self.adapter}.weight"

    @property
    def name_a(self) -> str:
        return self.name_of("lora_A")

    @property
    def name_b(self) -> str:
        return self.name_of("lora_B")

    @property
    def extras(self) -> dict[str, dict[str, Shape]]:
        """What each variant holds beside A and B: names and shapes, by the variant."""
        return {
            variant: {
                self.name_of(kind): shape
                for kind, shape in VARIANTS[variant]
                .tensors(self.layout, self.covered, self.r)
                .items()
            }
            for variant in self.variants
        }

    def upto(self, variant: str) -> Entry:
        """The entry with the variants before this one alone."""
        before = self.variants[: self.variants.index(variant)]
        return dataclasses.replace(self, variants=before)

    def without_gains(self) -> Entry:
        """The entry less the variants that scale the outputs."""
        plain = tuple(v for v in self.variants if VARIANTS[v].gain is None)
        return dataclasses.replace(self, variants=plain)

    @property
    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of everything that injection adds."""
        a, b = self.shapes
        found = {self.name_a: a, self.name_b: b}
        for held in self.extras.values():
            found |= held
        return found

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of what of it trains."""
        extra = [n for v, held in self.extras.items() if VARIANTS[v].trains for n in held]
        return (self.name_a, self.name_b, *extra)

    # ---- as data ----------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        data = {**dataclasses.asdict(self), "layout": self.layout.roles}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}
        return {key: value for key, value in plain.items() if value is not None}  # TOML has no null

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Entry:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }  # pyright: ignore[reportUnknownArgumentType]
        values["layout"] = Layout(data["layout"])
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

    @property
    def split_ties(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The ties that a fold splits: of each, the names that stay one weight together."""
        ties: dict[frozenset[str], dict[tuple[str, ...], None]] = {}
        for entry in self:
            if entry.tied:
                ties.setdefault(frozenset((*entry.names, *entry.tied)), {})[entry.names] = None
        found: list[tuple[tuple[str, ...], ...]] = []
        for names, groups in ties.items():
            left = names.difference(*groups)
            found.append((*groups, tuple(sorted(left))) if left else tuple(groups))
        return tuple(found)

    def __str__(self) -> str:
        header = ["site", "op", "weight", "form", "r", "alpha", "+parameters", "rule", "note"]
        rows = [
            [
                e.site,
                e.op,
                "x".join(map(str, e.covered)),
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
