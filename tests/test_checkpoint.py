"""fold_checkpoint and verify_checkpoint: checkpoints on disk, against PEFT and the formula."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import fxlora
from fxlora import AdapterError, ConfigError, ExportError, LoraConfig, Rule, VerificationError, cli
from fxlora.disk.checkpoint import pieces
from fxlora.disk.checkpoint.weights_file import WeightsFile

from .checkpoints import nearest, pair, read, write_adapter, write_sharded
from .typed import untyped

BF16 = torch.bfloat16
BASE, ADAPTER, OUT = Path("base.safetensors"), Path("adapter"), Path("out.safetensors")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder; a few rows are a piece, so that tiny weights have several."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    monkeypatch.setattr(pieces, "ROWS", 64)


class Layers(nn.Module):
    """A layer of each class that PEFT adapts, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3)
        self.fc = nn.Linear(5, 7)
        self.gpt = Conv1D(9, 7)
        self.image = nn.Conv2d(2, 3, (3, 2))
        self.head = nn.Linear(9, 4)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> Any:
        x = torch.tanh(self.conv(self.emb(ids).transpose(1, 2))).mean(2)
        return self.head(self.gpt(self.fc(x))), self.image(image)


TARGETS = ["emb", "conv", "fc", "gpt", "image"]


def pefts(model: nn.Module, folder: Path, config: peft.LoraConfig) -> Any:
    """Save an adapter of PEFT's with random tensors, and return PEFT's model in float64."""
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.uniform_(0.5, 1.5) if "magnitude" in name else parameter.normal_()
    theirs.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(copy.deepcopy(model).double(), folder)


def folded(base: Path = BASE, out: Path = OUT, **how: Any) -> dict[str, torch.Tensor]:
    """Fold, check, and return the result."""
    fxlora.fold_checkpoint(base, ADAPTER, out, **how)
    fxlora.verify_checkpoint(base, ADAPTER, out, **how)
    assert not list(out.parent.glob(".*fxlora"))
    return read(out)


def assert_folded(found: dict[str, torch.Tensor], base: Any, expected: Any, changed: int) -> None:
    """The tensors are PEFT's merged ones to a rounding; those that it leaves keep their bits."""
    different = 0
    for name, tensor in found.items():
        reference = expected[name].double()
        if torch.equal(reference, base[name].double()):
            assert torch.equal(tensor, base[name]), name
            continue
        different += 1
        error = (tensor.double() - reference).abs().max() / reference.abs().max()
        assert error < max(1e-10, torch.finfo(tensor.dtype).eps), (name, float(error))
    assert different == changed
    assert set(found) == set(base)


# ---- against PEFT -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_class_of_layer_is_pefts_merge(dtype: torch.dtype, dora: bool) -> None:
    model = Layers().to(dtype).eval()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS,
        modules_to_save=["head"],
        rank_pattern={"fc": 2},
        alpha_pattern={"conv": 9},
        use_rslora=True,
        use_dora=dora,
    )
    theirs = pefts(model, ADAPTER, config)
    state = model.state_dict()
    base = write_sharded(Path("base"), dict(list(state.items())[:4]), dict(list(state.items())[4:]))
    found = folded(base, Path("out"))
    assert_folded(found, state, theirs.merge_and_unload().state_dict(), changed=7)


@pytest.mark.parametrize("named", ["q_proj", "embed_tokens"])
def test_transformers_load_the_result(named: str) -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=33,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).bfloat16().eval()
    model.save_pretrained(Path("base"), max_shard_size="6kB")
    theirs = pefts(model, ADAPTER, peft.LoraConfig(r=2, target_modules=[named, "up_proj"]))
    fxlora.fold_checkpoint(Path("base"), ADAPTER, Path("out"))
    again = LlamaForCausalLM.from_pretrained(Path("out"))
    merged = theirs.merge_and_unload().state_dict()
    changed = 2 + (2 if named == "q_proj" else 1)
    assert_folded(dict(again.state_dict()), model.state_dict(), merged, changed)
    names = [{p.name for p in Path(d).iterdir()} for d in ("base", "out")]
    assert names[0] == names[1] and len(names[0]) > 4


def test_square_matrices_are_stored_as_their_biases_tell() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=32, n_positions=8))
    model.save_pretrained(Path("base"))
    theirs = pefts(
        model,
        ADAPTER,
        peft.LoraConfig(r=2, target_modules=["attn.c_proj"], fan_in_fan_out=True),
    )
    found = folded(Path("base"), Path("out"))
    merged = {n: t for n, t in theirs.merge_and_unload().state_dict().items() if n in found}
    assert_folded(found, {n: t for n, t in model.state_dict().items() if n in found}, merged, 1)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 5, 7))
        self.down = nn.Parameter(torch.randn(3, 7, 4))
        self.flat = nn.Parameter(torch.randn(6, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.up) @ self.down


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_and_bare_parameters_are_pefts_merge(transposed: bool) -> None:
    Experts.is_transposed = transposed  # pyright: ignore[reportAttributeAccessIssue]
    model = Routed()
    names = ["experts.up", "experts.down", "experts.flat"]
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=names)
    theirs = pefts(model, ADAPTER, config)
    save_file(model.state_dict(), BASE)
    found = folded()
    assert_folded(found, model.state_dict(), theirs.merge_and_unload().state_dict(), 3)


# ---- against fxlora's own fold ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16], ids=str)
@pytest.mark.parametrize("kind", ["layers", "parts", "dora", "stack"])
def test_the_bits_are_those_of_fold(kind: str, dtype: torch.dtype) -> None:
    """Also for fxlora's own folders: parts of packed weights, functional reads, stacks."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.randn(12, 5))
            self.fc = nn.Linear(12, 6)
            self.stack = nn.Parameter(torch.randn(2, 3, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(torch.tanh(x @ self.packed.T), self.fc.weight)
            return torch.bmm(x.view(2, -1, 3), self.stack)

    r2 = LoraConfig(r=2)
    rules: Any = {
        "layers": LoraConfig(r=2, lora_alpha=6, target_modules=["fc"], bias="all"),
        "parts": [Rule("packed", parts={"q": 3, "k": 4, "v": 5}, enable=["q", "v"], lora=r2)],
        "dora": LoraConfig(
            r=2, target_modules=["fc"], target_parameters=["packed", "stack"], use_dora=True
        ),
        "stack": LoraConfig(r=2, target_parameters=["stack"], lora_alpha=5),
    }[kind]
    model = Odd().to(dtype)
    lora = fxlora.adapt(model, torch.randn(2, 5).to(dtype), rules=rules)
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.normal_()
    fxlora.save_adapter(lora, ADAPTER)
    save_file(model.state_dict(), BASE)
    found = folded()
    expected = fxlora.fold(lora).state_dict()
    changed = [
        n for n, t in model.state_dict().items() if not torch.equal(t, expected[n].to(dtype))
    ]
    assert changed
    for name, tensor in found.items():
        wanted = expected[name].to(dtype)
        close = torch.allclose(tensor, wanted, rtol=0, atol=1e-12) and dtype == torch.float64
        assert close or torch.equal(tensor, wanted), name


def test_no_entry_is_rounded_twice_or_wrongly() -> None:
    weight = torch.randn(96, 512).to(BF16)
    save_file({"fc.weight": weight, "fc.bias": torch.randn(96)}, BASE)
    tensors = pair("fc", 96, 512, r=4)
    write_adapter(ADAPTER, tensors, r=4, lora_alpha=2)
    found = folded()
    b, a = tensors["fc.lora_B.weight"].double(), tensors["fc.lora_A.weight"].double()
    exact = weight.double() + 0.5 * (b @ a)
    assert (exact - weight.double()).abs().max() > 1
    assert int((found["fc.weight"] != nearest(exact, BF16)).sum()) == 0
    report = fxlora.fold_checkpoint(BASE, ADAPTER, Path("again.safetensors"))
    (tensor,) = report.folded
    worst = (found["fc.weight"].double() - exact).abs().max() / (
        exact - weight.double()
    ).abs().max()
    assert tensor.relative_error is not None and tensor.survives is not None
    assert 0.1 * float(worst) < tensor.relative_error < 2 * float(worst)
    assert abs(tensor.survives - 1) < 1e-3


def test_an_update_below_the_rounding_does_not_survive() -> None:
    save_file({"fc.weight": torch.ones(6, 40, dtype=BF16)}, BASE)
    tensors = {n: t.sign() * 1e-2 for n, t in pair("fc", 6, 40, r=1).items()}
    write_adapter(ADAPTER, tensors, r=1, lora_alpha=1)
    report = fxlora.fold_checkpoint(BASE, ADAPTER, OUT)
    assert report.folded[0].survives == 0
    assert report.folded[0].relative_error == pytest.approx(1)


# ---- the base that an adapter was trained over --------------------------------------------------


@pytest.mark.parametrize("rows", [2**12, 2**21])
@pytest.mark.parametrize(("trained", "held"), [(BF16, BF16), (BF16, torch.float32)])
def test_the_base_that_an_adapter_was_trained_over(
    rows: int, trained: torch.dtype, held: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprints are computed from pieces that may be shorter or longer than their rows."""
    monkeypatch.setattr(pieces, "ROWS", rows)
    model = nn.Sequential(nn.Linear(301, 297), nn.Linear(297, 5)).to(trained)
    rules = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    fxlora.save_adapter(fxlora.adapt(model, torch.randn(2, 301).to(trained), rules=rules), ADAPTER)
    state = {name: tensor.to(held) for name, tensor in model.state_dict().items()}
    save_file(state, BASE)
    found = folded(strict_base=True)
    assert not torch.equal(found["0.weight"], state["0.weight"])
    state["0.weight"][296, 300] += 1
    save_file(state, BASE)
    said = r"trained over other weights: 0\.weight\. Fold it into the checkpoint"
    with pytest.raises(AdapterError, match=said):
        fxlora.fold_checkpoint(BASE, ADAPTER, Path("new.safetensors"), strict_base=True)
    assert not Path("new.safetensors").exists() and not list(Path().glob(".*fxlora"))
    with pytest.warns(fxlora.FxLoraWarning, match=said):
        fxlora.fold_checkpoint(BASE, ADAPTER, OUT)
    with pytest.warns(fxlora.FxLoraWarning, match=said):
        fxlora.verify_checkpoint(BASE, ADAPTER, OUT)
    with pytest.raises(AdapterError, match=said):
        fxlora.verify_checkpoint(BASE, ADAPTER, OUT, strict_base=True)


def test_a_base_of_which_not_all_is_known() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    rules = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    fxlora.save_adapter(fxlora.adapt(model, torch.randn(2, 6), rules=rules), ADAPTER)
    save_file({name: tensor.to(BF16) for name, tensor in model.state_dict().items()}, BASE)
    with pytest.warns(fxlora.FxLoraWarning, match=r"in a wider dtype: 0\.weight"):
        fxlora.fold_checkpoint(BASE, ADAPTER, OUT)
    write_adapter(Path("pefts"), pair("0", 5, 6))
    fxlora.fold_checkpoint(BASE, Path("pefts"), OUT)
    with pytest.raises(AdapterError, match=r"PEFT writes none.*: fold without strict_base"):
        fxlora.fold_checkpoint(BASE, Path("pefts"), OUT, strict_base=True)


# ---- bytes --------------------------------------------------------------------------------------


def test_headers_order_and_other_tensors_keep_their_bytes() -> None:
    state = {
        "b.weight": torch.randn(7, 5),
        "b.bias": torch.randn(7),  # so it is no embedding, which might be tied
        "a.weight": torch.randn(5, 9).to(BF16),
        "ids": torch.arange(4),
        "scale": torch.randn(3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
    }
    save_file(state, BASE, {"format": "pt", "note": "mine"})
    write_adapter(ADAPTER, pair("b", 7, 5))
    folded()
    files = [WeightsFile.read(Path(f"{n}.safetensors")) for n in ("base", "out")]
    assert files[0].tensors == files[1].tensors and files[1].metadata == {
        "format": "pt",
        "note": "mine",
    }
    before, after = ((Path(f"{n}.safetensors")).read_bytes() for n in ("base", "out"))
    (mine,) = (tensor for tensor in files[0].tensors if tensor.name == "b.weight")
    assert before[: mine.start] == after[: mine.start]
    assert before[mine.start : mine.stop] != after[mine.start : mine.stop]
    assert before[mine.stop :] == after[mine.stop :]


def test_dry_run_reads_no_weights_and_writes_nothing() -> None:
    base = write_sharded(Path("base"), {"m.fc.weight": torch.randn(7, 5)}, {"x": torch.ones(3)})
    write_adapter(ADAPTER, pair("m.fc", 7, 5))
    for path in base.glob("*.safetensors"):  # only headers: the rest is a hole
        start, size = WeightsFile.read(path).start, path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(start)
            file.truncate(size)
    before = sorted(Path().rglob("*"))
    report = fxlora.fold_checkpoint(base, ADAPTER, Path("out"), dry_run=True)
    assert sorted(Path().rglob("*")) == before
    assert "m.fc.weight  7x5       F32      oi      2          3" in str(report)
    assert json.loads(report.to_json())["copied"] == 1


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("fc", "model.fc"), ("model.fc", "fc"), ("fc", "a.b.fc"), ("x.y.fc", "y.fc")],
)
def test_a_prefix_that_one_side_lacks(ours: str, theirs: str) -> None:
    weight = torch.randn(7, 5)
    save_file({f"{theirs}.weight": weight, "other": torch.ones(2)}, BASE)
    tensors = pair(ours, 7, 5)
    write_adapter(ADAPTER, tensors)
    found = folded()
    delta = (
        3 * tensors[f"{ours}.lora_B.weight"].double() @ tensors[f"{ours}.lora_A.weight"].double()
    )
    assert torch.equal(found[f"{theirs}.weight"], (weight.double() + delta).float())


def refused(state: Any, tensors: Any, config: Any = None, **how: Any) -> str:
    """Return the message with which an adapter is refused; nothing is written."""
    if not isinstance(state, Path):
        save_file(state, BASE)
        state = BASE
    write_adapter(ADAPTER, tensors, **(config or {}))
    before = sorted(Path().rglob("*"))
    with pytest.raises(AdapterError) as error:
        fxlora.fold_checkpoint(state, ADAPTER, OUT, **how)
    assert sorted(Path().rglob("*")) == before
    return str(error.value)


def test_ambiguous_prefixes_are_refused() -> None:
    state = {"encoder.fc.weight": torch.randn(7, 5), "decoder.fc.weight": torch.randn(7, 5)}
    said = refused(state, pair("fc", 7, 5))
    assert "fits several parts" in said and "'decoder.', 'encoder.'" in said


@pytest.mark.parametrize(
    ("state", "tensors", "said"),
    [
        ({"fc.weight": (7, 6)}, pair("fc", 7, 5), "'fc' has fc.weight (7, 6)"),
        ({"afd.weight": (7, 5)}, pair("afc", 7, 5), "'afc' has nothing. Did you mean 'afd'"),
        ({"fc.weight": (7, 5)}, pair("fc", 7, 5) | pair("ab", 2, 3), "no weight for 'ab'"),
        ({"fc.weight": (7, 5)}, {"fc.lora_A.weight": torch.ones(2, 5)}, "no weight for 'fc'"),
        ({"fc.weight": (7, 5)}, pair("fc", 7, 5, r=3), "no weight for 'fc'"),
        ({"fc.weight": (7, 5)}, pair("fc", 7, 5) | {"k": torch.ones(2)}, "has no 'k'"),
        ({"fc.weight": (7, 5)}, {}, "has no tensors"),
        (
            {"fc.weight": (7, 5), "b": (3,)},
            pair("fc", 7, 5) | {"b": torch.ones(3)},
            "'b' with other",
        ),
        ({"fc.weight": (5, 5), "fc.bias": (5,)}, pair("fc", 5, 5), "fits in several ways"),
        (
            {"e.w": (3, 5, 5)},
            {"e.lora_A.weight": torch.ones(6, 5), "e.lora_B.weight": torch.ones(5, 6)},
            "as eoi, e.w as eio",
        ),
    ],
)
def test_what_does_not_fit_is_refused(state: Any, tensors: Any, said: str) -> None:
    config = {"target_parameters": ["e.w"]}
    made = {name: torch.randn(shape) for name, shape in state.items()}
    assert said in refused(made, tensors, config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "LOHA"}, "for 'LOHA'"),
        ({"peft_type": {"a": 1}}, "not for LORA"),
        ({"use_qalora": True}, "uses use_qalora"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"some_new_field": 3}, "uses some_new_field"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": ["a"]}, "init_lora_weights=['a']"),
        ({"r": "2"}, "r must be"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"use_dora": True}, "no weight for 'fc'"),
    ],
)
def test_configurations_that_are_refused(config: Any, said: str) -> None:
    assert said in refused({"fc.weight": torch.randn(7, 5)}, pair("fc", 7, 5), config)


def test_a_quantised_checkpoint_is_refused() -> None:
    state = {
        "fc.weight": torch.randn(7, 5).to(torch.float8_e4m3fn),
        "fc.weight_scale": torch.ones(7),
    }
    assert "'fc.weight' is F8_E4M3" in refused(state, pair("fc", 7, 5))


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Conv1D(5, 5)
        self.b = nn.Linear(5, 5)


def test_a_model_tells_how_square_matrices_are_stored() -> None:
    state = Square().state_dict()
    tensors = pair("a", 5, 5) | pair("b", 5, 5)
    assert "--model" in refused(state, tensors)
    found = folded(
        model=Square,
    )
    for name in "ab":
        delta = 3 * (
            tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double()
        )
        exact = state[f"{name}.weight"].double() + (delta.T if name == "a" else delta)
        assert torch.equal(found[f"{name}.weight"], exact.float())
    assert "the given model" in refused(state, tensors, model=Layers)
    with pytest.raises(ConfigError, match="must be an nn"):
        fxlora.fold_checkpoint(BASE, ADAPTER, Path("o"), model=untyped(dict))


# ---- names that the model changes when it loads -------------------------------------------------

LLAVA = {r"^model\.language_model\.": "language_model.model.", r"^model\.vision\.": "vision."}


def test_names_that_differ_by_more_than_a_prefix() -> None:
    names = {"model.language_model.q": "language_model.model.q", "model.vision.q": "vision.q"}
    state = {f"{name}.weight": torch.randn(7, 5) for name in names.values()}
    tensors = {n: t for name in names for n, t in pair(name, 7, 5).items()}
    said = refused(state, tensors)
    assert "does not fit" in said and "--key-mapping expression=text" in said
    found = folded(key_mapping=LLAVA)
    for name, held in names.items():
        b, a = (tensors[f"{name}.lora_{x}.weight"].double() for x in "BA")
        exact = state[f"{held}.weight"].double() + 3 * (b @ a)
        assert torch.equal(found[f"{held}.weight"], exact.float())
    words = [f"--key-mapping={old}={new}" for old, new in LLAVA.items()]
    assert cli.main(["verify", str(BASE), str(ADAPTER), str(OUT), *words]) == 0
    assert "no weight for" in refused(state, tensors, key_mapping={r"^.*\.q$": "vision.q"})
    both = {r"^model\.(language_model|vision)\.": "vision."}
    assert "several of its names are one" in refused(state, tensors, key_mapping=both)
    with pytest.raises(ConfigError, match="key_mapping"):
        fxlora.fold_checkpoint(BASE, ADAPTER, OUT, key_mapping={"(": "x"})


# ---- ties ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mid(self.emb(ids))))


def embedding_pair(name: str = "emb") -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_embedding_A": torch.randn(2, 11),
        f"{name}.lora_embedding_B": torch.randn(6, 2),
    }


def test_a_tie_that_the_adapter_splits_is_refused() -> None:
    model = Tied()
    save_model(model, str(BASE))  # notes the tie in the header
    (kept,) = load_file(BASE).keys() - {"mid.weight"}
    tensors = embedding_pair() if kept == "emb.weight" else pair("head", 11, 6)
    assert "which is tied to it" in refused(BASE, tensors)
    save_file({"emb.weight": model.emb.weight.detach()}, BASE)
    said = refused(BASE, embedding_pair(), model=Tied)
    assert "not head.weight, which is tied to it" in said and 'tied="share"' in said


VOCAB = {"vocab_size": 11}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
HEAD = {"head.weight": torch.randn(11, 6)}


@pytest.mark.parametrize(
    ("config", "more", "outcome"),
    [
        (TIED | VOCAB, {}, "refused"),
        (TIED | VOCAB, HEAD, "refused"),  # which a class that ties would not read
        (VOCAB, {}, "refused"),  # the default depends on the class
        ({"parts": [{"text_config": TIED | VOCAB}]}, {}, "refused"),
        (UNTIED | {"decoder": TIED | VOCAB}, HEAD, "refused"),
        ({"text_config": UNTIED | VOCAB}, {}, "refused"),
        (UNTIED | VOCAB, {}, "folded"),
        (VOCAB, HEAD, "warned"),  # another tensor of this shape may not be the head
        (VOCAB | {"vocab_size": 12}, {}, "warned"),
        ({}, {}, "refused"),
        ({}, HEAD, "warned"),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_an_embedding_that_may_be_tied(config: Any, more: Any, outcome: str, whole: bool) -> None:
    """By a pair, or trained in full, which is no embedding if the vocabulary has another size."""
    if whole and config.get("vocab_size") == 12:
        outcome = "folded"
    made = {"emb.weight": torch.randn(11, 6)} if whole else embedding_pair()
    how: Any = {"modules_to_save": ["emb"]} if whole else {}
    base, save = Path("folder"), Path("folder/model.safetensors")
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    save_file({"emb.weight": torch.randn(11, 6), **more}, save)
    if outcome == "refused":
        said = refused(base, made, how)
        assert "may be tied to it" in said and ("put its config.json" in said) == (not config)
        if more:
            return
    write_adapter(ADAPTER, made, **how)
    untied = fxlora.FxLoraWarning if outcome == "warned" else None
    with pytest.warns(untied) if untied else contextlib.nullcontext() as said:
        if outcome != "refused":
            fxlora.fold_checkpoint(base, ADAPTER, Path("out"))
    if said:
        assert "nothing says whether these are tied" in str(said[0].message)
    with warnings.catch_warnings():  # the advice
        warnings.simplefilter("error", fxlora.FxLoraWarning)
        shutil.rmtree("out", ignore_errors=True)
        fxlora.fold_checkpoint(base, ADAPTER, Path("out"), model=Only if not more else Both)


class Only(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)


class Both(Only):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11, bias=False)


class BothAndUp(Both):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9, bias=False)


def test_a_pair_on_what_may_be_a_tied_head_needs_the_model() -> None:
    """Only a head is in the file: an embedding that is tied to it would change too."""
    base = Path("base.safetensors")
    layers = {"up.weight": torch.randn(9, 6), "down.weight": torch.randn(6, 9)}
    save_file({"head.weight": torch.randn(11, 6), **layers}, base)
    said = refused(base, pair("head", 11, 6), {"target_modules": ["head"]})
    assert "may be tied to it" in said and "--model" in said
    write_adapter(ADAPTER, pair("up", 9, 6), target_modules=["up"])  # no head
    fxlora.fold_checkpoint(base, ADAPTER, Path("up.safetensors"))
    save_file({**load_file(base), "head.bias": torch.randn(11)}, base)
    write_adapter(ADAPTER, pair("head", 11, 6), target_modules=["head"])
    fxlora.fold_checkpoint(base, ADAPTER, Path("out.safetensors"))
    assert not torch.equal(load_file("out.safetensors")["head.weight"], HEAD["head.weight"])


def test_a_head_outside_the_repeated_layers_may_be_tied() -> None:
    """Also if the vocabulary is smaller than the layers; these are no heads."""
    base = Path("base.safetensors")
    layers = {f"layers.{i}.up.weight": torch.randn(20, 6) for i in range(2)}
    save_file({"head.weight": torch.randn(11, 6), **layers}, base)
    said = refused(base, pair("head", 11, 6), {"target_modules": ["head"]})
    assert "may be tied to it" in said
    write_adapter(ADAPTER, pair("layers.1.up", 20, 6), target_modules=["up"])
    fxlora.fold_checkpoint(base, ADAPTER, Path("up.safetensors"))
    assert not torch.equal(
        load_file("up.safetensors")["layers.1.up.weight"], layers["layers.1.up.weight"]
    )


@pytest.mark.parametrize("named", ["emb", "head", "both"])
def test_copies_of_an_embedding_may_be_a_tie(named: str) -> None:
    """Both are in the file: other values cannot be tied, equal ones may be."""
    base, weight = Path("base.safetensors"), torch.randn(11, 6)
    made = {
        "emb": embedding_pair(),
        "head": pair("head", 11, 6),
        "both": embedding_pair() | pair("head", 11, 6),
    }[named]
    how: Any = {"target_modules": ["emb", "head"]}
    save_file(
        {"emb.weight": weight, "head.weight": weight.clone(), "up.weight": torch.randn(9, 6)}, base
    )
    said = refused(base, made, how)
    assert "has the same values" in said and "--model" in said
    write_adapter(ADAPTER, made, **how)
    fxlora.fold_checkpoint(base, ADAPTER, Path("out.safetensors"), model=BothAndUp)  # the advice
    Path("config.json").write_text(json.dumps(UNTIED))
    fxlora.fold_checkpoint(base, ADAPTER, Path("again.safetensors"))
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    Path("config.json").unlink()
    save_file(
        {"emb.weight": weight, "head.weight": weight + 1, "up.weight": torch.randn(9, 6)}, base
    )
    with pytest.warns(fxlora.FxLoraWarning, match="of the same shape"):
        fxlora.fold_checkpoint(base, ADAPTER, Path("third.safetensors"))


def test_a_pair_on_the_name_that_is_not_in_the_file() -> None:
    base = Path("base.safetensors")
    save_file({"emb.weight": torch.randn(11, 6), "up.weight": torch.randn(9, 6)}, base)
    said = refused(base, pair("head", 11, 6), {"target_modules": ["head"]})
    assert "no weight for 'head'" in said


def test_all_names_of_a_tie_fold_once() -> None:
    model, ids = Tied(), torch.randint(11, (3, 4))
    config = LoraConfig(r=2, target_modules=["emb"], tied="share")
    lora = fxlora.adapt(model, ids, rules=config)
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.normal_()
    fxlora.save_adapter(lora, ADAPTER)
    save_file({"emb.weight": model.emb.weight.detach()}, BASE)
    found = folded(
        model=Tied,
    )
    assert list(found) == ["emb.weight"]
    assert torch.equal(found["emb.weight"], fxlora.fold(lora).state_dict()["emb.weight"])


@pytest.mark.parametrize("whose", ["fxlora", "PEFT"])
def test_a_tie_that_trains_in_full_is_replaced_once(whose: str) -> None:
    """The adapter has the tensor under both names, the checkpoint under one."""
    model, value = Tied(), torch.randn(11, 6)
    if whose == "fxlora":
        rules = [Rule("emb", train=True), Rule("mid", lora=LoraConfig(r=2))]
        with pytest.warns(fxlora.FxLoraWarning, match="is the same tensor as"):
            lora = fxlora.adapt(model, torch.randint(11, (3, 4)), rules=rules)
        with torch.no_grad():
            lora.get_parameter("emb.weight").copy_(value)
        fxlora.save_adapter(lora, ADAPTER)
    else:
        trained = {"emb.weight": value, "head.weight": value.clone()}
        write_adapter(ADAPTER, pair("mid", 6, 6) | trained, modules_to_save=["emb", "head"])
    state = {n: t for n, t in model.state_dict().items() if n != "head.weight"}
    save_file(state, BASE)
    found = folded()
    assert torch.equal(found["emb.weight"], value) and set(found) == set(state)
    if whose == "PEFT":
        other = pair("mid", 6, 6) | {"emb.weight": value, "head.weight": value + 1}
        said = refused(BASE, other, {"modules_to_save": ["emb", "head"]})
        assert "the checkpoint has no 'head.weight'" in said
        frozen = {"head.weight": value, "emb.weight": value.clone()}  # of which one is trained
        said = refused(BASE, pair("mid", 6, 6) | frozen, {"modules_to_save": ["head"]})
        assert "is trained where this one is not" in said


def test_equal_numbers_are_no_tie_if_they_are_one_number() -> None:
    save_file({"mid.weight": torch.randn(6, 6), "n1.weight": torch.randn(6)}, BASE)
    ones = {"n1.weight": torch.ones(6), "n2.weight": torch.ones(6)}
    said = refused(BASE, pair("mid", 6, 6) | ones, {"modules_to_save": ["n1", "n2"]})
    assert "the checkpoint has no 'n2.weight'" in said


# ---- the model ----------------------------------------------------------------------------------


def fails() -> nn.Module:
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (fails, "cannot be built on the meta device.*ZeroDivisionError: mine"),
        (lambda size: nn.Linear(size, 2), "TypeError.*Give a function without arguments"),
        (lambda: None, "a function that builds one, not"),
        ("module:callable", "a function that builds one, not 'module:callable'"),
        (nn.Sequential(nn.LazyLinear(3)), r"no shapes yet for 0\.weight"),
    ],
)
def test_what_is_no_model_of_the_checkpoint(model: Any, said: str) -> None:
    square = pair("fc", 5, 5)  # whose layout a model would tell
    save_file({"fc.weight": torch.randn(5, 5), "fc.bias": torch.randn(5)}, BASE)
    write_adapter(ADAPTER, square)
    with pytest.raises(ConfigError, match=said):
        fxlora.fold_checkpoint(BASE, ADAPTER, OUT, model=model)
    assert not OUT.exists()


# ---- verify -------------------------------------------------------------------------------------


def test_verify_names_what_differs() -> None:
    base, out = BASE, OUT
    save_file({"fc.weight": torch.randn(40, 9).to(BF16), "bias": torch.randn(40)}, base)
    write_adapter(ADAPTER, pair("fc", 40, 9))
    good = folded()
    for name in good:
        bad = good[name].clone()
        bad.view(torch.int16).view(-1)[7] += 1
        save_file(good | {name: bad}, out)
        with pytest.raises(VerificationError, match=f"1 other tensor: '{name}': 1") as error:
            fxlora.verify_checkpoint(base, ADAPTER, out)
        assert ("wrong number" if name == "fc.weight" else "other byte") in str(error.value)
    save_file({"fc.weight": good["fc.weight"].float()}, out)
    with pytest.raises(VerificationError, match=r"'bias': missing; 'fc\.weight': F32"):
        fxlora.verify_checkpoint(base, ADAPTER, out)
    with pytest.raises(ConfigError, match="no checkpoint at"):
        fxlora.verify_checkpoint(base, ADAPTER, Path("none"))


@pytest.mark.parametrize("dora", [False, True])
def test_a_sum_halfway_between_two_numbers_may_be_either(dora: bool) -> None:
    """The last bits of a sum in float64 depend on the order of its terms; a whole number does."""
    weight = torch.ones(40, 8, dtype=BF16)  # halfway to the next number: 1 + 2⁻⁸
    tensors = {"fc.lora_A.weight": torch.ones(1, 8), "fc.lora_B.weight": torch.full((40, 1), 2**-8)}
    magnitude = {"fc.lora_magnitude_vector": (1 + 2**-8) * 8**0.5 * torch.ones(40).double()}
    save_file({"fc.weight": weight}, BASE)
    config = {"r": 1, "lora_alpha": 1, "use_dora": dora}
    write_adapter(ADAPTER, tensors | (magnitude if dora else {}), **config)
    found = folded()["fc.weight"]
    for value, wrong in ((1.0, 0), (1 + 2**-7, 0), (1 + 2**-6, 1)):
        other = found.clone()
        other[33, 5] = value
        save_file({"fc.weight": other}, OUT)
        if not wrong:
            fxlora.verify_checkpoint(BASE, ADAPTER, OUT)
            continue
        with pytest.raises(VerificationError, match="1 wrong number"):
            fxlora.verify_checkpoint(BASE, ADAPTER, OUT)


# ---- checkpoints that cannot be meant -----------------------------------------------------------


def broken(harm: str) -> Path:
    base = write_sharded(Path("base"), {"fc.weight": torch.randn(7, 5)}, {"x": torch.ones(3)})
    first, second = sorted(base.glob("*.safetensors"))
    index = base / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    if harm == "truncated":
        first.write_bytes(first.read_bytes()[:-3])
    elif harm == "longer":
        first.write_bytes(first.read_bytes() + b"123")
    elif harm == "flipped":
        content = bytearray(first.read_bytes())
        content[20] ^= 255
        first.write_bytes(content)
    elif harm == "renamed":
        first.rename(base / "other.safetensors")
    elif harm == "missing":
        first.unlink()
    elif harm == "link":
        first.rename(Path("elsewhere"))
        first.symlink_to(Path("nowhere"))
    elif harm == "loop":
        first.unlink()
        first.symlink_to(first)
    elif harm == "swapped":
        data["weight_map"] = {"fc.weight": second.name, "x": first.name}
    elif harm == "outside":
        data["weight_map"]["x"] = "../elsewhere.safetensors"
    elif harm == "two":
        (base / "b.safetensors.index.json").write_text(index.read_text())
    elif harm == "no index":
        index.unlink()
    elif harm == "nested":
        data["weight_map"] = [[[]]]
    if harm in ("swapped", "outside", "nested"):
        index.write_text(json.dumps(data))
    if harm == "json":
        index.write_text("{" * 99)
    return base


HARMS = ("truncated", "longer", "flipped", "renamed", "missing", "link", "loop", "swapped")
HARMS = (*HARMS, "outside", "two", "no index", "nested", "json")


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_checkpoint_is_refused(harm: str) -> None:
    base = broken(harm)
    write_adapter(ADAPTER, pair("fc", 7, 5))
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError):
        fxlora.fold_checkpoint(base, ADAPTER, Path("out"))
    assert sorted(Path().rglob("*")) == before


def test_links_to_files_are_followed() -> None:
    """As in the cache of a model hub, where a snapshot consists of links."""
    base = write_sharded(Path("blobs"), {"fc.weight": torch.randn(7, 5)}, {"x": torch.ones(3)})
    (Path("snapshot")).mkdir()
    for path in base.iterdir():
        (Path("snapshot") / path.name).symlink_to(path.absolute())
    write_adapter(ADAPTER, pair("fc", 7, 5))
    found = folded(Path("snapshot"), Path("out"))
    assert not torch.equal(found["fc.weight"], read(base)["fc.weight"])
    assert not any(path.is_symlink() for path in (Path("out")).rglob("*"))


def test_pickles_are_refused() -> None:
    Path("base").mkdir()
    torch.save({"fc.weight": torch.randn(7, 5)}, "base/pytorch_model.bin")
    write_adapter(ADAPTER, pair("fc", 7, 5))
    for base in ("base", "base/pytorch_model.bin"):
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin may be a pickle.* safetensors"):
            fxlora.fold_checkpoint(base, ADAPTER, "out")


def test_files_that_may_hold_other_weights_are_left_out() -> None:
    base = write_sharded(Path("base"), {"fc.weight": torch.randn(7, 5)})
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / ".hidden").write_text("x")
    write_adapter(ADAPTER, pair("fc", 7, 5))
    with pytest.warns(fxlora.FxLoraWarning, match=r"pytorch_model.bin beside .* not copied"):
        report = fxlora.fold_checkpoint(base, ADAPTER, Path("out"))
    assert report.left == ("pytorch_model.bin",)
    assert (Path("out/tokenizer/vocab.txt")).read_text() == "a b c"
    assert not (Path("out/pytorch_model.bin")).exists()


# ---- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(value: float) -> None:
    tensors = pair("fc", 40, 5)
    tensors["fc.lora_B.weight"][33, 1] = value
    state = {"fc.weight": torch.randn(40, 5).to(BF16)}
    assert "NaN or infinities" in refused(state, tensors)
    found = folded(
        allow_nonfinite=True,
    )
    finite = found["fc.weight"].isfinite()
    assert not finite[33].any() and finite.sum() == 39 * 5


def test_an_overflow_is_refused() -> None:
    tensors = {n: t * 1e3 for n, t in pair("fc", 40, 5).items()}
    state = {"fc.weight": torch.randn(40, 5).half()}
    assert "is not finite in F16" in refused(state, tensors)


def test_load_adapter_and_fold_take_what_is_not_finite_if_told() -> None:
    model = nn.Sequential(nn.Linear(5, 7))
    tensors = pair("0", 7, 5)
    tensors["0.lora_B.weight"][3, 1] = torch.nan
    write_adapter(ADAPTER, tensors, target_modules=["0"])
    module = fxlora.capture(model, torch.randn(2, 5))
    with pytest.raises(AdapterError, match="allow_nonfinite=True"):
        fxlora.load_adapter(module, ADAPTER)
    lora = fxlora.load_adapter(module, ADAPTER, allow_nonfinite=True)
    with pytest.raises(fxlora.InjectError, match="not finite"):
        fxlora.fold(lora)
    found = fxlora.fold(lora, allow_nonfinite=True).state_dict()["0.weight"]
    assert found[3].isnan().all() and found.isfinite().sum() == 30


__all__ = ["ExportError"]


def test_a_pair_and_the_whole_tensor_for_one_weight() -> None:
    save_file({"one.weight": torch.randn(5, 6)}, "base.safetensors")
    tensors = {**pair("one", 5, 6), "one.weight": torch.randn(5, 6)}
    write_adapter(Path("a"), tensors, target_modules=["one"], modules_to_save=["one"])
    with pytest.raises(AdapterError, match=r"both a pair and the whole tensor for one\.weight"):
        fxlora.fold_checkpoint("base.safetensors", "a", "out.safetensors")


@pytest.mark.parametrize(
    ("held", "given"),
    [
        (torch.ones(3, 5, dtype=torch.int8), torch.randn(3, 5)),
        (torch.ones(3, 5), torch.randn(3, 5, dtype=torch.complex64)),
        (torch.ones(3, 5, dtype=torch.int8), torch.full((3, 5), 300)),
        (torch.ones(3, 5, dtype=BF16), torch.full((3, 5), 257)),
        (torch.ones(3, 5, dtype=torch.bool), torch.full((3, 5), 2)),
    ],
)
def test_what_a_dtype_cannot_hold_is_refused(held: torch.Tensor, given: torch.Tensor) -> None:
    state = {"one.weight": torch.randn(5, 6), "head.weight": held, "head.bias": torch.ones(3)}
    save_file(state, BASE)
    tensors = {**pair("one", 5, 6), "head.weight": given}
    write_adapter(ADAPTER, tensors, target_modules=["one"], modules_to_save=["head"])
    with pytest.raises(AdapterError, match=rf"is .* in base.*cannot hold the {given.dtype}"):
        fxlora.fold_checkpoint(BASE, ADAPTER, OUT)
    write_adapter(ADAPTER, tensors | {"head.weight": held}, modules_to_save=["head"])
    assert torch.equal(folded()["head.weight"], held)


def test_biases_of_modules_that_are_saved() -> None:
    state = {"one.weight": torch.randn(5, 6), "one.bias": torch.zeros(5)}
    state |= {"head.weight": torch.randn(3, 5), "head.bias": torch.zeros(3)}
    save_file(state, "base.safetensors")
    tensors = {n: torch.randn(*state[n].shape) for n in ("one.bias", "head.weight", "head.bias")}
    options: dict[str, Any] = {"target_modules": ["one"], "modules_to_save": ["head"]}
    write_adapter(Path("a"), pair("one", 5, 6) | tensors, **options, bias="lora_only")
    fxlora.fold_checkpoint("base.safetensors", "a", "out.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(read(Path("out.safetensors"))[name], tensor)
