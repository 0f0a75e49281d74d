"""LoraConfig and Rule: the rules by which weights are adapted, as data checked on creation.

Rules can also be read from TOML and JSON files, and written as plain data.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from .data import as_path, parsed, read_text
from .errors import ConfigError, warn
from .lora.dtypes import DtypeRule, dtype_rule
from .lora.inits import INITS
from .lora.parts import Parts, check_parts
from .lora.variants import VARIANTS
from .names import shown
from .tables import did_you_mean, some

MAX_RANK = 2**20
MAX_SIZE = 2**48  # limit for sizes of dimensions, numbers of parameters, layer numbers, …

Names = str | Sequence[str] | None
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Configuration of LoRA, with the field names, defaults and name matching of PEFT's LoraConfig.

    The adapted weight is W0 + s·BA (Hu et al. 2021, LoRA, eq. 3) with the scaling factor
    s = lora_alpha / r (§4.1). For a linear layer, A is (r, in_features) and B is
    (out_features, r). The fields `variant` and `tied` are fxlora's own.

    Attributes:
        r: the rank, from 1 to 2**20.
        target_modules: the modules or parameters to adapt. A list of names, each of which matches
            a whole name or a dotted suffix of one; or one string, a regular expression for the
            whole name; or "all-linear": every weight that matrix products read, except output
            embeddings and weights that are also looked up as embeddings.
        exclude_modules: modules or parameters not to adapt, written like `target_modules`.
        lora_alpha: numerator of the scaling factor s, a finite number > 0.
        lora_dropout: probability, in [0, 1), of zeroing an element of the branch's input in train
            mode. The indices of an embedding take no dropout, and for a site that cannot take a
            branch, dropout is an error in `match`. With DoRA, the output of the base weight is
            scaled without dropout (PEFT recomputes it from the dropped input, so that its dropout
            also affects the frozen layer).
        bias: biases that train too: "none", "all", or those of adapted layers ("lora_only").
        use_rslora: whether s is lora_alpha / √r (Kalajdzievski 2023, eq. 4).
        use_dora: PEFT's name for `variant="dora"`.
        modules_to_save: modules (whole names or dotted suffixes) to train in full, as copies.
        init_lora_weights: how A and B are initialized:

            - "kaiming_uniform": A Kaiming uniform with a=√5, B zero.
            - True: the same, but for an embedding A is zero and B normal, as in loralib.
            - "kaiming_normal": A Kaiming normal with a=√5, B zero.
            - "gaussian": A normal with standard deviation 1/r, B zero.
            - "orthogonal": both random with BA = 0; r must be even.
            - "pissa" (Meng et al. 2024, eq. 2-3), "olora" (Büyükakyüz 2024): both computed from
              the weight W0. The initial s·BA is subtracted from W0, so that the outputs start
              unchanged.
            - False: both Kaiming uniform. The outputs change as soon as the adapter is injected.
        layers_to_transform: numbers of the layers to adapt; None adapts all.
        layers_pattern: regular expressions, without groups, for the part of a name before the
            layer number ("h" in "h.3.attn"); needs `layers_to_transform`. None allows any part.
        rank_pattern: ranks that differ from `r`, as `{regular expression: rank}`. The expression
            must match the whole name of the site or a dotted suffix of it; the first match counts.
        alpha_pattern: values that differ from `lora_alpha`, in the form of `rank_pattern`.
        target_parameters: names (whole or dotted suffixes) of parameters to adapt.
        variant: a row of the table `fxlora.lora.variants.VARIANTS`, or None for plain LoRA. "dora"
            rescales each output of the adapted weight to a trained magnitude (Liu et al. 2024,
            DoRA, eq. 5). "from_weight" subtracts the initial s·BA from W0; the inits "pissa" and
            "olora" select it by themselves.
        tied: how a rule adapts a weight that has several names: only where it is read under a name
            that the rule matches ("rule"), or wherever it is read ("share").
        autocast_adapter_dtype: the dtype of A, B, a variant's tensors, and the parameters that
            `bias` and `modules_to_save` train in full. True: float32, or the weight's dtype if
            that is wider. False: the weight's dtype. Or a dtype, as a torch.dtype or a name
            ("float32"), which the field then holds as its name. The graph casts them to the
            weight's dtype where they are used. (PEFT has this as an argument of `get_peft_model`.)
        task_type: accepted so that scripts written for PEFT run; it has no effect.
        fan_in_fan_out: the same; the layout of a weight is taken from the graph.

    Raises:
        ConfigError: a field has a wrong type or value, or two fields contradict each other.

    Warns:
        FxLoraWarning: an alpha is not a whole number, although PEFT declares an integer.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        >>> module = fxlora.capture(model, torch.randn(2, 6))
        >>> config = fxlora.LoraConfig(r=2, lora_alpha=8, target_modules=["0"])
        >>> [(entry.site, entry.r, entry.scaling) for entry in fxlora.match(module, config)]
        [('0', 2, 4.0)]
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
    autocast_adapter_dtype: bool | str | torch.dtype = True
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
        rule = dtype_rule(self.autocast_adapter_dtype, "autocast_adapter_dtype")
        object.__setattr__(self, "autocast_adapter_dtype", rule)
        self._normalise_names()
        self._normalise_layers()
        self._normalise_patterns()

    def _normalise_names(self) -> None:
        """Check the fields that hold names; make lists tuples, so that configs compare by value."""
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
            # match takes the layer number from group 1, so a pattern must have no groups.
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
        """The row of `VARIANTS` that `variant` or `use_dora` selects, or None for plain LoRA."""
        return "dora" if self.use_dora else self.variant

    @property
    def dtype_rule(self) -> DtypeRule:
        """`autocast_adapter_dtype` as plain data: True, False or the name of a dtype."""
        return dtype_rule(self.autocast_adapter_dtype, "autocast_adapter_dtype")

    @property
    def has_targets(self) -> bool:
        """Whether the configuration itself says which sites to adapt."""
        return self.target_modules is not None or self.target_parameters is not None

    def scaling(self, r: int, alpha: float) -> float:
        """Return the scaling factor s of BA.

        Args:
            r: the rank of a site.
            alpha: its `lora_alpha`.

        Returns:
            alpha / r (Hu et al. 2021, §4.1), or alpha / √r with rsLoRA (Kalajdzievski 2023, eq. 4).
        """
        return alpha / (math.sqrt(r) if self.use_rslora else r)


@dataclass(frozen=True)
class Rule:
    """Which sites to match, and how to adapt or train them.

    A site matches if all given keys match. If several rules match a site, the first one applies.

    Attributes:
        name: a glob (`*.attn.*`); `re:` and a regular expression for the whole name; or a name,
            which matches a whole name or a dotted suffix of one. A list matches if one of its
            items does. None matches every name.
        op: kind of the op that reads the weight ("linear", "conv2d", "embedding", "addmm", …), a
            glob (`conv*`), or a list of these. None matches every op.
        min_features: lower bound on the numbers of both input and output features.
        max_features: upper bound on both.
        min_in_features: lower bound on the number of input features.
        max_in_features: upper bound on it.
        min_out_features: lower bound on the number of output features.
        max_out_features: upper bound on it.
        kernel_size: kernel size of a convolution; one number means that size in all dimensions.
        where: a function that takes a `Site` and returns whether the rule matches it. It is called
            last, and a rule that has one cannot be written to a file.
        lora: the configuration of the adapters, or None to leave the sites as they are.
        train: whether to train in full, as a copy, instead: the weight's module if the weight is
            its `weight` or the rule names the module, else only the weight. A rule with no key but
            `name` also trains modules and parameters that cannot take adapters (norms, biases) if
            their names match.
        parts: the parts of a packed weight, each of which gets its own adapter. A number of equal
            parts along the output dimension; or, by name, their sizes (`{"q": 64, "k": 16,
            "v": 16}`, all parts in order) or ranges (`{"q": (0, 64), "v": (80, 96)}`, from and to).
        enable: the parts to adapt, as one flag for each part or as names; None adapts all.

    Raises:
        ConfigError: a key has a wrong type or value, or two keys contradict each other.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        >>> module = fxlora.capture(model, torch.randn(2, 6))
        >>> rules = [
        ...     fxlora.Rule("0", lora=fxlora.LoraConfig(r=2)),
        ...     fxlora.Rule(op="linear", max_features=8, lora=fxlora.LoraConfig(r=1)),
        ... ]
        >>> [(entry.site, entry.r, entry.rule) for entry in fxlora.match(module, rules)]
        [('0', 2, 1), ('1', 1, 2)]
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
        if self.lora is not None and self.lora.has_targets and self.name is not None:
            raise ConfigError(
                "a rule with a name and a LoraConfig with target_modules say which sites "
                "twice. Keep one of the two."
            )

    @property
    def bounds(self) -> tuple[int | None, ...]:
        """The values of the bounds on features, in the order of `_BOUNDS`."""
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
        """Return the rule's names, targets or other keys in one line, for messages."""
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
    """Return rules given as objects, as a mapping, or as the path of a file, as a tuple of Rules.

    Raises:
        ConfigError: there are no rules, or they are not valid.
    """
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
    if not item.has_targets:
        raise ConfigError(
            "a LoraConfig on its own needs target_modules (or target_parameters): name them, "
            'or take target_modules="all-linear".'
        )
    return Rule(lora=item)


# ---- rules as data: TOML and JSON ---------------------------------------------------------------


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """Read rules from a TOML or JSON file.

    The file has either `[[rule]]` tables, whose keys are the fields of `Rule` except `where`, or
    one `[lora]` table with the fields of `LoraConfig`. In a rule, `lora` is a table of these, or
    false for `lora=None`. A plan written by `Plan.to_toml` or `Plan.to_json` is valid too: its
    rules are read, and its sites are ignored.

    Args:
        path: the file. It is read as JSON if its name ends in `.json`, else as TOML.

    Returns:
        The rules, in the order of the file.

    Raises:
        ConfigError: the file cannot be read or parsed, or has an unknown key or an invalid value.

    Example:
        >>> import pathlib, tempfile, fxlora
        >>> text = '''
        ... [[rule]]
        ... name = "*.attn.*"
        ... lora = {r = 4}
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "rules.toml")
        ...     _ = path.write_text(text)
        ...     (rule,) = fxlora.load_rules(path)
        >>> rule.name, rule.lora.r
        (('*.attn.*',), 4)
    """
    path = as_path(path, ConfigError)
    where = f"rules file {path}"
    text = read_text(path, where, ConfigError)
    return rules_from_data(parsed(text, where, ConfigError, path.suffix), where)


def rules_from_data(data: Any, where: str) -> tuple[Rule, ...]:
    """Return the rules in `{"rule": [...]}` or `{"lora": {...}}`.

    Args:
        data: the content of a rules file.
        where: the source of the data, for messages.

    Raises:
        ConfigError: the data has another structure, an unknown key or an invalid value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a table, found {type(data).__name__}.")
    # A written plan also has "site" and "version". They are ignored: match finds the sites again.
    _check_keys(data, {"rule", "lora", "site", "version"}, where)
    if "site" in data and not {"rule", "lora"} & set(data):
        raise ConfigError(
            f"{where}: a plan without rules, that of an adapter that was loaded. Load the adapter "
            "again (load_adapter), or write [[rule]] tables."
        )
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
    """Return a rule as plain data: the keys that differ from the defaults.

    Raises:
        ConfigError: the rule has a `where=` function, which cannot be written to a file.
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
    """Return a configuration as plain data: r, lora_alpha, and fields that are not at default."""
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
    """Whether a value of any type is an integer, not a bool, with low <= value <= high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_finite(value: object) -> bool:
    """Whether a value of any type is an int or float, not a bool, that fits a finite float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # float() overflows for large integers


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
    """Check a regular expression, also inside the larger one that it becomes part of.

    Args:
        name: the field, for messages.
        value: the regular expression.
        within: the larger expression, with `{}` in the place of the value.
        groups: the number of groups that the larger expression must have; None allows any.

    Raises:
        ConfigError: it is not a valid regular expression, or has groups where it must not.
    """
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
    """Return a list of names as a tuple, and a set sorted, or None for None."""
    if value is None:
        return None
    items = list(value) if isinstance(value, set | frozenset) else value
    if not isinstance(items, Sequence) or not all(isinstance(i, str) and i for i in items):
        raise ConfigError(f"{name} must be a name or a list of names, not {shown(value)}.")
    if not items:
        raise ConfigError(f"{name} is an empty list: it would match nothing.")
    return tuple(sorted(items) if isinstance(value, set | frozenset) else items)


_OTHER_NAMES = {"rank": "r", "lora_r": "r", "lora_rank": "r"}  # of keys, in other libraries


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known, key=str)
    if not unknown:
        return
    first, *others = unknown
    fields = (f.name for f in dataclasses.fields(LoraConfig) if "lora" in known)
    candidates = [*sorted(known), *(f"lora.{name}" for name in fields)]
    near = did_you_mean(_OTHER_NAMES.get(first, str(first)), candidates, limit=1)
    also = f" Also unknown: {some(map(shown, others))}." if others else ""
    raise ConfigError(
        f"{where}: unknown key {shown(first)}.{near}{also} Known: {', '.join(sorted(known))}."
    )
