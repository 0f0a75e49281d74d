"""The laws on small models, with both frontends and all forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import check_laws
from .models import Attention, Convolutions, Mlp, Normed, Readers, Tied
from .typed import examples, plan_of

EVERY = [Rule(lora=LoraConfig(r=2, lora_alpha=3))]


def inputs(kind: type[nn.Module]) -> tuple[torch.Tensor, ...]:
    indices = torch.tensor([[1, 2, 5, 12], [3, 3, 0, 2], [7, 8, 9, 10]])
    return {
        Mlp: (torch.randn(3, 5).double(),),
        Convolutions: (torch.randn(2, 6, 5, 18, 11).double(),),
        Readers: (torch.randn(3, 5).double(), indices),
        Tied: (indices,),
        Attention: (torch.randn(3, 4, 8).double(),),
        Normed: (torch.randn(4, 3, 9, 7).double(),),
    }[kind]


# The quick run has the laws of attention in test_models.py, on a ViT and a Swin.
SLOW = pytest.param(Attention, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", [Mlp, Convolutions, Readers, Tied, SLOW, Normed])
def test_exported(kind: type[nn.Module]) -> None:
    check_laws(kind(), inputs(kind), rules=EVERY)


@pytest.mark.parametrize("kind", [Mlp, Convolutions, Readers, Tied, Normed])
def test_traced(kind: type[nn.Module]) -> None:
    check_laws(kind(), inputs(kind), rules=EVERY, capture=fxlora.capture)


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Conv2d(5, 3, 2), nn.Embedding(5, 3)])
def test_a_model_that_is_one_layer(layer: nn.Module) -> None:
    x = {
        nn.Linear: torch.randn(2, 5).double(),
        nn.Conv2d: torch.randn(2, 5, 4, 6).double(),
        nn.Embedding: torch.tensor([[0, 4, 2]]),
    }[type(layer)]
    _, lora = check_laws(layer, (x,), rules=Rule("weight", lora=LoraConfig(r=2)))
    assert [entry.site for entry in plan_of(lora)] == ["weight"]


def test_a_name_with_no_dot() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 4))
    x = (torch.randn(2, 5).double(),)
    _, lora = check_laws(model, x, rules=LoraConfig(r=2, target_modules=["0", "2"]))
    assert lora.get_parameter("0.lora_A.default.weight").shape == (2, 5)
    assert lora.get_parameter("2.lora_B.default.weight").shape == (4, 2)


@examples(25)
@given(
    groups=st.integers(1, 4),
    in_each=st.integers(1, 3),
    out_each=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    r=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.5]),
    rslora=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_convolution_geometry(
    groups: int,
    in_each: int,
    out_each: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dilation: int,
    r: int,
    dropout: float,
    rslora: bool,
) -> None:
    """Any number of groups with any r, in both forms (dropout requires the branch form)."""
    layer = nn.Conv2d(
        groups * in_each, groups * out_each, kernel, stride, padding, dilation, groups
    )
    x = torch.randn(2, groups * in_each, 9, 8).double()
    config = LoraConfig(r=r, lora_alpha=5, lora_dropout=dropout, use_rslora=rslora)
    gm = fxlora.capture(layer.double())
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=config)))
    if dropout:
        assert plan_of(lora).entries[0].form == "branch"
        # With dropout the modes differ, so the laws are checked on the eval graph only.
        lora.graphs["train"] = lora.graphs["eval"]
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.normal_()
    a, b = fxlora.lora_parameters(lora)
    matrix = b.flatten(1) @ a.flatten(1)
    scaling = 5 / (r**0.5 if rslora else r)
    weight = layer.weight + scaling * matrix.reshape(layer.weight.shape)
    expected = torch.nn.functional.conv2d(x, weight, layer.bias, stride, padding, dilation, groups)
    effect = (expected - layer(x)).abs().max()
    assert effect > 0
    for module in (lora.eval(), fxlora.fold(lora).eval()):
        assert (module(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
