"""Weights that are read inside nested graphs: adapted, folded and found like others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as map_over

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.nested import every_call

from .laws import check_laws

R = LoraConfig(r=2, lora_alpha=3)
EVERY = [Rule(lora=R)]


class Pair(nn.Module):
    """5 → 7 → 5 in `block`, which the subclasses call in regions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5, bias=False)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)


class Autocast(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.block(x)
        return y.to(x.dtype) * 2


class EnableGrad(Pair):
    """The first layer without gradients, both layers with them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = F.linear(x, self.up.weight)
        return self.block(x) + y[:, :5]


class OneBranch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, self.block, lambda x: x * 1.5, (x,))


class BothBranches(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = lambda x: F.linear(F.linear(x, self.up.weight) * 2, self.down.weight)  # noqa: E731
        return torch.cond(x.sum() > 0, self.block, other, (x,)) + F.linear(x, self.up.weight)[:, :5]


class Twice(Pair):
    """A cond in a cond."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x[0, 0] < 9, self.block, lambda x: x + 1, (x,))

        return torch.cond(x.sum() > 0, inner, lambda x: x * 1.5, (x,))


class Scan(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def step(carry: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            carry = torch.tanh(self.block(carry) + row)
            return carry, carry.clone()

        return scan(step, x[0], x, dim=0)[1]


class While(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def test(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return i < 3

        def body(i: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return i + 1, self.block(x)

        return while_loop(test, body, (torch.tensor(0), x))[1]


class Map(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return map_over(self.block, x)


def positive(rows: int = 3) -> torch.Tensor:
    return torch.rand(rows, 5).double() + 0.1


@pytest.mark.parametrize(
    "kind", [Autocast, EnableGrad, OneBranch, BothBranches, Twice, Scan, While, Map]
)
def test_the_laws(kind: type[Pair]) -> None:
    gm, lora = check_laws(kind(), (positive(),), rules=EVERY)
    assert list(every_call(gm.graphs["eval"], gm))
    assert [(e.site, e.op, e.form) for e in lora.plan] == [
        ("up", "linear", "branch"),
        ("down", "linear", "branch"),
    ]
    fxlora.verify(lora, (positive(),))
