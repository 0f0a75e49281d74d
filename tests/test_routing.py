"""route: each sample of a mixed batch gets what the module with its own adapter computes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import (
    AdapterError,
    CapturedModule,
    ConfigError,
    InjectError,
    InputError,
    LoraConfig,
    Rule,
    UnsupportedOpError,
)
from fxlora.fx.compare import difference
from fxlora.reads.sites import find_sites

from .laws import TOLERANCE, assert_same, randomise
from .models import Attention, Convolutions, Mlp, Normed, Readers, Tied
from .oracle import floats
from .random_models import draw
from .typed import grad_of, untyped

ALL = "all-linear"
X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([0, -1, 1, 1, 2, 0])


def config(r: int, targets: Any = ALL, **more: Any) -> LoraConfig:
    return LoraConfig(r=r, target_modules=targets, **more)


def adapted(gm: CapturedModule, rules: Any) -> CapturedModule:
    """Return a module with a random adapter, and other values of what trains in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxlora.FxLoraWarning)  # a pair larger than its weight
        lora = fxlora.inject(gm, fxlora.match(gm, rules))
    randomise(lora)
    with torch.no_grad():
        for name in sorted(lora.trained):
            lora.get_parameter(name).add_(torch.randn_like(lora.get_parameter(name)), alpha=0.3)
    return lora.eval()


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedModule:
    torch.manual_seed(1)
    return fxlora.capture(model.double(), args, kwargs).eval()


def check_samples(
    routed: CapturedModule,
    gm: CapturedModule,
    loras: Sequence[CapturedModule],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    ids: torch.Tensor = IDS,
) -> None:
    """Assert that each sample is what its adapter's module computes, and that no two agree."""
    kwargs = kwargs or {}
    with torch.no_grad():
        single = [floats(module(*args, **kwargs)) for module in [*loras, gm]]
        mixed = floats(routed(*args, **kwargs, adapter_ids=ids))
    compared = False
    for number, found in enumerate(mixed):
        if not found.ndim or found.shape[0] != len(ids):
            continue
        compared = True
        whole = [outputs[number] for outputs in single]
        assert all((a - whole[-1]).abs().max() > 1e-4 for a in whole[:-1])  # each has an effect
        for sample, slot in enumerate(ids.tolist()):
            used = slot if 0 <= slot < len(loras) else -1  # an empty slot is the base
            expected = whole[used][sample]
            scale = float(expected.abs().max())
            assert float((found[sample] - expected).abs().max()) <= TOLERANCE * scale
    assert compared


def check(model: nn.Module, args: tuple[Any, ...], *rules: Any, **kwargs: Any) -> CapturedModule:
    gm = captured(model, *args, **kwargs)
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras, slots=len(loras) + 1)
    check_samples(routed, gm, loras, args, kwargs)
    removed = fxlora.remove(routed)
    for mode in ("train", "eval"):
        assert difference(removed.graphs[mode], gm.graphs[mode]) is None
    assert list(removed.state_dict()) == list(gm.state_dict())
    for lora, number in zip(loras, range(len(loras)), strict=True):
        taken = fxlora.take_adapter(routed, number)
        assert_same(floats(taken(*args, **kwargs)), floats(lora(*args, **kwargs)))
    return routed


def per_slot(routed: CapturedModule) -> bool:
    """Whether something is computed once per slot, and not gathered."""
    return any(node.target is torch.ops.aten.where.self for node in routed.graphs["eval"].nodes)


# ---- every kind of read -------------------------------------------------------------------------

CONVOLUTIONS = ["c3", "c2", "reflect", "grouped", "depthwise", "c1"]


class Turned(nn.Module):
    """Transposed convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)
        self.grouped = nn.ConvTranspose1d(6, 9, 2, groups=3, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(torch.tanh(self.plain(x)))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 5, padding_idx=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids)


def long(*shape: int, high: int = 11) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(4))


def wide(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


GATHERED: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[Any]]] = {
    "linear": (Mlp, (X,), [config(3), config(1, ["up"], lora_alpha=3)]),
    "linear, 4 dimensions": (Mlp, (wide(6, 2, 3, 5),), [config(3), config(2, ["down"])]),
    "pissa": (Mlp, (X,), [config(r, init_lora_weights="pissa") for r in (2, 1)]),
    "convolutions": (
        Convolutions,
        (wide(6, 6, 5, 18, 11),),
        [config(2, CONVOLUTIONS), config(1, CONVOLUTIONS[2:])],
    ),
    "transposed": (
        Turned,
        (wide(6, 4, 5),),
        [config(2, ["plain", "grouped"]), config(1, "grouped")],
    ),
    "padding": (Padded, (long(6, 4),), [config(2, ["emb"]), config(1, ["emb"])]),
    "tied": (
        Tied,
        (long(6, 4),),
        [Rule("emb", lora=LoraConfig(r=2, tied="share")), config(1, ["mix"])],
    ),
    "attention": (Attention, (wide(6, 3, 8),), [Rule(lora=LoraConfig(r=r)) for r in (2, 1)]),
    "normed": (
        Normed,
        (wide(6, 3, 5, 5),),
        [Rule(lora=LoraConfig(r=2)), config(1, ["conv", "fc"])],
    ),
    "parts": (
        lambda: nn.Sequential(nn.Linear(5, 9)),
        (X,),
        [Rule("0", parts=3, enable=[True, False, True], lora=LoraConfig(r=2)), config(1, ["0"])],
    ),
}


@pytest.mark.parametrize("kind", GATHERED)
def test_gathered(kind: str) -> None:
    model, args, rules = GATHERED[kind]
    assert not per_slot(check(model(), args, *rules))


class Positions(nn.Module):
    """A look-up of positions, which all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos, self.out = nn.Embedding(11, 5), nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.emb(ids) + self.pos(torch.arange(ids.shape[1])))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0])


class Two(nn.Module):
    """Two linear layers, with an order of the samples between them that a subclass chooses."""

    subscripts: ClassVar = {}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Flipped(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)).flip(0)).flip(0)


class Sorted(Two):
    """The second layer sees the samples in an order of values, as the experts of a mixture do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        order = hidden.sum(1).argsort()
        return self.b(hidden[order])[order.argsort()]


class Checkpointed(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda given: torch.tanh(self.a(given)), x, use_reentrant=False)
        return self.b(untyped(hidden))


PER_SLOT: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[Any]]] = {
    "dora": (Mlp, (X,), [config(2, use_dora=True), config(1, ["up"], use_dora=True)]),
    "head in full": (Mlp, (X,), [config(2, ["up"], modules_to_save=["down"]), config(1, ["up"])]),
    "a head only": (Mlp, (X,), [Rule("down", train=True), config(1, ["up"])]),
    "biases": (Mlp, (X,), [config(2, ["up"], bias="all"), config(1, ["up"])]),
    "tied, in full": (Tied, (long(6, 4),), [config(2, ["mix"], modules_to_save=["emb"])] * 2),
    "readers": (Readers, (X, long(6, 4)), [Rule(lora=LoraConfig(r=r)) for r in (2, 1)]),
    "positions": (Positions, (long(6, 7),), [config(2, ["emb", "pos"]), config(1, ["pos"])]),
    "recurrent": (
        Recurrent,
        (wide(6, 7, 5),),
        [Rule(lora=LoraConfig(r=2)), Rule("lstm.*", lora=LoraConfig(r=1))],
    ),
    "flipped": (Flipped, (X,), [config(2), config(1)]),
    "sorted": (Sorted, (X,), [config(2), config(1)]),
    "checkpointed": (Checkpointed, (X,), [config(2), config(1, ["a"])]),
}


class Dropped(Two):
    """Draws random numbers in training, in a nested graph and outside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(given: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(torch.tanh(self.a(given)), 0.5, self.training)

        hidden = untyped(checkpoint(inner, x, use_reentrant=False))
        return self.b(nn.functional.dropout(hidden, 0.5, self.training))


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


@pytest.mark.parametrize("kind", [Flat, FlatTimeFirst, TimeFirst])
def test_the_samples_are_found_in_any_dimension(kind: type[Two]) -> None:
    assert not per_slot(check(kind(), (wide(6, 7, 5),), config(2), config(1, ["b"])))


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
    check_samples(  # the advice works, unless the outputs have no samples
        fxlora.route([adapted(gm, config(2, ["a"]))]), gm, [], (X,), ids=IDS * 0 - 1
    ) if kind is Rolled else None


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


def test_samples_that_depend_on_others_are_warned_of() -> None:
    gm = captured(Mixed(), X)
    with pytest.warns(fxlora.FxLoraWarning, match="depends on the other samples"):
        fxlora.route([adapted(gm, config(2))])


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


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolutions", "padding", "parts", "tied"])
def test_gradients_are_those_of_each_adapter_alone(kind: str) -> None:
    model, args, rules = GATHERED[kind]
    _check_gradients(model(), args, rules)


@pytest.mark.parametrize("kind", ["dora", "head in full", "recurrent"])
def test_gradients_where_values_are_computed_once_per_slot(kind: str) -> None:
    model, args, rules = PER_SLOT[kind]
    _check_gradients(model(), args, rules)


def _check_gradients(model: nn.Module, args: tuple[Any, ...], rules: list[Any]) -> None:
    gm = captured(model, *args)
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras, slots=3)
    routed(*args, adapter_ids=IDS).square().sum().backward()
    routing = routed.known.routing
    assert routing is not None
    places = {entry.prefix: entry for entry in routing.entries}
    for slot, lora in enumerate(loras):
        own = slot == IDS
        lora(*(given[own] for given in args)).square().sum().backward()
        for entry in lora.plan or ():
            for name, stack in zip(entry.tensors, places[entry.prefix].tensors, strict=True):
                parameter = lora.get_parameter(name)
                if parameter.requires_grad:
                    _compare_gradient(routed.get_parameter(stack), slot, grad_of(parameter))
        for name in lora.trained:
            stack = routed.get_parameter(routing.full[name])
            _compare_gradient(stack, slot, grad_of(lora.get_parameter(name)))
    for name in routing.trainable:
        assert not grad_of(routed.get_parameter(name))[2:].any()  # the empty slot, and the base


def _compare_gradient(stack: nn.Parameter, slot: int, expected: torch.Tensor) -> None:
    found = grad_of(stack)[slot]
    own = tuple(slice(size) for size in expected.shape)
    assert float(expected.abs().max()) > 0
    scale = float(expected.abs().max())
    assert float((found[own] - expected).abs().max()) <= 1e-9 * scale
    rest = found.clone()
    rest[own] = 0
    assert not rest.any()  # the padding


@pytest.mark.parametrize("first", [{}, {"use_dora": True}, {"modules_to_save": ["down"]}])
def test_what_no_adapter_trains_stays_as_it_is_in_training(first: dict[str, Any]) -> None:
    gm = captured(Mlp(), X)
    every = ["up"] if "modules_to_save" in first else ALL
    more = {"use_dora": True} if "use_dora" in first else {}
    loras = [adapted(gm, config(3, every, **first)), adapted(gm, config(1, ["up"], **more))]
    routed = fxlora.route(loras, slots=3)
    parameters = fxlora.lora_parameters(routed)
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    before = [parameter.detach().clone() for parameter in parameters]
    for _ in range(3):
        optimizer.zero_grad()
        routed.train()(X, adapter_ids=IDS).square().sum().backward()
        optimizer.step()
    assert any((p - b).abs().max() > 0.01 for p, b in zip(parameters, before, strict=True))
    for parameter, old in zip(parameters, before, strict=True):
        assert not parameter[old == 0].any()  # the padding
    routed.eval()
    for slot in (-1, 2):
        assert torch.allclose(routed(X, adapter_ids=IDS * 0 + slot), gm(X), rtol=0, atol=1e-14)
    taken = fxlora.take_adapter(routed, 1)  # without a part of the first adapter
    assert torch.allclose(routed(X, adapter_ids=IDS * 0 + 1), taken(X), rtol=0, atol=1e-14)
    assert not torch.allclose(taken(X), gm(X), atol=1e-3)


def test_dropout_is_in_the_train_graph_only_and_alike() -> None:
    gm = captured(Mlp(), X)
    loras = [adapted(gm, config(2, lora_dropout=0.5)) for _ in range(2)]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    ids = torch.zeros(6, dtype=torch.long)
    first, second = (routed.train()(X, adapter_ids=ids) for _ in range(2))
    assert not torch.equal(first, second)
    with pytest.raises(UnsupportedOpError, match=r"differ in dropout \(0\.5 and 0\.0\)"):
        fxlora.route([loras[0], adapted(gm, config(2))])


def test_dropout_that_a_weight_computed_per_slot_cannot_have_is_warned_of() -> None:
    gm = captured(Mlp(), X)
    lora = adapted(gm, config(2, ["up"], use_dora=True, lora_dropout=0.5))
    with pytest.warns(fxlora.FxLoraWarning, match="up: .* lora_dropout does not apply"):
        fxlora.route([lora])


def test_a_trained_adapter_is_taken_out_and_saved(tmp_path: Path) -> None:
    gm = captured(Mlp(), X)
    routed = fxlora.route(
        [adapted(gm, config(2, ["down"])), adapted(gm, config(1, ["down"], modules_to_save=["up"]))]
    )
    optimizer = torch.optim.SGD(fxlora.lora_parameters(routed), lr=0.01)
    routed(X, adapter_ids=IDS.clamp(max=1)).square().sum().backward()
    optimizer.step()
    for slot in (0, 1):
        taken = fxlora.take_adapter(routed, slot)
        fxlora.save_adapter(taken, tmp_path / str(slot))
        loaded = fxlora.load_adapter(gm, tmp_path / str(slot)).eval()
        expected = routed(X, adapter_ids=torch.full((6,), slot))
        assert torch.allclose(loaded(X), expected, atol=1e-12, rtol=0)
        assert not torch.allclose(loaded(X), gm(X), atol=1e-3)


# ---- the input ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed() -> CapturedModule:
    gm = captured(Mlp(), X)
    return fxlora.route([adapted(gm, config(2, ["up"])), adapted(gm, config(1))], slots=3)


@pytest.mark.parametrize("wrong", [-2, 3])
def test_an_id_out_of_range_raises(routed: CapturedModule, wrong: int) -> None:
    ids = IDS.clone()
    ids[4] = wrong
    with pytest.raises(InputError, match=f"from -1 .the base. to 2, but called with {wrong}"):
        routed(X, adapter_ids=ids)
    compiled = torch.compile(routed, backend="aot_eager", dynamic=True)
    with pytest.raises(RuntimeError, match="adapter_ids must be from -1"):
        compiled(X, adapter_ids=ids)


def test_the_ids_are_checked_like_every_input(routed: CapturedModule) -> None:
    for ids, why in ((None, "missing"), (IDS[:5], "is 5"), (IDS.int(), "int32")):
        given = {} if ids is None else {"adapter_ids": ids}
        with pytest.raises(InputError, match=why):
            routed(X, **given)


def test_functions_that_do_not_take_a_routed_module_say_what_to_do(routed: CapturedModule) -> None:
    for function in (fxlora.fold, fxlora.report, lambda m: fxlora.match(m, config(1))):
        with pytest.raises(InjectError, match="take_adapter"):
            function(routed)


def test_copies_and_moves_keep_the_slots(routed: CapturedModule) -> None:
    expected = routed(X, adapter_ids=IDS)
    copied = copy.deepcopy(routed)
    copied.load_state_dict(routed.state_dict())
    assert torch.equal(copied(X, adapter_ids=IDS), expected)
    moved = copied.to(torch.float32)
    found = moved(X.float(), adapter_ids=IDS)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_half_precision_is_rounded_as_with_one_adapter() -> None:
    gm = fxlora.capture(Mlp().bfloat16(), X.bfloat16()).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1))]
    found = fxlora.route(loras, slots=3)(X.bfloat16(), adapter_ids=IDS)
    for sample, slot in enumerate(IDS.tolist()):
        module = loras[slot] if slot in (0, 1) else gm
        assert torch.allclose(found[sample], module(X.bfloat16())[sample], atol=0.02)


def test_export_keeps_the_input_and_the_batch(routed: CapturedModule, tmp_path: Path) -> None:
    path = fxlora.export(routed, tmp_path / "routed.pt2", X, {"adapter_ids": IDS})
    program = torch.export.load(path).module()
    expected = routed(X, adapter_ids=IDS)
    assert torch.allclose(program(X[:4], adapter_ids=IDS[:4]), expected[:4], atol=1e-12)


def test_weights_multiply_the_effect_of_each_sample() -> None:
    gm = captured(Mlp(), X)
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["up"]))]
    routed = fxlora.route(loras, weights=True)
    ids = torch.tensor([0, -1, 1, 1, 0, 0])
    strengths = torch.tensor([0.5, 3.0, -2.0, 0.0, 1.0, 0.25])
    found = routed(X, adapter_ids=ids, adapter_weights=strengths)
    for sample, (slot, strength) in enumerate(zip(ids.tolist(), strengths.tolist(), strict=True)):
        module = copy.deepcopy(loras[slot] if slot >= 0 else gm)
        with torch.no_grad():
            for entry in module.plan or ():
                module.get_parameter(entry.name_b).mul_(strength)
        expected = module(X)[sample]
        assert torch.allclose(found[sample], expected, rtol=0, atol=1e-12)
        assert slot < 0 or strength == 1 or not torch.allclose(expected, loras[slot](X)[sample])
    with pytest.raises(InputError, match="adapter_weights: missing"):
        routed(X, adapter_ids=ids)
    assert fxlora.remove(routed).code == gm.code
    dora = adapted(gm, config(2, use_dora=True))
    with pytest.raises(UnsupportedOpError, match=r"'up\.weight' .* takes no weights"):
        fxlora.route([dora], weights=True)


# ---- swapping -----------------------------------------------------------------------------------


def test_swap_writes_in_place_without_another_compilation(tmp_path: Path) -> None:
    gm = captured(Mlp(), X)
    loras = [
        adapted(gm, config(2, ["up"], modules_to_save=["down"])),
        adapted(gm, config(1, ["up"])),
    ]
    routed = fxlora.route(loras, slots=3)
    other = adapted(gm, config(1, ["up"], lora_alpha=5))
    fxlora.save_adapter(other, tmp_path)
    counter = torch._dynamo.testing.CompileCounter()
    compiled: Any = torch.compile(routed, backend=counter, dynamic=True)
    with torch.no_grad():
        before = compiled(X, adapter_ids=IDS)
    count = counter.frame_count
    assert count > 0
    fxlora.swap_adapter(routed, 2, tmp_path)
    with torch.no_grad():
        after = compiled(X, adapter_ids=IDS)
    check_samples(compiled, gm, [*loras, other], (X,))
    assert counter.frame_count == count
    assert torch.equal(after[:4], before[:4]) and not torch.equal(after[4], before[4])
    fxlora.swap_adapter(routed, 0, other)
    check_samples(compiled, gm, [other, loras[1], other], (X,))
    assert counter.frame_count == count


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    gm = captured(Mlp(), X)
    routed = fxlora.route([adapted(gm, config(2, ["up"]))], rank=3)
    before = {name: tensor.clone() for name, tensor in routed.state_dict().items()}
    nan = adapted(gm, config(2, ["up"]))
    with torch.no_grad():
        fxlora.lora_parameters(nan)[-1].fill_(float("nan"))
    wrong = {
        "rank 4": adapted(gm, config(4, ["up"])),
        "down": adapted(gm, config(1, ["down"])),
        "not finite": nan,
        "variants": adapted(gm, config(1, ["up"], use_dora=True)),
    }
    for why, lora in wrong.items():
        with pytest.raises(AdapterError, match=why):
            fxlora.swap_adapter(routed, 0, lora)
    assert all(torch.equal(before[n], t) for n, t in routed.state_dict().items())
    roomy = adapted(gm, config(3, ["up"]))  # what the error advises
    fxlora.swap_adapter(routed, 0, roomy)
    check_samples(routed, gm, [roomy], (X,), ids=IDS.clamp(max=0))


def test_slots_are_checked(routed: CapturedModule) -> None:
    with pytest.raises(ConfigError, match="slot must be from 0 to 2"):
        fxlora.take_adapter(routed, 3)
    with pytest.raises(InjectError, match="slot 2 is empty"):
        fxlora.take_adapter(routed, 2)
    gm = fxlora.remove(routed)
    lora = adapted(gm, config(1))
    with pytest.raises(InjectError, match="takes a routed module"):
        fxlora.swap_adapter(lora, 0, lora)
    for modules, slots, why in (([], None, "with at least one"), ([lora] * 2, 1, "do not fit")):
        with pytest.raises(ConfigError, match=why):
            fxlora.route(modules, slots=slots)
    for module in ([gm], gm):
        with pytest.raises(InjectError, match="inject a plan first"):
            fxlora.route(module)


def test_modules_over_other_bases_are_refused() -> None:
    model = Mlp()
    one, two = captured(model, X), captured(copy.deepcopy(model), X)
    with torch.no_grad():
        two.get_parameter("up.bias").add_(1)
    with pytest.raises(InjectError, match=r"different base weights or calls \(up\.bias"):
        fxlora.route([adapted(one, config(1)), adapted(two, config(1))])


def test_buffers_that_one_adapter_changed_are_refused() -> None:
    gm = captured(Normed(), wide(6, 3, 5, 5))
    lora = adapted(gm, config(1, ["fc"]))
    lora.train()(wide(6, 3, 5, 5))
    with pytest.raises(InjectError, match=r"changed bn\.running_mean"):
        fxlora.route([lora])


def test_statistics_of_a_batch_that_trains_in_full_are_refused() -> None:
    gm = captured(Normed(), wide(6, 3, 5, 5))
    with pytest.raises(UnsupportedOpError, match=r"'bn\.weight': .* writes to memory"):
        fxlora.route([adapted(gm, config(1, ["fc"], modules_to_save=["bn"]))])


def test_adapters_that_differ_in_kind_at_a_weight_are_refused() -> None:
    gm = captured(Mlp(), X)
    with pytest.raises(UnsupportedOpError, match=r"'up': the adapters differ in variants"):
        fxlora.route(
            [adapted(gm, config(1, ["up"])), adapted(gm, config(1, ["up"], use_dora=True))]
        )
    with pytest.raises(UnsupportedOpError, match=r"'up\.weight' is trained in full by one"):
        fxlora.route(
            [
                adapted(gm, config(1, ["up"])),
                adapted(gm, config(1, ["down"], modules_to_save=["up"])),
            ]
        )


@pytest.mark.parametrize("modules", ["0", ["0.up", "1"], ["0", "0.up"]], ids=str)
def test_blocks_get_the_rows_as_an_argument(modules: Any) -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 4)).double()
    gm = fxlora.capture(model, X, modules=modules).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["0.up", "1"]))]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    seen: list[Any] = []
    block = routed.get_submodule(modules[0] if isinstance(modules, list) else modules)
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    routed(X, adapter_ids=IDS)
    handle.remove()
    assert seen[0]["adapter_rows"].tolist() == [i if i >= 0 else 3 for i in IDS.tolist()]
    mixed = fxlora.route(loras, mixture=2, weights=True)
    ids, weights = IDS.clamp(max=1)[:, None].repeat(1, 2), torch.tensor([[0.25, 0.75]] * 6)
    found = mixed(X, adapter_ids=ids, adapter_weights=weights)
    flat = fxlora.route(loras)(X, adapter_ids=ids[:, 0])
    assert torch.allclose(found, flat, rtol=0, atol=1e-12)
    removed = fxlora.remove(routed)
    assert removed.code == gm.code
    assert_same(floats(removed(X)), floats(gm(X)))
    routed.train()(X, adapter_ids=IDS).square().sum().backward()
    assert all(p.grad is not None for p in fxlora.lora_parameters(routed))


def test_every_captured_call_gets_the_input() -> None:
    class Scaled(Two):
        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) if scale is None else super().forward(x) * scale

    gm = fxlora.capture(Scaled().double(), calls=[((X,), {}), ((X, wide(6, 3)), {})]).eval()
    loras = [adapted(gm, config(2)), adapted(gm, config(1, ["b"]))]
    routed = fxlora.route(loras, slots=3)
    check_samples(routed, gm, loras, (X,))
    check_samples(routed, gm, loras, (X, wide(6, 3)))


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
