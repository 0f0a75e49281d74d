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
from fxlora.module.decoded import DecodedTensor, Decoder
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


def test_buffers_of_few_bits_are_weights_only_if_an_op_dequantises_them() -> None:
    class Graph(nn.Module):
        """A graph network: an adjacency of bytes, multiplied with data, and a mask by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("adj", (torch.rand(5, 5) > 0.5).to(torch.uint8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            h = h * (h > 0).to(h.dtype)
            return self.b(torch.matmul(self.get_buffer("adj").to(h.dtype), h))

    torch.manual_seed(0)
    model, x = Graph().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64)
    captured = fxlora.capture(model, x)
    assert not any(map(is_quantised, captured.parameters()))
    assert captured.state_dict().keys() == model.state_dict().keys()
    captured.load_state_dict(model.state_dict())
    assert_same_gradients(captured, model, x)

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    lora = fxlora.inject(captured, fxlora.match(captured, config)).eval()
    folded = fxlora.fold(lora)
    merged = fxlora.merged(model, folded)
    assert torch.equal(merged(x), folded(x))
    assert_same_gradients(lora, merged, x)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    x = x.clone().requires_grad_()
    grads = [torch.autograd.grad(module(x).square().sum(), x)[0] for module in (ours, theirs)]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


class Quantised(nn.Module):
    """PT2E's ops by hand: codes of a weight, one quantised activation with three readers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        codes = torch.randint(-127, 127, (6, 6), dtype=torch.int8, generator=generator)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.rand(6, generator=generator) / 100)
        self.register_buffer("zeros", torch.zeros(6, dtype=torch.int64))

    def quantise(self, h: torch.Tensor) -> torch.Tensor:
        return OPS.quantize_per_tensor(h, 0.02, 128, 0, 255, torch.uint8)

    def dequantise(self, codes: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return OPS.dequantize_per_tensor(codes, 0.02, 128, 0, 255, torch.uint8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = self.get_buffer("codes"), self.get_buffer("scales"), self.get_buffer("zeros")
        weight = OPS.dequantize_per_channel(*codes, 0, -128, 127, torch.int8)
        h = F.linear(x, weight)
        h = h * (h > 0.1).to(h.dtype)
        q = self.quantise(h)
        first, second = self.dequantise(q, h), self.dequantise(q, h)
        return F.linear(first, weight) + second.sin() + (q > 130).to(h.dtype)


class StraightThrough(Quantised):
    """The same, with the gradients that are meant."""

    def dequantise(self, codes: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return h + (super().dequantise(codes, h) - h).detach()


OPS: Any = torch.ops.quantized_decomposed


def test_only_quantisers_are_straight_through_and_all_their_readers_are() -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    captured = fxlora.capture(Quantised().eval(), x)
    assert [n for n, p in captured.named_parameters() if is_quantised(p)] == ["codes"]
    assert torch.equal(captured(x), Quantised()(x))
    x.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(module(x).square().sum(), x)[0]
        for module in (captured, StraightThrough())
    )
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "channels"), [(torch.bfloat16, 600), (torch.float16, 5000)])
def test_scales_of_16_bits_and_many_channels_stay_apart(dtype: torch.dtype, channels: int) -> None:
    def decode(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return codes.to(dtype) * scales

    generator = torch.Generator().manual_seed(6)
    scales = torch.rand(channels, 1, generator=generator).mul(4).exp().div(127).to(dtype)
    codes = torch.randint(-127, 128, (channels, 3), generator=generator).to(torch.int8)
    codes[0, 0], codes[0, 1] = 127, -127
    decoder = Decoder(torch.fx.symbolic_trace(decode), (channels, 3), dtype)
    weight = DecodedTensor({"part_0": codes, "part_1": scales}, decoder)
    wanted = weight.dequantize() * 1.5
    errors = (weight.encoded(wanted).dequantize() - wanted).double().abs().amax(1)
    assert float((errors / wanted.double().abs().amax(1)).max()) < 0.02


def test_a_folded_model_is_quantised_as_its_source_is() -> None:
    model = float_model()
    torch.manual_seed(2)
    folded = fxlora.fold(fxlora.adapt(model, X, rules=CONFIG).eval())
    source = copy.deepcopy(model)
    source.load_state_dict(folded.state_dict())
    ours = in_pt2e(fxlora.merged(model, folded))
    assert torch.equal(ours(X), in_pt2e(source)(X))
