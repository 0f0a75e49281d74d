"""Rows of a weight that train alone (new tokens), at every read of it, as in PEFT and by files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import AdapterError, ConfigError, LoraConfig, NoMatchError, Rule, UnsupportedOpError

from .laws import assert_close, assert_same, check_laws, randomise, run
from .models import Tied
from .test_peft_folders import assert_equal_to_pefts, theirs
from .typed import plan_of

peft = pytest.importorskip("peft", reason="peft is optional")
transformers = pytest.importorskip("transformers", reason="transformers is optional")

pytestmark = pytest.mark.filterwarnings("ignore:fold splits a tie")

IDS = torch.tensor([[3, 9, 1, 11, 3], [2, 9, 16, 0, 11]])
TOKENS = [3, 9, 11]


class Reads(nn.Module):
    """A table that is looked up, indexed, and multiplied as a bare parameter; takes indices."""

    subscripts = {"table": "io"}

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(17, 6))
        self.mix = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, self.table) + self.table[ids] + self.table[-1]
        return self.mix(x.tanh()) @ self.table.T


class Bag(nn.Module):
    """An embedding with a padding row, and another table whose name ends in its name."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(17, 6, padding_idx=1)
        self.pos_emb = nn.Embedding(5, 6)
        self.mix = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mix(self.emb(ids) + self.pos_emb.weight)


@pytest.mark.parametrize(
    ("model", "rule", "names"),
    [
        (Tied(), Rule("emb", tokens=TOKENS, lora=LoraConfig(tied="share")), 2),
        (Tied(), Rule("head", tokens=range(3, 6)), 1),
        (Tied(), Rule("emb", tokens=TOKENS), 1),
        (Reads(), Rule("table", tokens=TOKENS), 1),
        (Bag(), Rule("emb", tokens=TOKENS), 1),
    ],
    ids=["tied", "head", "one of a tie", "any read", "padding"],
)
def test_the_laws_at_every_read(model: nn.Module, rule: Rule, names: int) -> None:
    gm, lora = check_laws(model, (IDS,), rules=rule)
    (entry,) = plan_of(lora)
    assert len(entry.names) == names
    assert [p.shape.numel() for p in fxlora.lora_parameters(lora)] == [len(entry.tokens) * 6]
    expected = run(lora.eval(), (IDS,), {})
    assert_close(run(fxlora.optimize(lora).eval(), (IDS,), {}), expected)
    tuned = fxlora.fold(lora)
    assert fxlora.verify(lora, (IDS,), folded=tuned)
    if not entry.tied:
        assert_close(run(fxlora.extract(gm, tuned, rule).eval(), (IDS,), {}), expected)
    half = fxlora.fold(fxlora.scale_adapter(lora, 0.5)).get_parameter(entry.parameter)
    base, full = (m.get_parameter(entry.parameter) for m in (gm, tuned))
    assert_close([half], [(base + full) / 2])


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def _gemma() -> nn.Module:
    """A tied embedding whose rows are scaled."""
    config = transformers.Gemma2Config(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    return transformers.Gemma2ForCausalLM(config).double().eval()


LLAMA: dict[str, Any] = {"target_modules": ["q_proj"]}
MIX: dict[str, Any] = {"target_modules": ["mix"], "r": 2}


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Tied().double(), {**MIX, "trainable_token_indices": {"emb": TOKENS}}),
        (Tied().double(), {**MIX, "trainable_token_indices": {"head": [9]}}),
        (_llama(), {**LLAMA, "trainable_token_indices": TOKENS, "use_dora": True}),
        (_gemma(), {**LLAMA, "trainable_token_indices": TOKENS}),
        (
            _llama(),
            {**LLAMA, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [9]}},
        ),
    ],
    ids=["custom tie", "custom head", "tied", "scaled", "other rows"],
)
def test_folders_of_pefts_both_ways(
    model: nn.Module, config: dict[str, Any], tmp_path: Path
) -> None:
    lora = assert_equal_to_pefts(model, (IDS,), tmp_path, theirs(model, tmp_path, **config))
    plan = fxlora.match(fxlora.remove(lora), LoraConfig(**config))
    assert _places(plan) == _places(plan_of(lora))


def _places(plan: fxlora.Plan) -> list[Any]:
    return sorted((entry.parameter, entry.names, entry.tokens, entry.r) for entry in plan)


def test_a_step_of_training_is_pefts() -> None:
    model = _llama()
    config: dict[str, Any] = {**LLAMA, "trainable_token_indices": TOKENS}
    torch.manual_seed(1)
    made = peft.get_peft_model(_llama(), peft.LoraConfig(**config)).eval()
    lora = fxlora.adapt(model, (IDS,), rules=LoraConfig(**config)).eval()
    (name,) = (name for entry in plan_of(lora) if entry.tokens for name in entry.trainable)
    for module, parameters in (
        (made, [p for n, p in made.named_parameters() if p.requires_grad and "delta" in n]),
        (lora, [lora.get_parameter(name)]),
    ):
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        _loss(module).backward()
        optimizer.step()
    expected, found = run(made, (IDS,), {}), run(lora, (IDS,), {})
    assert (expected[0] - run(model, (IDS,), {})[0]).abs().max() > 1e-3
    assert_close(found, expected)


def _loss(module: nn.Module) -> torch.Tensor:
    logits = module(IDS).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def test_a_folder_of_fxloras_own_holds_only_what_trains(tmp_path: Path) -> None:
    gm = fxlora.capture(Reads().double(), IDS)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("table", tokens=TOKENS))).eval()
    randomise(lora)
    with pytest.warns(fxlora.FxLoraWarning, match="PEFT cannot read"):
        fxlora.save_adapter(lora, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 17 * 6 * 8 + 2000
    assert_same(run(fxlora.load_adapter(gm, tmp_path).eval(), (IDS,), {}), run(lora, (IDS,), {}))


def test_what_cannot_be_meant_raises() -> None:
    gm = fxlora.capture(Bag(), IDS)
    for rules, kind, said in (
        (Rule("emb", tokens=[17]), ConfigError, "no row 17"),
        (Rule("emb", tokens=[1, 2]), ConfigError, "padding_idx"),
        (LoraConfig(target_modules=["mix"], trainable_token_indices=[3]), NoMatchError, "by name"),
        (
            LoraConfig(target_modules=["mix"], trainable_token_indices={"emb": [3]}),
            ConfigError,
            "for PEFT also pos_emb",
        ),
        (
            [Rule("emb"), Rule("emb", tokens=[3])],
            ConfigError,
            "rule 1 takes the whole of 'emb'",
        ),
    ):
        with pytest.raises(kind, match=said):
            fxlora.match(gm, rules)
    for fields in ({"tokens": [2, 2]}, {"tokens": []}, {"tokens": [-1]}, {"tokens": "3"}):
        with pytest.raises(ConfigError, match="tokens"):
            Rule("emb", **fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="r, use_dora of lora= has no effect"):
        Rule("emb", tokens=[3], lora=LoraConfig(r=2, use_dora=True))
    with pytest.raises(ConfigError, match=r"trainable_token_indices\['emb'\]"):
        LoraConfig(trainable_token_indices={"emb": [2.0]})  # pyright: ignore[reportArgumentType]
    conv = fxlora.capture(nn.Conv1d(6, 4, 3), torch.randn(2, 6, 9))
    with pytest.raises(UnsupportedOpError, match="rows of a matrix"):
        fxlora.match(conv, Rule(op="conv1d", tokens=[1]))


def test_rows_are_kept_apart_from_pairs(tmp_path: Path) -> None:
    gm = fxlora.capture(Tied(), IDS)
    plans = [fxlora.match(gm, Rule("emb", tokens=[token])) for token in (3, 9)]
    adapters = [fxlora.inject(gm, plan) for plan in plans]
    with pytest.raises(AdapterError, match="rows that train alone"):
        fxlora.combine(adapters, [1.0, 1.0])
    with pytest.raises(UnsupportedOpError, match="tokens"):
        fxlora.route(adapters)
    rules = [Rule("emb", tokens=[3, 9]), Rule("mix", lora=LoraConfig(r=2))]
    plan = fxlora.match(gm, rules, budget=50)  # each rank takes 12, and so do the two rows
    assert [entry.r for entry in plan] == [3, 2]
    assert plan.adapter_parameters == 48
    with pytest.raises(ConfigError, match=r"takes 12 and the rows that train alone take 12\."):
        fxlora.match(gm, rules, budget=23)
    with pytest.raises(ConfigError, match="the rows that train alone take 12"):
        fxlora.match(gm, rules[:1], budget=11)
    (tmp_path / "plan.toml").write_text(plan.to_toml())
    assert fxlora.load_rules(tmp_path / "plan.toml") == plan.rules
