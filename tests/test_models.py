"""The laws on widely used models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import check_laws, run
from .models import gpt2
from .typed import plan_of

torchvision = pytest.importorskip("torchvision", reason="torchvision is optional")

LAYERS = [Rule(op=["conv*", "linear"], lora=LoraConfig(r=2, lora_alpha=3))]


def seen(model: nn.Module) -> nn.Module:
    """Draw vectors and layer scales from [0.5, 1), so that no gate near zero hides an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "layer_scale" in name:
                parameter.uniform_(0.5, 1.0)
    return model


# torchvision's own classes, with few and narrow layers; each has every kind of block of its family.


def resnet() -> nn.Module:
    model = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7
    )
    model.layer3 = model.layer4 = nn.Identity()  # wider, and like layer2
    model.fc = nn.Linear(128, 7)
    return model


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=1,
        num_heads=3,
        hidden_dim=36,
        mlp_dim=60,
        num_classes=7,
    )


def swin() -> nn.Module:
    model = torchvision.models.swin_transformer.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=12,
        depths=[2],
        num_heads=[2],
        window_size=[3, 3],
        num_classes=7,
    )
    model.features[1][0] = nn.Identity()  # the second block also shifts its windows
    return model


def convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(12, 20, 1), block(20, None, 1)], num_classes=7)


def mobilenet() -> nn.Module:
    v3 = torchvision.models.mobilenetv3
    block = functools.partial(v3.InvertedResidualConfig, width_mult=1.0)
    settings = [
        block(16, 3, 16, 24, True, "RE", 2, 1),
        block(24, 5, 40, 24, False, "HS", 1, 2),  # with a residual
    ]
    return v3.MobileNetV3(settings, last_channel=40, num_classes=7)


def efficientnet() -> nn.Module:
    net = torchvision.models.efficientnet
    settings = [
        net.FusedMBConvConfig(2, 3, 2, 8, 16, 1),
        net.MBConvConfig(4, 5, 1, 16, 16, 1),  # with a residual
    ]
    return net.EfficientNet(settings, dropout=0.2, last_channel=40, num_classes=7)


# An EfficientNet has all the kinds of layers that a MobileNet has.
MOBILE = pytest.param(mobilenet, marks=pytest.mark.slow)
SMALL = (resnet, vit, swin, convnext, MOBILE, efficientnet)


@pytest.mark.parametrize("make", SMALL)
def test_torchvision(make: Callable[[], nn.Module]) -> None:
    height = 32 if make is vit else 40
    check_vision(make(), torch.randn(2, 3, height, 32, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenet_v3_small", "convnext_tiny", "efficientnet_b0", "vit_b_16", "swin_t"],
)
def test_torchvisions_own_sizes(name: str) -> None:
    sizes = {"image_size": 48} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, num_classes=7, **sizes)
    check_vision(model, torch.randn(2, 3, 48, 48, dtype=torch.float64))


def check_vision(model: nn.Module, x: torch.Tensor) -> None:
    gm, lora = check_laws(seen(model), (x,), rules=LAYERS)
    layers = sum(isinstance(m, nn.Linear | nn.Conv2d) for m in model.modules())
    vit = isinstance(model, torchvision.models.VisionTransformer)
    # The packed weight of a ViT's attention belongs to no Linear.
    assert vit or len(plan_of(lora)) == layers
    check_batch_is_dynamic(gm, model, x)


def check_batch_is_dynamic(gm: Any, model: nn.Module, x: torch.Tensor) -> None:
    for batch in (1, 3):
        other = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        found, expected = run(gm.eval(), (other,), {}), run(model.eval(), (other,), {})
        assert torch.equal(found[0], expected[0])


def check_targets(
    model: nn.Module, kwargs: dict[str, Any], gm: Any, targets: list[tuple[Any, int]]
) -> None:
    for names, sites in targets:
        rules = LoraConfig(r=2, lora_alpha=3, target_modules=names)
        _, lora = check_laws(model, (), kwargs, rules=rules, capture=lambda _: gm)
        assert len(plan_of(lora)) == sites
        assert {entry.form for entry in plan_of(lora)} == {"branch"}
    assert gm(**kwargs).loss.ndim == 0


def test_gpt2() -> None:
    check_targets(*gpt2(), [(["c_attn", "c_proj", "c_fc"], 4), (["wte"], 1)])


@pytest.mark.slow  # the quick run has the laws of a Llama in test_nested.py
def test_llama() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    config = transformers.LlamaConfig(
        num_hidden_layers=1,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=53,
        pad_token_id=0,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).double()
    ids = torch.randint(3, 53, (2, 7))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    gm = fxlora.capture(model, (), kwargs)
    every = [(["q_proj", "v_proj", "embed_tokens"], 3), ("all-linear", 7)]
    check_targets(model, kwargs, gm, every)


def test_trained_batch_norm_and_head_survive_the_fold() -> None:
    model = resnet()
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
    adapters = {n for e in plan_of(lora) for n in (e.name_a, e.name_b)}
    assert moved == adapters | {"fc.weight", "fc.bias"}
    assert not torch.equal(
        lora.get_buffer("bn1.running_mean"), model.get_buffer("bn1.running_mean")
    )
    folded = fxlora.fold(lora).eval()
    assert torch.allclose(folded(x), lora.eval()(x), atol=1e-5)
    assert torch.equal(folded.get_buffer("bn1.running_mean"), lora.get_buffer("bn1.running_mean"))
    removed = fxlora.remove(lora).eval()
    assert torch.equal(removed(x), model.eval()(x))
