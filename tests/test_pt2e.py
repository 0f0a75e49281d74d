"""Bases that PT2E quantised: weights decoded from constants, activations rounded."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import LoraConfig, QuantisedError
from fxlora.module.decoded import DecodedTensor
from fxlora.module.quantised import dequantised, is_quantised

pytest.importorskip("torchao", reason="the torchao extra is not installed")

from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=["0", "3"], init_lora_weights=False)


def float_model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    return nn.Sequential(*layers).eval()


def in_pt2e(model: nn.Module) -> nn.Module:
    quantizer: Any = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    exported: Any = torch.export.export(model, (X,)).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(X)
    return convert_pt2e(prepared)


@functools.cache
def pair() -> tuple[nn.Module, fxlora.CapturedModule, fxlora.CapturedModule]:
    """The converted model, its capture, and an injection of random adapters."""
    source = in_pt2e(float_model())
    captured = fxlora.capture(source, X)
    torch.manual_seed(2)
    return source, captured, fxlora.inject(captured, fxlora.match(captured, CONFIG)).eval()


def test_a_capture_has_the_bits_and_the_weights_have_the_layers_names() -> None:
    source, captured, _ = pair()
    assert torch.equal(captured(X), source(X))
    weights = {name: p for name, p in captured.named_parameters() if is_quantised(p)}
    assert {n: tuple(p.shape) for n, p in weights.items()} == {
        "0.weight": (8, 3, 3, 3),
        "3.weight": (5, 128),
    }
    assert not any("_frozen" in name or "_scale" in name for name in captured.state_dict())
    decoded = dequantised(captured.get_parameter("3.weight"))
    codes, scale, _ = (getattr(captured.get_parameter("3.weight"), f"part_{n}") for n in range(3))
    assert torch.equal(decoded, codes.float() * scale[:, None])


def test_layers_in_front_of_rounded_activations_train() -> None:
    _, _, lora = pair()
    assert lora.plan is not None and [e.form for e in lora.plan] == ["branch", "branch"]
    trained = copy.deepcopy(lora).train()
    wanted = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(fxlora.lora_parameters(trained), lr=1e-2)
    losses: list[float] = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.mse_loss(trained(X), wanted)
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad.abs().max() > 0 for p in fxlora.lora_parameters(trained))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_verify_files_and_copies(tmp_path: Path) -> None:
    source, captured, lora = pair()
    assert not torch.allclose(lora(X), source(X), atol=1e-2)
    assert len(fxlora.verify(lora, X).sites) == 2
    fxlora.save_adapter(lora, tmp_path / "adapter")
    assert torch.equal(fxlora.load_adapter(captured, tmp_path / "adapter").eval()(X), lora(X))
    assert torch.equal(copy.deepcopy(lora)(X), lora(X))
    assert torch.equal(fxlora.remove(lora)(X), source(X))
    captured.load_state_dict(captured.state_dict())
    with pytest.raises(RuntimeError, match="takes only values that are stored like it"):
        captured.load_state_dict(source.state_dict())


def test_a_file_holds_plain_tensors(tmp_path: Path) -> None:
    _, _, lora = pair()
    program = torch.export.load(fxlora.export(lora, tmp_path / "model.pt2", X))
    assert not any(map(is_quantised, program.state_dict.values()))
    assert any(tensor.dtype == torch.int8 for tensor in program.state_dict.values())
    assert torch.equal(program.module()(X), lora(X))


def test_an_adapter_of_the_float_model_is_one_of_the_quantised(tmp_path: Path) -> None:
    _, captured, _ = pair()
    lora = fxlora.adapt(float_model(), X, rules=CONFIG)
    fxlora.save_adapter(lora, tmp_path / "adapter")
    with pytest.warns(fxlora.FxLoraWarning):  # trained over another base
        loaded = fxlora.load_adapter(captured, tmp_path / "adapter")
    for name in lora.adapter_parameters():
        assert torch.equal(loaded.get_parameter(name), lora.get_parameter(name))


def test_the_fold_says_what_becomes_of_the_codes() -> None:
    _, _, lora = pair()
    with pytest.raises(QuantisedError, match="dequantise"):
        fxlora.fold(lora)
    plain = fxlora.fold(lora, quantised="dequantise")
    assert not any(map(is_quantised, plain.parameters()))
    torch.testing.assert_close(plain(X), lora(X), rtol=1e-4, atol=1e-4)

    again = fxlora.fold(lora, quantised="requantise", min_retention=0.5)
    weight = again.get_parameter("3.weight")
    assert isinstance(weight, DecodedTensor)
    values = plain.get_parameter("3.weight")
    before: Any = lora.get_parameter("3.weight")
    highest = before.part_0.max()
    lowest = before.part_0.min()
    scale = torch.maximum(values.amax(1) / highest, values.amin(1) / lowest)
    codes: Any = weight.part_0  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(codes, (values / scale[:, None]).round().to(torch.int8))
    assert again.retention["3"] > 0.9


def test_masks_and_positions_of_few_bits_are_no_weights() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)
            self.register_buffer("mask", torch.tril(torch.ones(5, 5, dtype=torch.uint8)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x @ self.lin(x).mT + (1.0 - self.get_buffer("mask").float()) * -1e9
            return scores.softmax(-1) @ x

    model, x = Masked().eval(), torch.randn(2, 5, 6)
    captured = fxlora.capture(model, x)
    assert captured.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(captured(x), model(x))


def test_a_folded_model_is_quantised_as_its_source_is() -> None:
    model = float_model()
    torch.manual_seed(2)
    folded = fxlora.fold(fxlora.adapt(model, X, rules=CONFIG).eval())
    source = copy.deepcopy(model)
    source.load_state_dict(folded.state_dict())
    ours = in_pt2e(fxlora.merged(model, folded))
    assert torch.equal(ours(X), in_pt2e(source)(X))
