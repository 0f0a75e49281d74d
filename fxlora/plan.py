"""Plan: the decisions of `match`, as data to print, count, write to a file and inject."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tomli_w
import torch

from .config import MAX_RANK, MAX_SIZE, Rule, is_finite, is_whole, rule_to_data
from .errors import ConfigError
from .lora.dtypes import DTYPES, DtypeRule, held_dtype, name_of
from .lora.inits import INITS
from .lora.layout import Layout, Shape
from .lora.variants import VARIANTS
from .names import ADAPTER_RULE, WORD_RULE, is_adapter, is_path, is_word, printable, shown
from .tables import count, render, some


def scales_outputs(entry: Entry) -> bool:
    """Whether one of the entry's variants multiplies the outputs by a factor, as DoRA does."""
    return any(VARIANTS[variant].gain for variant in entry.variants)


def overlap(one: Entry, other: Entry) -> bool:
    """Whether two entries of one weight adapt some of the same outputs."""
    if one.rows is None or other.rows is None:
        return True
    return one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1]


_HEAD = """\
# A plan of fxlora. Edit the rules: they are matched again when the file is read.
# The sites below them only show what the rules chose; they are not read.
"""
_HEAD_WITHOUT_RULES = """\
# The plan of an adapter that was loaded, scaled or combined. It has no rules to edit.
"""

FORMS = ("branch", "weight")
IN_FULL = "trained in full"


@dataclass(frozen=True)
class Entry:
    """One adapter of a plan, for a site or for a part of one.

    Its factors A and B have the shapes `shapes`; the adapted weight is W + s·BA (Hu et al. 2021,
    LoRA, eq. 3), with the variants applied.

    Attributes:
        site: name of the site, followed by the part's name if there is one. The adapter's
            parameters are named after it (see `prefix`).
        parameter: name of the weight in `state_dict()`.
        names: all names of the weight under which its reads are adapted; several if it is tied.
        tied: other names of the same tensor, whose reads are not adapted. A fold splits the tie.
        op: kind of the op that reads the weight (see `Site`).
        shape: shape of the whole weight.
        layout: the roles of its dimensions.
        form: "branch", op(x, W) + s·B(A(x)), or "weight", op(x, W + s·BA).
        reason: notes for the printed plan: the reason for the form, and ties.
        r: the rank.
        alpha: `lora_alpha`.
        scaling: the scaling factor s.
        dropout: probability of zeroing an element of the branch's input, in the train graph; 0 in
            the weight form.
        init: `init_lora_weights`.
        adapter: name of the adapter.
        rule: number of the rule that matched the site, from 1.
        variants: rows of the table of variants, in the order in which they apply.
        part: name of the part of a packed weight, or None.
        rows: range (start, stop) of the part in the weight's output dimension, or None. For a part
            of the rows of a table, `layout` has these as outputs.
        tokens: rows of the weight, in its first dimension, that train alone (see `Rule.tokens`):
            one of A and B, frozen, selects them, and the other has what is added to each. Empty
            for a low-rank pair.
        padding_idx: row of an embedding that never trains, or None.
        autocast_adapter_dtype: the dtype of the adapter's tensors, as in LoraConfig: True, False
            or the name of a dtype.
        weight_dtype: name of the weight's dtype in the module that the plan was made for or
            injected into; "" if the plan is from an older file.

    Raises:
        ConfigError: an attribute has a wrong type or value, or is not a valid name in a graph.
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
    tokens: tuple[int, ...] = ()
    autocast_adapter_dtype: DtypeRule = True
    weight_dtype: str = ""

    def __post_init__(self) -> None:
        """Check all attributes: they may come from a file, and the names go into generated code."""
        self._check_names()
        self._check_numbers()
        self._check_tables()
        self._check_ranges()

    def _check_names(self) -> None:
        texts = {"op": self.op, "form": self.form, "reason": self.reason}
        lists = {"names": self.names, "tied": self.tied}
        for what, name in (("site", self.site), ("parameter", self.parameter)):
            _check(is_path(name), f"{what} {shown(name)} is not a valid name in a graph")
        for what, names in lists.items():
            paths = isinstance(names, tuple) and all(map(is_path, names))
            _check(paths, f"{what} must be a tuple of valid names in a graph, not {shown(names)}")
        part = self.part is None or is_word(self.part)
        _check(part, f"part {shown(self.part)} is not a valid name: {WORD_RULE}")
        adapter = is_adapter(self.adapter)
        _check(adapter, f"adapter {shown(self.adapter)} is not a valid name: {ADAPTER_RULE}")
        for what, text in texts.items():
            _check(
                isinstance(text, str), f"{what} of '{self.site}' must be a string: {shown(text)}"
            )
        _check(
            self.parameter in self.names and len(set(self.names)) == len(self.names),
            f"the names of '{self.site}' must be distinct and include '{self.parameter}'",
        )

    def _check_numbers(self) -> None:
        for what, number, low, high in (
            ("r", self.r, 1, MAX_RANK),
            ("rule", self.rule, 1, MAX_SIZE),
            ("padding_idx", self.padding_idx or 0, 0, MAX_SIZE),
        ):
            good = is_whole(number, low, high)
            _check(good, f"{what} of '{self.site}' must be an integer ≥ {low}, not {shown(number)}")
        for what, value in (("alpha", self.alpha), ("scaling", self.scaling)):
            good = is_finite(value)
            _check(good, f"{what} of '{self.site}' must be a finite number, not {shown(value)}")
        dropout = is_finite(self.dropout) and 0 <= self.dropout < 1
        _check(dropout, f"dropout of '{self.site}' must be in [0, 1), not {shown(self.dropout)}")
        shape = isinstance(self.shape, tuple) and all(is_whole(n, 0, MAX_SIZE) for n in self.shape)
        _check(shape, f"shape of '{self.site}' must be a tuple of sizes, not {shown(self.shape)}")

    def _check_tables(self) -> None:
        unknown = set(self.variants) - set(VARIANTS) if isinstance(self.variants, tuple) else set()
        _check(
            not unknown,
            f"'{self.site}' has the variant {some(map(str, unknown))}, which this process does not "
            "know: register it first (fxlora.register_variant)",
        )
        variants = isinstance(self.variants, tuple) and list(self.variants) == [
            name for name in VARIANTS if name in self.variants
        ]
        _check(
            variants, f"'{self.site}' has unknown or misordered variants: {shown(self.variants)}"
        )
        _check(self.form in FORMS, f"'{self.site}' has an unknown form: {shown(self.form)}")
        init = isinstance(self.init, bool | str) and self.init in INITS
        _check(init, f"'{self.site}' has an unknown init: {shown(self.init)}")
        _check_dtype_rule(self.autocast_adapter_dtype, self.site)
        known = isinstance(self.weight_dtype, str) and is_word(self.weight_dtype or "unknown")
        _check(known, f"'{self.site}' has an unknown dtype: {shown(self.weight_dtype)}")
        layout = isinstance(self.layout, Layout) and len(self.layout.roles) == len(self.shape)
        _check(layout, f"the layout of '{self.site}' does not fit its shape")

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
                f"rows of '{self.site}' must be a range of its outputs, not {shown(self.rows)}",
            )
            part = self.site.endswith(f".{self.part}")
            _check(part, f"the name '{self.site}' does not end with its part {shown(self.part)}")
        self._check_tokens()
        rows = self.layout.features(self.shape)[0] if self.layout.in_first else 0
        padding = self.padding_idx is None or self.padding_idx < rows
        _check(
            padding, f"padding_idx of '{self.site}' is not a row of its weight: {self.padding_idx}"
        )

    def _check_tokens(self) -> None:
        tokens, several = self.tokens, isinstance(self.tokens, tuple) and bool(self.tokens)
        _check(several or tokens == (), f"tokens of '{self.site}' must be a tuple of rows")
        if several:
            rows = self.shape[0] if len(self.shape) == 2 else 0
            whole = all(is_whole(token, 0, rows - 1) for token in tokens)
            _check(
                whole and len(set(tokens)) == len(tokens) == self.r,
                f"tokens of '{self.site}' must be {self.r} distinct rows of its {rows}, not "
                f"{shown(tokens)}",
            )
            _check(
                not self.variants and self.rows is None,
                f"the tokens of '{self.site}' have variants or a part",
            )

    # ---- shapes -----------------------------------------------------------------------------

    @property
    def adapted_shape(self) -> Shape:
        """Shape of the adapted tensor: the weight, or the part's slice of it."""
        if self.rows is None:
            return self.shape
        size = list(self.shape)
        size[self.layout.part_dim] = self.rows[1] - self.rows[0]
        return tuple(size)

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """Shapes of A and B (see `Layout.factor_shapes`): (r, in) and (out, r) if W is a matrix."""
        return self.layout.factor_shapes(self.adapted_shape, self.r)

    @property
    def weight_parameters(self) -> int:
        """Number of parameters of the adapted weight, or of the part's slice of it."""
        return math.prod(self.adapted_shape)

    @property
    def adapter_parameters(self) -> int:
        """Number of trainable parameters that the adapter adds: A, B and a variant's."""
        return sum(math.prod(self.tensors[name]) for name in self.trainable)

    # ---- dtypes -----------------------------------------------------------------------------

    def dtype_over(self, weight: torch.dtype) -> torch.dtype:
        """Return the dtype of the adapter's tensors over a weight of this dtype."""
        return held_dtype(self.autocast_adapter_dtype, weight)

    @property
    def notes(self) -> str:
        """The notes of the printed plan: `reason`, and a dtype other than the weight's."""
        weight = DTYPES.get(self.weight_dtype)
        held = weight and self.dtype_over(weight)
        other = f"A and B in {name_of(held)}" if held and held != weight else ""
        return "; ".join(filter(None, (self.reason, other)))

    # ---- names ------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """Path of the module that contains the adapter's tensors in the adapted module."""
        # A bare parameter occupies its own name, so its adapter goes next to it, in a module
        # whose name ends in "_adapter".
        owner = self.site.removesuffix(f".{self.part}") if self.part else self.site
        own = owner if f"{owner}.weight" in self.names else f"{owner}_adapter"
        return f"{own}.{self.part}" if self.part else own

    def name_of(self, kind: str) -> str:
        """Return the name of one of the adapter's tensors in `state_dict()`.

        Args:
            kind: which tensor, by PEFT's name for it ("lora_A", "lora_B", …).
        """
        return f"{self.prefix}.{kind}.{self.adapter}.weight"

    @property
    def name_a(self) -> str:
        """Name of A in the adapted module's `state_dict()`."""
        return self.name_of("lora_A")

    @property
    def name_b(self) -> str:
        """Name of B in the adapted module's `state_dict()`."""
        return self.name_of("lora_B")

    @property
    def variant_tensors(self) -> dict[str, dict[str, Shape]]:
        """Names and shapes of the tensors that each variant adds to A and B, by variant."""
        return {
            variant: {
                self.name_of(kind): shape
                for kind, shape in VARIANTS[variant]
                .tensors(self.layout, self.adapted_shape, self.r)
                .items()
            }
            for variant in self.variants
        }

    def before_variant(self, variant: str) -> Entry:
        """Return the entry with only the variants that come before this one."""
        before = self.variants[: self.variants.index(variant)]
        return dataclasses.replace(self, variants=before)

    def without_gains(self) -> Entry:
        """Return the entry without the variants that scale the outputs."""
        plain = tuple(v for v in self.variants if VARIANTS[v].gain is None)
        return dataclasses.replace(self, variants=plain)

    @property
    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of all tensors that injection adds for the entry."""
        a, b = self.shapes
        found = {self.name_a: a, self.name_b: b}
        for held in self.variant_tensors.values():
            found |= held
        return found

    @property
    def selection(self) -> str | None:
        """Name of the one of A and B that selects the `tokens`: a 1 for each, else zeros."""
        if not self.tokens:
            return None
        return self.name_a if self.layout.in_first else self.name_b

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the trainable tensors: A, B and those of variants that train theirs."""
        frozen = {self.selection}
        frozen |= {self.name_of(kind) for v in self.variants for kind in VARIANTS[v].freezes}
        extra = [n for v, held in self.variant_tensors.items() if VARIANTS[v].trains for n in held]
        return (*(name for name in (self.name_a, self.name_b) if name not in frozen), *extra)

    # ---- as data ----------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        """Return the entry as plain data, without attributes that are None."""
        data = {**dataclasses.asdict(self), "layout": self.layout.roles}
        data["tokens"] = self.tokens or None
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}
        return {key: value for key, value in plain.items() if value is not None}  # TOML has no null

    @classmethod
    def from_data(cls, data: Any) -> Entry:
        """Return the entry in data from `to_data`, or from any other source.

        Raises:
            ConfigError: the data is not a valid entry.
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
        except (TypeError, ValueError) as error:  # a missing attribute; an unknown layout
            raise ConfigError(f"the entry for {shown(data.get('site'))}: {error}") from error


def _check(holds: object, otherwise: str) -> None:
    if not holds:
        raise ConfigError(f"{otherwise}.")


def _check_dtype_rule(rule: object, name: str) -> None:
    known = isinstance(rule, bool) or (isinstance(rule, str) and rule in DTYPES)
    _check(known, f"the dtype for '{name}' must be True, False or a dtype's name: {shown(rule)}")


@dataclass(frozen=True)
class Plan:
    """The adapters that `inject` will add, and the parameters that train in full.

    `match` makes a plan. It can be iterated (over its entries), counted with `len`, printed, and
    passed to `report` and `inject`.

    Attributes:
        entries: one entry per adapter: for each adapted site, or for each adapted part of one.
        trained: names of the parameters to train in full, including biases that `bias=` selects.
        skipped: (site, reason) for every site that is not adapted.
        modules_to_save: paths of the modules and bare parameters that rules train in full.
        model_parameters: number of parameters of the model.
        trained_parameters: number of those that train in full.
        trained_dtypes: the dtypes of parameters trained in full, by name, as in
            `LoraConfig.autocast_adapter_dtype`; True for those that it leaves out.
        adapter: name of the adapter; of the first entry's, if there are entries.
        remarks: what a reader of the printed plan may have overlooked.
        untied: other names of the tensor of a parameter trained in full, by its name, which do not
            train with it: injection splits the tie. (`match` trains a tensor under all its names;
            PEFT's `modules_to_save` splits ties.)
        rules: the rules from which `match` made the plan; empty if it was read from an adapter
            folder that fxlora wrote or another library's file, or if its adapters were scaled or
            combined.
        descriptions: what rules or a folder say of the adapter and its base model: `task_type`,
            `base_model_name_or_path`, … (see LoraConfig). They are written to folders.

    Raises:
        ConfigError: an attribute has a wrong type or value, or two entries of one adapter adapt
            the same rows of a weight.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        >>> module = fxlora.capture(model, torch.randn(2, 6))
        >>> plan = fxlora.match(module, fxlora.LoraConfig(r=2, target_modules=["0"]))
        >>> len(plan), plan.adapter_parameters, plan.model_parameters
        (1, 20, 43)
        >>> plan.entries[0].shapes
        ((2, 6), (4, 2))
        >>> plan.skipped
        (('1', 'no rule matches its linear'),)
    """

    entries: tuple[Entry, ...]
    trained: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    model_parameters: int = 0
    trained_parameters: int = 0
    rules: tuple[Rule, ...] = ()
    trained_dtypes: Mapping[str, DtypeRule] = field(default_factory=dict[str, DtypeRule])
    descriptions: Mapping[str, Any] = field(default_factory=dict[str, Any])
    remarks: tuple[str, ...] = ()
    untied: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    adapter: str = "default"

    def __post_init__(self) -> None:
        counts = (self.model_parameters, self.trained_parameters)
        _check(
            all(is_whole(n, 0, MAX_SIZE) for n in counts),
            f"the numbers of parameters must be integers ≥ 0, not {shown(counts)}",
        )
        entries = isinstance(self.entries, tuple) and all(isinstance(e, Entry) for e in self)
        _check(entries, "the entries of a plan must be a tuple of Entry")
        if self.entries:
            object.__setattr__(self, "adapter", self.entries[0].adapter)
        adapter = is_adapter(self.adapter)
        _check(adapter, f"adapter {shown(self.adapter)} is not a valid name: {ADAPTER_RULE}")
        for what in ("trained", "modules_to_save"):
            names = getattr(self, what)
            paths = isinstance(names, tuple) and all(map(is_path, names))
            _check(paths, f"{what} must be a tuple of valid names in a graph, not {shown(names)}")
        _check(isinstance(self.trained_dtypes, Mapping), "trained_dtypes must be a mapping")
        for name, rule in self.trained_dtypes.items():
            _check(name in self.trained, f"trained_dtypes has {shown(name)}, which does not train")
            _check_dtype_rule(rule, name)
        _check(isinstance(self.untied, Mapping), "untied must be a mapping")
        for name, others in self.untied.items():
            paths = isinstance(others, tuple) and all(map(is_path, others))
            _check(name in self.trained, f"untied has {shown(name)}, which does not train")
            _check(
                paths and name not in others,
                f"untied must hold other names than '{name}', not {shown(others)}",
            )
        self._check_apart()

    def _check_apart(self) -> None:
        """Raise if two entries adapt the same rows of a weight, or their tensors' names collide."""
        prefixes = Counter((entry.prefix, entry.adapter) for entry in self)
        twice = [prefix for (prefix, _), count in prefixes.items() if count > 1]
        _check(not twice, f"the plan has {some(twice)} more than once")
        held: dict[str, list[Entry]] = {}
        for entry in self:
            for name in entry.names:
                held.setdefault(name, []).append(entry)
        for name, sharing in held.items():
            for adapter in dict.fromkeys(entry.adapter for entry in sharing):
                rows = sorted(e.rows or (0, MAX_SIZE) for e in sharing if e.adapter == adapter)
                apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(rows))
                _check(apart, f"the plan adapts the same rows of '{name}' more than once")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def with_adapter_dtype(self, rule: DtypeRule) -> Plan:
        """Return the plan with one dtype rule for all adapters and parameters trained in full."""
        entries = tuple(dataclasses.replace(e, autocast_adapter_dtype=rule) for e in self)
        trained = dict.fromkeys(self.trained, rule)
        return dataclasses.replace(self, entries=entries, trained_dtypes=trained)

    def over(self, weights: Mapping[str, torch.Tensor]) -> Plan:
        """Return the plan with the dtypes of a module's weights, for its notes."""
        entries = tuple(
            dataclasses.replace(e, weight_dtype=name_of(weights[e.parameter].dtype)) for e in self
        )
        return dataclasses.replace(self, entries=entries)

    def trained_dtype(self, name: str, weight: torch.dtype) -> torch.dtype:
        """Return the dtype in which a parameter of this dtype in the model trains in full.

        It holds the model's values exactly: a narrower one would change the outputs.
        """
        held = held_dtype(self.trained_dtypes.get(name, True), weight)
        exact = held == weight or torch.promote_types(held, weight) == held
        return held if exact else weight

    @cached_property
    def one_adapter(self) -> bool:
        """Whether all entries are of one adapter."""
        return len({entry.adapter for entry in self}) < 2

    def label(self, entry: Entry) -> str:
        """Return the site of an entry for a table, with the adapter's name if there are several."""
        return entry.site if self.one_adapter else f"{entry.site} ({entry.adapter})"

    @property
    def inference_mode(self) -> bool:
        """Whether the adapters and the parameters trained in full start frozen."""
        return any(rule.lora is not None and rule.lora.inference_mode for rule in self.rules)

    @property
    def adapter_parameters(self) -> int:
        """Number of trainable parameters that all adapters add together."""
        return sum(entry.adapter_parameters for entry in self)

    @property
    def split_ties(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The ties that a fold splits, each as groups of names that stay one weight.

        The groups that entries adapt or that train come first, then the other names, if any.
        """
        ties: dict[frozenset[str], dict[tuple[str, ...], None]] = {}
        for entry in self:
            if entry.tied:
                ties.setdefault(frozenset((*entry.names, *entry.tied)), {})[entry.names] = None
        for name, others in self.untied.items():
            ties.setdefault(frozenset((name, *others)), {})[(name,)] = None
        found: list[tuple[tuple[str, ...], ...]] = []
        for names, groups in ties.items():
            left = names.difference(*groups)
            found.append((*groups, tuple(sorted(left))) if left else tuple(groups))
        return tuple(found)

    def __str__(self) -> str:
        header = ["site", "op", "weight", "form", "r", "alpha", "+parameters", "rule", "note"]
        rows = [
            [
                self.label(e),
                e.op,
                "x".join(map(str, e.adapted_shape)),
                e.form,
                e.r,
                f"{e.alpha:g}",
                f"{e.adapter_parameters:,}",
                e.rule,
                e.notes,
            ]
            for e in self
        ]
        lines = [render(header, rows)]
        lines.append(
            f"{count(len(self), 'site')} adapted with {self.adapter_parameters:,} parameters."
        )
        if self.modules_to_save:
            saved = ", ".join(map(printable, self.modules_to_save))
            lines.append(f"Trained in full: {saved}.")
        alone = [f"  {site}: {reason}" for site, reason in self.skipped if reason != IN_FULL]
        alone = list(map(printable, alone))
        if alone:
            lines += [f"{count(len(alone), 'site')} left alone:", *alone]
        lines += map(printable, self.remarks)
        return "\n".join(lines)

    def to_data(self) -> dict[str, Any]:
        """Return the rules (unless the plan has none) and the sites as plain data.

        Raises:
            ConfigError: a rule has a `where=` function, which cannot be written to a file.
        """
        rules = [rule_to_data(rule) for rule in self.rules]
        sites = [entry.to_data() for entry in self]
        return {"version": 1, **({"rule": rules} if rules else {}), "site": sites}

    def to_json(self) -> str:
        """Return the plan as JSON, as content for a rules file (see `load_rules`).

        Raises:
            ConfigError: a rule has a `where=` function, which cannot be written to a file.
        """
        return json.dumps(self.to_data(), indent=2)

    def to_toml(self) -> str:
        """Return the plan as TOML, as content for a rules file (see `load_rules`).

        A comment at its top says which part of it to edit, if any.

        Raises:
            ConfigError: a rule has a `where=` function, which cannot be written to a file.
        """
        text = (_HEAD if self.rules else _HEAD_WITHOUT_RULES) + tomli_w.dumps(self.to_data())
        # tomli_w leaves some unprintable characters as they are. It writes basic strings only, in
        # which a \U escape is valid.
        return "".join(c if c.isprintable() or c == "\n" else f"\\U{ord(c):08x}" for c in text)


def joined(plans: Sequence[Plan]) -> Plan:
    """Return one plan of several adapters on one model; of one, its own plan."""
    if len(plans) == 1:
        return plans[0]
    first = plans[0]
    adapted = {entry.site for plan in plans for entry in plan}
    return Plan(
        entries=tuple(entry for plan in plans for entry in plan),
        trained=tuple(dict.fromkeys(n for plan in plans for n in plan.trained)),
        skipped=tuple((site, why) for site, why in first.skipped if site not in adapted),
        modules_to_save=tuple(dict.fromkeys(n for plan in plans for n in plan.modules_to_save)),
        model_parameters=first.model_parameters,
        trained_parameters=sum(plan.trained_parameters for plan in plans),
        trained_dtypes={n: rule for plan in plans for n, rule in plan.trained_dtypes.items()},
        descriptions=first.descriptions,
        untied={n: others for plan in plans for n, others in plan.untied.items()},
        adapter=first.adapter,
    )


def separated(plan: Plan) -> dict[str, Plan]:
    """Return the plan of each adapter in a plan, by name; the first one's has all but entries."""
    names = dict.fromkeys([plan.adapter, *(entry.adapter for entry in plan)])
    if len(names) == 1:
        return {plan.adapter: plan}
    found: dict[str, Plan] = {}
    for name in names:
        entries = tuple(entry for entry in plan if entry.adapter == name)
        rest = plan if not found else Plan((), model_parameters=plan.model_parameters)
        found[name] = dataclasses.replace(rest, entries=entries, adapter=name)
    return found
