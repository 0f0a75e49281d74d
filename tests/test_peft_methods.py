"""PEFT's folders of VeRA and LoKr: read as pairs, to 1e-10 in float64, or refused."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxlora
from fxlora import AdapterError, FxLoraWarning

from .laws import assert_close, run
from .test_peft_folders import assert_equal_to_pefts
from .typed import plan_of

peft = pytest.importorskip("peft", reason="peft is optional")
D = torch.float64


class Linears(nn.Module):
    """A weight (in, out) and two (out, in), all of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = Conv1D(12, 7), nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.mid(torch.tanh(self.first(x)))))


class Convolutions(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.two, self.one = nn.Conv2d(16, 18, 3, **options), nn.Conv1d(18, 12, 2)
        self.lin = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(torch.tanh(self.two(x)).flatten(2))
        return self.lin(torch.tanh(x.mean(2)))


X, IMAGES = torch.randn(3, 7, dtype=D), torch.randn(2, 16, 6, 5, dtype=D)


def theirs(model: nn.Module, folder: Path, config: Any) -> Any:
    """Adapt a copy by PEFT, draw all that trains at random, save it; return PEFT's module."""
    made = peft.get_peft_model(copy.deepcopy(model), config).to(D).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(str(folder))
    return made


VERA = {"r": 3, "target_modules": ["first", "mid"], "vera_dropout": 0.25, "bias": "vera_only"}


def test_vera(tmp_path: Path) -> None:
    model = Linears().to(D).eval()
    config = peft.VeraConfig(**VERA, modules_to_save=["last"])
    made = theirs(model, tmp_path, config)
    lora = assert_equal_to_pefts(model, (X,), tmp_path, made)
    assert [(e.site, e.r, e.scaling, e.dropout) for e in plan_of(lora)] == [
        ("first", 3, 1.0, 0.25),
        ("mid", 3, 1.0, 0.25),
    ]
    assert set(lora.trained) == {"first.bias", "mid.bias", "last.weight", "last.bias"}


def test_vera_in_another_model(tmp_path: Path) -> None:
    """A wrapped model's names, and those of a mapping, lead to the same pairs."""
    model = Linears().to(D).eval()
    made = theirs(model, tmp_path, peft.VeraConfig(**VERA | {"bias": "none"}))
    gm, file = fxlora.capture(model, X).eval(), tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for new, key_mapping in (("module.", None), ("net.", {"^net\\.": ""})):
        save_file({k.replace(".model.", f".model.{new}"): t for k, t in tensors.items()}, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FxLoraWarning)
            lora = fxlora.load_adapter(gm, tmp_path, key_mapping=key_mapping).eval()
        assert_close(run(lora, (X,), {}), run(made, (X,), {}))
    with pytest.raises(AdapterError, match="does not fit the module"):
        fxlora.load_adapter(fxlora.capture(nn.Linear(7, 2).to(D), X), tmp_path)


def test_vera_without_its_projections(tmp_path: Path) -> None:
    model = Linears().to(D).eval()
    made = theirs(model, tmp_path, peft.VeraConfig(**VERA, save_projection=False))
    gm = fxlora.capture(model, X).eval()
    with pytest.raises(AdapterError, match=r"no vera_A, vera_B.*save_projection=True"):
        fxlora.load_adapter(gm, tmp_path)
    # as the message says
    old = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    config = copy.deepcopy(old.peft_config["default"])
    config.save_projection = True
    new = peft.get_peft_model(copy.deepcopy(model), config)
    new.load_state_dict(old.state_dict(), strict=False)
    new.save_pretrained(str(tmp_path))
    lora = fxlora.load_adapter(gm, tmp_path).eval()
    assert_close(run(lora, (X,), {}), run(made, (X,), {}))


LOKR = {
    "whole": {"r": 9},
    "decomposed": {"r": 2, "decompose_both": True},
    "Tucker": {"r": 2, "use_effective_conv2d": True},
    "patterns": {"r": 2, "alpha": 5, "rank_pattern": {"lin": 1}, "alpha_pattern": {"^two": 7}},
}


@pytest.mark.parametrize("kind", LOKR)
def test_lokr(tmp_path: Path, kind: str) -> None:
    model = Convolutions().to(D).eval()
    config = {"target_modules": ["two", "one", "lin"], "alpha": 3, **LOKR[kind]}
    made = theirs(model, tmp_path, peft.LoKrConfig(**config))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*more parameters than", FxLoraWarning)
        lora = assert_equal_to_pefts(model, (IMAGES,), tmp_path, made)
    assert {entry.scaling for entry in plan_of(lora)} == {1.0}


def test_what_lokr_does_in_training_has_no_effect(tmp_path: Path) -> None:
    model = Linears().to(D).eval()
    config = peft.LoKrConfig(r=1, target_modules=["mid"], rank_dropout=0.5)
    made = theirs(model, tmp_path, config)
    with pytest.warns(FxLoraWarning, match=r"rank_dropout=0\.5 acts on LoKr's products"):
        lora = fxlora.load_adapter(fxlora.capture(model, X), tmp_path).eval()
    assert_close(run(lora, (X,), {}), run(made, (X,), {}))


def test_lokr_has_the_groups_and_the_dilation_of_its_layer(tmp_path: Path) -> None:
    model = Convolutions(groups=2, dilation=(2, 1)).to(D).eval()
    made = theirs(model, tmp_path, peft.LoKrConfig(r=2, target_modules=["two"]))
    gm = fxlora.capture(model, IMAGES).eval()
    lora = fxlora.load_adapter(gm, tmp_path).eval()
    assert (run(made, (IMAGES,), {})[0] - run(gm, (IMAGES,), {})[0]).abs().max() > 1e-3
    assert_close(run(lora, (IMAGES,), {}), run(made, (IMAGES,), {}))
    padded = Convolutions(padding=1, padding_mode="circular").to(D).eval()
    theirs(padded, tmp_path, peft.LoKrConfig(r=2, target_modules=["two"]))
    with pytest.raises(AdapterError, match="padding by another op"):
        fxlora.load_adapter(fxlora.capture(padded, IMAGES), tmp_path)


def test_damaged_folders_and_other_methods(tmp_path: Path) -> None:
    model = Linears().to(D).eval()
    gm = fxlora.capture(model, X).eval()
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    theirs(model, tmp_path, peft.VeraConfig(**VERA))
    said, tensors = json.loads(config.read_text()), load_file(file)
    key = "base_model.model.mid.vera_lambda_d"
    for change, message in (
        ({key: torch.ones(2, dtype=D)}, "of rank 2"),
        ({key: torch.ones(3, 1, dtype=D)}, "not a vector"),
        ({"base_model.vera_A": torch.ones(3, 11, dtype=D)}, "12 inputs, and vera_A"),
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises(AdapterError, match=message):
            fxlora.load_adapter(gm, tmp_path)
    save_file(tensors, file)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=r"for 'VERA', not for LORA\. Fold with the model"):
        fxlora.fold_checkpoint(tmp_path / "model.safetensors", tmp_path, tmp_path / "out")
    save_file({k: t for k, t in tensors.items() if k != key}, file)
    with pytest.raises(AdapterError, match="no 'vera_lambda_d'"):
        fxlora.load_adapter(gm, tmp_path)
    save_file(tensors, file)
    for change, message in (
        ({"peft_type": "IA3"}, "is for 'IA3'; of PEFT's methods, LORA, VERA and LOKR are read"),
        ({"peft_type": ["VERA"]}, "of PEFT's methods"),
        ({"kasa_config": {"a": 1}}, "uses kasa_config"),
    ):
        config.write_text(json.dumps({**said, **change}))
        with pytest.raises(AdapterError, match=message):
            fxlora.load_adapter(gm, tmp_path)
    theirs(model, tmp_path, peft.LoKrConfig(r=1, target_modules=["mid"], rank_pattern={"mid": 2}))
    values = json.loads(config.read_text())
    for wrong in (0, "2", None, True):
        config.write_text(json.dumps({**values, "rank_pattern": {"mid": wrong}}))
        with pytest.raises(AdapterError, match="r of 'mid' must be a number"):
            fxlora.load_adapter(gm, tmp_path)
