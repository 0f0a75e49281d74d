"""What the user says: LoraConfig (PEFT's words) and Rule. Data, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, warn
from .lora.inits import INITS
from .lora.parts import Parts, check_parts
from .lora.variants import VARIANTS

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the newer module under its older name
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Names = str | Sequence[str] | None
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's LoraConfig: its names, its defaults, its matching.

    Attributes:
        r: the rank, ≥ 1.
        lora_alpha: the branch is scaled by `lora_alpha / r`, with `use_rslora` by
            `lora_alpha / sqrt(r)` (Kalajdzievski 2023, eq. 4).
        target_modules: a list of names, each matching whole or as a dotted suffix; or one
            string, a regular expression for the whole name; or "all-linear".
        exclude_modules: as target_modules; what it matches is left alone.
        lora_dropout: probability of zeroing an entry of the branch's input, in train mode. With
            DoRA the base's own output is scaled as it is (PEFT computes it again from the dropped
            input, so that dropout there also drops from the frozen layer).
        modules_to_save: modules (whole name or dotted suffix) trained in full, as copies.
        bias: "none"; "all" biases or those of adapted layers ("lora_only") train too.
        use_dora: PEFT's word for `variant="dora"`.
        init_lora_weights: True or "kaiming_uniform" (A Kaiming uniform with a=√5, B zero; an
            embedding has A zero and B normal, as in loralib), "kaiming_normal", "gaussian"
            (A normal with deviation 1/r), "orthogonal" (both random, BA = 0), "pissa" and "olora"
            (from the weight, which is trained less that), False (A and B both Kaiming uniform: no
            identity).
        rank_pattern, alpha_pattern: `{regular expression for the end of a name: value}`.
        layers_to_transform, layers_pattern: only layers of these numbers.
        target_parameters: names of parameters (whole or dotted suffix).
        variant: a row of `fxlora.variants` ("dora"), or None for plain LoRA.
        tied: of a weight under several names, a rule adapts the reads that go by the names that
            it matches ("rule"), or all of them ("share").
        task_type, fan_in_fan_out: taken so that PEFT's scripts run; a graph needs neither.
    """

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    target_parameters: Sequence[str] | None = None
    variant: str | None = None
    tied: Literal["rule", "share"] = "rule"
    task_type: str | None = None
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f'bias must be "none", "all" or "lora_only", not {self.bias!r}.')
        if self.tied not in ("rule", "share"):
            raise ConfigError(f'tied must be "rule" or "share", not {self.tied!r}.')
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        self._check_variant()
        if not any(self.init_lora_weights is i or self.init_lora_weights == i for i in INITS):
            raise ConfigError(
                f"init_lora_weights must be one of {', '.join(map(repr, INITS))}, "
                f"not {self.init_lora_weights!r}."
            )
        self._normalise_names()
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"{name} must be a mapping of names to numbers.")
            for key, value in pattern.items():
                _check_regex(f"{name}[{key!r}]", key)
                check(f"{name}[{key!r}]", value)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform.")

    def _check_variant(self) -> None:
        if self.variant is not None and self.variant not in VARIANTS:
            names = ", ".join(sorted(VARIANTS))
            raise ConfigError(f"variant must be one of {names}, not {self.variant!r}.")
        if self.use_dora and self.variant not in (None, "dora"):
            raise ConfigError(f"use_dora=True and variant={self.variant!r} contradict each other.")
        if self.use_dora:
            object.__setattr__(self, "variant", "dora")

    def _normalise_names(self) -> None:
        """Sequences of names as tuples, so that a configuration compares by value."""
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_regex(name, value)
            else:
                object.__setattr__(self, name, _names(name, value))
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} must be a list of names, not the string {value!r}.")
            object.__setattr__(self, name, _names(name, value))
        layers = self.layers_to_transform
        if layers is None:
            return
        numbers = (layers,) if isinstance(layers, int) else tuple(layers)
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ConfigError(f"layers_to_transform must be layer numbers, not {layers!r}.")
        object.__setattr__(self, "layers_to_transform", numbers)

    @property
    def targets_anything(self) -> bool:
        return self.target_modules is not None or self.target_parameters is not None

    def scaling(self, r: int, alpha: float) -> float:
        """The factor s of the branch: alpha/r, or alpha/√r with rsLoRA."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)


@dataclass(frozen=True)
class Rule:
    """Which sites, and what to do with them. All keys that are given must match.

    Attributes:
        name: glob (`*.attn.*`), `re:` and a regular expression, or a name that matches whole
            or as a dotted suffix; a list of those matches any. None matches every name.
        op: kind of the op that reads the weight ("linear", "conv2d", "embedding", "addmm",
            …), a glob (`conv*`) or a list.
        min_features, max_features: bounds on both in and out features.
        min_in_features, …: bounds on one of them.
        kernel_size: of a convolution; a number stands for all its dimensions.
        where: a function of the `Site`, true where the rule holds.
        lora: the configuration, or None to leave the sites alone.
        train: train the weight's module in full (as a copy) instead; also what no LoRA could take,
            a norm or a bias, by its name.
        parts: the weight is several in one, beside each other in its output dimension, and each
            gets an adapter of its own. How many equal parts, or by name: sizes (`{"q": 64,
            "k": 16, "v": 16}`, all of them in order) or ranges (`{"q": (0, 64), "v": (80, 96)}`).
        enable: which of the parts: a flag for each, or their names. All by default.
    """

    name: Names = None
    _: dataclasses.KW_ONLY
    op: Names = None
    min_features: int | None = None
    max_features: int | None = None
    min_in_features: int | None = None
    max_in_features: int | None = None
    min_out_features: int | None = None
    max_out_features: int | None = None
    kernel_size: int | Sequence[int] | None = None
    where: Callable[[Any], bool] | None = None
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    train: bool = False
    parts: Parts = None
    enable: Sequence[bool] | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "op"):
            value = getattr(self, name)
            names = (value,) if isinstance(value, str) else _names(name, value)
            object.__setattr__(self, name, names)
        for pattern in self.name or ():
            if pattern.startswith("re:"):
                _check_regex("name", pattern[3:])
        for name in _BOUNDS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name} must be a number of features, not {value!r}.")
        self._check_kernel_size()
        check_parts(self.parts, self.enable)
        if self.train and (self.parts is not None or self.lora != LoraConfig()):
            raise ConfigError("train=True trains in full: lora= and parts= say another thing.")
        if self.where is not None and not callable(self.where):
            raise ConfigError(f"where must be a function of a Site, not {self.where!r}.")
        if self.lora is not None and not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora must be a LoraConfig or None, not {self.lora!r}.")
        if self.lora is not None and self.lora.targets_anything and self.name is not None:
            raise ConfigError(
                "a rule with a name and a LoraConfig with target_modules say which sites "
                "twice. Keep one of the two."
            )

    @property
    def bounds(self) -> tuple[int | None, ...]:
        """The bounds on features."""
        return tuple(getattr(self, name) for name in _BOUNDS)

    def _check_kernel_size(self) -> None:
        size = self.kernel_size
        sizes = (size,) if isinstance(size, int) or size is None else tuple(size)
        if size is not None and not all(isinstance(n, int) and n > 0 for n in sizes):
            raise ConfigError(f"kernel_size must be a number or a tuple of them, not {size!r}.")
        if sizes != (size,):
            object.__setattr__(self, "kernel_size", sizes)

    def describe(self) -> str:
        """The rule's keys in a line, for messages."""
        if self.name is not None:
            return ", ".join(f"'{name}'" for name in self.name)
        target = self.lora.target_modules if self.lora else None
        if target is not None:
            return repr(target) if isinstance(target, str) else ", ".join(map(repr, target))
        keys = [f"{k}={getattr(self, k)!r}" for k in ("op", *_BOUNDS, "kernel_size", "where")]
        return ", ".join(k for k in keys if not k.endswith("=None")) or "every site"


_BOUNDS = tuple(f"{end}_{side}features" for side in ("", "in_", "out_") for end in ("min", "max"))

Rules = LoraConfig | Rule | Sequence[Rule | LoraConfig]


def as_rules(rules: Rules | Mapping[str, Any] | str | Path) -> tuple[Rule, ...]:
    """Any way to write rules as a tuple of Rules: objects, a mapping, or a file's path."""
    if isinstance(rules, str | Path):
        return load_rules(rules)
    if isinstance(rules, Mapping):
        return rules_from_data(rules, "the rules")
    if not isinstance(rules, LoraConfig | Rule | Sequence):
        raise ConfigError(f"rules are a LoraConfig, Rules or a file's path, not {rules!r}.")
    items = [rules] if isinstance(rules, LoraConfig | Rule) else list(rules)
    if not items:
        raise ConfigError("no rules: give a LoraConfig or a list of Rules.")
    return tuple(_as_rule(item) for item in items)


def _as_rule(item: object) -> Rule:
    if isinstance(item, Rule):
        return item
    if not isinstance(item, LoraConfig):
        raise ConfigError(f"a rule is a Rule or a LoraConfig, not {item!r}.")
    if not item.targets_anything:
        raise ConfigError(
            "a LoraConfig on its own needs target_modules (or target_parameters): name them, "
            'or take target_modules="all-linear".'
        )
    return Rule(lora=item)


# ---- rules as data: TOML and JSON ---------------------------------------------------------------


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read rules from a TOML or JSON file (`[[rule]]` tables, or one `[lora]` table).

    Raises:
        ConfigError: the file cannot be read, or a key or a value is not one that rules have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"rules file {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"rules file {path} is not valid: {error}.") from error
    return rules_from_data(data, f"rules file {path}")


def rules_from_data(data: Any, where: str) -> tuple[Rule, ...]:
    """Rules from `{"rule": [...]}` or `{"lora": {...}}`."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a table, found {type(data).__name__}.")
    # "site" and "version" are what a written plan has besides; match works the sites out anew.
    _check_keys(data, {"rule", "lora", "site", "version"}, where)
    if ("rule" in data) == ("lora" in data):
        raise ConfigError(f"{where}: give either [[rule]] tables or one [lora] table.")
    if "lora" in data:
        return (_as_rule(_config_from_data(data["lora"], f"{where}, [lora]")),)
    tables = data["rule"]
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{where}: 'rule' must be a list of tables, with at least one.")
    return tuple(
        _rule_from_data(table, f"{where}, rule {number}") for number, table in enumerate(tables, 1)
    )


def _rule_from_data(table: Any, where: str) -> Rule:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table, found {type(table).__name__}.")
    fields = {f.name for f in dataclasses.fields(Rule)} - {"_", "where"}
    _check_keys(table, fields, where)
    values = dict(table)
    lora = values.pop("lora", {})
    if lora is False:
        values["lora"] = None
    else:
        values["lora"] = _config_from_data(lora, f"{where}, lora")
    return _made(Rule, values, where)


def _config_from_data(table: Any, where: str) -> LoraConfig:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table (or false), found {table!r}.")
    _check_keys(table, {f.name for f in dataclasses.fields(LoraConfig)}, where)
    return _made(LoraConfig, dict(table), where)


def _made(kind: Callable[..., Any], values: dict[str, Any], where: str) -> Any:
    try:
        return kind(**values)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def rule_to_data(rule: Rule) -> dict[str, Any]:
    """A rule as plain data: what differs from the defaults.

    Raises:
        ConfigError: the rule has a `where=` function, which no file can hold.
    """
    if rule.where is not None:
        raise ConfigError(
            f"the rule {rule.describe()} has where=, a function, and cannot be written to a "
            "file. Say the same by name, op or shape."
        )
    data = _differences(rule, Rule(), {"lora", "_", "where"})
    if rule.lora is None:
        data["lora"] = False
    elif not rule.train:
        data["lora"] = config_to_data(rule.lora)
    return data


def config_to_data(config: LoraConfig) -> dict[str, Any]:
    """A configuration as plain data: r and alpha, and what differs from the defaults."""
    data = _differences(config, LoraConfig(), set())
    return {"r": config.r, "lora_alpha": config.lora_alpha, **data}


def _differences(item: Any, default: Any, leave: set[str]) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(item) if f.name not in leave]
    changed = [n for n in names if getattr(item, n) != getattr(default, n)]
    return {name: _plain(getattr(item, name)) for name in changed}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


# ---- checks -------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number ≥ 1, not {value!r}.")


def _check_alpha(name: str, value: object) -> None:
    if not _is_number(value) or float(value) <= 0:  # pyright: ignore[reportArgumentType]
        raise ConfigError(
            f"{name} must be a finite number > 0, not {value!r} (at 0 the branch has no effect)."
        )
    if float(value) != int(value):  # pyright: ignore[reportArgumentType]
        warn(
            f"{name}={value} is not a whole number; it is used as it is, but PEFT's "
            "configuration declares an integer there."
        )


def _check_regex(name: str, value: object) -> None:
    try:
        re.compile(value)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (re.error, TypeError) as error:
        raise ConfigError(f"{name}: {value!r} is not a regular expression: {error}.") from error


def _names(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = sorted(value) if isinstance(value, set | frozenset) else value
    if not isinstance(items, Sequence) or not all(isinstance(i, str) and i for i in items):
        raise ConfigError(f"{name} must be a name or a list of names, not {value!r}.")
    if not items:
        raise ConfigError(f"{name} is an empty list: it would match nothing.")
    return tuple(items)


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}. "
            f"Known: {', '.join(sorted(known))}."
        )
