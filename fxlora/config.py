"""What the user says: LoraConfig (PEFT's words) and Rule. Data, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data import as_path, parsed, read_text
from .errors import ConfigError, warn
from .lora.inits import INITS
from .lora.parts import Parts, check_parts
from .lora.variants import VARIANTS
from .names import shown
from .tables import some

MAX_RANK = 2**20
MAX_SIZE = 2**48  # of a dimension, a number of parameters, …

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
        if not is_finite(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {shown(self.lora_dropout)}.")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
            _check_one_of(name, getattr(self, name), (True, False))
        _check_one_of("bias", self.bias, ("none", "all", "lora_only"))
        _check_one_of("tied", self.tied, ("rule", "share"))
        _check_one_of("variant", self.variant, (*sorted(VARIANTS), None))
        _check_one_of("init_lora_weights", self.init_lora_weights, INITS)
        if not isinstance(self.task_type, str | None):
            raise ConfigError(f"task_type must be a text, not {shown(self.task_type)}.")
        if self.use_dora and self.variant not in (None, "dora"):
            raise ConfigError(f"use_dora=True and variant={self.variant!r} contradict each other.")
        self._normalise_names()
        self._normalise_layers()
        self._normalise_patterns()

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

    def _normalise_layers(self) -> None:
        patterns = self.layers_pattern or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            # (the group around the layer's number must be the first)
            _check_regex("layers_pattern", pattern, r"(?:.*\.)?{}\.(\d+)\.", groups=1)
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform.")
        layers = self.layers_to_transform
        if layers is None:
            return
        numbers = tuple(layers) if isinstance(layers, Sequence) else (layers,)
        if not all(is_whole(n, 0, MAX_SIZE) for n in numbers):
            raise ConfigError(f"layers_to_transform must be layer numbers, not {shown(layers)}.")
        object.__setattr__(self, "layers_to_transform", numbers)

    def _normalise_patterns(self) -> None:
        for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
            pattern = getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"{name} must be a mapping of names to numbers.")
            for key, value in pattern.items():
                _check_regex(f"{name}[{shown(key)}]", key, r"(.*\.)?({})$")
                check(f"{name}[{shown(key)}]", value)
            object.__setattr__(self, name, dict(pattern))

    @property
    def row(self) -> str | None:
        """The row of `fxlora.variants` that `variant` or `use_dora` ask for."""
        return "dora" if self.use_dora else self.variant

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
            if value is not None and not is_whole(value, 0, MAX_SIZE):
                raise ConfigError(f"{name} must be a number of features, not {shown(value)}.")
        self._check_kernel_size()
        _check_one_of("train", self.train, (True, False))
        check_parts(self.parts, self.enable)
        if self.lora is not None and not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora must be a LoraConfig or None, not {shown(self.lora)}.")
        if self.train and (self.parts is not None or self.lora != LoraConfig()):
            raise ConfigError("train=True trains in full: lora= and parts= say another thing.")
        if self.where is not None and not callable(self.where):
            raise ConfigError(f"where must be a function of a Site, not {shown(self.where)}.")
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
        if size is None:
            return
        sizes = tuple(size) if isinstance(size, Sequence) else (size,)
        if not sizes or not all(is_whole(n, 1, MAX_SIZE) for n in sizes):
            raise ConfigError(
                f"kernel_size must be a number or a tuple of them, not {shown(size)}."
            )
        if not isinstance(size, int):
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
    if not isinstance(rules, LoraConfig | Rule | Sequence) or isinstance(rules, bytes):
        raise ConfigError(f"rules are a LoraConfig, Rules or a file's path, not {shown(rules)}.")
    items = [rules] if isinstance(rules, LoraConfig | Rule) else list(rules)
    if not items:
        raise ConfigError("no rules: give a LoraConfig or a list of Rules.")
    return tuple(_as_rule(item) for item in items)


def _as_rule(item: object) -> Rule:
    if isinstance(item, Rule):
        return item
    if not isinstance(item, LoraConfig):
        raise ConfigError(f"a rule is a Rule or a LoraConfig, not {shown(item)}.")
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
    path = as_path(path, ConfigError)
    where = f"rules file {path}"
    text = read_text(path, where, ConfigError)
    return rules_from_data(parsed(text, where, ConfigError, path.suffix), where)


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
        raise ConfigError(f"{where}: expected a table (or false), found {shown(table)}.")
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


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value of any kind is a whole number in these bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_finite(value: object) -> bool:
    """Whether a value of any kind is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # (a comparison takes integers of any size)


def _check_one_of(name: str, value: object, allowed: Sequence[Any]) -> None:
    if any(isinstance(value, type(one)) and value == one for one in allowed):
        return
    if set(allowed) == {True, False}:
        raise ConfigError(f"{name} must be True or False, not {shown(value)}.")
    *names, last = (f'"{one}"' if isinstance(one, str) else str(one) for one in allowed)
    raise ConfigError(f"{name} must be {', '.join(names)} or {last}, not {shown(value)}.")


def _check_rank(name: str, value: object) -> None:
    if not is_whole(value, 1, MAX_RANK):
        bound = f" and ≤ {MAX_RANK}" if is_whole(value, 1, sys.maxsize) else ""
        raise ConfigError(f"{name} must be a whole number ≥ 1{bound}, not {shown(value)}.")


def _check_alpha(name: str, value: Any) -> None:
    if not is_finite(value) or value <= 0:
        raise ConfigError(
            f"{name} must be a finite number > 0, not {shown(value)} (at 0 the branch has no "
            "effect)."
        )
    if value != int(value):
        warn(
            f"{name}={value} is not a whole number; it is used as it is, but PEFT's "
            "configuration declares an integer there."
        )


def _check_regex(name: str, value: Any, within: str = "{}", groups: int | None = None) -> None:
    """Raise unless a value is a regular expression, also inside the one that it is used in."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {shown(value)} is not a regular expression, but no text.")
    try:
        re.compile(value)
        compiled = re.compile(within.replace("{}", value))
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"{name}: {shown(value)} is not a regular expression: {error}."
        ) from error
    if groups is not None and compiled.groups != groups:
        raise ConfigError(f"{name}: {shown(value)} must have no groups: write (?:…).")


def _names(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = list(value) if isinstance(value, set | frozenset) else value
    if not isinstance(items, Sequence) or not all(isinstance(i, str) and i for i in items):
        raise ConfigError(f"{name} must be a name or a list of names, not {shown(value)}.")
    if not items:
        raise ConfigError(f"{name} is an empty list: it would match nothing.")
    return tuple(sorted(items) if isinstance(value, set | frozenset) else items)


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(shown(key) for key in set(table) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {some(unknown)}. Known: {', '.join(sorted(known))}."
        )
