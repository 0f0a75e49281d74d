"""route: each sample of a mixed batch gets what the module with its own adapter computes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import (
    CapturedModule,
    ConfigError,
    InputError,
    LoraConfig,
    Rule,
    UnsupportedOpError,
)
from fxlora.reads.sites import find_sites

from .models import Mlp
from .oracle import floats
from .random_models import draw
from .routing import (
    GATHERED,
    IDS,
    PER_SLOT,
    Dropped,
    Recurrent,
    Two,
    X,
    adapted,
    captured,
    check,
    check_samples,
    config,
    long,
    per_slot,
    wide,
)


@pytest.mark.parametrize("kind", GATHERED)
def test_gathered(kind: str) -> None:
    model, args, rules = GATHERED[kind]
    assert not per_slot(check(model(), args, *rules))


def test_random_numbers_of_the_model_do_not_hide_the_samples() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    gm = captured(Dropped(), X)
    loras = [adapted(gm, config(2, ["b"])), adapted(gm, config(1, ["a", "b"]))]
    torch.set_rng_state(state)
    routed = fxlora.route(loras, slots=3)
    assert torch.equal(torch.get_rng_state(), state)
    check_samples(routed, gm, loras, (X,))
    first, second = (routed.train()(X, adapter_ids=IDS) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", PER_SLOT)
def test_computed_once_per_slot(kind: str) -> None:
    model, args, rules = PER_SLOT[kind]
    assert per_slot(check(model(), args, *rules))


# ---- where the samples are ----------------------------------------------------------------------


class Flat(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        return self.b(torch.tanh(self.a(x.reshape(b * t, -1)))).reshape(b, t, 3)


class FlatTimeFirst(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        rows = x.transpose(0, 1).reshape(b * t, -1)
        return self.b(torch.tanh(self.a(rows))).reshape(t, b, 3).transpose(0, 1)


class TimeFirst(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).transpose(0, 1)


class Twice(Two):
    """All samples, and all again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.a(torch.cat([x, x.tanh()])).chunk(2)
        return self.b(first * second)


@pytest.mark.parametrize("kind", [Flat, FlatTimeFirst, TimeFirst, Twice])
def test_the_samples_are_found_in_any_dimension(kind: type[Two]) -> None:
    assert not per_slot(check(kind(), (wide(6, 7, 5),), config(2), config(1, ["b"])))


class Vmapped(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(super().forward)(x)


def test_tensors_inside_of_a_vmap_tell_nothing() -> None:
    assert per_slot(check(Vmapped(), (X,), config(2), config(1, ["b"])))


def test_samples_in_another_dimension_than_the_first() -> None:
    x = wide(7, 6, 5)
    shapes = ({0: torch.export.Dim("time", min=2), 1: torch.export.Dim("batch", min=2)},)
    gm = fxlora.capture(Recurrent(batch_first=False).double(), x, dynamic_shapes=shapes).eval()
    loras = [adapted(gm, Rule(lora=LoraConfig(r=2))), adapted(gm, config(1, ["out"]))]
    routed = fxlora.route(loras, slots=3, batch={"x": 1})
    found = routed(x, adapter_ids=IDS)
    for sample, slot in enumerate(IDS.tolist()):
        module = loras[slot] if slot in (0, 1) else gm
        assert torch.allclose(found[:, sample], module(x)[:, sample], rtol=0, atol=1e-10)
        assert slot not in (0, 1) or not torch.allclose(found[:, sample], gm(x)[:, sample])
    with pytest.raises(InputError, match="is 7"):
        routed(x, adapter_ids=torch.zeros(7, dtype=torch.long))
    with pytest.raises(InputError, match=r"dimension 0 of x, dimension 1 of x are dynamic"):
        fxlora.route(loras, batch={"x": 2})
    wrong: Any
    for wrong in ({}, {"x": -1}, {"x": True}, 0, {0: 1}):
        with pytest.raises(ConfigError, match="batch must be an argument's name"):
            fxlora.route(loras, batch=wrong)


class Rolled(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)).roll(1, 0))


class Averaged(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)).mean(0))


class Shuffled(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)[torch.randperm(x.shape[0])])


@pytest.mark.parametrize("kind", [Rolled, Averaged, Shuffled])
def test_samples_that_cannot_be_told_apart_are_refused(kind: type[Two]) -> None:
    gm = captured(kind(), X)
    with pytest.raises(UnsupportedOpError, match=r"'b\.weight': .* cannot be told apart"):
        fxlora.route([adapted(gm, config(2))])
    if kind is Rolled:  # the advice works: a sample gets what another's adapter computes
        with pytest.warns(fxlora.FxLoraWarning, match="depends on the other samples"):
            routed = fxlora.route([adapted(gm, config(2, ["a"]))])
        check_samples(routed, gm, [], (X,), ids=IDS * 0 - 1)


def test_batch_norms_over_few_values_do_not_hide_the_samples() -> None:
    torch.manual_seed(1)
    parts = [p for _ in range(24) for p in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())]
    x = torch.randn(5, 16, dtype=torch.float64)
    gm = fxlora.capture(nn.Sequential(*parts).double(), x)
    lora = fxlora.inject(gm, fxlora.match(gm, config(2, ["66", "69"], init_lora_weights=False)))
    routed = fxlora.route([lora])
    assert not any(
        node.target is torch.ops.aten.where.self for node in routed.graphs["train"].nodes
    )


def test_a_batch_of_a_fixed_size_is_refused() -> None:
    gm = fxlora.capture(Mlp().double(), X, dynamic_shapes=({},))
    with pytest.raises(InputError, match="dynamic first dimension"):
        fxlora.route([adapted(gm, config(2))])


class Switched(Two):
    """All samples together decide what becomes of each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(
            torch.cond(hidden.sum() > 0, torch.tanh, lambda h: h.flip(0).sin(), (hidden,))
        )


def test_nothing_is_known_behind_a_choice_by_a_value() -> None:
    gm = captured(Switched(), X)
    with pytest.raises(UnsupportedOpError, match=r"'b\.weight': .* cannot be told apart"):
        fxlora.route([adapted(gm, config(2))])
    with pytest.warns(fxlora.FxLoraWarning, match="depends on the other samples"):
        fxlora.route([adapted(gm, config(2, ["a"]))])


class Chosen(Two):
    """As `Switched`, without control flow: only for values of one sign are samples reordered."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.where(x.sum() > 0, x[:, :4], x[:, :4].flip(0)))


def test_a_choice_by_a_value_is_seen_in_both_ways() -> None:
    with pytest.raises(UnsupportedOpError, match="cannot be told apart"):
        fxlora.route([adapted(captured(Chosen(), X), config(2, ["b"]))])


class Mixed(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(torch.softmax(hidden @ hidden.T, 1) @ hidden)


class Scaled(Two):
    """The largest of all samples scales each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(hidden / hidden.abs().max())


class Clamped(Two):
    """Only a rare value is changed by the mean of all samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        return self.b(hidden.clamp(max=hidden.mean() + 9))


class Ranked(Two):
    """The outputs are in the order of a value, whatever the order of the samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)[x[:, 0].argsort()]


@pytest.mark.parametrize("kind", [Mixed, Scaled, Clamped, Ranked])
def test_samples_that_depend_on_others_are_warned_of(kind: type[Two]) -> None:
    gm = captured(kind(), X)
    with pytest.warns(fxlora.FxLoraWarning, match="depends on the other samples"):
        fxlora.route([adapted(gm, config(2, ["a"]))])


class Pairs(Two):
    """The products of all pairs of samples, as in contrastive models."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) @ self.a(x).T


def test_products_of_all_pairs_of_samples_are_warned_of() -> None:
    gm = captured(Pairs(), X)
    with pytest.warns(fxlora.FxLoraWarning, match="depends on the other samples"):
        fxlora.route([adapted(gm, config(2, ["a"]))])


class Tables(nn.Module):
    """The second argument is a table, which is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        return self.b(torch.softmax(hidden @ table.T, 1) @ table)


def test_batch_names_the_argument_that_counts_the_samples() -> None:
    args = X, wide(9, 4)
    dims = tuple({0: torch.export.Dim(name, min=2)} for name in ("samples", "rows"))
    gm = fxlora.capture(Tables().double(), args, dynamic_shapes=dims).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1))]
    check_samples(fxlora.route(loras, slots=3, batch="x"), gm, loras, args)
    with pytest.warns(fxlora.FxLoraWarning, match="depends on the other samples"):
        both = fxlora.route(loras)
    with pytest.raises(InputError, match="has 6 entries where table, dimension 0 is 9"):
        both(*args, adapter_ids=IDS % 2)


# ---- transformers -------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 53,
    "max_position_embeddings": 16,
}


def llama(transformers: Any) -> tuple[nn.Module, list[Any]]:
    sizes = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    rules = [config(3), config(2, ["q_proj", "embed_tokens", "lm_head"], use_rslora=True)]
    return transformers.LlamaForCausalLM(sizes), rules


def bert(transformers: Any) -> tuple[nn.Module, list[Any]]:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    return model, [config(r, ["query", "dense"], modules_to_save=["classifier"]) for r in (3, 1)]


def gpt2(transformers: Any) -> tuple[nn.Module, list[Any]]:
    sizes = {"n_layer": 1, "n_embd": 24, "n_head": 3, "n_positions": 8, "n_inner": 40}
    tokens = {"vocab_size": 53, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **tokens, use_cache=False)
    )
    return model, [config(3, ["c_attn", "c_fc"]), config(2, ["c_proj", "wte"])]


@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=lambda make: make.__name__)
def test_transformers(make: Callable[[Any], tuple[nn.Module, list[Any]]]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    torch.manual_seed(0)
    model, rules = make(transformers)
    ids = long(6, 7, high=50) + 3
    mask = torch.ones_like(ids)
    mask[2, 4:] = 0
    gm = fxlora.capture(
        model.double().eval(), (), {"input_ids": ids, "attention_mask": mask}
    ).eval()
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (), {"input_ids": ids, "attention_mask": mask})


def test_a_mixed_batch_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    torch.manual_seed(0)
    model = Mlp().double().eval()
    gm = captured(copy.deepcopy(model), X)
    loras = [adapted(gm, config(r, ["up", "down"], lora_alpha=5)) for r in (2, 3)]
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["up", "down"]), "a0"
    )
    theirs.add_adapter("a1", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"]))
    theirs.double().eval()
    with torch.no_grad():
        for number, lora in enumerate(loras):
            for name in lora.adapter_parameters():
                own = name.replace(".default.", f".a{number}.")
                theirs.get_parameter(f"base_model.model.{own}").copy_(lora.get_parameter(name))
    names = ["__base__" if slot < 0 else f"a{slot}" for slot in (IDS % 2 - (IDS < 0).long() * 2)]
    ids = torch.tensor([-1 if name == "__base__" else int(name[1:]) for name in names])
    assert len(set(names)) == 3
    found = fxlora.route(loras)(X, adapter_ids=ids)
    expected = theirs(X, adapter_names=names)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(found, gm(X), atol=1e-2)


# ---- random models ------------------------------------------------------------------------------


def _routable(gm: CapturedModule) -> list[str]:
    """Return the names of the weights that can be adapted."""
    found: list[str] = []
    for site in find_sites(gm):
        with contextlib.suppress(fxlora.FxLoraError):
            fxlora.match(gm, Rule(site.name, lora=LoraConfig(r=1)))
            found.append(site.name)
    return found


def _judge(seed: int) -> Counter[str]:
    """Route each weight of a random model: right, refused, or warned of."""
    model, args = draw(seed).build()
    given = tuple(a.double() if a.is_floating_point() else a for a in args)
    found: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm = fxlora.capture(model.double(), given).eval()
        loras = {
            name: [adapted(gm, Rule(name, lora=LoraConfig(r=r))) for r in (2, 1)]
            for name in _routable(gm)
        }
    for name, pair in loras.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                routed = fxlora.route(pair, slots=3)
            except (InputError, UnsupportedOpError):
                found["refused"] += 1
                continue
        if any("depends on the other samples" in str(warning.message) for warning in caught):
            found["warned"] += 1
            continue
        ids = (torch.arange(len(given[0])) + seed) % 4 - 1
        with torch.no_grad():
            mixed = floats(routed(*given, adapter_ids=ids))
            single = [floats(module(*given)) for module in (*pair, gm)]
        for number, outputs in enumerate(mixed):
            for sample, slot in enumerate(ids.tolist()):
                expected = single[slot if slot in (0, 1) else -1][number][sample]
                scale = float(expected.abs().max())
                gap = float((outputs[sample] - expected).abs().max())
                assert gap <= 1e-9 * scale, f"seed {seed}, {name}: {gap / scale}"
        found["right"] += 1
    return found


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param((0, 1, 2, 4, 5, 6, 9, 61), id="few"),
        pytest.param(list(range(14, 29)), id="more", marks=pytest.mark.slow),
        pytest.param([n for n in range(130, 200) if n not in (165, 175)], marks=pytest.mark.slow),
    ],
)
def test_random_models_are_routed_right_or_refused(seeds: Sequence[int]) -> None:
    found = sum(map(_judge, seeds), Counter[str]())
    assert found["right"] > 0.7 * found.total(), found
