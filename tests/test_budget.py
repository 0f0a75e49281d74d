"""Ranks by a budget: they never exceed it, and are in the proportions of the rules' ranks."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import fxlora
from fxlora import ConfigError, FxLoraWarning, LoraConfig, Rule
from fxlora.cli import main

from .laws import check_laws
from .models import Tied
from .typed import examples


class Model(nn.Module):
    """Two linear layers, 40 → 30 → 20, and three stacked experts, 20 → 10."""

    subscripts: ClassVar = {"experts": "eio"}

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(40, 30, bias=False)
        self.b = nn.Linear(30, 20, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 20, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return (x @ self.experts).sum(0)


COUNT = 40 * 30 + 30 * 20 + 3 * 20 * 10
EACH = {"a": 70, "b": 50, "experts": 90}  # adapter parameters per rank
X = torch.linspace(-1, 1, 80).reshape(2, 40)


@pytest.fixture(scope="module")
def gm() -> fxlora.CapturedModule:
    return fxlora.capture(Model(), X)


def ranks(plan: fxlora.Plan) -> dict[str, int]:
    return {entry.site: entry.r for entry in plan}


def rules(**r: int) -> list[Rule]:
    return [Rule(name, lora=LoraConfig(r=n, lora_alpha=6)) for name, n in r.items()]


@examples(60)
@example(budget=1360, a=15, b=9, experts=30)  # two steps of one entry fit
@given(
    budget=st.integers(1, 3000),
    a=st.integers(1, 40),
    b=st.integers(1, 40),
    experts=st.integers(1, 40),
)
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_any_budget(gm: fxlora.CapturedModule, budget: int, a: int, b: int, experts: int) -> None:
    asked = {"a": a, "b": b, "experts": experts}
    if budget < sum(EACH.values()):
        with pytest.raises(ConfigError, match=r"the least rank at all 3 sites takes 210"):
            fxlora.match(gm, rules(**asked), budget=budget)
        return
    plan = fxlora.match(gm, rules(**asked), budget=budget)
    found, largest = ranks(plan), {"a": 30, "b": 20, "experts": 10}
    assert plan.adapter_parameters == sum(EACH[n] * r for n, r in found.items()) <= budget
    left = budget - plan.adapter_parameters
    assert all(1 <= r <= largest[n] for n, r in found.items())
    assert all(r == largest[n] or EACH[n] > left for n, r in found.items())  # no rank could grow
    for one, other in itertools.permutations(found, 2):  # proportions hold up to rounding
        if found[one] < largest[one] and found[other] > 2:
            factor = (found[other] - 1) / asked[other]
            assert found[one] >= int(factor * asked[one]) - 1
    for entry in plan:  # alpha keeps the rule's scaling
        assert entry.scaling == pytest.approx(6 / asked[entry.site])
        assert entry.alpha / entry.r == pytest.approx(entry.scaling)


@pytest.mark.parametrize(
    ("budget", "limit"), [("10%", 240), ("12.5 %", 300), ("100%", 2400), (" 50%", 1200)]
)
def test_shares(gm: fxlora.CapturedModule, budget: str, limit: int) -> None:
    plan = fxlora.match(gm, rules(a=4, b=4, experts=4), budget=budget)
    assert plan.model_parameters == COUNT
    assert limit - 90 < plan.adapter_parameters <= limit


@pytest.mark.parametrize(
    "budget",
    [*(0, -5, True, 0.5, "1", "one", "%", "0%", "-1%", "101%", "nan%", "inf%", ""), [], b"1%"],
)
def test_no_budget(gm: fxlora.CapturedModule, budget: Any) -> None:
    with pytest.raises(ConfigError, match="budget must be a number of parameters or a share"):
        fxlora.match(gm, rules(a=4), budget=budget)


def test_a_budget_of_nothing(gm: fxlora.CapturedModule) -> None:
    with pytest.raises(ConfigError, match="Give more, or target fewer sites"):
        fxlora.match(gm, rules(a=4), budget="0.01%")


def test_the_factor_is_the_rules(gm: fxlora.CapturedModule) -> None:
    for rslora in (False, True):
        config = LoraConfig(r=16, lora_alpha=8, use_rslora=rslora, target_modules=["a", "b"])
        (first, *_) = plan = fxlora.match(gm, config, budget=600).entries
        assert first.r != 16
        for entry in plan:
            assert entry.scaling == (2.0 if rslora else 0.5)
            root = entry.r**0.5 if rslora else entry.r
            assert entry.alpha / root == pytest.approx(entry.scaling)


def test_a_pattern_of_ranks_is_a_proportion(gm: fxlora.CapturedModule) -> None:
    config = LoraConfig(r=2, target_modules=["a", "b"], rank_pattern={"b": 6})
    found = ranks(fxlora.match(gm, config, budget=2 * 70 * 2 + 2 * 50 * 6))
    assert found == {"a": 4, "b": 12}


def test_parts_count_alone(gm: fxlora.CapturedModule) -> None:
    rule = Rule("a", lora=LoraConfig(r=4), parts={"p": (0, 5), "q": (10, 30)})
    plan = fxlora.match(gm, rule, budget=400)
    assert ranks(plan) == {"a.p": 4, "a.q": 3}  # 45 and 60 parameters per rank
    assert plan.adapter_parameters == 360


def test_magnitudes_count(gm: fxlora.CapturedModule) -> None:
    config = LoraConfig(r=4, use_dora=True, target_modules=["a"])
    plan = fxlora.match(gm, config, budget=249)  # 3 ranks and 30 magnitudes are 240
    assert ranks(plan) == {"a": 3} and plan.adapter_parameters == 240
    with pytest.raises(ConfigError, match="takes 100"):
        fxlora.match(gm, config, budget=99)


def test_what_only_holds_does_not_count(gm: fxlora.CapturedModule) -> None:
    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules=["a"])
    assert ranks(fxlora.match(gm, config, budget=219)) == {"a": 3}


def test_no_warning_of_ranks_that_the_budget_cuts(gm: fxlora.CapturedModule) -> None:
    plan = fxlora.match(gm, rules(a=100), budget=700)  # a warning would be an error here
    assert ranks(plan) == {"a": 10}


def test_forms_are_those_of_the_budgets_ranks() -> None:
    """At the budget's rank, 3, a branch is cheap enough; at the rule's rank, 12, it is not."""
    conv = nn.Sequential(nn.Conv2d(16, 24, 3, groups=2)).double()
    x = torch.randn(1, 16, 5, 6).double()
    gm = fxlora.capture(conv, x)
    rule = Rule(lora=LoraConfig(r=12))
    assert [e.form for e in fxlora.match(gm, rule)] == ["weight"]
    plan = fxlora.match(gm, rule, budget=300)
    assert [(e.form, e.reason) for e in plan] == [("branch", "")]


def test_tied_weights_count_once() -> None:
    ids = torch.tensor([[1, 2, 3]])
    gm = fxlora.capture(Tied(), ids)
    plan = fxlora.match(gm, Rule(["emb", "head"], lora=LoraConfig(r=2)), budget=80)
    assert [entry.r for entry in plan] == [3]
    assert plan.entries[0].reason == "tied"
    assert fxlora.match(gm, Rule("head", lora=LoraConfig(r=2)), budget=80).entries[0].tied


def test_the_laws_hold_with_a_budget() -> None:
    model = Model().double()
    gm = fxlora.capture(model, X.double())
    plan = fxlora.match(gm, rules(a=8, b=4, experts=2), budget="20%")
    _, lora = check_laws(model, (X.double(),), rules={"rule": plan.to_data()["rule"]})
    assert lora.plan  # rules do not include the budget, but the plan does
    lora = fxlora.inject(gm, plan)
    assert sum(p.numel() for p in fxlora.lora_parameters(lora)) == plan.adapter_parameters <= 480
    assert fxlora.verify(lora, (X.double(),))


def test_an_adapter_larger_than_its_weight() -> None:
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False))
    gm = fxlora.capture(depthwise, torch.randn(1, 8, 5, 6))
    with pytest.warns(FxLoraWarning, match=r"adapter has more parameters than its weight: 0\."):
        fxlora.match(gm, Rule("0", lora=LoraConfig(r=5)))


# ---- on the command line ------------------------------------------------------------------------

CLI = ("plan", "torchvision:resnet18", "--meta", "--target", "fc,conv1")


@pytest.mark.parametrize(("budget", "limit"), [("20000", 20_000), ("0.5%", 58_447)])
def test_command(budget: str, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert main([*CLI, "--budget", budget]) == 0
    said = capsys.readouterr().out.partition("adapted with ")[2].partition(" ")[0]
    assert 0.8 * limit < int(said.replace(",", "")) <= limit


@pytest.mark.parametrize("budget", ["0", "x", "200%", "1.5", "3"])
def test_command_with_no_budget(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    assert main([*CLI, "--budget", budget]) == 2
    assert "budget" in capsys.readouterr().err


def test_an_adapter_has_its_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", "torchvision:resnet18", "--adapter", "folder", "--budget", "1%"]
    assert main(words) == 2
    assert "leave out the options for budget" in capsys.readouterr().err


def test_ranks_of_an_init_that_halves_them_stay_even() -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 7)), torch.randn(2, 12))
    config = LoraConfig(r=4, init_lora_weights="orthogonal", target_modules="all-linear")
    for budget in (80, 100, 120, 130):
        plan = fxlora.match(gm, config, budget=budget)
        assert all(entry.r % 2 == 0 for entry in plan) and plan.adapter_parameters <= budget
        fxlora.inject(gm, plan)
    with pytest.raises(fxlora.ConfigError, match="must be even"):
        fxlora.match(gm, LoraConfig(r=3, init_lora_weights="orthogonal", target_modules=["0"]))


# ---- rank_by ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """A packed linear, a product with a bare weight and a convolution; takes (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 12)
        self.w = nn.Parameter(torch.randn(4, 7))
        self.conv = nn.Conv1d(1, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.conv(torch.tanh((q * k + v) @ self.w)[:, None])


def chain() -> tuple[Chain, torch.Tensor, fxlora.CapturedModule]:
    model, x = Chain().double(), torch.randn(6, 8).double()
    return model, x, fxlora.capture(model, x)


def worth_most(
    gains: dict[str, torch.Tensor], costs: dict[str, int], budget: int
) -> dict[str, int]:
    """Return the ranks of the steps behind rank 1 that are worth most per parameter."""
    found = dict.fromkeys(gains, 1)
    left = budget - sum(costs.values())
    steps = [(-float(g) / costs[n], n) for n, all_ in gains.items() for g in all_[1:]]
    blocked: set[str] = set()
    for _, name in sorted(steps):
        if name in blocked or costs[name] > left:
            blocked.add(name)
            continue
        found[name] += 1
        left -= costs[name]
    return found


COSTS = {"qkv.0": 12, "qkv.1": 12, "qkv.2": 12, "w": 11, "conv": 8}
PARTS = [Rule("qkv", lora=LoraConfig(1), parts=3), Rule("w", lora=LoraConfig(1))]


def shares(squares: torch.Tensor) -> torch.Tensor:
    return squares / squares.sum()


@pytest.mark.parametrize("budget", [85, 95, 130, 150])
def test_ranks_by_the_spectrum(budget: int) -> None:
    model, _, gm = chain()
    every = [*PARTS, Rule("conv", lora=LoraConfig(1))]
    plan = fxlora.match(gm, every, budget=budget, rank_by="spectrum")
    weights = [*model.qkv.weight.detach().chunk(3), model.w.detach(), model.conv.weight.detach()]
    squares = [torch.linalg.svdvals(weight.flatten(1)).square() for weight in weights]
    gains = dict(zip(COSTS, map(shares, squares), strict=True))
    assert ranks(plan) == worth_most(gains, COSTS, budget)
    assert plan.adapter_parameters <= budget
    assert len(set(ranks(plan).values())) > 1, "as without rank_by"


@pytest.mark.parametrize("budget", [60, 90, 120])
def test_ranks_by_the_inputs(budget: int) -> None:
    model, x, gm = chain()
    low = x[:2].sum(0, keepdim=True) * torch.randn(4, 1).double() + 0.05 * x[:4]
    plan = fxlora.match(gm, PARTS, budget=budget, rank_by="eva", data=[x[:3], (x[3:],), {"x": low}])
    inputs = torch.cat([x, low])
    q, k, v = model.qkv(inputs).chunk(3, -1)
    of_qkv, of_w = (torch.linalg.svdvals(i.detach()).square() for i in (inputs, q * k + v))
    gains = {f"qkv.{n}": shares(of_qkv)[:4] for n in range(3)} | {"w": shares(of_w)[:4]}
    costs = {name: COSTS[name] for name in gains}
    assert ranks(plan) == worth_most(gains, costs, budget)
    every = [*PARTS, Rule("conv", lora=LoraConfig(1))]
    with pytest.raises(ConfigError, match=r"cannot measure conv.*spectrum"):
        fxlora.match(gm, every, budget=90, rank_by="eva", data=[x])


@pytest.mark.parametrize("budget", [60, 85, 110])
def test_ranks_by_the_gradients(budget: int) -> None:
    model, x, gm = chain()
    every = [*PARTS, Rule("conv", lora=LoraConfig(1))]
    batches = [x[:2], x[2:]]
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = fxlora.match(
        gm, every, budget=budget, rank_by="fisher", data=batches, loss=lambda y: y.square().mean()
    )
    gains: dict[str, torch.Tensor] = {}
    for batch in batches:
        names = [model.qkv.weight, model.w, model.conv.weight]
        qkv, w, conv = torch.autograd.grad(model(batch).square().mean(), names)
        for name, part in zip(COSTS, [*qkv.chunk(3), w, conv.flatten(1)], strict=True):
            more = torch.linalg.svdvals(part).square()
            gains[name] = gains[name] + more if name in gains else more
    assert ranks(plan) == worth_most(gains, COSTS, budget)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in [*model.parameters(), *gm.parameters()])


def test_ranks_of_rules_do_not_matter() -> None:
    _, _, gm = chain()
    large = LoraConfig(64, init_lora_weights="pissa")  # more than any weight here can have
    rules = [Rule("qkv", lora=large, parts=3), Rule("w", lora=large)]
    plans = [fxlora.match(gm, r, budget=100, rank_by="spectrum") for r in (PARTS, rules)]
    assert ranks(plans[0]) == ranks(plans[1])


def test_what_rank_by_refuses() -> None:
    _, x, gm = chain()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rank_by": "norm", "budget": 90}, "rank_by must be one of"),
        ({"rank_by": "spectrum"}, "give budget="),
        ({"rank_by": "eva", "budget": 90}, "needs data="),
        ({"rank_by": "spectrum", "budget": 90, "data": [x]}, "leave it out"),
        ({"budget": 90, "data": [x]}, "leave it out"),
        ({"rank_by": "eva", "budget": 90, "data": [x], "loss": sum}, "loss= is for"),
        ({"rank_by": "eva", "budget": 90, "data": x}, "list of batches"),
        ({"rank_by": "eva", "budget": 90, "data": []}, "cannot measure"),
        ({"rank_by": "fisher", "budget": 90, "data": [x]}, "needs loss="),
        ({"rank_by": "fisher", "budget": 90, "data": [x], "loss": lambda y: 1}, "must return"),
        ({"rank_by": "fisher", "budget": 90, "data": [], "loss": torch.sum}, "no gradient reaches"),
    ]
    for keys, said in cases:
        with pytest.raises(ConfigError, match=said):
            fxlora.match(gm, PARTS, **keys)
