"""An adapter folder knows the base that it was trained over."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import AdapterError, FxLoraWarning, LoraConfig

from .laws import assert_same, randomise, run

X = (torch.randn(3, 6),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 5), nn.Linear(5, 4), nn.LayerNorm(4)
        self.pooler = nn.Linear(4, 4)  # which nothing reads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(torch.tanh(self.a(x))))


def adapted(model: nn.Module, folder: Path, args: Any = X) -> fxlora.CapturedModule:
    gm = fxlora.capture(model, *args)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["a"])))
    randomise(lora)
    fxlora.save_adapter(lora, folder)
    return lora


def test_the_same_base(tmp_path: Path) -> None:
    model = Net()
    lora = adapted(model, tmp_path)
    with torch.no_grad():
        model.pooler.weight.normal_()
    again = fxlora.load_adapter(
        fxlora.capture(copy.deepcopy(model), *X), tmp_path, strict_base=True
    )
    assert_same(run(again, X, {}), run(lora, X, {}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("a.weight", r"trained over other weights: a\.weight\."),
        ("b.weight", "weights that it adapts are the same, and others differ"),
        ("norm.bias", "others differ"),
    ],
)
@pytest.mark.parametrize("how", ["an entry", "two swapped", "a sign"])
def test_another_base(tmp_path: Path, changed: str, message: str, how: str) -> None:
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    adapted(model, tmp_path)
    with torch.no_grad():
        flat = model.get_parameter(changed).view(-1)
        if how == "an entry":
            flat[1] = torch.nextafter(flat[1], flat.new_tensor(torch.inf))
        elif how == "a sign":
            flat[1] *= -1
        else:
            flat[:2] = flat[:2].flip(0)
    gm = fxlora.capture(model, *X)
    with pytest.warns(FxLoraWarning, match=message):
        fxlora.load_adapter(gm, tmp_path)
    with pytest.raises(AdapterError, match=message):
        fxlora.load_adapter(gm, tmp_path, strict_base=True)


def test_a_second_stage_on_the_first_base(tmp_path: Path) -> None:
    gm = fxlora.capture(Net(), *X)
    first = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["a"])))
    randomise(first)
    stage = fxlora.fold(first)
    second = fxlora.inject(stage, fxlora.match(stage, LoraConfig(r=2, target_modules=["a"])))
    randomise(second)
    fxlora.save_adapter(second, tmp_path)
    with pytest.warns(FxLoraWarning, match="with the adapters folded that were folded there"):
        fxlora.load_adapter(gm, tmp_path)
    again = fxlora.load_adapter(stage, tmp_path, strict_base=True)  # the advice
    assert_same(run(again, X, {}), run(second, X, {}))


def test_other_dtypes(tmp_path: Path) -> None:
    """A wider copy is compared as rounded; of a narrower one nothing is known."""
    model, half = Net(), (X[0].bfloat16(),)
    adapted(copy.deepcopy(model).bfloat16(), tmp_path / "narrow", half)
    fxlora.load_adapter(fxlora.capture(model, *X), tmp_path / "narrow", strict_base=True)
    adapted(model, tmp_path / "wide")
    narrow = fxlora.capture(copy.deepcopy(model).bfloat16(), *half)
    with pytest.raises(AdapterError, match=r"wider dtype: a\.weight \(float32\).*is not known"):
        fxlora.load_adapter(narrow, tmp_path / "wide", strict_base=True)
    with torch.no_grad():
        model.a.weight.neg_()
    with pytest.warns(FxLoraWarning, match="trained over other weights"):
        fxlora.load_adapter(fxlora.capture(model, *X), tmp_path / "narrow")


def test_folders_without_fingerprints(tmp_path: Path) -> None:
    model = Net()
    adapted(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path)  # without the header, as PEFT writes it
    with torch.no_grad():
        model.a.weight.normal_()
    gm = fxlora.capture(model, *X)
    fxlora.load_adapter(gm, tmp_path)
    with pytest.raises(AdapterError, match=r"has no fingerprints.*load it without strict_base"):
        fxlora.load_adapter(gm, tmp_path, strict_base=True)


@pytest.mark.parametrize("value", [3, [], {"weights": 3}, {"weights": {"a.weight": ["x", 1]}}])
def test_damaged_fingerprints(tmp_path: Path, value: Any) -> None:
    model = Net()
    adapted(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fxlora"])
    save_file(load_file(path), path, {"fxlora": json.dumps({**header, "base": value})})
    with pytest.raises(AdapterError, match="its plan is damaged: base"):
        fxlora.load_adapter(fxlora.capture(model, *X), tmp_path)


def test_peft_reads_the_folder(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model = Net()
    lora = adapted(model, tmp_path).eval()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert torch.allclose(again(*X), lora(*X), atol=1e-6)
