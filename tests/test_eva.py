"""EVA: A becomes the leading directions of each site's inputs; the outputs do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import ConfigError, LoraConfig, Rule

from .laws import assert_same, run


class Net(nn.Module):
    """Sites whose A is initialized (a layer, a part, a product), and one that keeps its init.

    Takes (N, 8).
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 9)
        self.qkv = nn.Linear(9, 12)
        self.w = nn.Parameter(torch.randn(6, 5))
        self.conv = nn.Conv1d(1, 3, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        self_attended = self.qkv(x).view(-1, 2, 6).tanh()
        return self.conv((self_attended @ self.w * scale).mean(1, keepdim=True))


def adapted(rules: Any, **keys: Any) -> tuple[fxlora.CapturedModule, fxlora.CapturedModule]:
    gm = fxlora.capture(Net().double(), torch.randn(4, 8).double(), **keys)
    return gm, fxlora.inject(gm, fxlora.match(gm, rules))


RULES = [
    Rule("qkv", lora=LoraConfig(r=2), parts=2, enable=[False, True]),
    Rule(lora=LoraConfig(r=3, lora_dropout=0.5)),
]


def projector(rows: torch.Tensor) -> torch.Tensor:
    """Return the projector onto the span of orthonormal rows."""
    assert torch.allclose(rows @ rows.mT, torch.eye(len(rows)).to(rows))
    return rows.mT @ rows


def test_a_spans_the_leading_directions_of_the_inputs() -> None:
    gm, lora = adapted(RULES)
    source = torch.randn(3, 8).double()
    batches = [torch.randn(4, 3).double() @ source * n for n in (1, 2, 5)]
    before = {n: p.clone() for n, p in lora.named_parameters()}
    done = fxlora.initialize_from(lora, [batches[0], (batches[1],), {"x": batches[2]}])
    assert set(done.sites) == {"first", "qkv.1", "w"}
    assert "conv keeps its init" in str(done) and "at 3 sites" in str(done)

    x = torch.cat(batches)
    hidden = torch.tanh(x @ gm.get_parameter("first.weight").T + gm.get_parameter("first.bias"))
    packed = hidden @ gm.get_parameter("qkv.weight").T + gm.get_parameter("qkv.bias")
    inputs = {"first": x, "qkv.1": hidden, "w_adapter": packed.view(-1, 6).tanh()}
    for site, values in inputs.items():
        a = lora.get_parameter(f"{site}.lora_A.default.weight")
        _, _, vh = torch.linalg.svd(values.detach(), full_matrices=False)
        assert torch.allclose(projector(a.detach()), projector(vh[: len(a)]), atol=1e-8)
    changed = {n for n, p in lora.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{site}.lora_A.default.weight" for site in inputs}
    assert list(lora.state_dict()) == list(before)
    assert_same(run(lora.eval(), (x[:4],), {}), run(gm.eval(), (x[:4],), {}))


def test_a_spans_the_principal_components_if_centered() -> None:
    _, lora = adapted([Rule("first", lora=LoraConfig(r=2))])
    x = torch.randn(9, 8).double() + 3 * torch.randn(8).double()
    fxlora.initialize_from(lora, [x[:4], x[4:]], centered=True)
    found = projector(lora.get_parameter("first.lora_A.default.weight").detach())
    plain, centered = (torch.linalg.svd(rows)[2][:2] for rows in (x, x - x.mean(0)))
    assert not torch.allclose(projector(plain), projector(centered), atol=0.1)
    assert torch.allclose(found, projector(centered), atol=1e-8)


def test_regions() -> None:
    class Jumps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return x if x.sum() > 0 else -x

    model, x = Jumps().double(), torch.randn(4, 8).double()
    with pytest.warns(fxlora.FxLoraWarning):
        gm = fxlora.capture(model, x)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["first"])))
    assert fxlora.initialize_from(lora, [x]).sites == ("first",)
    a = lora.get_parameter("first.lora_A.default.weight").detach()
    _, _, vh = torch.linalg.svd(x)
    assert torch.allclose(projector(a), projector(vh[:2]))


@pytest.mark.parametrize(
    ("config", "batches", "message"),
    [
        ({}, [], "no batch reaches 'first'"),
        ({"init_lora_weights": False}, [torch.randn(4, 8).double()], "B of 'first' is not zero"),
        (
            {"init_lora_weights": "pissa"},
            [torch.randn(4, 8).double()],
            "no op has just A as its weight",
        ),
        ({"r": 9}, [torch.randn(4, 8).double()], "fewer than r=9"),
    ],
)
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_what_cannot_be(config: Any, batches: Any, message: str) -> None:
    _, lora = adapted(LoraConfig(**{"r": 2, "target_modules": ["first"], **config}))
    with pytest.raises(ConfigError, match=message):
        fxlora.initialize_from(lora, batches)
    with pytest.raises(ConfigError, match="inject a plan first"):
        fxlora.initialize_from(fxlora.remove(lora), batches)
