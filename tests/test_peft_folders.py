"""Folders that PEFT made: what PEFT trained is what loads, to 1e-10 in float64, or nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fxlora
from fxlora import AdapterError, FxLoraWarning, LoraConfig, UnsupportedOpError

from .laws import assert_close, assert_same, randomise, run
from .models import Tied
from .typed import plan_of

peft = pytest.importorskip("peft", reason="peft is optional")
D = torch.float64


def theirs(model: nn.Module, folder: Path, **config: Any) -> nn.Module:
    """Adapt a copy by PEFT, draw all that trains at random, save it; return PEFT's module."""
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(str(folder))
    return made


def assert_equal_to_pefts(
    model: nn.Module, args: tuple[Any, ...], folder: Path, made: nn.Module
) -> fxlora.CapturedModule:
    """Load PEFT's folder, compare; save it, and compare PEFT's reading of that."""
    gm = fxlora.capture(model, args).eval()
    lora = fxlora.load_adapter(gm, folder).eval()
    expected = run(made, args, {})
    assert (expected[0] - run(gm, args, {})[0]).abs().max() > 1e-3
    assert_close(run(lora, args, {}), expected)
    fxlora.save_adapter(lora, folder / "ours")
    assert json.loads((folder / "ours/adapter_config.json").read_text())["peft_type"] == "LORA"
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder / "ours")).eval()
    assert_close(run(again, args, {}), expected)
    loaded = fxlora.load_adapter(gm, folder / "ours").eval()
    assert_same(run(loaded, args, {}), run(lora, args, {}))
    assert plan_of(loaded).untied == plan_of(lora).untied
    return lora


# ---- modules_to_save and ties -------------------------------------------------------------------

IDS = (torch.tensor([[1, 2, 3], [5, 0, 16]]),)


@pytest.mark.parametrize("saved", [["emb"], ["head"], ["emb", "head"]])
def test_pefts_modules_to_save_split_a_tie(tmp_path: Path, saved: list[str]) -> None:
    model = Tied().to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules=["mix"], modules_to_save=saved)
    lora = assert_equal_to_pefts(model, IDS, tmp_path, made)
    assert set(plan_of(lora).trained) == {f"{name}.weight" for name in saved}
    gm = fxlora.remove(lora).eval()
    assert sorted(map(sorted, gm.aliases().values()))[0] == ["emb.weight", "head.weight"]
    assert_same(run(gm, IDS, {}), run(model, IDS, {}))
    with pytest.warns(FxLoraWarning, match="splits a tie"):
        folded = fxlora.fold(lora).eval()
    assert_close(run(folded, IDS, {}), run(made, IDS, {}))
    fxlora.verify(lora, IDS, folded=folded)
    assert_same(run(copy.deepcopy(lora), IDS, {}), run(lora, IDS, {}))


@pytest.mark.parametrize("saved", [["emb"], ["head"], ["emb", "head"]])
def test_ours_keep_the_tie(tmp_path: Path, saved: list[str]) -> None:
    """PEFT wraps both modules, and gets the value under both names."""
    model = Tied().to(D).eval()
    gm = fxlora.capture(model, *IDS).eval()
    lora = fxlora.inject(gm, in_full(gm, saved)).eval()
    randomise(lora)
    with torch.no_grad():
        lora.get_parameter("emb.weight").normal_()
    fxlora.save_adapter(lora, tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert_close(run(again, IDS, {}), run(lora, IDS, {}))
    loaded = fxlora.load_adapter(gm, tmp_path).eval()
    assert not plan_of(loaded).untied and len(plan_of(loaded).trained) == 1
    assert_same(run(loaded, IDS, {}), run(lora, IDS, {}))


def in_full(gm: fxlora.CapturedModule, saved: list[str]) -> fxlora.Plan:
    config = LoraConfig(r=2, target_modules=["mix"], modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*which trains with it")
        return fxlora.match(gm, config)


def test_a_tied_value_that_differs_under_its_names_is_refused(tmp_path: Path) -> None:
    gm = fxlora.capture(Tied().eval(), *IDS)
    fxlora.save_adapter(fxlora.inject(gm, in_full(gm, ["emb"])), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    change(weights, lambda tensors: tensors["base_model.model.head.weight"].add_(1))
    with pytest.raises(AdapterError, match=r"unexpected in the file: .*head\.weight"):
        fxlora.load_adapter(gm, tmp_path)


def change(weights: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    edit(tensors)
    save_file(tensors, weights, metadata)


class Named(nn.Module):
    """Modules whose names end alike, and a norm with buffers; takes (N, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.bn = nn.BatchNorm1d(5)
        self.pre_head = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.pre_head(self.bn(torch.tanh(self.first(x))))))


@pytest.mark.parametrize("saved", [["head"], ["bn"], ["head", "bn"]])
def test_what_peft_wraps_by_the_end_of_a_name(tmp_path: Path, saved: list[str]) -> None:
    """PEFT also wraps pre_head for "head", and needs every tensor of what it wraps."""
    model, args = Named().to(D).eval(), (torch.randn(4, 6, dtype=D),)
    made = theirs(model, tmp_path / "a", r=2, target_modules=["first"], modules_to_save=saved)
    assert_equal_to_pefts(model, args, tmp_path / "a", made)
    gm = fxlora.capture(model, args).eval()
    rules = [fxlora.Rule("first", lora=LoraConfig(r=2)), fxlora.Rule(saved, train=True)]
    lora = fxlora.inject(gm, fxlora.match(gm, rules)).eval()
    randomise(lora)
    with torch.no_grad():
        for name in lora.trained:
            lora.get_parameter(name).normal_()
    fxlora.save_adapter(lora, tmp_path / "b")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "b")).eval()
    assert_close(run(again, args, {}), run(lora, args, {}))


def test_pefts_pairs_of_both_names_of_a_tie(tmp_path: Path) -> None:
    model = Tied().to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules=["emb", "head"])
    lora = fxlora.load_adapter(fxlora.capture(model, *IDS), tmp_path).eval()
    assert [entry.site for entry in plan_of(lora)] == ["emb", "head"]
    assert_close(run(lora, IDS, {}), run(made, IDS, {}))


class Uncalled(Tied):
    """The embedding has a second module, which nothing calls, as T5's `shared`."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Embedding(17, 6)
        self.zero.weight = self.emb.weight


def test_a_pair_at_a_name_of_a_tie_that_nothing_calls_is_refused(tmp_path: Path) -> None:
    model = Uncalled().to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules=["zero"])
    gm = fxlora.capture(model, *IDS).eval()
    assert_close(run(made, IDS, {}), run(gm, IDS, {}))  # PEFT's has no effect
    with pytest.raises(AdapterError, match=r"outside of the forward of 'zero'.*as_formula"):
        fxlora.load_adapter(gm, tmp_path)


def language_model() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    ids = torch.tensor([[1, 2, 5, 11], [3, 3, 0, 2]])
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(D).eval(), {"input_ids": ids}


def test_pairs_that_peft_ties_train_as_one(tmp_path: Path) -> None:
    """`ensure_weight_tying`: outputs and a step of SGD; pairs that differ train apart."""
    model, ids = language_model()
    options = {"r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    made = theirs(model, tmp_path, **options)
    gm = fxlora.capture(model, kwargs=ids).eval()
    lora = fxlora.load_adapter(gm, tmp_path).eval()
    names = ("model.embed_tokens.weight", "lm_head.weight")
    for plan in (plan_of(lora), fxlora.match(gm, LoraConfig(**options))):
        assert [entry.names for entry in plan] == [names]
    for module in (lora, made):
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        before = module(**ids).logits
        before.square().mean().backward()
        optimizer.step()
        assert (module(**ids).logits - before).abs().max() > 1e-3
    assert_close([lora(**ids).logits], [made(**ids).logits])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.lora_B.weight"] += 0.1
    save_file(tensors, file)
    with pytest.warns(FxLoraWarning, match="PEFT trains the pairs of tied weights"):
        apart = fxlora.load_adapter(gm, tmp_path)
    assert [entry.site for entry in plan_of(apart)] == ["model.embed_tokens", "lm_head"]


def test_what_peft_does_not_tie_is_not_tied() -> None:
    """By `ensure_weight_tying`, PEFT ties by the names of targets, and gives each its magnitude."""
    model, ids = language_model()
    gm = fxlora.capture(model, kwargs=ids)
    config = LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)
    with pytest.raises(UnsupportedOpError, match=r"dora with ensure_weight_tying.*tied='each'"):
        fxlora.match(gm, dataclasses.replace(config, ensure_weight_tying=True))
    for tied, names in (("each", 1), ("share", 2)):
        plan = fxlora.match(gm, dataclasses.replace(config, tied=tied))
        assert [len(entry.names) for entry in plan] == [names]
    other = LoraConfig(r=2, target_modules=["emb"], ensure_weight_tying=True)
    with pytest.warns(FxLoraWarning, match=r'no effect on emb.*say tied="share"'):
        plan = fxlora.match(fxlora.capture(Tied(), IDS), other)
    assert [entry.names for entry in plan] == [("emb.weight",)]


# ---- where PEFT computes something else ---------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * F.linear(input, self.weight, self.bias)


class Shifted(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 1)


class Same(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        flat = input.reshape(-1, input.shape[-1])
        return (F.linear(flat, self.weight) + self.bias).view(*input.shape[:-1], -1)


class Sub(nn.Linear):
    pass


class Lookup(nn.Embedding):
    """A table whose rows are scaled, as Gemma's are."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__(rows, features)
        self.register_buffer("embed_scale", torch.tensor(1.5), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.get_buffer("embed_scale").to(self.weight.dtype)


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Functional(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.get_parameter("layer.weight"))


class Twice(Around):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.again = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(torch.tanh(self.layer(x)))


def _tripled(module: nn.Module, given: Any, output: Any) -> Any:
    return 3 * output


def hooked(before: bool) -> nn.Module:
    layer = nn.Linear(5, 7)
    if before:
        layer.register_forward_pre_hook(lambda _, given: (torch.tanh(given[0]),))
    else:
        layer.register_forward_hook(_tripled)
    return Around(layer)


X, IMAGE = torch.randn(3, 5, dtype=D), torch.randn(2, 3, 7, 8, dtype=D)
OTHERWISE: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, str]] = {
    "reflect": (
        lambda: Around(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
        IMAGE,
        "padding by another op",
    ),
    "dilated": (
        lambda: Around(nn.Conv2d(3, 6, 3, padding="same", dilation=2)),
        IMAGE,
        "a convolution with dilation",
    ),
    "scaled": (lambda: Around(Scaled(5, 7)), X, "mul in the forward of 'layer', after its linear"),
    "shifted": (
        lambda: Around(Shifted(9, 4)),
        torch.tensor([[1, 2, 7]]),
        "add in the forward of 'layer', before its embedding",
    ),
    "pre-hook": (lambda: hooked(True), X, "tanh in the forward of 'layer', before its linear"),
    "hook": (lambda: hooked(False), X, "mul in the forward of 'layer', after its linear"),
    "functional": (lambda: Functional(nn.Linear(5, 7)), X, "outside of the forward of 'layer'"),
    "twice": (lambda: Twice(nn.Linear(5, 5)), X, "one module under several names"),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_what_peft_computes_otherwise_is_refused(tmp_path: Path, what: str) -> None:
    make, x, why = OTHERWISE[what]
    model = make().to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules=["layer"])
    gm = fxlora.capture(model, x)
    with pytest.raises(AdapterError, match=rf"PEFT computes another.*{why}.*as_formula=True"):
        fxlora.load_adapter(gm, tmp_path)
    with pytest.warns(FxLoraWarning, match="PEFT computes another result"):
        lora = fxlora.load_adapter(gm, tmp_path, as_formula=True).eval()
    assert (run(lora, (x,), {})[0] - run(made, (x,), {})[0]).abs().max() > 1e-3
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kind = "embedding_" if what == "shifted" else ""
    end = "" if kind else ".weight"
    a, b = (saved[f"base_model.model.layer.lora_{kind}{side}{end}"] for side in "AB")
    ba = torch.einsum("or,r...->o...", b.flatten(1), a) * 4  # alpha / r = 8 / 2
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.get_parameter("layer.weight").add_(ba.T if kind else ba)
    assert_close(run(lora, (x,), {}), run(merged, (x,), {}))


@pytest.mark.parametrize("what", ["subclass", "reshapes", "scaled"])
def test_a_subclass_that_computes_the_same(tmp_path: Path, what: str) -> None:
    layer = Sub(5, 7) if what == "subclass" else Same(5, 7)
    model = Around(Lookup(7, 5) if what == "scaled" else layer).to(D).eval()
    x = torch.tensor([[1, 2, 6]]) if what == "scaled" else torch.randn(2, 3, 5, dtype=D)
    made = theirs(model, tmp_path, r=2, target_modules=["layer"])
    assert_equal_to_pefts(model, (x,), tmp_path, made)


class Experts(nn.Module):
    """A stack of square matrices (e, in, out), whose module may say so."""

    def __init__(self, says: bool | None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(3, 5, 5) / 3)
        if says is not None:
            self.is_transposed = says

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not getattr(self, "is_transposed", True):
            return torch.bmm(x.expand(3, -1, -1), self.down.mT).sum(0)
        return torch.bmm(x.expand(3, -1, -1), self.down).sum(0)


@pytest.mark.parametrize("says", [True, False, None])
def test_a_square_stack_is_turned_as_peft_turns_it(tmp_path: Path, says: bool | None) -> None:
    model, x = Around(Experts(says)).to(D).eval(), (X,)
    made = theirs(model, tmp_path, r=2, target_modules=[], target_parameters=["layer.down"])
    if says is not None:
        assert_equal_to_pefts(model, x, tmp_path, made)
        return
    with pytest.raises(AdapterError, match="a stack of square matrices"):
        fxlora.load_adapter(fxlora.capture(model, x), tmp_path)


def test_the_shapes_of_a_stack_say_how_peft_turned_it(tmp_path: Path) -> None:
    """Here no call reads `is_transposed`, by which PEFT takes the stack for (e, in, out)."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = True
            self.up = nn.Parameter(torch.randn(3, 5, 6) / 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x.expand(3, -1, -1), self.up).sum(0)

    model = Around(Wide()).to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules=[], target_parameters=["layer.up"])
    lora = fxlora.load_adapter(fxlora.capture(model, (X,)), tmp_path).eval()
    assert (made(X) - model(X)).abs().max() > 1e-3
    assert_close(run(lora, (X,), {}), run(made, (X,), {}))


# ---- names in the configuration that match nothing ----------------------------------------------


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def test_names_that_match_nothing(tmp_path: Path) -> None:
    model = Unused().to(D).eval()
    names = {"target_modules": ["a", "lm_head"], "modules_to_save": ["score"]}
    made = theirs(model, tmp_path, r=2, rank_pattern={"q_proj": 3}, **names)
    assert_equal_to_pefts(model, (X,), tmp_path, made)


def test_adapters_of_what_nothing_reads_are_named(tmp_path: Path) -> None:
    model = Unused().to(D).eval()
    made = theirs(model, tmp_path, r=2, target_modules="all-linear")
    gm = fxlora.capture(model, X)
    with pytest.warns(FxLoraWarning, match=r"unused\.weight have no effect"):
        lora = fxlora.load_adapter(gm, tmp_path).eval()
    assert_close(run(lora, (X,), {}), run(made, (X,), {}))


@pytest.mark.parametrize("task", ["SEQ_CLS"])
def test_the_heads_that_peft_adds_by_the_task(tmp_path: Path, task: str) -> None:
    tf = pytest.importorskip("transformers", reason="transformers is optional")
    kind = tf.BertForSequenceClassification if task == "SEQ_CLS" else tf.BertForTokenClassification
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    config = tf.BertConfig(vocab_size=40, num_hidden_layers=1, num_labels=3, **sizes)
    model, args = kind(config).to(D).eval(), (torch.tensor([[5, 6, 7]]),)
    made = theirs(model, tmp_path, r=2, task_type=task, target_modules=["query", "value"])
    gm = fxlora.capture(model, args)
    lora = fxlora.load_adapter(gm, tmp_path).eval()
    assert plan_of(lora).modules_to_save == ("classifier",)
    assert (made(*args).logits - model(*args).logits).abs().max() > 1e-3
    assert_close(run(lora, args, {}), run(made, args, {}))


@pytest.mark.parametrize("gone", ["lora_A", "a.lora_", "head.bias"])
def test_what_the_file_lacks_is_named(tmp_path: Path, gone: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(4, 6), "head": nn.Linear(6, 3)})
    model.forward = lambda x: model["head"](model["b"](torch.tanh(model["a"](x))))
    model = model.to(D).eval()
    theirs(model, tmp_path, r=2, target_modules=["a", "b"], modules_to_save=["head"])
    weights = tmp_path / "adapter_model.safetensors"
    change(weights, lambda held: [held.pop(key) for key in list(held) if gone in key])
    with pytest.raises(AdapterError, match="missing in the file"):
        fxlora.load_adapter(fxlora.capture(model, X), tmp_path)


# ---- inits, biases, patterns, resized embeddings ------------------------------------------------


class Every(nn.Module):
    """Each op that PEFT wraps; takes ids (N, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=0)
        self.c1 = nn.Conv1d(6, 5, 3, stride=2, padding=1)
        self.lin = nn.Linear(4, 12)
        self.c2 = nn.Conv2d(5, 4, (3, 2), padding=(1, 0))
        self.c3 = nn.Conv3d(1, 3, (2, 1, 3), bias=False)
        self.head = nn.Linear(3, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.c1(self.emb(ids).mT))  # (N, 5, 4)
        x = torch.tanh(self.lin(x)).unflatten(2, (4, 3))  # (N, 5, 4, 3)
        x = torch.tanh(self.c2(x)).unsqueeze(1).repeat(1, 1, 1, 1, 2)  # (N, 1, 4, 4, 4)
        return self.head(self.c3(x).flatten(2).mean(2))


EVERY: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True, "r": 3},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True, "rank_pattern": {"c2": 3}},
    "patterns": {
        "rank_pattern": {r"c\d": 3, "emb|lin": 1},
        "alpha_pattern": {"^emb": 5, r"(c1|c3)": 7},
        "use_rslora": True,
    },
    "biases": {"bias": "all"},
    "biases of layers": {"bias": "lora_only"},
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": ["lin", "c2", "emb"]},
    "orthogonal": {"init_lora_weights": "orthogonal", "target_modules": ["lin", "head"]},
    "bias of B": {"lora_bias": True, "target_modules": ["c1", "c2", "lin"]},
    "bias of B and of the layer": {
        "lora_bias": True,
        "bias": "lora_only",
        "target_modules": ["c1", "lin"],
    },
    "parameters": {"target_modules": ["c1"], "target_parameters": ["lin.weight", "head.weight"]},
    "a parameter of an embedding": {"target_modules": [], "target_parameters": ["emb.weight"]},
}


@pytest.mark.parametrize("what", EVERY)
def test_every_op_and_field_both_ways(tmp_path: Path, what: str) -> None:
    model, args = Every().to(D).eval(), (torch.randint(11, (3, 8)),)
    targets = {"target_modules": ["emb", "c1", "lin", "c2", "c3"]}
    made = theirs(model, tmp_path, **{"r": 2, "lora_alpha": 3, **targets, **EVERY[what]})
    assert_equal_to_pefts(model, args, tmp_path, made)


class Positions(nn.Module):
    """Position embeddings, which are looked up by fixed indices; takes ids (N, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(7, 6)
        self.ids: torch.Tensor
        self.register_buffer("ids", torch.arange(7), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.words(ids) + self.places(self.ids[: ids.shape[1]]))


def test_an_embedding_that_is_looked_up_by_fixed_indices(tmp_path: Path) -> None:
    model, args = Positions().to(D).eval(), (torch.randint(11, (3, 5)),)
    made = theirs(model, tmp_path, r=2, target_modules=["words", "places"])
    assert_equal_to_pefts(model, args, tmp_path, made)


def test_a_bias_of_b_needs_one_of_the_layer(tmp_path: Path) -> None:
    model = Around(nn.Linear(5, 7, bias=False)).to(D).eval()
    theirs(model, tmp_path / "a", r=2, target_modules=["layer"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"B of 'layer' has a bias.*one of zeros"):
        fxlora.load_adapter(fxlora.capture(model, X), tmp_path / "a")
    model.layer.bias = nn.Parameter(torch.zeros(7, dtype=D))  # the advice
    made = theirs(model, tmp_path / "b", r=2, target_modules=["layer"], lora_bias=True)
    assert_equal_to_pefts(model, (X,), tmp_path / "b", made)


def test_an_eva_folder(tmp_path: Path) -> None:
    model = Unused().to(D).eval()
    config = {"r": 2, "target_modules": ["a"], "init_lora_weights": "eva"}
    made = theirs(model, tmp_path, eva_config=peft.EvaConfig(rho=1.0), **config)
    assert_equal_to_pefts(model, (X,), tmp_path, made)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_4", ["a"], 3])
def test_inits_that_change_the_base_are_refused(tmp_path: Path, init: Any) -> None:
    model = Unused().to(D).eval()
    theirs(model, tmp_path, r=2, target_modules=["a"])
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": init}))
    with pytest.raises(AdapterError, match="which changes the weights"):
        fxlora.load_adapter(fxlora.capture(model, X), tmp_path)


def test_embeddings_that_peft_saves_along(tmp_path: Path) -> None:
    """They are the base's, unless the vocabulary was resized: then the model needs them first."""
    model, args = Every().to(D).eval(), (torch.randint(11, (3, 8)),)
    made = theirs(model, tmp_path, r=2, target_modules=["emb", "lin"])
    weights, key = tmp_path / "adapter_model.safetensors", "base_model.model.emb.base_layer.weight"
    grown = torch.randn(11, 6, dtype=D)
    change(weights, lambda held: held.update({key: grown}))
    with pytest.raises(AdapterError, match=r"other base weights.*emb\.base_layer.*Load them into"):
        fxlora.load_adapter(fxlora.capture(model, args), tmp_path)
    with torch.no_grad():
        model.emb.weight.copy_(grown)
        made.get_parameter("base_model.model.emb.base_layer.weight").copy_(grown)
    lora = fxlora.load_adapter(fxlora.capture(model, args), tmp_path).eval()
    assert_close(run(lora, args, {}), run(made, args, {}))


def test_values_of_the_base_that_differ_are_loaded_with_a_warning(tmp_path: Path) -> None:
    model, args = Every().to(D).eval(), (torch.randint(11, (3, 8)),)
    made = theirs(model, tmp_path, r=2, target_modules=["lin"])
    with torch.no_grad():
        made.get_parameter("base_model.model.head.weight").normal_()
    value = made.get_parameter("base_model.model.head.weight").detach().clone()
    weights = tmp_path / "adapter_model.safetensors"
    change(weights, lambda held: held.update({"base_model.model.head.weight": value}))
    with pytest.warns(FxLoraWarning, match=r"other values of head\.weight"):
        lora = fxlora.load_adapter(fxlora.capture(model, args), tmp_path).eval()
    assert_close(run(lora, args, {}), run(made, args, {}))


def test_a_rank_and_an_alpha_per_site(tmp_path: Path) -> None:
    model = Unused().to(D).eval()
    pattern = {"rank_pattern": {"a": 4}, "alpha_pattern": {"a": 6}, "use_rslora": True}
    made = theirs(model, tmp_path, r=2, target_modules=["a"], **pattern)
    lora = assert_equal_to_pefts(model, (X,), tmp_path, made)
    (entry,) = plan_of(lora)
    assert (entry.r, entry.alpha) == (4, 6) and math.isclose(entry.scaling, 3)


WRONG = [None, -1, 0, 0.5, "", "x", "(", [], [None], ["x", 2], [[1]], {}, {"a": 1}, {"(": 2}, True]
FIELDS = [
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "bias"),
    *("alpha_pattern", "target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "init_lora_weights", "lora_bias", "peft_type", "fan_in_fan_out"),
]


def test_damaged_configurations(tmp_path: Path) -> None:
    """A field of any value raises a typed error, or the folder loads."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(D).eval()
    theirs(model, tmp_path, r=2, target_modules=["0"], modules_to_save=["2"])
    gm = fxlora.capture(model, X)
    path = tmp_path / "adapter_config.json"
    config, refused = json.loads(path.read_text()), 0
    for field in FIELDS:
        for value in WRONG:
            path.write_text(json.dumps({**config, field: value}))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FxLoraWarning)
                    fxlora.load_adapter(gm, tmp_path)
            except AdapterError:
                refused += 1
    assert refused > len(FIELDS) * len(WRONG) / 3


def test_biases_of_modules_that_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], bias="all")
    x, theirs = torch.randn(4, 6).double(), peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path)
    ours = fxlora.load_adapter(fxlora.capture(model, x), tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert (ours(x) - model(x)).abs().max() > 0.1
    torch.testing.assert_close(ours(x), again(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_a_folder_says_which_biases_trained(mode: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, config = torch.randn(4, 6).double(), LoraConfig(r=2, target_modules=["0"], bias=mode)
    lora = fxlora.adapt(model, x, rules=config).eval()
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.add_(torch.randn_like(parameter))
    fxlora.save_adapter(lora, tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, is_trainable=True)
    assert again.peft_config["default"].bias == mode
    trains = {n.split("model.")[-1] for n, p in again.named_parameters() if p.requires_grad}
    assert len([name for name in trains if name.endswith("bias")]) == {"all": 2}.get(mode, 1)
    torch.testing.assert_close(again.eval()(x), lora(x), rtol=1e-10, atol=1e-10)
    loaded = fxlora.load_adapter(fxlora.capture(model, x), tmp_path).eval()
    assert torch.equal(loaded(x), lora(x))


class Ends(nn.Module):
    """Modules with names that are the ends of PEFT's own: lora_A, lora_dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.A, self.out = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.A(torch.tanh(self.lin(x)))))


def test_saved_modules_with_the_ends_of_pefts_names(tmp_path: Path) -> None:
    model, x = Ends().double(), torch.randn(4, 6).double()
    config = LoraConfig(r=2, target_modules=["lin"], modules_to_save=["A", "out"])
    lora = fxlora.adapt(model, x, rules=config).eval()
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.add_(torch.randn_like(parameter))
    fxlora.save_adapter(lora, tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(again(x), lora(x), rtol=1e-10, atol=1e-10)
    loaded = fxlora.load_adapter(fxlora.capture(model, x), tmp_path).eval()
    assert torch.equal(loaded(x), lora(x))


def _with_other(key: str, old: str, new: str) -> Any:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[key.replace(old, new)] = tensors[key] + 1

    return change


def _scalar_a(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.0.lora_A.weight"] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, config: config.update(lora_alpha=0), "lora_alpha"),
        (_with_other("base_model.model.0.lora_A.weight", "0.lora", "module.0.lora"), "0.lora_A"),
        (_with_other("base_model.model.0.lora_B.weight", "weight", "bias"), "lora_B.bias"),
        (_scalar_a, "lora_A.weight"),
    ],
)
def test_what_peft_would_read_otherwise(change: Any, said: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    weights, text = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(weights), json.loads(text.read_text())
    change(tensors, fields)
    save_file(tensors, weights)
    text.write_text(json.dumps(fields))
    gm = fxlora.capture(model, torch.randn(2, 6).double())
    with pytest.raises(AdapterError, match=said):
        fxlora.load_adapter(gm, tmp_path)


def test_a_grouped_convolution_of_pefts_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).double()
    theirs(model, tmp_path, r=2, target_modules=["0"])
    gm = fxlora.capture(model, torch.randn(2, 4, 5, 5).double())
    with pytest.raises(AdapterError, match="'0', a grouped convolution, mixes the channels"):
        fxlora.load_adapter(gm, tmp_path)
