"""Pictures of sites, and the page of a plan."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import fxlora
from fxlora import ConfigError, LoraConfig, NoMatchError, Rule, cli
from fxlora.pictures.page import plan_page

from .models import Mlp
from .typed import untyped

R = LoraConfig(r=2, lora_alpha=3)
FILLS = {"#dbe7ff": "weight", "#ffe3c2": "adapter", "#ffffff": "op", "#f3f4f6": "border"}


def boxes(picture: str) -> dict[str, list[str]]:
    """Return the labels in a picture by the kind of their box; raises unless it is valid XML."""
    root = ElementTree.fromstring(picture)
    found: dict[str, list[str]] = {kind: [] for kind in FILLS.values()}
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        children = list(group)
        for rect, text in itertools.pairwise(children):
            if rect.tag.endswith("rect"):
                found[FILLS[rect.get("fill") or ""]].append(text.text or "")
    return found


def test_before_adapted_and_folded() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("up", lora=R)))
    before, adapted = boxes(fxlora.draw(gm, "up")), boxes(fxlora.draw(lora, "up"))
    assert before["weight"] == ["up.weight"] and before["op"] == ["linear"]
    assert before["adapter"] == []
    assert adapted["weight"] == ["up.weight"]
    assert {"up.lora_A.default.weight", "up.lora_B.default.weight", "mul", "add"} <= {
        *adapted["adapter"]
    }
    assert adapted["adapter"].count("linear") == 2 and "linear" in adapted["op"]
    assert boxes(fxlora.draw(fxlora.fold(lora), "up")) == before


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_weight_form_reaches_the_op_that_reads(mode: str) -> None:
    gm = fxlora.capture(nn.GRU(5, 7), torch.randn(3, 2, 5))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("weight_ih_l0", lora=R)))
    found = boxes(fxlora.draw(lora, "weight_ih_l0", mode=mode))
    assert found["op"] == ["gru"]
    assert found["adapter"][-2:] == ["mm", "add"]


def test_what_cannot_be_drawn() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    with pytest.raises(NoMatchError, match=r"no site 'upp'\. Did you mean 'up'\?"):
        fxlora.draw(gm, "upp")
    with pytest.raises(ConfigError, match="mode must be one of"):
        fxlora.draw(gm, "up", mode="test")
    with pytest.raises(fxlora.NotCapturedError):
        fxlora.draw(untyped(Mlp()), "up")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


class Odd(nn.Module):
    """Has a module whose name is HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<img src=x onerror=alert(1)>", nn.Linear(5, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(self.children())(x)


def test_names_do_not_become_markup() -> None:
    gm = fxlora.capture(Odd(), torch.randn(2, 5))
    plan = fxlora.match(gm, Rule(op="linear", lora=R))
    picture = fxlora.draw(fxlora.inject(gm, plan), plan.entries[0].site)
    assert "<img" not in picture
    assert any(name.startswith("<img") for name in boxes(picture)["weight"])
    page = plan_page(gm, plan, "<b>title</b>")
    assert {"img", "b"} & {*Tags(page).tags} == {"b"}  # bars hold <b>


def test_the_page_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "house.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["plan", "house:build", "--input", "2x5", "--target", "all-linear", "-r", "2"]
    assert cli.main([*words, "--html", "plan.html"]) == 0
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    tags = Tags(page).tags
    assert tags.count("tr") == 3  # a header and two sites
    assert tags.count("figure") == 3  # one kind of site: before, adapted, folded
    assert not re.findall(r"(?:src|href)=", page)  # self-contained
    before, adapted, folded = (boxes(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert before == folded != adapted
