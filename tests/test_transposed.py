"""Weights that an op is given transposed take the branch, as the op's own layout does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import check_laws, delta, randomise

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

    def __init__(self, spelling, shape: tuple[int, int]) -> None:
        super().__init__()
        self.before = nn.Linear(5, 5)
        self.matrix = nn.Parameter(torch.randn(shape))
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.spelling(torch.tanh(self.before(x)), self.matrix))


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_out_first(spelling) -> None:
    _check(Spelled(spelling, (7, 5)), in_first=False)


@pytest.mark.parametrize("spelling", IN_FIRST.values(), ids=IN_FIRST)
def test_in_first(spelling) -> None:
    _check(Spelled(spelling, (5, 7)), in_first=True)


def _check(model: nn.Module, in_first: bool) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    rule = Rule("matrix", lora=LoraConfig(r=2, lora_alpha=3))
    _, lora = check_laws(model, (x,), rules=rule)
    (entry,) = lora.plan
    assert (entry.form, entry.in_first) == ("branch", in_first)
    assert entry.shapes == ((2, 5), (7, 2))  # A takes the input, B gives the output


def test_all_linear_takes_a_linear_that_is_spelled_out() -> None:
    model = Spelled(SPELLINGS["x @ W.T"], (7, 5))
    gm = fxlora.capture(model, torch.randn(4, 5))
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules="all-linear"))
    assert [entry.site for entry in plan] == ["matrix", "before"]


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
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(7, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = self.matrix.t()
            return x @ turned + (x @ turned[:, :1])

    model = Sliced().double()
    x = torch.randn(4, 5, dtype=torch.float64)
    _, lora = check_laws(model, (x,), rules=LoraConfig(r=2, target_parameters=["matrix"]))
    (entry,) = lora.plan
    assert entry.form == "weight"
    randomise(lora)
    total = model.matrix + delta(entry, *map(lora.get_parameter, (entry.name_a, entry.name_b)))
    assert torch.allclose(lora(x), x @ total.T + x @ total.T[:, :1])


def test_an_assertion_on_a_weight_is_no_read() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(7, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x.float(), self.matrix.float())

    gm = fxlora.capture(Cast(), torch.randn(4, 5))
    plan = fxlora.match(gm, LoraConfig(r=2, target_parameters=["matrix"]))
    assert [(entry.form, entry.reason) for entry in plan] == [("weight", "read by to")]
