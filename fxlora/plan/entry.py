"""One adapter of a plan: what it reads, where, and with which tensors."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..config import MAX_RANK, MAX_SIZE, is_finite, is_whole
from ..errors import ConfigError
from ..lora.dtypes import DTYPES, DtypeRule, held_dtype, name_of
from ..lora.inits import INITS
from ..lora.layout import Layout, Shape
from ..lora.variants import VARIANTS
from ..names import ADAPTER_RULE, WORD_RULE, is_adapter, is_path, is_word, shown
from ..tables import some

FORMS = ("branch", "weight")


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
            check(is_path(name), f"{what} {shown(name)} is not a valid name in a graph")
        for what, names in lists.items():
            paths = isinstance(names, tuple) and all(map(is_path, names))
            check(paths, f"{what} must be a tuple of valid names in a graph, not {shown(names)}")
        part = self.part is None or is_word(self.part)
        check(part, f"part {shown(self.part)} is not a valid name: {WORD_RULE}")
        adapter = is_adapter(self.adapter)
        check(adapter, f"adapter {shown(self.adapter)} is not a valid name: {ADAPTER_RULE}")
        for what, text in texts.items():
            check(isinstance(text, str), f"{what} of '{self.site}' must be a string: {shown(text)}")
        check(
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
            check(good, f"{what} of '{self.site}' must be an integer ≥ {low}, not {shown(number)}")
        for what, value in (("alpha", self.alpha), ("scaling", self.scaling)):
            good = is_finite(value)
            check(good, f"{what} of '{self.site}' must be a finite number, not {shown(value)}")
        dropout = is_finite(self.dropout) and 0 <= self.dropout < 1
        check(dropout, f"dropout of '{self.site}' must be in [0, 1), not {shown(self.dropout)}")
        shape = isinstance(self.shape, tuple) and all(is_whole(n, 0, MAX_SIZE) for n in self.shape)
        check(shape, f"shape of '{self.site}' must be a tuple of sizes, not {shown(self.shape)}")

    def _check_tables(self) -> None:
        unknown = set(self.variants) - set(VARIANTS) if isinstance(self.variants, tuple) else set()
        check(
            not unknown,
            f"'{self.site}' has the variant {some(map(str, unknown))}, which this process does not "
            "know: register it first (fxlora.register_variant)",
        )
        variants = isinstance(self.variants, tuple) and list(self.variants) == [
            name for name in VARIANTS if name in self.variants
        ]
        check(variants, f"'{self.site}' has unknown or misordered variants: {shown(self.variants)}")
        check(self.form in FORMS, f"'{self.site}' has an unknown form: {shown(self.form)}")
        init = isinstance(self.init, bool | str) and self.init in INITS
        check(init, f"'{self.site}' has an unknown init: {shown(self.init)}")
        check_dtype_rule(self.autocast_adapter_dtype, self.site)
        known = isinstance(self.weight_dtype, str) and is_word(self.weight_dtype or "unknown")
        check(known, f"'{self.site}' has an unknown dtype: {shown(self.weight_dtype)}")
        layout = isinstance(self.layout, Layout) and len(self.layout.roles) == len(self.shape)
        check(layout, f"the layout of '{self.site}' does not fit its shape")

    def _check_ranges(self) -> None:
        check(
            (self.part is None) == (self.rows is None),
            f"'{self.site}' has a part without rows, or rows without a part",
        )
        if self.rows is not None:
            outputs = self.shape[self.layout.part_dim]
            pair = isinstance(self.rows, tuple) and len(self.rows) == 2
            whole = pair and all(is_whole(n, 0, outputs) for n in self.rows)
            check(
                whole and self.rows[0] < self.rows[1],
                f"rows of '{self.site}' must be a range of its outputs, not {shown(self.rows)}",
            )
            part = self.site.endswith(f".{self.part}")
            check(part, f"the name '{self.site}' does not end with its part {shown(self.part)}")
        self._check_tokens()
        rows = self.layout.features(self.shape)[0] if self.layout.in_first else 0
        padding = self.padding_idx is None or self.padding_idx < rows
        check(
            padding, f"padding_idx of '{self.site}' is not a row of its weight: {self.padding_idx}"
        )

    def _check_tokens(self) -> None:
        tokens, several = self.tokens, isinstance(self.tokens, tuple) and bool(self.tokens)
        check(several or tokens == (), f"tokens of '{self.site}' must be a tuple of rows")
        if several:
            rows = self.shape[0] if len(self.shape) == 2 else 0
            whole = all(is_whole(token, 0, rows - 1) for token in tokens)
            check(
                whole and len(set(tokens)) == len(tokens) == self.r,
                f"tokens of '{self.site}' must be {self.r} distinct rows of its {rows}, not "
                f"{shown(tokens)}",
            )
            check(
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


def check(holds: object, otherwise: str) -> None:
    if not holds:
        raise ConfigError(f"{otherwise}.")


def check_dtype_rule(rule: object, name: str) -> None:
    known = isinstance(rule, bool) or (isinstance(rule, str) and rule in DTYPES)
    check(known, f"the dtype for '{name}' must be True, False or a dtype's name: {shown(rule)}")


def scales_outputs(entry: Entry) -> bool:
    """Whether one of the entry's variants multiplies the outputs by a factor, as DoRA does."""
    return any(VARIANTS[variant].gain for variant in entry.variants)


def overlap(one: Entry, other: Entry) -> bool:
    """Whether two entries of one weight adapt some of the same outputs."""
    if one.rows is None or other.rows is None:
        return True
    return one.rows[0] < other.rows[1] and other.rows[0] < one.rows[1]
