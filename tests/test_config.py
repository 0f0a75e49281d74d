from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fxlora import ConfigError, FxLoraWarning, LoraConfig, Rule, load_rules
from fxlora.config import config_to_data


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r must be a whole number ≥ 1, not 0"),
        ({"r": -3}, "r must be"),
        ({"r": 2.5}, "r must be"),
        ({"r": True}, "r must be"),
        ({"r": "8"}, "r must be"),
        ({"lora_alpha": 0}, "lora_alpha must be a finite number > 0"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"bias": "some"}, "bias"),
        ({"use_dora": 1}, "use_dora must be True or False"),
        ({"variant": "dorra"}, 'variant must be "dora", "fa", "from_weight" or None'),
        ({"use_dora": True, "variant": "from_weight"}, "contradict"),
        ({"tied": "all"}, "tied must be"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"init_lora_weights": "piza"}, "init_lora_weights must be True, "),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": [1]}, "target_modules must be"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"modules_to_save": "fc"}, "must be a list of names"),
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\]"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
    ],
)
def test_a_configuration_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


HUGE = 10**400
DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]


@pytest.mark.filterwarnings("ignore:.*not a whole number:fxlora.FxLoraWarning")
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LoraConfig)])
@pytest.mark.parametrize(
    "value",
    [HUGE, -HUGE, 10**5000, math.inf, 1.5, b"x", [b"x"], DEEP, {}, {1: 2}, torch.ones(2), object(),
     [1, "a"], {"(?i)a": 1}, {"a": HUGE}, "(" * 5000, "a{9999999999}", [None], "\ud800"],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_a_configuration_of_any_kind_is_typed(field: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        config = LoraConfig(**{"layers_to_transform": 1, field: value})
        assert LoraConfig(**config_to_data(config)) == config


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Rule) if f.name != "_"])
@pytest.mark.parametrize(
    "value",
    [HUGE, 10**5000, math.inf, 1.5, b"x", DEEP, {1: 2}, torch.ones(2), object(), 10**9, [2, 2],
     {"a": HUGE}, {"a": [0, HUGE]}, {"a.b": 1}, {"a\nb": 1}, {'a"': 1}, "re:(?i)a", [10**5000]],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_a_rule_of_any_kind_is_typed(field: str, value: Any) -> None:
    with contextlib.suppress(ConfigError):
        Rule(**{"name": "a", field: value})


@pytest.mark.parametrize("pattern", ["(?i)a", "a)(b", "(a"])
def test_expressions_must_be_ones_where_they_are_used(pattern: str) -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        LoraConfig(rank_pattern={pattern: 2})
    with pytest.raises(ConfigError, match=r"layers_pattern"):
        LoraConfig(layers_pattern=[pattern], layers_to_transform=1)


def test_a_group_in_layers_pattern_would_be_taken_for_the_number() -> None:
    with pytest.raises(ConfigError, match="must have no groups"):
        LoraConfig(layers_pattern="(h|layers)", layers_to_transform=1)
    LoraConfig(layers_pattern="(?:h|layers)", layers_to_transform=1)


def test_replacing_use_dora_takes_the_variant_away() -> None:
    dora = LoraConfig(use_dora=True)
    assert dora.row == "dora" and LoraConfig(variant="dora").row == "dora"
    assert dataclasses.replace(dora, use_dora=False) == LoraConfig()
    assert dataclasses.replace(dora, use_dora=False).row is None
    assert dataclasses.replace(dora, r=3).row == "dora"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "re:("}, "not a regular expression"),
        ({"name": []}, "empty list"),
        ({"min_features": -1}, "min_features"),
        ({"where": 3}, "where must be a function"),
        ({"lora": 8}, "lora must be a LoraConfig"),
        ({"name": "a", "lora": LoraConfig(target_modules=["b"])}, "twice"),
    ],
)
def test_a_rule_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rule(**values)


def test_an_alpha_that_is_not_whole_is_warned_about() -> None:
    with pytest.warns(FxLoraWarning, match="not a whole number"):
        assert LoraConfig(r=4, lora_alpha=2.5).scaling(4, 2.5) == 0.625
    LoraConfig(lora_alpha=16.0)


def test_a_configuration_shows_what_it_says() -> None:
    config = LoraConfig(r=4, target_modules=["a"], tied="share")
    assert repr(config) == "LoraConfig(r=4, target_modules=('a',), tied='share')"
    assert eval(repr(config)) == config and repr(LoraConfig()) == "LoraConfig()"


def test_scaling() -> None:
    assert LoraConfig(r=4).scaling(4, 16) == 4
    assert LoraConfig(r=4, use_rslora=True).scaling(4, 16) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = 3", "'rule' must be a list of tables"),
        (
            "[[rule]]\nnaem = 'x'",
            r"rule 1: unknown key 'naem'. Did you mean 'name'\? Known: .*name",
        ),
        ("[[rule]]\nnaem = 'x'\noop = 'y'", "Did you mean 'name'.* Also unknown: 'oop'. Known"),
        ("[[rule]]\nname = 'x'\n[rule.lora]\nrank = 3", "lora: unknown key 'rank'.*mean 'r'"),
        ("[[rule]]\nname = 'x'\nr = 3", "rule 1: unknown key 'r'.*mean 'lora.r'"),
        ("[[rule]]\ntarget_modules = 3", "unknown key .*mean 'lora.target_modules'"),
        ("[lora]\nalpha = 3", "unknown key 'alpha'.*mean 'lora_alpha'"),
        ("[[rules]]\nname = 'x'", "unknown key 'rules'.*mean 'rule'"),
        ("[[rule]]\nname = 'x'\n[rule.lora]\nr = '3'", "rule 1, lora: r must be a whole number"),
        ("[[rule]]\nname = 3", "rule 1: name must be"),
        ("[lora]\nr = 3", "needs target_modules"),
        ("[lora]\nr = 3\n[[rule]]", "give either"),
        ("", "give either"),
        ("zzz = 3", "unknown key 'zzz'. Known:"),
        ("r = [", "is not valid"),
        ("[[rule]]\nlora = true", "expected a table"),
    ],
)
def test_rules_files_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_rules(path)
    assert "lora.toml" in str(error.value) or "a LoraConfig on its own" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.json", b"[" * 100_000),
        ("deep.toml", b"a=" + b"[" * 100_000),
        ("deep2.json", b'{"rule":' + b"[" * 300 + b"]" * 300 + b"}"),
        ("latin.toml", "[lora]\ntask_type = 'ü'".encode("latin-1")),
        ("big.json", b'{"rule":[{"name":"0","lora":{"lora_alpha":1' + b"0" * 400 + b"}}]}"),
        ("bigger.json", b'{"rule":[{"name":"0","lora":{"lora_alpha":1' + b"0" * 9000 + b"}}]}"),
        ("hex.toml", b"[[rule]]\nname='0'\nmin_features=0x" + b"f" * 9000),
        ("nan.json", b'{"rule":[{"name":"0","lora":{"lora_alpha":NaN}}]}'),
    ],
)
def test_rules_files_of_any_bytes_are_typed(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_rules(tmp_path / name)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, 5, None, b"x"])
def test_rules_from_what_is_no_path(path: Any) -> None:
    with pytest.raises(ConfigError):
        load_rules(path)


def test_a_rules_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_rules(tmp_path / "none.toml")


def test_a_rules_file(tmp_path: Path) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(
        """
        [[rule]]
        name = "lm_head"
        lora = false

        [[rule]]
        op = "conv2d"
        min_features = 64
        lora = { r = 4, lora_alpha = 8 }
        """
    )
    assert load_rules(path) == (
        Rule("lm_head", lora=None),
        Rule(op="conv2d", min_features=64, lora=LoraConfig(r=4, lora_alpha=8)),
    )
    path.write_text('[lora]\nr = 4\ntarget_modules = ["q_proj"]')
    assert load_rules(path) == (Rule(lora=LoraConfig(r=4, target_modules=["q_proj"])),)
