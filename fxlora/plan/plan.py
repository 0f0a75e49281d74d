"""Plan: the decisions of `match`, as data to print, count, write to a file and inject."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tomli_w
import torch

from ..config import MAX_SIZE, Rule, is_whole, rule_to_data
from ..lora.dtypes import DtypeRule, held_dtype, name_of
from ..names import ADAPTER_RULE, is_adapter, is_path, printable, shown
from ..tables import count, render, some
from .entry import Entry, check, check_dtype_rule

IN_FULL = "trained in full"
_HEAD = """\
# A plan of fxlora. Edit the rules: they are matched again when the file is read.
# The sites below them only show what the rules chose; they are not read.
"""
_HEAD_WITHOUT_RULES = """\
# The plan of an adapter that was loaded, scaled or combined. It has no rules to edit.
"""


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
        check(
            all(is_whole(n, 0, MAX_SIZE) for n in counts),
            f"the numbers of parameters must be integers ≥ 0, not {shown(counts)}",
        )
        entries = isinstance(self.entries, tuple) and all(isinstance(e, Entry) for e in self)
        check(entries, "the entries of a plan must be a tuple of Entry")
        if self.entries:
            object.__setattr__(self, "adapter", self.entries[0].adapter)
        adapter = is_adapter(self.adapter)
        check(adapter, f"adapter {shown(self.adapter)} is not a valid name: {ADAPTER_RULE}")
        for what in ("trained", "modules_to_save"):
            names = getattr(self, what)
            paths = isinstance(names, tuple) and all(map(is_path, names))
            check(paths, f"{what} must be a tuple of valid names in a graph, not {shown(names)}")
        twice = [name for name, count in Counter(self.trained).items() if count > 1]
        check(not twice, f"the plan trains {some(twice)} more than once")
        check(isinstance(self.trained_dtypes, Mapping), "trained_dtypes must be a mapping")
        for name, rule in self.trained_dtypes.items():
            check(name in self.trained, f"trained_dtypes has {shown(name)}, which does not train")
            check_dtype_rule(rule, name)
        check(isinstance(self.untied, Mapping), "untied must be a mapping")
        for name, others in self.untied.items():
            paths = isinstance(others, tuple) and all(map(is_path, others))
            check(name in self.trained, f"untied has {shown(name)}, which does not train")
            check(
                paths and name not in others,
                f"untied must hold other names than '{name}', not {shown(others)}",
            )
        self._check_apart()

    def _check_apart(self) -> None:
        """Raise if two entries adapt the same rows of a weight, or their tensors' names collide."""
        prefixes = Counter((entry.prefix, entry.adapter) for entry in self)
        twice = [prefix for (prefix, _), count in prefixes.items() if count > 1]
        check(not twice, f"the plan has {some(twice)} more than once")
        held: dict[str, list[Entry]] = {}
        for entry in self:
            for name in entry.names:
                held.setdefault(name, []).append(entry)
        for name, sharing in held.items():
            for adapter in dict.fromkeys(entry.adapter for entry in sharing):
                rows = sorted(e.rows or (0, MAX_SIZE) for e in sharing if e.adapter == adapter)
                apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(rows))
                check(apart, f"the plan adapts the same rows of '{name}' more than once")

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
