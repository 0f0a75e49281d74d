from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import InjectError, LoraConfig, Rule, VerificationError

from .laws import randomise
from .models import Convolutions, Normed, Tied

R = LoraConfig(r=2, lora_alpha=3)


@pytest.fixture
def lora() -> fxlora.CapturedModule:
    rules = Rule(["conv", "twice", "first"], lora=R)
    result = fxlora.adapt(Normed(), torch.randn(2, 3, 9, 7), rules=rules)
    randomise(result)
    return result


X = torch.randn(3, 3, 9, 7)


def test_a_sound_module_verifies(lora: fxlora.CapturedModule) -> None:
    state = {n: t.clone() for n, t in lora.state_dict().items()}
    found = fxlora.verify(lora, X, folded=fxlora.fold(lora))
    assert [check.site for check in found.sites] == ["conv", "twice", "first"]
    assert all(check.effect > 0 for check in found.sites)
    assert [check.reads_in("eval") for check in found.sites] == [1, 2, 2]
    assert found.output_error < found.tolerance
    assert "twice" in str(found)
    assert all(torch.equal(t, state[n]) for n, t in lora.state_dict().items())
    assert all(p.grad is None for p in lora.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_form_and_dtype(dtype: torch.dtype) -> None:
    model = Convolutions().to(dtype)
    x = torch.randn(2, 6, 5, 18, 11, dtype=dtype)
    adapted = fxlora.adapt(model, x, rules=Rule(lora=R))
    randomise(adapted)
    assert {check.form for check in fxlora.verify(adapted, x).sites} == {"branch", "weight"}
    tied = fxlora.adapt(Tied().to(dtype), torch.tensor([[1, 2]]), rules=Rule("emb", lora=R))
    randomise(tied)
    fxlora.verify(tied, torch.tensor([[1, 2]]))


def test_an_untrained_module_verifies() -> None:
    adapted = fxlora.adapt(Normed(), X, rules=Rule("twice", lora=R))
    assert fxlora.verify(adapted, X).output_error == 0


def test_a_wrong_fold_is_named(lora: fxlora.CapturedModule) -> None:
    folded = fxlora.fold(lora)
    with torch.no_grad():
        folded.get_parameter("twice.weight")[2, 1] += 1e-4
    with pytest.raises(VerificationError, match=r"'twice': its folded weight is not W0 \+ s·BA"):
        fxlora.verify(lora, X, folded=folded)


def test_the_fold_of_another_module_is_noticed(lora: fxlora.CapturedModule) -> None:
    other = fxlora.adapt(Normed(), X, rules=Rule(["conv", "twice", "first"], lora=R))
    randomise(other)
    with pytest.raises(VerificationError, match="'conv'"):
        fxlora.verify(lora, X, folded=fxlora.fold(other))
    with pytest.raises(VerificationError, match="not the captured one node for node"):
        fxlora.verify(lora, X, folded=lora)


def test_an_adapter_that_cannot_change_the_output() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = nn.Linear(5, 4), nn.Linear(5, 4)
            self.gate = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.live(x) + self.gate * self.dead(x)

    x = torch.randn(3, 5)
    adapted = fxlora.adapt(Gated(), x, rules=Rule(["live", "dead"], lora=R))
    with pytest.raises(VerificationError, match="'dead' cannot change the outputs"):
        fxlora.verify(adapted, x)


def test_a_branch_that_was_cut_is_noticed(lora: fxlora.CapturedModule) -> None:
    broken = lora.derive()
    for graph in broken.distinct_graphs():
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.add.Tensor and "conv2d" in str(node.args[0]):
                node.replace_all_uses_with(node.args[0])
    broken.recompile()
    with pytest.raises(VerificationError, match="'conv'"):
        fxlora.verify(broken, X)


def test_a_weight_that_only_the_train_graph_reads() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.Linear(5, 4), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self.main(F.dropout(x, 0.1, self.training))
            return (out, self.aux(x)) if self.training else (out,)

    adapted = fxlora.adapt(Auxiliary(), torch.randn(3, 5), rules=Rule(["main", "aux"], lora=R))
    found = fxlora.verify(adapted, torch.randn(3, 5))
    (aux,) = (check for check in found.sites if check.site == "aux")
    assert (aux.reads_in("train"), aux.reads_in("eval")) == (1, 0)
    assert "1/0" in str(found)


def test_what_has_nothing_to_verify(lora: fxlora.CapturedModule) -> None:
    with pytest.raises(InjectError, match="nothing to verify"):
        fxlora.verify(fxlora.fold(lora), X)
