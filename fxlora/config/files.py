"""Rules as objects and as plain data: TOML and JSON files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import as_path, parsed, read_text
from ..errors import ConfigError
from ..names import shown
from .keywords import unknown_names
from .lora_config import ARCHITECTURE, LoraConfig
from .rule import Rule, Rules


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
    if item.target_modules is None:
        item = dataclasses.replace(item, target_modules=ARCHITECTURE)
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
        config = _config_from_data(data["lora"], f"{where}, [lora]")
        if not config.has_targets:
            raise ConfigError(
                f"{where}: [lora] needs target_modules (or target_parameters): names, "
                '"all-linear", or "auto", those that PEFT has for the architecture of the model.'
            )
        return (_as_rule(config),)
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
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if not (unknown := set(table) - known):
        return
    fields = (f.name for f in dataclasses.fields(LoraConfig) if "lora" in known)
    candidates = [*sorted(known), *(f"lora.{name}" for name in fields)]
    raise ConfigError(
        f"{where}: unknown key {unknown_names(unknown, candidates)} "
        f"Known: {', '.join(sorted(known))}."
    )
