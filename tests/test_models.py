"""The laws on widely used models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import check_laws, run

torchvision = pytest.importorskip("torchvision", reason="torchvision is optional")

LAYERS = [Rule(op=["conv*", "linear"], lora=LoraConfig(r=2, lora_alpha=3))]
SIZES = {"vit_b_16": {"image_size": 48}}


def seen(model: nn.Module) -> nn.Module:
    """Draw vectors and layer scales from [0.5, 1), so that no gate near zero hides an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "layer_scale" in name:
                parameter.uniform_(0.5, 1.0)
    return model


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0", "vit_b_16", "swin_t"],
)
def test_torchvision(name: str) -> None:
    model = torchvision.models.get_model(name, num_classes=7, **SIZES.get(name, {}))
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    gm, lora = check_laws(seen(model), (x,), rules=LAYERS)
    assert len(lora.plan) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules()) or (
        name == "vit_b_16"  # its attention's packed weight belongs to no Linear
    )
    check_batch_is_dynamic(gm, model, x)


def check_batch_is_dynamic(gm: Any, model: nn.Module, x: torch.Tensor) -> None:
    for batch in (1, 3):
        other = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        found, expected = run(gm.eval(), (other,), {}), run(model.eval(), (other,), {})
        assert torch.equal(found[0], expected[0])


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    common = {"vocab_size": 53, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=24, n_head=3, n_positions=32, n_inner=40, **common
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=24,
            intermediate_size=40,
            num_attention_heads=3,
            num_key_value_heads=1,
            **common,
        )
        model = transformers.LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize(
    ("kind", "targets", "sites"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"], 8),
        ("gpt2", ["wte"], 1),
        ("llama", ["q_proj", "v_proj", "embed_tokens"], 5),
        ("llama", "all-linear", 14),
    ],
)
def test_transformers(kind: str, targets: Any, sites: int) -> None:
    ids = torch.randint(3, 53, (2, 7))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    rules = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    gm, lora = check_laws(language_model(kind), (), kwargs, rules=rules)
    assert len(lora.plan) == sites
    assert {entry.form for entry in lora.plan} == {"branch"}
    assert gm(**kwargs).loss.ndim == 0


def test_trained_batch_norm_and_head_survive_the_fold() -> None:
    model = torchvision.models.resnet18(num_classes=3)
    x = torch.randn(4, 3, 32, 32)
    config = LoraConfig(r=2, target_modules=["conv1", "conv2"], modules_to_save=["fc"])
    lora = fxlora.adapt(model, x, rules=config).train()
    optimizer = torch.optim.SGD(fxlora.lora_parameters(lora), lr=0.1)
    before = {n: p.clone() for n, p in lora.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        lora(x).square().mean().backward()
        optimizer.step()
    moved = {n for n, p in lora.named_parameters() if not torch.equal(p, before[n])}
    adapters = {n for e in lora.plan for n in (e.name_a, e.name_b)}
    assert moved == adapters | {"fc.weight", "fc.bias"}
    assert not torch.equal(lora.get_buffer("bn1.running_mean"), model.bn1.running_mean)
    folded = fxlora.fold(lora).eval()
    assert torch.allclose(folded(x), lora.eval()(x), atol=1e-5)
    assert torch.equal(folded.get_buffer("bn1.running_mean"), lora.get_buffer("bn1.running_mean"))
    removed = fxlora.remove(lora).eval()
    assert torch.equal(removed(x), model.eval()(x))
