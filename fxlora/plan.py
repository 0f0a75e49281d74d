"""Plan: what match decided, as data. It can be printed, counted, written down and applied."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tomli_w

from .config import MAX_RANK, MAX_SIZE, Rule, is_finite, is_whole, rule_to_data
from .errors import ConfigError
from .lora.inits import INITS
from .lora.layout import Layout, Shape
from .lora.variants import VARIANTS
from .names import ADAPTER_RULE, WORD_RULE, is_adapter, is_path, is_word, printable, shown
from .tables import render, some


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
        """An entry may come from a file: no name gets into a graph but through here."""
        self._check_names()
        self._check_numbers()
        self._check_tables()
        self._check_ranges()

    def _check_names(self) -> None:
        texts = {"op": self.op, "form": self.form, "reason": self.reason}
        lists = {"names": self.names, "tied": self.tied}
        for what, name in (("site", self.site), ("parameter", self.parameter)):
            _check(is_path(name), f"{what} {shown(name)} cannot be a name in a graph")
        for what, names in lists.items():
            paths = isinstance(names, tuple) and all(map(is_path, names))
            _check(paths, f"{what} {shown(names)} are no names in a graph")
        part = self.part is None or is_word(self.part)
        _check(part, f"part {shown(self.part)} is no name: {WORD_RULE}")
        adapter = is_adapter(self.adapter)
        _check(adapter, f"adapter {shown(self.adapter)} is no name: {ADAPTER_RULE}")
        for what, text in texts.items():
            _check(isinstance(text, str), f"{what} of '{self.site}' is no text: {shown(text)}")
        _check(
            self.parameter in self.names and len(set(self.names)) == len(self.names),
            f"the names of '{self.site}' are not those of '{self.parameter}', once each",
        )

    def _check_numbers(self) -> None:
        for what, number, low, high in (
            ("r", self.r, 1, MAX_RANK),
            ("rule", self.rule, 1, MAX_SIZE),
            ("padding_idx", self.padding_idx or 0, 0, MAX_SIZE),
        ):
            good = is_whole(number, low, high)
            _check(good, f"{what} of '{self.site}' is no number from {low}: {shown(number)}")
        for what, value in (("alpha", self.alpha), ("scaling", self.scaling)):
            good = is_finite(value)
            _check(good, f"{what} of '{self.site}' is no finite number: {shown(value)}")
        dropout = is_finite(self.dropout) and 0 <= self.dropout < 1
        _check(dropout, f"dropout of '{self.site}' is not in [0, 1): {shown(self.dropout)}")
        shape = isinstance(self.shape, tuple) and all(is_whole(n, 0, MAX_SIZE) for n in self.shape)
        _check(shape, f"shape of '{self.site}' is none: {shown(self.shape)}")

    def _check_tables(self) -> None:
        variants = isinstance(self.variants, tuple) and list(self.variants) == [
            name for name in VARIANTS if name in self.variants
        ]
        _check(variants, f"'{self.site}' has no such variants: {shown(self.variants)}")
        _check(self.form in FORMS, f"'{self.site}' has no such form: {shown(self.form)}")
        init = isinstance(self.init, bool | str) and self.init in INITS
        _check(init, f"'{self.site}' has no such init: {shown(self.init)}")
        layout = isinstance(self.layout, Layout) and len(self.layout.roles) == len(self.shape)
        _check(layout, f"layout and shape of '{self.site}' differ")

    def _check_ranges(self) -> None:
        _check(
            (self.part is None) == (self.rows is None),
            f"'{self.site}' has a part without rows, or rows without a part",
        )
        if self.rows is not None:
            outputs = self.shape[self.layout.part_dim]
            pair = isinstance(self.rows, tuple) and len(self.rows) == 2
            whole = pair and all(is_whole(n, 0, outputs) for n in self.rows)
            _check(
                whole and self.rows[0] < self.rows[1],
                f"'{self.site}' has no rows {shown(self.rows)}",
            )
            part = self.site.endswith(f".{self.part}")
            _check(part, f"'{self.site}' is no part {shown(self.part)}")
        rows = self.layout.features(self.shape)[0] if self.layout.in_first else 0
        padding = self.padding_idx is None or self.padding_idx < rows
        _check(padding, f"'{self.site}' has no row {self.padding_idx}")

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
    def from_data(cls, data: Any) -> Entry:
        """The inverse of `to_data`, for data from anywhere.

        Raises:
            ConfigError: it is no entry.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, dict) or not set(data) <= known:
            raise ConfigError(f"expected an entry of a plan, found {shown(data)}.")
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        roles = values.get("layout")
        try:
            values["layout"] = Layout(roles if isinstance(roles, str) else "")
            return cls(**values)
        except (TypeError, ValueError) as error:  # what is missing; no such layout
            raise ConfigError(f"the entry for {shown(data.get('site'))}: {error}") from error


def _check(holds: object, otherwise: str) -> None:
    if not holds:
        raise ConfigError(f"{otherwise}.")


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

    def __post_init__(self) -> None:
        counts = (self.model_parameters, self.trained_parameters)
        _check(all(is_whole(n, 0, MAX_SIZE) for n in counts), f"no counts: {shown(counts)}")
        entries = isinstance(self.entries, tuple) and all(isinstance(e, Entry) for e in self)
        _check(entries, "the entries of a plan are a tuple of Entry")
        for what in ("trained", "modules_to_save"):
            names = getattr(self, what)
            paths = isinstance(names, tuple) and all(map(is_path, names))
            _check(paths, f"{what} {shown(names)} are no names in a graph")
        self._check_apart()

    def _check_apart(self) -> None:
        """Raise where two entries adapt the same rows of a weight, or share their tensors."""
        prefixes = Counter((entry.prefix, entry.adapter) for entry in self)
        twice = [prefix for (prefix, _), count in prefixes.items() if count > 1]
        _check(not twice, f"the plan has {some(twice)} more than once")
        held: dict[tuple[str, str], list[Entry]] = {}
        for entry in self:
            for name in entry.names:
                held.setdefault((name, entry.adapter), []).append(entry)
        for (name, _), sharing in held.items():
            rows = sorted(entry.rows or (0, MAX_SIZE) for entry in sharing)
            apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(rows))
            _check(apart, f"the plan adapts the same rows of '{name}' more than once")

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
            saved = ", ".join(map(printable, self.modules_to_save))
            lines.append(f"Trained in full: {saved}.")
        alone = [f"  {site}: {reason}" for site, reason in self.skipped if reason != IN_FULL]
        alone = list(map(printable, alone))
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
        text = tomli_w.dumps(self.to_data())  # which escapes most, in basic strings alone
        return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in text)


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"
