"""Names: no text can inject code into generated source, or control characters into output."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora import CaptureError, ConfigError, FxLoraError, LoraConfig, Plan, Rule
from fxlora.errors import warn
from fxlora.names import is_adapter, is_path, is_word, printable, shown
from fxlora.tables import did_you_mean, render, some

RUNS = "exec(\"open('ran','w')\")"
HOSTILE = [
    f'W")\r{RUNS}\rdef f(self):\r    y = getattr(self, "y',
    f'x"); {RUNS}; ("',
    "a\nb",
    "a\0b",
    "a\\b",
    'a"b',
    "0\n",
    "class",
    "\ufb01",  # a ligature, which Python's parser normalizes to "fi"
    "\ud800",
    "",
]
ODD = ["a-b", "0x", "größe", "a'b", "\x1b[31m", "²", "a\tb", "layer 1", "名前", "#x", "a\u202eb"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_torch_would_write_as_something_else(name: str) -> None:
    assert not is_path(name) and not is_path(f"a.{name}.b") and not is_word(name)


@pytest.mark.parametrize("name", ODD)
def test_what_reads_back_from_generated_source(name: str) -> None:
    """The oracle is torch.fx: its generated code must read the parameter by this name."""
    assert is_path(f"0.{name}")
    root = nn.Module()
    root.register_parameter(name, nn.Parameter(torch.randn(2, 3)))
    graph = fx.Graph()
    graph.output(graph.get_attr(name))
    assert fx.GraphModule(root, graph)() is root._parameters[name]


def test_words() -> None:
    assert all(map(is_word, ("q", "0", "12", "a b", "my-adapter", "ключ", "lora_A", "training")))
    assert not any(map(is_word, ("a.b", " a", "a ", "x" * 65, "-a", "a/b", "None", 5, None, b"x")))
    assert is_adapter("default") and not is_adapter("training") and not is_adapter("forward")


# ---- sources of names ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gm() -> fxlora.CapturedModule:
    """One capture for all tests: no verb changes it."""
    return fxlora.capture(nn.Sequential(nn.Linear(5, 6)), torch.randn(4, 5))


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not os.path.exists("ran"), "a text ran as code"  # noqa: PTH110


@pytest.mark.parametrize("name", [*HOSTILE, "a.b", "training", "forward", 5, None])
def test_the_name_of_an_adapter(gm: fxlora.CapturedModule, name: Any, tmp_path: Path) -> None:
    rule = Rule("0", lora=LoraConfig(r=2))
    with pytest.raises(ConfigError, match="adapter_name"):
        fxlora.match(gm, rule, adapter_name=name)
    fxlora.save_adapter(fxlora.inject(gm, fxlora.match(gm, rule)), tmp_path)
    with pytest.raises(ConfigError, match="adapter_name"):
        fxlora.load_adapter(gm, tmp_path, adapter_name=name)


@pytest.mark.parametrize("name", [*HOSTILE, "a.b"])
@pytest.mark.parametrize("parts", [{"other": 2}, {}])
def test_the_name_of_a_part(parts: dict[str, int], name: str, tmp_path: Path) -> None:
    given = {**parts, name: 6 - sum(parts.values())}
    with pytest.raises(ConfigError, match="parts"):
        Rule("0", parts=given)
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"rule": [{"name": "0", "parts": given}]}))
    with pytest.raises(ConfigError, match="parts"):
        fxlora.load_rules(path)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["site", "parameter", "names", "tied", "part", "adapter"])
def test_no_entry_has_a_bad_name(gm: fxlora.CapturedModule, field: str, name: str) -> None:
    plan = fxlora.match(gm, Rule("0", lora=LoraConfig(r=2), parts=2))
    value = (plan.entries[0].parameter, name) if field in ("names", "tied") else name
    with pytest.raises(ConfigError):
        dataclasses.replace(plan.entries[0], **{field: value})
    for trained in ({"trained": (name,)}, {"modules_to_save": (name,)}):
        with pytest.raises(ConfigError):
            dataclasses.replace(plan, **trained)


def test_a_plan_has_every_row_once(gm: fxlora.CapturedModule) -> None:
    (entry,) = fxlora.match(gm, Rule("0", lora=LoraConfig(r=2)))
    with pytest.raises(ConfigError, match="more than once"):
        Plan((entry, entry))
    one, other = fxlora.match(gm, Rule("0", lora=LoraConfig(r=2), parts=2))
    assert Plan((other, one))
    with pytest.raises(ConfigError, match="same rows"):
        Plan((one, dataclasses.replace(other, rows=(2, 6))))
    with pytest.raises(ConfigError, match=r"trains 0\.bias more than once"):
        Plan((entry,), ("0.bias", "0.bias"))


class Named(nn.Module):
    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name, self.kind, self.inner, self.lin = name, kind, nn.Module(), nn.Linear(5, 6)
        if kind == "module":
            self.inner.add_module(name, nn.Linear(6, 7))
        elif kind == "parameter":
            self.inner.register_parameter(name, nn.Parameter(torch.randn(7, 6)))
        else:
            self.inner.register_buffer(name, torch.randn(7, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = getattr(self.inner, self.name)
        x = self.lin(x)
        return held(x) if self.kind == "module" else nn.functional.linear(x, held)


WAYS = [
    ("module", True),
    ("parameter", True),
    ("buffer", True),
    ("module", False),
    ("parameter", False),
]
OWN = [*HOSTILE[:-1], *ODD[::2], ODD[-1]]
# Each name by the tracer, and by torch.export as the name of one kind; the first name of all.
QUICK = {(name, *way) for number, name in enumerate(OWN) for way in (WAYS[number % 3], *WAYS[3:])}
QUICK |= {(name, *way) for name in (HOSTILE[0], ODD[0]) for way in WAYS}


@pytest.mark.parametrize(
    ("name", "kind", "given"),
    [
        pytest.param(name, *way, marks=() if (name, *way) in QUICK else pytest.mark.slow)
        for name in OWN
        for way in WAYS
    ],
)
@pytest.mark.filterwarnings("ignore:no rule can adapt:fxlora.FxLoraWarning")
def test_the_models_own_names(name: str, kind: str, given: bool) -> None:
    """Names that torch.fx can write are kept; else capture refuses, or keeps them out of graphs."""
    model, x = Named(name, kind).eval(), torch.randn(3, 5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captured by regions where torch.export fails
            gm = fxlora.capture(model, x if given else None)
    except CaptureError:
        assert name in HOSTILE
        return
    assert name in ODD or gm.parent_module
    assert torch.equal(gm.eval()(x), model(x))
    lora = fxlora.inject(
        gm,
        fxlora.match(
            gm,
            Rule(
                "lin" if kind == "buffer" or gm.parent_module else f"inner.{name}",
                lora=LoraConfig(r=2),
            ),
        ),
    ).eval()
    assert torch.equal(lora(x), model(x))
    for text in (str(lora.plan), *(fxlora.report(lora, f) for f in ("table", "html", "csv"))):
        assert text.replace("\n", "").isprintable()


# ---- printed text -------------------------------------------------------------------------------


def test_errors_and_warnings_escape_control_characters() -> None:
    for kind in (FxLoraError, ConfigError, fxlora.NoMatchError):
        assert str(kind("a\x1b[31m\rb\nc\td\0")) == "a\\x1b[31m\\rb\nc\td\\x00"
    with pytest.warns(fxlora.FxLoraWarning, match=r"a\\x1bb"):
        warn("a\x1bb")


def test_tables_hold_a_cell_together() -> None:
    assert r"a\nb\x1b" in render(["h"], [["a\nb\x1b"]])
    assert r"a\|b" in render(["h"], [["a|b"]], "github")
    assert "&lt;b&gt;" in render(["h"], [["<b>"]], "html")
    assert some(["a\nb"]) == r"a\nb"


def test_values_of_any_kind_are_shown() -> None:
    class Bad:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown(Bad()) == "a value of type Bad"
    assert shown(10**5000) == "a value of type int"
    assert len(shown("x" * 10**6)) < 250
    assert printable("a\nb", "\n") == "a\nb"


def test_what_was_meant() -> None:
    held = ["layers.0.q_proj", "layers.1.q_proj", "layers.0.k_proj", "lm_head", "head"]
    assert did_you_mean("q_prj", held) == (
        " Did you mean 'layers.0.q_proj', 'layers.1.q_proj' or 'layers.0.k_proj'?"
    )
    assert did_you_mean("layers.1.qproj", held, limit=1) == " Did you mean 'layers.1.q_proj'?"
    assert did_you_mean("lm_haed", held, limit=2) == " Did you mean 'lm_head' or 'head'?"
    assert did_you_mean("heads", [*held, "head"], limit=1) == " Did you mean 'head'?"
    assert did_you_mean("zzz", held) == did_you_mean("head", []) == ""
    assert did_you_mean("x[2J", ["x\x1b[2J"]) == " Did you mean 'x\\x1b[2J'?"
