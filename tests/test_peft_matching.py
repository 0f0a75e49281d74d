"""Configurations mean what they mean in PEFT: the same weights, ranks and alphas, or an error."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import peft
import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import fxlora
from fxlora import FxLoraError, LoraConfig
from fxlora.matching.fused_experts import FORMER

pytestmark = pytest.mark.filterwarnings("ignore")


class Doubled(nn.Linear):
    """A layer that owns a second matrix."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.gate = nn.Parameter(torch.randn(6, 6))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * (input @ self.gate)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.experts: Any = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 6)}) for _ in range(2))
        self.gate = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.q_proj(x)) + self.v_proj(x)
        for expert in self.experts:
            x = x + expert["up"](x)
        return self.gate(x)


class Decoder(nn.Module):
    """Layers, experts in them, a layer called a number, and names that end in others' letters."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer() for _ in range(2))
        self.model: Any = nn.ModuleDict({"layers": layers, "embed": nn.Embedding(9, 6)})
        self.up = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.doubled = Doubled()
        self.norm = nn.LayerNorm(6)
        self.q_proj, self.lm_head, self.head = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model["embed"](ids)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.head(self.lm_head(self.norm(self.doubled(self.up(self.q_proj(x))))))


class Mixed(nn.Module):
    """A list of layers at the beginning of names, packed attention, convolutions, bare weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(Layer() for _ in range(2))
        self.conv = nn.Conv1d(6, 6, 1)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.bare = nn.ParameterDict({"up": nn.Parameter(torch.randn(6, 6))})
        self.inner: Any = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, *self.inner["layers"]):
            x = layer(x)
        x = self.conv((x @ self.bare["up"]).mT).mT
        return self.attn(x, x, x, need_weights=False)[0]


SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}


def mixtral() -> Any:
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 1}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_local_experts=3, use_cache=False))


def qwen() -> Any:
    experts: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    experts |= {"moe_intermediate_size": 12, "mlp_only_layers": [0], "use_cache": False}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **experts))


IDS = torch.tensor([[0, 3, 5]])
MODELS: dict[str, tuple[Callable[[], Any], torch.Tensor]] = {
    "decoder": (Decoder, IDS),
    "mixed": (Mixed, torch.randn(2, 4, 6)),
    "mixtral": (mixtral, IDS),
    "qwen": (qwen, IDS),
}
Found = dict[str, tuple[int, float]]


@functools.cache
def captured(name: str) -> tuple[Any, fxlora.CapturedModule]:
    kind, x = MODELS[name]
    model: Any = kind().eval()
    return model, fxlora.capture(model, x)


def by_peft(name: str, config: dict[str, Any]) -> tuple[Found, set[str], set[str]] | None:
    """Return what PEFT adapts, with ranks and alphas, what it saves, and the biases that it trains.

    It is None if PEFT refuses the configuration.
    """
    model = copy.deepcopy(captured(name)[0])
    try:
        theirs: Any = peft.get_peft_model(model, peft.LoraConfig(**config))
        adapted: Any = theirs.base_model.model
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    found: Found = {}
    saved: set[str] = set()
    for path, module in adapted.named_modules():
        plain = path.replace(".base_layer", "")
        if isinstance(module, ModulesToSaveWrapper):
            saved.add(plain)
        if not isinstance(module, LoraLayer) or "default" not in module.r:
            continue
        if isinstance(module, ParamWrapper):
            weight = module.parameter_name
        else:
            weight = "in_proj_weight" if isinstance(module, MultiheadAttention) else "weight"
        found[f"{plain}.{weight}"] = (module.r["default"], module.lora_alpha["default"])
    trained = {
        path.replace(".base_layer", "")
        for path, p in adapted.named_parameters()
        if p.requires_grad and "lora_" not in path and "modules_to_save" not in path
    }
    return found, saved, trained


def by_fxlora(name: str, config: dict[str, Any]) -> tuple[Found, set[str], set[str]]:
    plan = fxlora.match(captured(name)[1], LoraConfig(**config))
    found: Found = {entry.parameter: (entry.r, entry.alpha) for entry in plan}
    saved = set(plan.modules_to_save)
    trained = {n for n in plan.trained if not any(n.startswith(f"{path}.") for path in saved)}
    return found, saved, trained


def outcome(name: str, config: dict[str, Any]) -> str:
    """Return how the two compare: "equal", "refused" by fxlora, or by "peft".

    Raises:
        AssertionError: neither refuses the configuration, and they differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = by_peft(name, copy.deepcopy(config))
        try:
            ours = by_fxlora(name, config)
        except FxLoraError:
            return "refused"
    if theirs is None:
        return "peft"
    assert ours == theirs, config
    return "equal"


ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.MultiheadAttention)
CHECKS = [HealthCheck.data_too_large, HealthCheck.too_slow, HealthCheck.filter_too_much]
REGEXES = [
    *(r".*q_proj", r".*\.(?!q_proj|layers|experts|\d)[^.]*", r".*\.1\..*proj", r".*(up|gate)"),
    *(r"(.*\.)?layers\.\d\.[qv]_proj", r"(.*\.)?up", r".*head", r".*layers\.[0-9]+\.v.*"),
    *(r".*attn", r".*weight", r"lm_head|embed", r"inner.*q_proj", r".*experts.*up", "all-linear"),
]


def ends(paths: list[str]) -> st.SearchStrategy[str]:
    """Dotted ends of paths, of any length."""
    parts = st.sampled_from(paths).map(lambda path: path.split("."))
    return parts.flatmap(
        lambda p: st.integers(1, len(p)).map(lambda n: ".".join(p[len(p) - n :]))
    ).filter(lambda end: not end.isdigit())


def patterns(ends: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, int]]:
    forms = st.sampled_from(["{}", "{}", "^{}", ".*{}", "(?:{})", "x|{}"])
    key = st.tuples(forms, ends).map(lambda both: both[0].format(both[1]))
    return st.dictionaries(key, st.integers(1, 3), min_size=1, max_size=2)


@st.composite
def configs(draw: Callable[..., Any], name: str) -> dict[str, Any]:
    """Draw a configuration whose names are of the model."""
    model = captured(name)[0]
    layers = [path for path, m in model.named_modules() if isinstance(m, ADAPTED) and path]
    weights = [n for n, p in model.named_parameters() if p.ndim == 2 and "." in n]
    config: dict[str, Any] = {"r": 4}

    def maybe(key: str, values: st.SearchStrategy[Any], often: float = 0.3) -> None:
        if draw(st.floats(0, 1)) < often:
            config[key] = draw(values)

    lists = st.lists(ends(layers), min_size=1, max_size=3, unique=True)
    either = st.one_of(lists, lists, st.sampled_from(REGEXES))
    maybe("target_modules", either, 0.8)
    maybe("target_parameters", st.lists(ends(weights), min_size=1, max_size=2, unique=True))
    if "target_modules" not in config:
        config.setdefault("target_parameters", [draw(st.sampled_from(weights))])
    maybe("exclude_modules", either)
    maybe("layers_to_transform", st.one_of(st.integers(0, 1), st.sampled_from([[0, 1], [1], []])))
    if config.get("layers_to_transform"):
        maybe("layers_pattern", st.sampled_from(["layers", ["layers"], ["experts", "layers"], []]))
    keys = ends([*layers, *weights])
    maybe("rank_pattern", patterns(keys))
    maybe("alpha_pattern", patterns(keys))
    maybe("modules_to_save", lists, 0.2)
    maybe("bias", st.sampled_from(["all", "lora_only"]))
    return config


def relaxed(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a configuration, and what is left when its last restrictions are taken away."""
    yield config
    while len(config) > 2:
        config = dict(list(config.items())[:-1])
        yield config


@pytest.mark.parametrize("name", ["decoder", "mixed"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=CHECKS)
@given(data=st.data())
def test_any_configuration_is_peft_s_or_refused(name: str, data: st.DataObject) -> None:
    for config in relaxed(data.draw(configs(name))):
        if outcome(name, config) == "equal":
            break


EXPERTS = ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("mixtral", {"target_modules": "all-linear"}, "equal"),
        ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"], "r": 3}, "equal"),
        ("mixtral", {"target_modules": ["q_proj", "w1"]}, "refused"),
        ("mixtral", {"target_parameters": ["experts.gate_up_proj"]}, "equal"),
        ("qwen", {"target_modules": "all-linear", "lora_alpha": 6}, "equal"),
        ("qwen", {"target_modules": ["q_proj", *EXPERTS]}, "equal"),
        ("qwen", {"target_modules": ["q_proj", "gate"], "layers_to_transform": [1]}, "equal"),
        ("qwen", {"target_modules": r".*q_proj"}, "equal"),
        ("qwen", {"target_modules": r".*\.1\..*q_proj"}, "refused"),
        ("qwen", {"target_modules": r".*(q_proj|gate_proj|up_proj)"}, "refused"),
    ],
)
def test_experts_that_transformers_fused(name: str, config: dict[str, Any], expected: str) -> None:
    assert outcome(name, config) == expected


def test_the_families_of_fused_experts_are_pefts() -> None:
    conversion = pytest.importorskip(
        "peft.utils.transformers_weight_conversion", reason="another PEFT has it elsewhere"
    )
    former = conversion._MOE_TARGET_MODULE_MAPPING
    families = conversion._MODEL_TO_CONVERSION_PATTERN
    assert {n: former[family] for n, family in families.items() if family in former} == FORMER


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("decoder", {"target_modules": ["0.up", "q_proj"], "layers_to_transform": [1]}),
        ("decoder", {"target_modules": ["lm_head", "v_proj"], "layers_to_transform": [0]}),
        ("decoder", {"target_modules": r".*\.(?!q_proj|layers|experts|\d)[^.]*"}),
        (
            "decoder",
            {
                "target_modules": ["v_proj"],
                "target_parameters": ["q_proj.weight"],
                "exclude_modules": ["q_proj", "0.v_proj"],
            },
        ),
        ("decoder", {"target_modules": ["doubled"]}),
        ("decoder", {"target_modules": "All-Linear", "bias": "all"}),
        ("mixed", {"target_modules": "all-linear"}),
        ("mixed", {"target_modules": ["attn"], "rank_pattern": {"attn": 2}, "bias": "all"}),
        ("mixed", {"target_modules": ["q_proj", "gate"], "modules_to_save": ["gate"]}),
        ("mixed", {"target_parameters": ["bare.up"], "target_modules": ["conv"]}),
    ],
)
def test_rows_that_are_equal(name: str, config: dict[str, Any]) -> None:
    assert outcome(name, config) == "equal"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["conv", "bare.up"]}, "Put it into target_parameters"),
        ({"target_parameters": ["attn"]}, "target_parameters of rule 1 .'attn'"),
        (
            {"target_parameters": ["q_proj.weight"], "layers_to_transform": [0]},
            "no effect on target_parameters",
        ),
        (
            {"target_parameters": ["conv.weight"], "rank_pattern": {"conv": 2}},
            "Did you mean 'conv.weight'",
        ),
        ({"target_modules": ["conv"], "exclude_modules": "all-linear"}, "takes names"),
    ],
)
def test_rows_that_peft_takes_otherwise_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FxLoraError, match=message):
        by_fxlora("mixed", config)


def test_names_that_mean_nothing_in_peft_are_those_of_parameters_too() -> None:
    bare = by_fxlora("mixed", {"target_modules": ["bare"]})[0]
    assert set(bare) == {"bare.up"} and by_peft("mixed", {"target_modules": ["bare"]}) is None

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w

    gm = fxlora.capture(Bare(), torch.randn(2, 6))
    assert len(fxlora.match(gm, LoraConfig(r=2, target_modules="all-linear"))) == 1
