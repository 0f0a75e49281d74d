"""One weight under several names: which reads are adapted, and which ties the fold keeps."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import ConfigError, FxLoraWarning, LoraConfig, Rule

from .laws import assert_close, check_laws, randomise, run
from .models import Tied, gpt2
from .typed import plan_of

IDS = torch.tensor([[1, 2, 5, 12], [3, 3, 0, 2], [7, 8, 9, 10]])


class Model(Tied):
    """The same, with a method for the head that subclasses override."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(torch.tanh(self.mix(self.emb(ids))))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Checkpointed(Model):
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.head, x, use_reentrant=False)


class Nested(Model):
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.head(x)


class Wrapped(Model):
    """The tied weight is that of a submodule of the head, whose forward reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(6, 17, bias=False))
        self.decoder[0].weight = self.emb.weight
        del self.head

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)


class Other(Model):
    """The tie in the other direction: the head's weight is assigned to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 17, bias=False)
        self.emb.weight = self.head.weight


R2 = LoraConfig(r=2, lora_alpha=3)
HEADS = {Model: "head", Checkpointed: "head", Nested: "head", Wrapped: "0", Other: "head"}
ROADS = {"exported": None, "traced": fxlora.capture}


@functools.cache
def captured(
    kind: Callable[[], Any], road: str = "exported", args: Any = (IDS,)
) -> tuple[Any, fxlora.CapturedModule]:
    """Return a model and its capture, which serve all rules: no verb changes them."""
    model = kind().double()
    return model, fxlora.capture(model, args if road == "exported" else None)


def checked(
    model: nn.Module,
    rules: Any,
    road: str = "exported",
    args: Any = (IDS,),
    gm: fxlora.CapturedModule | None = None,
) -> tuple[fxlora.CapturedModule, fxlora.CapturedModule]:
    reference = Model() if isinstance(model, Checkpointed) else None
    capture = (lambda _: gm) if gm else ROADS[road]
    _, lora = check_laws(model, args, rules=rules, capture=capture, reference=reference)
    folded = fxlora.fold(lora)
    fxlora.verify(lora, args, folded=folded)
    return lora, folded


WHICH = ["head", "emb", "both", "two rules", "share"]
TWO = ("both", "two rules")  # as in the plain model, from the graph of any other


@pytest.mark.parametrize(
    ("kind", "road", "which"),
    [
        *((Model, road, which) for road in ROADS for which in WHICH),
        *(
            pytest.param(kind, "exported", which, marks=pytest.mark.slow if which in TWO else ())
            for kind in HEADS
            for which in WHICH
            if kind is not Model
        ),
    ],
)
def test_who_is_adapted(kind: type[Model], road: str, which: str) -> None:
    head = HEADS[kind]
    rules = {
        "head": Rule(head, lora=R2),
        "emb": Rule("emb", lora=R2),
        "both": Rule([head, "emb"], lora=R2),
        "two rules": [Rule(head, lora=LoraConfig(r=3)), Rule("emb", lora=R2)],
        "share": Rule(head, lora=LoraConfig(r=2, tied="share")),
    }[which]
    model, gm = captured(kind, road)
    lora, folded = checked(model, rules, road, gm=gm)
    source = model.emb.weight
    path = "decoder.0.weight" if kind is Wrapped else "head.weight"
    emb, out = (folded.get_parameter(name) for name in ("emb.weight", path))
    kept = which in ("both", "share")
    assert (emb is out) is kept
    assert torch.equal(out, source) is (which == "emb")
    assert torch.equal(emb, source) is (which == "head")
    assert len(plan_of(lora)) == 1 + (which == "two rules")
    covered = {name for entry in plan_of(lora) for name in entry.names}
    wanted = {"head": {path}, "emb": {"emb.weight"}}.get(which, {path, "emb.weight"})
    assert covered == wanted
    _check_report(lora, folded, () if kept else {path, "emb.weight"})


def _check_report(lora: Any, folded: Any, split: Any) -> None:
    for x, words in ((lora.plan, "a fold splits"), (lora, "a fold"), (folded, "by the fold")):
        text, data = fxlora.report(x), json.loads(fxlora.report(x, "json"))
        assert ("Ties" in text and words in text) is bool(split)
        assert {n for tie in data["split_ties"] for group in tie for n in group} == set(split)
        for name in split:
            assert name in text


def test_the_report_of_a_split_tie() -> None:
    for name, other in (("head", "emb"), ("emb", "head")):
        gm = captured(Model)[1]
        lora = fxlora.inject(gm, fxlora.match(gm, Rule(name, lora=R2)))
        said = f"Ties split by the fold: {other}.weight from {name}.weight."
        assert said in fxlora.report(fxlora.fold(lora))
        assert f"split from its tie with {other}.weight" in str(lora.plan)


def test_parts_of_a_tied_weight() -> None:
    rule = Rule("head", lora=R2, parts={"a": (0, 5), "b": (9, 17)})
    model, gm = captured(Model)
    lora, folded = checked(model, rule, gm=gm)
    assert len(plan_of(lora)) == 2 and len(plan_of(lora).split_ties) == 1
    head, emb = (folded.get_parameter(f"{name}.weight") for name in ("head", "emb"))
    assert (head == emb).all(1).tolist() == [5 <= n < 9 for n in range(17)]


# ---- reads by the parent module -----------------------------------------------------------------


class Functional(Model):
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.emb.weight)


class Both(Model):
    """The parent module reads the tied weight, in addition to the head."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + F.linear(x, self.emb.weight)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", [Functional, Both])
def test_a_read_of_the_parents_is_every_names(kind: type[Model], road: str) -> None:
    lora, folded = checked(kind(), Rule("emb", lora=R2), road)
    (entry,) = plan_of(lora)
    assert set(entry.names) == {"emb.weight", "head.weight"} and not entry.tied
    assert folded.get_parameter("emb.weight") is folded.get_parameter("head.weight")


# ---- one Parameter in two modules, one module twice ---------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.tanh(self.first(x)))


X = torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["first", "second", "*"])
def test_one_parameter_in_two_modules(name: str, road: str) -> None:
    """A module that is called twice has one adapter, which is inserted at both calls."""
    model, gm = captured(Two, road, (X,))
    lora, folded = checked(model, Rule(name, lora=R2), road, (X,), gm)
    first, second = (folded.get_parameter(f"{n}.weight") for n in ("first", "second"))
    assert (first is second) is (name == "*")
    assert torch.equal(second, model.first.weight) is (name == "first")
    assert torch.equal(first, model.first.weight) is (name == "second")
    graph = lora.graphs["eval"]
    used = [n for n in graph.nodes if n.op == "get_attr" and "lora_A" in str(n.target)]
    assert sum(len(n.users) for n in used) == {"first": 2, "second": 1, "*": 3}[name]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["first", "again"])
def test_one_module_under_two_names(name: str, road: str) -> None:
    model, gm = captured(Names, road, (X,))
    lora, folded = checked(model, Rule(name, lora=R2), road, (X,), gm)
    assert [set(entry.names) for entry in plan_of(lora)] == [{"first.weight", "again.weight"}]
    assert folded.get_parameter("first.weight") is folded.get_parameter("again.weight")


def test_regions() -> None:
    class Chooses(Model):
        def logits(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 1e9:  # stays in Python
                return x
            return self.head(x)

    model = Chooses().double()
    with pytest.warns(FxLoraWarning):
        gm = fxlora.capture(model, (IDS,))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("head", lora=R2)))
    randomise(lora)
    (entry,) = plan_of(lora)
    assert entry.names == ("head.weight",)
    folded = fxlora.fold(lora)
    a, b = (lora.get_parameter(name).detach() for name in (entry.name_a, entry.name_b))
    source = copy.deepcopy(model)
    source.head.weight = nn.Parameter(source.emb.weight + 1.5 * b @ a)
    expected = run(source.eval(), (IDS,), {})
    assert_close(run(lora.eval(), (IDS,), {}), expected)
    assert_close(run(folded.eval(), (IDS,), {}), expected)


# ---- after a tie is split -----------------------------------------------------------------------


def split() -> tuple[fxlora.CapturedModule, fxlora.CapturedModule]:
    gm = captured(Model)[1]
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("head", lora=R2)))
    randomise(lora)
    return lora, fxlora.fold(lora)


def test_the_state_of_a_split_tie() -> None:
    lora, folded = split()
    state = folded.state_dict()
    gm = copy.deepcopy(captured(Model)[1])
    gm.load_state_dict(Model().state_dict())
    again = fxlora.fold(fxlora.inject(gm, fxlora.match(gm, Rule("head", lora=R2))))
    again.load_state_dict(state)
    assert_close(run(again.eval(), (IDS,), {}), run(lora.eval(), (IDS,), {}))
    for module in (copy.deepcopy(folded), folded):
        weights = [module.get_parameter(f"{n}.weight") for n in ("emb", "head")]
        assert not torch.equal(*weights)


def test_a_program_of_a_split_tie(tmp_path: Path) -> None:
    lora, folded = split()
    fxlora.export(folded.eval(), tmp_path / "m.pt2", (IDS,))
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert_close(run(program, (IDS,), {}), run(lora.eval(), (IDS,), {}))
    compiled = torch.compile(folded.eval(), backend="eager", fullgraph=True)
    assert_close(run(compiled, (IDS,), {}), run(lora.eval(), (IDS,), {}))


def test_a_saved_adapter_of_one_name(tmp_path: Path) -> None:
    lora, _ = split()
    fxlora.save_adapter(lora, tmp_path)
    gm = fxlora.remove(lora)
    again = fxlora.load_adapter(gm, tmp_path)
    assert plan_of(again).split_ties == plan_of(lora).split_ties
    assert_close(run(again.eval(), (IDS,), {}), run(lora.eval(), (IDS,), {}))


def test_folded_and_adapted_again() -> None:
    """After a fold that splits a tie, the second adapter finds two weights."""
    _, folded = split()
    lora = fxlora.inject(folded, fxlora.match(folded, Rule("emb", lora=R2)))
    assert not plan_of(lora).split_ties
    randomise(lora)
    again = fxlora.fold(lora)
    assert_close(run(again.eval(), (IDS,), {}), run(lora.eval(), (IDS,), {}))
    assert torch.equal(again.get_parameter("head.weight"), folded.get_parameter("head.weight"))


# ---- full training of a tied weight -------------------------------------------------------------


@pytest.mark.parametrize("trained", ["head", "emb"])
@pytest.mark.parametrize("road", ROADS)
def test_training_one_name_and_adapting_the_other_is_refused(trained: str, road: str) -> None:
    other = {"head": "emb", "emb": "head"}[trained]
    gm = captured(Model, road)[1]
    for rules in (
        [Rule(trained, train=True), Rule(other, lora=R2)],
        [Rule(other, lora=LoraConfig(r=2, modules_to_save=[trained]))],
    ):
        with (
            pytest.warns(FxLoraWarning, match="same tensor"),
            pytest.raises(ConfigError, match="Adapt both names or train both"),
        ):
            fxlora.match(gm, rules)


def test_training_both_names() -> None:
    gm = captured(Model)[1]
    rule = Rule("mix", lora=LoraConfig(r=2, modules_to_save=["head", "emb"]))
    with pytest.warns(FxLoraWarning, match="same tensor"):
        lora = fxlora.inject(gm, fxlora.match(gm, rule))
    assert lora.get_parameter("head.weight") is lora.get_parameter("emb.weight")
    assert lora.get_parameter("head.weight").requires_grad


def test_sharing_contradicts_another_rule() -> None:
    gm = captured(Model)[1]
    rules = [Rule("emb", lora=None), Rule("head", lora=LoraConfig(r=2, tied="share"))]
    with pytest.raises(ConfigError, match="let one rule match all of them"):
        fxlora.match(gm, rules)


# ---- transformers -------------------------------------------------------------------------------

SIZES = {"vocab_size": 37, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
HF: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "Llama": (
        "LlamaForCausalLM",
        {**SIZES, "num_attention_heads": 2, "tie_word_embeddings": True},
        ("lm_head", "embed_tokens"),
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 37,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
        ("lm_head", "shared"),
    ),
}


def test_gpt2() -> None:
    check_names(*gpt2(), ("lm_head", "wte"))


@pytest.mark.parametrize("name", ["T5", pytest.param("Llama", marks=pytest.mark.slow)])
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, sizes, names = HF[name]
    config = getattr(transformers, f"{name}Config")(**sizes, use_cache=False)
    model = getattr(transformers, kind)(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    kwargs = {"input_ids": IDS, "labels": IDS}
    fixed = dict.fromkeys(kwargs)  # twice as fast; no tie depends on it
    gm = fxlora.capture(model, (), kwargs, dynamic_shapes=fixed)
    check_names(model, kwargs, gm, names)


def check_names(model: nn.Module, kwargs: dict[str, Any], gm: Any, names: tuple[str, str]) -> None:
    """Adapt each of the two names of a tied weight by itself, and both."""
    for which in (*names, list(names)):
        rule = Rule(which, lora=R2)
        _, lora = check_laws(model, (), kwargs, rules=rule, capture=lambda _: gm)
        (entry,) = plan_of(lora)
        ties = next(n for n in lora.aliases().values() if "lm_head.weight" in n)
        assert set(entry.names) | set(entry.tied) == set(ties)
        folded = fxlora.fold(lora)
        head, table = folded.get_parameter("lm_head.weight"), folded.get_parameter(ties[0])
        assert (head is table) is isinstance(which, list)


def test_reads_of_two_names_inside_one_nested_graph_are_not_told_apart() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                h = self.b(self.a(x).tanh())
            return h + self.a(x) + self.b(x).cos()

    x = torch.randn(3, 5, dtype=torch.float64)
    _, lora = check_laws(Nested(), (x,), rules=Rule("a", lora=LoraConfig(r=2)))
    (entry,) = plan_of(lora)
    assert entry.names == ("a.weight", "b.weight")  # one delta for all, and the plan says why
    assert "all are adapted" in entry.reason


def test_a_shared_delta_does_not_go_onto_two_tensors() -> None:
    class Model(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            if tied:
                self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.emb(ids).relu())

    ids = torch.tensor([[1, 2, 3]])
    tied, apart = (fxlora.capture(Model(flag), ids) for flag in (True, False))
    plan = fxlora.match(tied, Rule(["emb", "head"], lora=LoraConfig(r=2)))
    with pytest.raises(fxlora.InjectError, match="one tensor under these names"):
        fxlora.inject(apart, plan)


def test_a_tie_that_is_broken_later_is_not_folded_into_one() -> None:
    gm = captured(Tied)[1]
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(["emb", "head"], lora=LoraConfig(r=2))))
    state = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    state["head.weight"] += 1
    lora.load_state_dict(state, assign=True)
    with pytest.raises(fxlora.InjectError, match="one tensor when the adapter was injected"):
        fxlora.fold(lora)


def test_a_fold_that_splits_a_tie_says_so() -> None:
    """Loading the result into the model's own class would tie the two weights again."""
    gm = captured(Tied)[1]
    split = fxlora.inject(gm, fxlora.match(gm, Rule("head", lora=LoraConfig(r=2))))
    with pytest.warns(fxlora.FxLoraWarning, match=r"fold splits a tie: .*tied=\"share\""):
        fxlora.fold(split)
    shared = LoraConfig(r=2, tied="share", target_modules=["head"])
    kept = fxlora.inject(gm, fxlora.match(gm, shared))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxlora.fold(kept)
