"""Weights that an op reads transposed take the branch form, as in the op's own layout."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.reads.sites import find_sites

from .laws import check_laws, merged_weights, randomise
from .models import Reads, Several
from .typed import Function, plan_of

SPELLINGS = {
    "x @ W.T": lambda x, w: x @ w.T,
    "x @ W.t()": lambda x, w: x @ w.t(),
    "x @ W.mT": lambda x, w: x @ w.mT,
    "mm": lambda x, w: torch.mm(x, w.transpose(0, 1)),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "negative": lambda x, w: x @ w.transpose(-2, -1),
    "addmm": lambda x, w: torch.addmm(torch.ones(7, dtype=x.dtype), x, w.t()),
    "twice": lambda x, w: F.linear(x, w.t().t()),
    "to left": lambda x, w: (w @ x.t()).t(),
}
IN_FIRST = {
    "linear of W.T": lambda x, w: F.linear(x, w.T),
    "W.T to the left": lambda x, w: (w.T @ x.t()).t(),
    "mm": lambda x, w: torch.mm(w.t(), x.t()).t(),
}


class Spelled(nn.Module):
    """One weight of 5 inputs and 7 outputs, in either layout; takes (N, 5)."""

    def __init__(self, spelling: Any, shape: tuple[int, int]) -> None:
        super().__init__()
        self.before: nn.Module = nn.Linear(5, 5)
        self.matrix = nn.Parameter(torch.randn(shape))
        self.subscripts = {"matrix": "oi" if shape == (7, 5) else "io"}
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.spelling(torch.tanh(self.before(x)), self.matrix))


def test_every_spelling() -> None:
    out = [Spelled(spelling, (7, 5)) for spelling in SPELLINGS.values()]
    model = Several([*out, *(Spelled(spelling, (5, 7)) for spelling in IN_FIRST.values())])
    x = torch.randn(4, 5, dtype=torch.float64)
    rule = Rule("parts.*.matrix", lora=LoraConfig(r=2, lora_alpha=3))
    _, lora = check_laws(model, (x,), rules=rule)
    for number, (name, entry) in enumerate(
        zip([*SPELLINGS, *IN_FIRST], plan_of(lora), strict=True)
    ):
        in_first = number >= len(SPELLINGS)
        assert (entry.form, entry.layout.in_first) == ("branch", in_first), name
        assert entry.shapes == ((2, 5), (7, 2)), name  # (r, in), (out, r)


def test_all_linear_takes_a_linear_that_is_spelled_out_if_there_is_no_layer() -> None:
    model, x = Spelled(SPELLINGS["x @ W.T"], (7, 5)), torch.randn(4, 5)
    config = LoraConfig(r=2, target_modules="all-linear")
    plan = fxlora.match(fxlora.capture(model, x), config)
    assert [entry.site for entry in plan] == ["before"]  # as in PEFT
    model.before = nn.Identity()
    plan = fxlora.match(fxlora.capture(model, x), config)
    assert [entry.site for entry in plan] == ["matrix"]


def test_a_weight_read_both_ways_has_one_adapter() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.enc(x)) @ self.enc.weight

    x = torch.randn(4, 5, dtype=torch.float64)
    check_laws(Autoencoder(), (x,), rules=LoraConfig(r=2, target_modules=["enc"]))


def test_a_use_of_the_transpose_that_is_no_product_takes_the_weight_form() -> None:
    def sliced(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        turned = w.t()
        return x @ turned + (x @ turned[:, :1])

    model = Reads(sliced, "oi", 7, 5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    _, lora = check_laws(model, (x,), rules=LoraConfig(r=2, target_parameters=["w"]))
    (entry,) = plan_of(lora)
    assert entry.form == "weight"
    randomise(lora)
    total = merged_weights(model, lora, dict(lora.named_parameters()))["w"]
    assert torch.allclose(lora(x), x @ total.T + x @ total.T[:, :1])


def test_an_assertion_on_a_weight_is_no_read() -> None:
    model = Reads(lambda x, w: F.linear(x.float(), w.float()), "oi", 7, 5)
    gm = fxlora.capture(model, torch.randn(4, 5))
    plan = fxlora.match(gm, LoraConfig(r=2, target_parameters=["w"]))
    assert [(entry.form, entry.reason) for entry in plan] == [
        ("weight", "read by linear through to")
    ]


# ---- weights computed from weights only ---------------------------------------------------------


class Standardised(nn.Conv2d):
    """A convolution whose weight is normalised at every call, as in BiT and in NFNets."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(input, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Squeezed(nn.Module):
    """A depthwise convolution that reads its weight through views, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, groups=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, self.conv.weight.squeeze(1).unsqueeze(1), groups=6)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (Standardised(3, 6, (3, 2)), (2, 3, 7, 8), "read by conv2d through reshape"),
        (
            Squeezed(),
            (2, 6, 9),
            "6 groups: a branch costs 8 times as much as the weight's gradient",
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 6, 4)),
            (2, 3, 9),
            "read by conv1d through _weight_norm",
        ),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 7)), (4, 5), "read by linear through"),
    ],
    ids=["standardised", "squeezed", "weight norm", "linear"],
)
def test_a_function_of_a_weight_takes_the_weight_form(
    layer: nn.Module, shape: tuple[int, ...], expected: str
) -> None:
    model = nn.Sequential(layer, nn.Tanh())
    x = torch.randn(shape, dtype=torch.float64)
    rule = Rule(op=["conv*", "linear"], where=lambda s: s.parameters > 7, lora=LoraConfig(r=2))
    _, lora = check_laws(model, (x,), rules=rule)
    (entry,) = plan_of(lora)
    assert entry.form == "weight"
    assert entry.reason.startswith(expected)
    assert ("k" in entry.layout.roles) == (entry.op != "linear")


@pytest.mark.parametrize(
    ("r", "reason"),
    [
        (2, ""),
        (3, "2 groups: a branch costs 50% more than the weight's gradient"),
        (5, "2 groups: a branch costs 2 times as much as the weight's gradient"),
    ],
)
def test_the_cost_of_a_grouped_convolution(r: int, reason: str) -> None:
    gm = fxlora.capture(nn.Sequential(nn.Conv1d(16, 16, 3, groups=2)), torch.randn(2, 16, 9))
    (entry,) = fxlora.match(gm, Rule("0", lora=LoraConfig(r=r)))
    assert (entry.form, entry.reason) == ("weight" if reason else "branch", reason)


def test_a_stack_of_kernels() -> None:
    model = Reads(lambda x, w: F.conv1d(x, w[1]) + F.conv1d(x, w[3]), "eoik", 4, 6, 3, 2)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    _, lora = check_laws(model, (x,), rules=LoraConfig(r=2, target_parameters=["w"]))
    (entry,) = plan_of(lora)
    assert entry.shapes == ((4, 2, 3, 2), (4, 6, 2, 1))


def test_a_weight_times_its_own_transpose() -> None:
    model = Reads(lambda x, w: x @ (w @ w.T), "io", 7, 5)
    x = torch.randn(4, 7, dtype=torch.float64)
    _, lora = check_laws(model, (x,), rules=LoraConfig(r=2, target_parameters=["w"]))
    (entry,) = plan_of(lora)
    assert (entry.form, entry.reason) == ("weight", "multiplied with another weight")


def test_a_parameter_that_is_the_input_of_a_linear_is_none() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(7, 5))
            self.proj = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(self.queries) @ x

    gm = fxlora.capture(Queries(), torch.randn(3, 4))
    kinds = {site.name: site.op for site in find_sites(gm)}
    assert kinds == {"queries": "operand of linear", "proj": "linear"}
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules="all-linear"))
    assert [entry.site for entry in plan] == ["proj"]


# ---- uses that are not reads of values ----------------------------------------------------------


class Looks(nn.Module):
    """Reads `used`; the function `look` may use `other`."""

    subscripts: ClassVar = {"used": "io", "other": "oi"}

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.used, self.other = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
        self.look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.look(self, x, x @ self.used)


NO_READS = {
    "dead code": lambda m, x, y: ((x @ m.other).sum() * 2, y)[1],
    "its shape": lambda m, x, y: y + torch.zeros_like(m.other)[:1],
    "its dtype": lambda m, x, y: y + m.other.new_ones(1, 3),
}
UNTRAINED = {
    "steps": lambda m, x, y: y + m.other.sign()[:1],
    "indices": lambda m, x, y: y + m.other.argmax(1)[:1, None].to(y.dtype),
    "detached after the read": lambda m, x, y: y + (x @ m.other).detach(),
}


@pytest.mark.parametrize("look", NO_READS.values(), ids=NO_READS)
def test_what_takes_no_values_is_no_read(look: Any) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    _, lora = check_laws(Looks(look), (x,), rules=Rule(lora=LoraConfig(r=2)))
    assert [(entry.site, entry.form) for entry in plan_of(lora)] == [("used", "branch")]
    with pytest.raises(fxlora.NoMatchError, match="'other'"):
        fxlora.match(fxlora.remove(lora), Rule("other", lora=LoraConfig(r=2)))


@pytest.mark.parametrize("look", UNTRAINED.values(), ids=UNTRAINED)
def test_where_no_gradient_passes_no_adapter_stands(look: Any) -> None:
    gm = fxlora.capture(Looks(look), torch.randn(4, 5))
    with pytest.raises(fxlora.UnsupportedOpError, match="would never train"):
        fxlora.match(gm, Rule("other", lora=LoraConfig(r=2)))


@fx.wrap
def new_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


class round(Function):
    """Has torch.round's name, but passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return torch.round(weight * 8) / 8

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_users_functions_are_not_torchs_of_the_same_name() -> None:
    model = Looks(lambda m, x, y: y + new_product(x, m.other))
    gm = fxlora.capture(model)  # the tracer keeps the function whole
    assert {s.name: s.op for s in find_sites(gm)}["other"] == "new_product"
    x = torch.randn(4, 5, dtype=torch.float64)
    check_laws(model, (x,), rules=Rule(lora=LoraConfig(r=2)), capture=fxlora.capture)
    passed_on = Looks(lambda m, x, y: y + x @ round.apply(m.other)).double()
    lora = fxlora.adapt(passed_on, x, rules=Rule("other", lora=LoraConfig(r=2)))
    randomise(lora)
    lora(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in fxlora.lora_parameters(lora))


def test_a_straight_through_estimator_trains() -> None:
    def quantised(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w + (torch.round(w * 8) / 8 - w).detach())

    model = Reads(quantised, "oi", 7, 5).double()
    gm = fxlora.capture(model, torch.randn(4, 5, dtype=torch.float64))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("w", lora=LoraConfig(r=2))))
    randomise(lora)
    lora(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in fxlora.lora_parameters(lora))


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_tracer_refuses_contexts_that_it_does_not_see(context: Any) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with context():
                return self.layer(x)

    with pytest.raises(fxlora.CaptureError, match="Give example inputs"):
        fxlora.capture(Inside())
