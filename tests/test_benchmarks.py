"""The sweeps of benchmarks/ classify a model's weights correctly, as the README's numbers need."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fxlora

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


class FourForms(nn.Module):
    """One weight for each category of benchmarks/forms.py."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.depthwise = nn.Conv1d(12, 12, 3, groups=12)
        self.bent = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(self.embedding(ids).transpose(1, 2))
        hidden = nn.functional.linear(hidden, self.bent.weight.tanh())
        with torch.no_grad():
            gate = self.frozen(hidden)
        return hidden.sum(-1, keepdim=True) * gate


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("forms")


def test_forms_tells_the_four_apart(forms: ModuleType) -> None:
    captured = fxlora.capture(FourForms(), (torch.zeros(2, 7, dtype=torch.long),))
    found = {weight["site"]: weight for weight in forms.forms(captured, r=2)}
    assert {site: (weight["op"], weight["form"]) for site, weight in found.items()} == {
        "embedding": ("embedding", "branch"),
        "depthwise": ("conv1d", "by choice"),
        "bent": ("linear", "weight"),
        "frozen": ("linear", "refused"),
    }
    assert "tanh" in found["bent"]["reason"]
    assert found["frozen"]["reason"] == "is read only under torch.no_grad()"
    row = forms.row("all", list(found.values()))
    assert (row["branch, %"], row["branch, % without 'by choice'"]) == ("25.0", "33.3")


def test_reasons_are_said_once_for_all_their_weights(forms: ModuleType) -> None:
    assert forms.general(
        "'a.b' (rule 1): a weight of shape (2, 3) that mul reads at model.py:7 is no matrix, and"
    ) == ("a weight of shape (…) that mul reads is no matrix")
    reasons = (
        "8 groups: a branch costs 7 times as much as the weight's gradient",
        "16 groups: a branch costs 5% more than the weight's gradient",
    )
    assert forms.alike(reasons[0]) == forms.alike(reasons[1]) != reasons[0]
