"""transformers' mixtures of experts, with each of its implementations of the experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import FxLoraWarning, LoraConfig, Rule, UnsupportedOpError

from .laws import called_with, check_laws, floats, merged_weights, randomise, run
from .oracle import declare
from .typed import plan_of

transformers = pytest.importorskip("transformers", reason="transformers is optional")
pytest.importorskip(
    "transformers.exporters.exporter_dynamo",
    reason="this release of transformers does not register its caches",
)

IDS = torch.randint(1, 37, (2, 7), generator=torch.Generator().manual_seed(5))
SMALL: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 7,
    "q_lora_rank": 9,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 6},
    "DeepseekV3": DEEPSEEK,
    "GptOss": {"num_local_experts": 4, "head_dim": 6},  # (experts, in, out), with biases
}
IN_TORCHS_ORDER = {"*experts.*_proj": "eoi"}  # of A and B, where fxlora cannot follow the read
EXPERTS = Rule("re:(.*mlp.)?experts.(gate_up|down)_proj", lora=LoraConfig(r=3, lora_alpha=4))


def build(name: str, implementation: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    config._experts_implementation = implementation
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4) if parameter.ndim > 1 else parameter.fill_(0.7)
    return model.eval()


class Block(nn.Module):
    """The router and the experts of a model's layer, without the rest of the model."""

    def __init__(self, name: str, implementation: str) -> None:
        super().__init__()
        self.mlp = build(name, implementation).model.layers[0].mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.mlp(hidden)
        return found[0] if isinstance(found, tuple) else found


HIDDEN = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(5))
Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def block(name: str, implementation: str, dtype: torch.dtype) -> Made:
    return Block(name, implementation).to(dtype), (HIDDEN.to(dtype),), {}


def whole(name: str, implementation: str, dtype: torch.dtype) -> Made:
    return build(name, implementation).to(dtype), (), {"input_ids": IDS}


MAKERS = [block, pytest.param(whole, marks=pytest.mark.slow)]
# Qwen3Moe's block differs from Mixtral's in its router; in float32, the others' fall back alike.
NAMES = [pytest.param(n, marks=pytest.mark.slow if n == "Qwen3Moe" else ()) for n in MODELS]
GROUPED = [
    pytest.param(
        name,
        dtype,
        marks=pytest.mark.slow
        if name == "Qwen3Moe" or (name != "Mixtral" and dtype == torch.float32)
        else (),
    )
    for name in MODELS
    for dtype in (torch.float32, torch.bfloat16)
]
Make = Callable[[str, str, torch.dtype], Made]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_experts_gathered_for_each_token(name: str, make: Make) -> None:
    model, args, kwargs = make(name, "batched_mm", torch.float64)
    declare(model, IN_TORCHS_ORDER)
    _, lora = check_laws(model, args, kwargs, rules=EXPERTS)
    assert len(plan_of(lora)) == 2
    for entry in plan_of(lora):
        assert entry.shapes[0][0] == entry.shapes[1][0] == 4  # an A and a B per expert


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("name", "dtype"), GROUPED)
def test_grouped_products(name: str, dtype: torch.dtype, make: Make) -> None:
    """torch's grouped kernel takes the branch form: two products of width r, no merged experts.

    The kernel does not support float64, and in float32 transformers exports its own fallback,
    which takes the weight form.
    """
    model, args, kwargs = make(name, "grouped_mm", dtype)
    gm = fxlora.capture(model, args, kwargs)
    lora = fxlora.inject(gm, fxlora.match(gm, EXPERTS))
    form = "branch" if dtype == torch.bfloat16 else "weight"
    declare(model, {} if form == "branch" else IN_TORCHS_ORDER)
    assert [entry.form for entry in plan_of(lora)] == [form, form]
    randomise(lora, 3)
    factors = {n: lora.get_parameter(n).detach() for e in plan_of(lora) for n in e.tensors}
    weights = merged_weights(model, lora, factors)
    with torch.no_grad():
        (expected,) = called_with(model, weights, args, kwargs)
    (base,) = run(gm.eval(), args, kwargs)
    scale = float(expected.abs().max())
    assert float((base - expected).abs().max()) > 0.1 * scale
    tolerance = 6 * torch.finfo(dtype).eps * scale
    for module in (lora.eval(), fxlora.fold(lora).eval()):
        assert float((run(module, args, kwargs)[0] - expected).abs().max()) < tolerance
    floats(lora(*args, **kwargs))[0].float().square().sum().backward()
    for parameter in fxlora.lora_parameters(lora):
        assert float(parameter.grad.abs().max()) > 0 and parameter.grad.isfinite().all()


def test_a_loop_over_the_experts_that_are_hit_is_refused() -> None:
    """Python chooses the experts to call by the data, which no graph can hold."""
    with pytest.warns(FxLoraWarning, match="Its submodules are captured instead"):
        gm = fxlora.capture(Block("Mixtral", "eager"), HIDDEN)
    with pytest.raises(UnsupportedOpError, match="outside of captured regions"):
        fxlora.match(gm, EXPERTS)
