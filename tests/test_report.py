from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxlora
from fxlora import ConfigError, InjectError, LoraConfig, Rule

from .models import Convolutions, Mlp, Tied


def big() -> fxlora.CapturedModule:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    return fxlora.capture(model, torch.empty(2, 4096, device="meta"))


def test_the_4096_square() -> None:
    gm = big()
    plan = fxlora.match(gm, LoraConfig(r=8, target_modules=["0"]))
    for x in (plan, fxlora.inject(gm, plan)):
        text = fxlora.report(x)
        for figure in ("65,536", "16,777,216", "99.61%", "256x", "0.39%"):
            assert figure in text
    data = json.loads(fxlora.report(plan, format="json"))
    assert data["adapter_parameters"] == 65_536 == 8 * (4096 + 4096)
    assert data["sites"][0]["factor"] == 256
    state = data["training_state_bytes"]
    assert state["float32"] == {"full_fine_tuning": 3 * 4 * 4096**2, "this_plan": 3 * 4 * 65_536}
    assert state["bfloat16"]["this_plan"] == 3 * 2 * 65_536


def test_a_shape_that_no_laptop_holds() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8192, 28672, bias=False)
            self.down = nn.Linear(28672, 8192, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    with torch.device("meta"):
        model = nn.Sequential(*(Block() for _ in range(60)))
    plan = fxlora.match(fxlora.capture(model), LoraConfig(r=16, target_modules="all-linear"))
    data = json.loads(fxlora.report(plan, "json"))
    assert data["model_parameters"] == 60 * 2 * 8192 * 28672 > 28e9
    assert data["adapter_parameters"] == 60 * 2 * 16 * (8192 + 28672)


@pytest.fixture(scope="module")
def lora() -> fxlora.CapturedModule:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up"], modules_to_save=["down"])
    return fxlora.adapt(Mlp(), torch.randn(2, 5), rules=config)


def test_totals_are_the_sums(lora: fxlora.CapturedModule) -> None:
    data = json.loads(fxlora.report(lora, format="json"))
    trainable = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert data["trainable_parameters"] == trainable == 2 * (5 + 7) + 21
    assert data["total_parameters"] == sum(p.numel() for p in lora.parameters())
    assert data["adapter_parameters"] == sum(s["adapter_parameters"] for s in data["sites"])
    assert data["trainable_percent"] == pytest.approx(100 * trainable / data["total_parameters"])


@pytest.mark.parametrize("style", ["table", "github", "html"])
def test_golden(
    lora: fxlora.CapturedModule, style: str, golden: Callable[[str, str], None]
) -> None:
    golden(f"report-{style}.txt", fxlora.report(lora, style))


def test_folded(lora: fxlora.CapturedModule) -> None:
    folded = fxlora.fold(lora)
    data = json.loads(fxlora.report(folded, format="json"))
    assert data["folded"]
    assert data["total_parameters"] == sum(p.numel() for p in folded.parameters()) == 63
    assert "folded into the weights" in fxlora.report(folded)


def test_csv_holds_numbers() -> None:
    plan = fxlora.match(fxlora.capture(Convolutions()), Rule(lora=LoraConfig(r=1)))
    rows = list(csv.DictReader(io.StringIO(fxlora.report(plan, "csv"))))
    assert [row["site"] for row in rows] == [entry.site for entry in plan]
    depthwise = next(row for row in rows if row["site"] == "depthwise")
    assert int(depthwise["W"]) == 135
    assert int(depthwise["A and B"]) == 9 + 15
    assert float(depthwise["fewer"]) == pytest.approx(100 * (1 - 24 / 135))


def test_what_has_no_report(lora: fxlora.CapturedModule) -> None:
    with pytest.raises(ConfigError, match="format must be one of"):
        fxlora.report(lora, "pdf")
    with pytest.raises(InjectError, match="nothing to report"):
        fxlora.report(fxlora.capture(Mlp(), torch.randn(2, 5)))


def test_the_total_of_a_folded_module_is_what_it_holds() -> None:
    """Also if the fold has split a tie."""
    gm = fxlora.capture(Tied(), torch.tensor([[1, 2, 5]]))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("head", lora=LoraConfig(r=2))))
    for module in (lora, fxlora.fold(lora)):
        assert_adds_up(module)
    data = json.loads(fxlora.report(fxlora.fold(lora), format="json"))
    assert data["split_tie_parameters"] == gm.get_parameter("head.weight").numel()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_frozen_start_counts(init: str) -> None:
    config = LoraConfig(
        r=2, target_modules=["up"], init_lora_weights=init, modules_to_save=["down"]
    )
    lora = fxlora.adapt(Mlp(), torch.randn(2, 5), rules=config)
    frozen = json.loads(fxlora.report(lora, format="json"))["frozen_adapter_parameters"]
    assert frozen == 2 * (5 + 7)
    for module in (lora, fxlora.fold(lora)):
        assert_adds_up(module)


def assert_adds_up(module: fxlora.CapturedModule) -> None:
    """Check that the total counts the module's parameters, and is the sum of the rows above it."""
    table = fxlora.report(module).split("\n\n")[1]
    found = re.findall(r"^(.+?)  +([\d,]+)%?$", table, re.MULTILINE)
    rows = [(what, int(number.replace(",", ""))) for what, number in found]
    at = [what for what, _ in rows].index("total")
    total = rows[at][1]
    assert total == sum(parameter.numel() for parameter in module.parameters())
    assert total == sum(number for _, number in rows[:at])
    assert total == json.loads(fxlora.report(module, format="json"))["total_parameters"]
