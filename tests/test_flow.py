"""Gradient flow: an adapter that no gradient can reach is refused, wherever the gradient stops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import LoraConfig, Rule, UnsupportedOpError

from .laws import check_laws, randomise
from .models import Several
from .typed import grad_of, plan_of

Op = Callable[[torch.Tensor], torch.Tensor]
X = torch.randn(4, 5, dtype=torch.float64)


class Two(nn.Module):
    """Two layers; `stop` is applied to the first one's output, inside or outside of a region."""

    def __init__(self, stop: Op, region: Any = contextlib.nullcontext, inside: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(5, 7)
        self.stop, self.region, self.inside = stop, region, inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.region():
            y = self.a(x)
            y = self.stop(y) if self.inside else y
        return (y if self.inside else self.stop(y)).to(x.dtype) + self.b(x)


STOPS: dict[str, Op] = {
    "detach": lambda y: y.detach(),
    "sign": torch.sign,
    "sgn": torch.sgn,
    "round": torch.round,
    "round decimals": lambda y: torch.round(y, decimals=2),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "fix": torch.fix,
    "heaviside": lambda y: torch.heaviside(y, torch.ones_like(y)),
    "comparison": lambda y: (y > 0).double(),
    "argmax": lambda y: y.argmax(-1, keepdim=True).double(),
    "argsort": lambda y: y.argsort(-1).double(),
    "bernoulli": lambda y: torch.bernoulli(y.sigmoid()),
    "integers": lambda y: y.long().double(),
    "floor_divide": lambda y: y.detach() // 2,
    "zeros_like": torch.zeros_like,
    "behind another": lambda y: torch.tanh(torch.round(y) * 2),
    "times nothing": lambda y: y * 0,
    "one hot": lambda y: F.one_hot(y.argmax(-1), 7).double(),
}
PASSES: dict[str, Op] = {
    "straight through": lambda y: y + (torch.round(y) - y).detach(),
    "frac": torch.frac,
    "remainder": lambda y: torch.remainder(y, 2.0),
    "relu": torch.relu,
    "clamp": lambda y: y.clamp(-0.5, 0.5),
    "between limits": lambda y: y.clamp(y.new_tensor(-0.5), y.new_tensor(0.5)),
    "gate": lambda y: torch.where(y > 0, y, 0.1 * y),
    "abs": torch.abs,
    "sort": lambda y: y.sort(-1).values,
    "softmax": lambda y: y.softmax(-1),
    "norm": lambda y: y / y.norm(dim=-1, keepdim=True),
    "norm over pixels": lambda y: F.instance_norm(y[None])[0],
    "beside its own step": lambda y: y * torch.sign(y).detach(),
}
REGIONS = {
    "no region": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "enable_grad": torch.enable_grad,
}


REFUSED = r"'parts\.{}\.a' .* its adapter would never train"


def only(name: str) -> Rule:
    return Rule(name, lora=LoraConfig(r=2))


def check_refused(gm: fxlora.CapturedModule, names: list[str]) -> None:
    """Check that in `Several` models, each layer `a` is refused and each layer `b` is accepted."""
    for number in range(len(names)):
        with pytest.raises(UnsupportedOpError, match=REFUSED.format(number)):
            fxlora.match(gm, only(f"parts.{number}.a"))
    assert len(fxlora.match(gm, only("parts.*.b"))) == len(names)


def test_what_no_gradient_reaches_is_refused() -> None:
    model = Several(Two(stop) for stop in STOPS.values()).double()
    check_refused(fxlora.capture(model, X), [*STOPS])


INSIDE = ["detach", "argmax", "bernoulli", "behind another", "times nothing"]
BEHIND = ["detach", "round", "argmax"]


@pytest.mark.parametrize("region", ["autocast", "enable_grad"])
@pytest.mark.parametrize(
    ("inside", "behind"),
    [(INSIDE, BEHIND), pytest.param([*STOPS], [], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_what_no_gradient_reaches_in_a_region(
    region: str, inside: list[str], behind: list[str]
) -> None:
    parts = [Two(STOPS[name], REGIONS[region]) for name in inside]
    parts += [Two(STOPS[name], REGIONS[region], inside=False) for name in behind]
    check_refused(fxlora.capture(Several(parts).double(), X), inside + behind)


def test_the_tracer_refuses_it_too() -> None:
    stops = STOPS | {"data": lambda y: y.data}  # torch.export cannot record it
    names = ["detach", "data", "sign", "round", "argmax", "comparison"]
    model = Several(Two(stops[name]) for name in names).double()
    check_refused(fxlora.capture(model), names)


SOME = {
    "no region": [*PASSES],
    "autocast": ["straight through", "gate", "beside its own step"],
    "enable_grad": ["clamp", "sort", "norm"],
}


@pytest.mark.parametrize(
    "names",
    [
        SOME,
        pytest.param({"autocast": [*PASSES]}, marks=pytest.mark.slow),
        pytest.param({"enable_grad": [*PASSES]}, marks=pytest.mark.slow),
    ],
    ids=["some", "autocast", "enable_grad"],
)
def test_what_a_gradient_reaches_trains(names: dict[str, list[str]]) -> None:
    cases = [(region, name) for region, chosen in names.items() for name in chosen]
    model = Several(Two(PASSES[name], REGIONS[region]) for region, name in cases).double()
    lora = fxlora.adapt(model, X, rules=only("parts.*.a"))
    randomise(lora)
    sum((y.square().sum() for y in lora.train()(X)), torch.zeros(())).backward()
    for entry, case in zip(plan_of(lora), cases, strict=True):
        for parameter in map(lora.get_parameter, entry.trainable):
            assert float(grad_of(parameter).abs().max()) > 0, case


def test_a_weight_whose_way_is_cut_is_refused() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, torch.round(self.a.weight)) + self.b(x)

    gm = fxlora.capture(Rounded(), X.float())
    with pytest.raises(UnsupportedOpError, match=r"'a' .* read only through round"):
        fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))


class Conditional(nn.Module):
    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.a, self.b, self.cut = nn.Linear(5, 7), nn.Linear(5, 7), cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.a(-x), (x,))
        return (y.detach() if self.cut else y) + self.b(x)


def test_a_detach_behind_a_cond() -> None:
    gm = fxlora.capture(Conditional(True).double(), X)
    with pytest.raises(UnsupportedOpError, match="would never train"):
        fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))
    check_laws(Conditional(False), (X,), rules=Rule("a", lora=LoraConfig(r=2)))


class OneResultOfTwo(nn.Module):
    """A torch.cond with two results, of which one is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.cond(
            x.sum() > 0,
            lambda x: (self.a(x), self.b(x)),
            lambda x: (self.a(-x), self.b(-x)),
            (x,),
        )
        return first.detach() + second


def test_the_results_of_a_region_are_told_apart() -> None:
    gm = fxlora.capture(OneResultOfTwo(), X.float())
    with pytest.raises(UnsupportedOpError, match=r"'a' .* would never train"):
        fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))
    assert len(fxlora.match(gm, Rule("b", lora=LoraConfig(r=2)))) == 1


class Carried(nn.Module):
    """A scan whose second carried value is added to the first in the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def step(carry: Any, item: torch.Tensor) -> Any:
            first, second = carry
            return (first + second, torch.tanh(self.a(item))), first.clone()

        carry, _ = scan(step, (x[0].clone(), x[0].clone()), x, dim=0)
        return carry[0]


def test_what_a_loop_carries_from_step_to_step_trains() -> None:
    gm = fxlora.capture(Carried(), X.float())
    assert len(fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))) == 1


class LoopTest(nn.Module):
    """A weight that only the condition of a while_loop reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 1), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def goes_on(n: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (n < 3) & (self.a(y).sum() < 100)

        return while_loop(goes_on, lambda n, y: (n + 1, self.b(y)), (torch.tensor(0), x))[1]


def test_the_test_of_a_loop_reads_its_weight() -> None:
    gm = fxlora.capture(LoopTest(), X.float())
    with pytest.raises(UnsupportedOpError, match=r"'a' .* would never train"):
        fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))


def test_a_checkpoint_is_no_end() -> None:
    class Checkpointed(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.stop(checkpoint(self.a, x, use_reentrant=False)) + self.b(x)

    gm = fxlora.capture(Checkpointed(STOPS["detach"]).double(), X)
    with pytest.raises(UnsupportedOpError, match="would never train"):
        fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))
    check_laws(Checkpointed(torch.tanh), (X,), rules=Rule("a", lora=LoraConfig(r=2)))


class LeastSize(nn.Module):
    """Computes a size by a function of torch's that fails an assertion for tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)[: torch.sym_min(x.shape[0], x.shape[1])]


def test_a_function_that_refuses_a_trial_in_any_way() -> None:
    dynamic = {"x": {0: Dim.AUTO, 1: Dim.AUTO}}
    gm = fxlora.capture(LeastSize(), torch.randn(5, 3, 4), dynamic_shapes=dynamic)
    assert "sym_min" in gm.code
    plan = fxlora.match(gm, fxlora.LoraConfig(r=2, target_modules="all-linear"))
    assert [entry.site for entry in plan] == ["proj"]


class NoRegisters(nn.Module):
    """Has a weight without entries, as a model of which a part is configured to size 0."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.none = nn.Linear(4, 6), nn.Parameter(torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.linear(x, self.none), self.proj(x)], 1)


def test_a_weight_without_entries() -> None:
    gm = fxlora.capture(NoRegisters(), torch.randn(5, 4))
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules=["proj"]))
    assert [entry.site for entry in plan] == ["proj"]
    with pytest.raises(fxlora.NoMatchError, match="'none'"):
        fxlora.match(gm, LoraConfig(r=2, target_parameters=["none"]))
