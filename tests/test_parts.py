"""Parts: only the enabled rows of a packed weight are adapted, each part with its own A and B."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import ConfigError, InjectError, LoraConfig, Rule, UnsupportedOpError
from fxlora.reads.sites import find_sites

from .laws import check_laws, randomise
from .models import Reads, Several, Tied, gpt2
from .typed import plan_of, untyped

LORA = LoraConfig(r=2, lora_alpha=3)


class Packed(nn.Module):
    """Queries, keys and values of 6, 2 and 4 features in one layer; takes (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.qkv(x)))


class Transposed(Packed):
    """The same with the weight stored as (in, out), as in GPT-2."""

    subscripts: ClassVar = {"qkv.weight": "io"}
    qkv: Any

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Module()
        self.qkv.weight = nn.Parameter(torch.randn(5, 12))
        self.qkv.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(torch.addmm(self.qkv.bias, x, self.qkv.weight)))


class Masked(Packed):
    """The same with a scaled weight, which takes the weight form."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.qkv.weight * 2
        return self.out(torch.tanh(nn.functional.linear(x, weight, self.qkv.bias)))


X = torch.linspace(-1, 2, 20, dtype=torch.float64).reshape(4, 5)
SPECS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
    "a number": ({"parts": 3}, {"0": (0, 4), "1": (4, 8), "2": (8, 12)}),
    "flags": ({"parts": 3, "enable": [True, False, True]}, {"0": (0, 4), "2": (8, 12)}),
    "numbers": ({"parts": 3, "enable": [1, 2]}, {"1": (4, 8), "2": (8, 12)}),
    "sizes": ({"parts": {"q": 6, "k": 2, "v": 4}}, {"q": (0, 6), "k": (6, 8), "v": (8, 12)}),
    "names": (
        {"parts": {"q": 6, "k": 2, "v": 4}, "enable": ["v", "q"]},
        {"q": (0, 6), "v": (8, 12)},
    ),
    "ranges": ({"parts": {"v": (8, 12), "q": [1, 5]}}, {"v": (8, 12), "q": (1, 5)}),
    "slices": ({"parts": {"q": slice(0, 6), "v": range(8, 12)}}, {"q": (0, 6), "v": (8, 12)}),
    "one": ({"parts": {"middle": (3, 7)}}, {"middle": (3, 7)}),
}


@functools.cache
def captured(kind: type[Packed], dtype: torch.dtype = torch.float64) -> tuple[Packed, Any]:
    """Return a model and its capture, which serve many tests: no verb changes its argument."""
    torch.manual_seed(0)
    model = kind().to(dtype)
    with torch.no_grad():
        model.qkv.weight[model.qkv.weight.abs() < 0.2] = -0.0  # a fold must keep the sign
    return model, fxlora.capture(model, X.to(dtype))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [Packed, Transposed, Masked])
def test_parts(spec: str, kind: type[Packed]) -> None:
    given, rows = SPECS[spec]
    model, gm = captured(kind)
    rule = Rule("qkv", lora=LORA, **given)
    _, lora = check_laws(model, (X,), rules=rule, capture=lambda _: gm)
    assert {entry.part: entry.rows for entry in plan_of(lora)} == rows
    form = "weight" if kind is Masked else "branch"
    for entry in plan_of(lora):
        assert entry.rows
        size = entry.rows[1] - entry.rows[0]
        assert entry.form == form and entry.site == f"qkv.{entry.part}"
        assert entry.shapes == ((2, 5), (size, 2))
        assert lora.get_parameter(f"qkv.{entry.part}.lora_B.default.weight").shape == (size, 2)
    for line in str(lora.plan).splitlines()[2 : 2 + len(rows)]:
        assert any(line.startswith(f"qkv.{part}") for part in rows)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Packed, torch.float64),
        (Packed, torch.float32),
        (Packed, torch.bfloat16),
        (Transposed, torch.float64),
        (Transposed, torch.bfloat16),
        (Masked, torch.float64),
        (Masked, torch.bfloat16),
    ],
)
def test_the_other_rows_keep_their_bits(kind: type[Packed], dtype: torch.dtype) -> None:
    model, gm = captured(kind, dtype)
    dim = int(kind is Transposed)
    rule = Rule("qkv", lora=LORA, parts={"q": 6, "k": 2, "v": 4}, enable=["k"])
    lora = fxlora.inject(gm, fxlora.match(gm, rule))
    randomise(lora)
    found = fxlora.fold(lora).get_parameter("qkv.weight").detach()
    for start, stop in ((0, 6), (8, 12)):
        rows, before = (w.narrow(dim, start, stop - start) for w in (found, model.qkv.weight))
        assert torch.equal(rows, before)
        assert torch.equal(rows.signbit(), before.signbit()) and bool((before == 0).any())
    changed = found.narrow(dim, 6, 2) != model.qkv.weight.narrow(dim, 6, 2)
    assert bool(changed.any())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_a_variant_of_parts(options: dict[str, Any]) -> None:
    config = LoraConfig(r=2, **options)
    rule = Rule("qkv", lora=config, parts=3, enable=[True, False, True])
    model, gm = captured(Packed)
    check_laws(model, (X,), rules=rule, capture=lambda _: gm)


def test_dropout_on_parts() -> None:
    _, gm = captured(Packed)
    rule = Rule("qkv", lora=LoraConfig(r=2, lora_dropout=0.5), parts=2)
    lora = fxlora.inject(gm, fxlora.match(gm, rule))
    randomise(lora)
    assert not torch.equal(lora.train()(X), lora(X))
    found = [m.eval()(X) for m in (lora, fxlora.fold(lora))]
    assert torch.allclose(*found, rtol=1e-10)


# ---- packed layers ------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        other = x if y is None else y
        return self.mha(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention(cross: bool) -> None:
    given = (torch.randn(2, 3, 6).double(), torch.randn(2, 4, 6).double())[: 2 if cross else 1]
    rule = Rule("*.in_proj", lora=LORA, parts={"q": 6, "k": 6, "v": 6}, enable=["q", "v"])
    model = Attends()
    gm, lora = check_laws(model, given, rules=rule)
    assert [entry.part for entry in plan_of(lora)] == ["q", "v"]
    folded = fxlora.fold(lora).get_parameter("mha.in_proj_weight")
    assert torch.equal(folded[6:12], model.mha.in_proj_weight[6:12])
    for name in ("*.in_proj_weight", "mha.in_proj_weight"):
        assert (
            fxlora.match(gm, dataclasses.replace(rule, name=name)).entries == plan_of(lora).entries
        )


def test_swin() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    model = nn.Sequential(
        swin.SwinTransformerBlock(6, 2, [2, 2], [1, 1], stochastic_depth_prob=0.0)
    )
    x = (torch.randn(1, 4, 4, 6).double(),)
    rule = Rule("*.qkv", lora=LORA, parts=3, enable=[True, False, True])
    _, lora = check_laws(model, x, rules=rule)
    assert [entry.form for entry in plan_of(lora)] == ["branch", "branch"]


def test_gpt2() -> None:
    model, kwargs, gm = gpt2()
    rule = Rule("*.c_attn", lora=LORA, parts=3, enable=[True, False, True])
    _, lora = check_laws(model, (), kwargs, rules=rule, capture=lambda _: gm)
    assert [entry.shapes for entry in plan_of(lora)] == [((2, 24), (24, 2))] * 2
    assert not any(entry.layout.roles != "io" for entry in plan_of(lora))


def test_gate_and_up_in_one() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.Linear(5, 14, bias=False)
            self.down = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_up(x).chunk(2, -1)
            return self.down(torch.nn.functional.silu(gate) * up)

    rule = Rule("gate_up", lora=LORA, parts={"gate": 7, "up": 7}, enable=["up"])
    _, lora = check_laws(Gated(), (X,), rules=rule)
    assert plan_of(lora).entries[0].rows == (7, 14)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_convolution(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=groups))
    x = (torch.randn(2, 4, 6, 5).double(),)
    _, lora = check_laws(model, x, rules=Rule("0", lora=LORA, parts={"a": (1, 4), "b": (4, 6)}))
    assert {entry.form for entry in plan_of(lora)} == {"branch" if groups == 1 else "weight"}


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_of_a_transposed_convolution(groups: int) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), groups=groups))
    x = (torch.randn(2, 4, 3, 5).double(),)
    parts = {"a": (0, 1), "b": (1, 3)}  # channels within each group
    check_laws(model, x, rules=Rule("0", lora=LORA, parts=parts))


def test_features_of_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=2))
    rule = Rule("0", lora=LORA, parts={"a": (0, 2), "b": (4, 6)})
    _, lora = check_laws(model, (torch.tensor([[1, 2, 8]]),), rules=rule)
    assert [entry.shapes for entry in plan_of(lora)] == [((2, 9), (2, 2))] * 2


class Tables(nn.Module):
    """An embedding with a padding row, a bag, and a table of which each row is read, too."""

    subscripts: ClassVar = {"table": "io"}

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.bag = nn.Embedding(17, 6, padding_idx=1), nn.EmbeddingBag(17, 6, mode="sum")
        self.table = nn.Parameter(torch.randn(17, 6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids) + F.embedding(ids, self.table) + self.table[-1]
        return torch.tanh(x + self.bag(ids).unsqueeze(1))


IDS = torch.tensor([[3, 9, 1, 11, 16], [2, 9, 16, 0, 12]])
NEW: dict[str, Any] = {"old": (2, 4), "new": (9, 13)}
R2_SHARED = LoraConfig(r=2, lora_alpha=3, tied="share")


@pytest.mark.parametrize(
    ("model", "rule", "forms"),
    [
        (Tables(), Rule(["emb", "bag", "table"], parts=NEW, part_dim=0, lora=LORA), "wwbbbb"),
        (Tied(), Rule("emb", parts=NEW, part_dim=0, lora=LORA), "bb"),
        (Tied(), Rule("head", parts=NEW, part_dim=0, lora=R2_SHARED), "bb"),
    ],
    ids=["tables", "one of a tie", "tied"],
)
def test_rows_of_a_table(model: nn.Module, rule: Rule, forms: str, tmp_path: Path) -> None:
    """A pair for the rows of new tokens, at every read of them."""
    gm, lora = check_laws(model, (IDS,), rules=rule)
    plan = plan_of(lora)
    assert "".join(entry.form[0] for entry in plan) == forms
    assert {entry.shapes for entry in plan} == {((2, 6), (2, 2)), ((2, 6), (4, 2))}
    found = fxlora.match(gm, dataclasses.replace(rule, part_dim=None))  # they fit only the rows
    assert found.entries == plan.entries and "rows 9 to 12" in str(found)
    randomise(lora)
    expected, folded = lora.eval()(IDS), fxlora.fold(lora)
    assert float((expected - gm.eval()(IDS)).detach().abs().max()) > 0.1
    assert fxlora.verify(lora, (IDS,), folded=folded)
    before, after = (m.get_parameter(plan.entries[0].parameter) for m in (gm, folded))
    assert (before != after).any(1).nonzero().flatten().tolist() == [2, 3, 9, 10, 11, 12]
    fxlora.save_adapter(lora, tmp_path)
    again = fxlora.load_adapter(gm, tmp_path).eval()
    assert torch.equal(again(IDS), expected) and plan_of(again).entries == plan.entries
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert fxlora.match(gm, tmp_path / "plan.json").entries == plan.entries


def test_peft_reads_rows_of_an_embedding(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model = nn.Sequential(nn.Embedding(17, 6), nn.Linear(6, 4)).double().eval()
    rules = [Rule("0", parts={"old": 9, "new": 8}, enable=["new"], lora=LORA), Rule("1", lora=LORA)]
    lora = fxlora.adapt(model, IDS, rules=rules).eval()
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(IDS), lora(IDS), rtol=1e-10, atol=1e-10)


def test_rows_of_a_table_that_are_refused() -> None:
    gm = fxlora.capture(Tables(), IDS)
    for rule, error, message in (
        (Rule("emb", parts={"a": (0, 9)}), ConfigError, "row 1, its padding_idx"),
        (
            Rule("emb", parts={"a": (2, 9)}, lora=LoraConfig(use_dora=True)),
            UnsupportedOpError,
            "dora",
        ),
        (Rule("emb", parts={"a": (2, 99)}), ConfigError, "fit neither dimension"),
        (Rule("table", parts={"a": (2, 4)}), ConfigError, "say which by part_dim=0"),
        (
            Rule("emb", parts={"a": (2, 4)}, part_dim=2),
            ConfigError,
            "in dimension 1, or rows, in 0",
        ),
    ):
        with pytest.raises(error, match=message):
            fxlora.match(gm, rule)
    assert len(fxlora.match(gm, Rule("table", parts={"a": (2, 4)}, part_dim=1, lora=LORA))) == 1
    with pytest.raises(ConfigError, match="of its outputs, in dimension 0"):
        fxlora.match(captured(Packed)[1], Rule("qkv", parts={"a": (0, 4)}, part_dim=1))
    wrong: list[dict[str, Any]] = [{"part_dim": 0}, {"parts": 2, "part_dim": -1}]
    for options in wrong:
        with pytest.raises(ConfigError, match="part_dim is the dimension that parts= cuts"):
            Rule("emb", **options)


def test_outputs_of_experts() -> None:
    x = (torch.randn(3, 2, 5).double(),)
    rule = Rule("w", lora=LORA, parts=2, enable=[False, True])
    _, lora = check_laws(Reads(torch.bmm, "eio", 3, 5, 8), x, rules=rule)
    assert plan_of(lora).entries[0].shapes == ((3, 2, 5), (3, 4, 2))


# ---- rules as text ------------------------------------------------------------------------------

TOML = """
[[rule]]
name = "qkv"
parts = { q = 6, k = 2, v = 4 }
enable = ["q", "v"]
lora = { r = 2, lora_alpha = 3, tied = "share" }

[[rule]]
name = "out"
parts = { first = [0, 2] }
lora = { r = 1 }
"""


def test_files_of_rules(tmp_path: Path) -> None:
    _, gm = captured(Packed)
    (tmp_path / "rules.toml").write_text(TOML)
    plan = fxlora.match(gm, tmp_path / "rules.toml")
    assert {e.site: e.rows for e in plan} == {
        "qkv.q": (0, 6),
        "qkv.v": (8, 12),
        "out.first": (0, 2),
    }
    for suffix, text in ((".json", plan.to_json()), (".toml", plan.to_toml())):
        path = tmp_path / f"again{suffix}"
        path.write_text(text)
        assert fxlora.match(gm, path) == plan


def test_a_saved_adapter_of_parts(tmp_path: Path) -> None:
    _, gm = captured(Packed)
    rule = Rule("qkv", lora=LORA, parts=3, enable=[True, False, True])
    lora = fxlora.inject(gm, fxlora.match(gm, rule))
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path)
    again = fxlora.load_adapter(gm, tmp_path)
    assert torch.equal(again.eval()(X), lora.eval()(X))
    assert fxlora.verify(lora, (X,))


# ---- refusals -----------------------------------------------------------------------------------

BAD: dict[str, dict[str, Any]] = {
    "one part": {"parts": 1},
    "no part": {"parts": 0},
    "a flag": {"parts": True},
    "a float": {"parts": 2.5},
    "a word": {"parts": "q"},
    "a list": {"parts": [6, 6]},
    "an empty mapping": {"parts": {}},
    "a dot": {"parts": {"q.a": 6, "v": 6}},
    "an empty name": {"parts": {"": 12}},
    "a number for a name": {"parts": {0: 12}},
    "both kinds": {"parts": {"q": 6, "v": (6, 12)}},
    "no rows": {"parts": {"q": 0, "v": 12}},
    "flags for rows": {"parts": {"q": True, "v": True}},
    "backwards": {"parts": {"q": (4, 2)}},
    "negative": {"parts": {"q": (-4, 2)}},
    "a step": {"parts": {"q": slice(0, 6, 2)}},
    "no end": {"parts": {"q": slice(3, None)}},
    "three numbers": {"parts": {"q": (0, 2, 4)}},
    "fractions": {"parts": {"q": (0, 2.5)}},
    "flags for a range": {"parts": {"q": (False, True)}},
    "nothing for a range": {"parts": {"q": None}},
    "enable alone": {"enable": [True]},
    "too few flags": {"parts": 3, "enable": [True, False]},
    "no flag": {"parts": 3, "enable": [False, False, False]},
    "no name": {"parts": 3, "enable": []},
    "unknown": {"parts": {"q": 6, "v": 6}, "enable": ["k"]},
    "a word to enable": {"parts": {"q": 6, "v": 6}, "enable": "q"},
    "not equal": {"parts": 5},
    "too many": {"parts": {"q": 6, "v": 8}},
    "too few": {"parts": {"q": 6, "v": 4}},
    "too far": {"parts": {"q": (6, 13)}},
    "overlapping": {"parts": {"q": (0, 6), "v": (5, 9)}},
    "within": {"parts": {"q": (0, 12), "v": (5, 9)}},
}


@pytest.mark.parametrize("spec", BAD)
def test_bad_parts(spec: str) -> None:
    _, gm = captured(Packed)
    with pytest.raises(ConfigError):
        fxlora.match(gm, Rule("qkv", lora=LORA, **BAD[spec]))


class Holding(Packed):
    """Its packed layer has a submodule `q`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv.q = nn.Linear(2, 2)


def with_a_part(name: str) -> tuple[fxlora.CapturedModule, fxlora.Plan]:
    _, gm = captured(Holding)
    rule = Rule("qkv", lora=LORA, parts={name: (0, 6), "other": (6, 12)})
    return gm, fxlora.match(gm, rule)


@pytest.mark.parametrize("name", ["weight", "bias", "train", "forward", "_parameters", "training"])
def test_a_name_that_is_taken(name: str) -> None:
    gm, plan = with_a_part(name)
    code, keys = gm.code, list(gm.state_dict())
    with pytest.raises(InjectError, match="name the part differently"):
        fxlora.inject(gm, plan)
    assert (gm.code, list(gm.state_dict())) == (code, keys)
    assert copy.deepcopy(gm)(X).equal(gm(X))


@pytest.mark.parametrize("name", ["q", "lora_A", "a b", "12", "ключ"])
def test_a_name_that_is_free(name: str) -> None:
    """An existing module of that name keeps its weights; A and B are added to it."""
    gm, plan = with_a_part(name)
    lora = fxlora.inject(gm, plan)
    randomise(lora)
    assert lora.get_parameter(f"qkv.{name}.lora_A.default.weight").shape == (2, 5)
    folded = fxlora.fold(lora)
    assert torch.allclose(lora.eval()(X), folded.eval()(X), rtol=1e-10)
    for module in (folded, fxlora.remove(lora)):
        assert list(module.state_dict()) == list(gm.state_dict())


def test_parts_of_a_weight_that_is_read_through_a_view() -> None:
    model = Reads(lambda x, w: F.linear(x, w.view(6, 5)), "ooi", 2, 3, 5)
    x = torch.randn(4, 5, dtype=torch.float64)
    rule = Rule("w", parts=2, enable=[True, False], lora=LoraConfig(r=1))
    check_laws(model, (x,), rules=rule)


LAST = untyped(([1], [1]))  # the dimensions that tensordot sums over
UNKNOWN = {
    "an op without a row": lambda x, w: torch.tensordot(x, w, LAST),
    "inverse": lambda x, w: F.linear(x, torch.linalg.inv(w[0, :, :5])),
    "flipped": lambda x, w: F.linear(x, w[0].t().flip(0)),
    "out of order": lambda x, w: F.linear(x, w[0].t()[torch.tensor([1, 0, 2, 3, 4, 5])]),
    "twice": lambda x, w: F.linear(x, torch.cat([w[0].t(), w[0].t()])),
    "its own square": lambda x, w: F.linear(x, w[0] @ w[0].t()),
    "summed up": lambda x, w: F.linear(x, w[0].t().cumsum(0)),
    "divided by a norm": lambda x, w: F.linear(x, (w[0] / w[0].norm()).t()),
    "another way, too": lambda x, w: F.linear(x, w[0].t()) + F.linear(x, w[0].t().flip(0)),
    "turned in blocks": lambda x, w: F.linear(x, w.permute(2, 0, 1).reshape(12, 5)),
}


def test_outputs_that_cannot_be_told_are_refused() -> None:
    model = Several(Reads(read, "", 2, 5, 6) for read in UNKNOWN.values())
    gm = fxlora.capture(model, torch.randn(3, 5))
    plain = LoraConfig(r=1)
    asked: list[dict[str, Any]] = [
        {"lora": plain, "parts": {"a": (0, 1)}},
        {"lora": LoraConfig(r=1, use_dora=True)},
    ]
    for number, name in enumerate(UNKNOWN):
        path = f"parts.{number}.w"
        assert len(fxlora.match(gm, Rule(path, lora=plain))) == 1, name
        for how in asked:
            with pytest.raises(UnsupportedOpError, match="unknown which of its dimensions are the"):
                fxlora.match(gm, Rule(path, **how))


# Reads for which fxlora knows the outputs of each slice of the weight's output dimension.
TOLD = {
    "as a matrix": ("oio", lambda x, w: F.linear(x, w.transpose(1, 2).flatten(0, 1))),
    "permuted": ("oio", lambda x, w: x @ w.permute(1, 0, 2).flatten(1)),
    "one of a stack": ("eio", lambda x, w: F.linear(x, w[0].movedim(0, 1))),
    "einsum": ("eio", lambda x, w: F.linear(x, torch.einsum("ij->ji", w[1]))),
    "times a unit matrix": ("eio", lambda x, w: F.linear(x, torch.mm(torch.eye(6), w[1].t()))),
    "gathered": ("eio", lambda x, w: torch.bmm(x[None].expand(2, -1, -1), w[torch.arange(2)])[1]),
}


def test_a_part_changes_its_own_outputs_and_no_others() -> None:
    """Measured on the outputs; fxlora's layout is compared only at the end."""
    model = Several(Reads(read, roles, 2, 5, 6) for roles, read in TOLD.values())
    x = torch.randn(3, 5)
    gm = fxlora.capture(model, x)
    rules = Rule("parts.*.w", lora=LoraConfig(r=1), parts=2, enable=[True, False])
    lora = fxlora.inject(gm, fxlora.match(gm, rules)).eval()
    randomise(lora)
    found = zip(TOLD.items(), find_sites(gm), lora(x), model(x), strict=True)
    for (name, (roles, _)), site, ours, theirs in found:
        size = 2 if roles.startswith("o") else 6
        changed = (ours - theirs).detach().abs().amax(0).reshape(size, -1).amax(1)
        assert bool((changed[: size // 2] > 0).all()), name
        assert not changed[size // 2 :].any(), name
        assert site.layout.roles == roles and site.layout_known, name
