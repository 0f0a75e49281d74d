from __future__ import annotations

import csv
import io
import json
import logging
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import fxlora
from fxlora import cli
from fxlora.cli import inputs, models
from fxlora.cli import weights as checkpoints

Run = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]

HOUSE = '''
import torch
from torch import nn


class Mixed(nn.Module):
    """Embedding, convolution, batch norm and linear; ids (N, L) and an optional scale."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.bn = nn.BatchNorm1d(5)
        self.lin = nn.Linear(5, 7)
        self.double()

    def forward(self, ids, scale=None):
        x = self.bn(self.conv(self.emb(ids).transpose(1, 2)))
        y = self.lin(x.transpose(1, 2))
        return y if scale is None else y * scale


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.mid = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight
        self.double()

    def forward(self, ids):
        return self.head(torch.tanh(self.mid(self.emb(ids))))


class Stored(nn.Module):
    """Two parameters over one memory, which the captured graph cannot know to be one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight.data = self.a.weight.data

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Padded(nn.Module):
    """Indices of zero, as the command line has them, are padding."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=0)
        self.lin = nn.Linear(6, 5)

    def forward(self, ids):
        return self.lin(self.emb(ids) + 1)


class Huge(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2_000_000, 3_000_000)

    def forward(self, x):
        return self.lin(x)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        print("forward")
        return self.lin(x) * (2 if x.sum() > 0 else 3)


class Shop:
    make = staticmethod(Mixed)


def loud():
    print("I am being built")
    return Mixed()


def fails():
    raise KeyError("no such thing")


def leaves():
    raise SystemExit(0)


def needs(size):
    return nn.Linear(size, size)


def number():
    return 3


ready = Tied()
seven = 7
'''
IDS = ("--input", "2x4:int64")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with house.py, which only the command line adds to sys.path."""
    (tmp_path / "house.py").write_text(HOUSE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("house", None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        status = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def done(run: Run) -> Callable[..., str]:
    """Run a command that must succeed without output on stderr; return its output."""

    def call(*words: object) -> str:
        status, out, err = run(*words)
        assert (status, err) == (0, "")
        assert out.endswith("\n")
        assert not out.endswith("\n\n")
        return out

    return call


@pytest.fixture
def refused(run: Run) -> Refused:
    """Run a command that must fail with status 2 and one line on stderr; return its message."""

    def call(*words: object) -> str:
        before = sorted(Path.cwd().rglob("*"))
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.startswith("fxlora: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        after = sorted(path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts)
        assert after == [path for path in before if "__pycache__" not in path.parts]
        return err.removeprefix("fxlora: error: ").rstrip("\n")

    return call


def house(name: str, seed: int = 0) -> nn.Module:
    """Return a model of house.py as the command line builds it."""
    model = models._named(models._imported("house"), name)
    torch.manual_seed(seed)
    return model().eval()


def train(model: nn.Module, folder: str, *args: Any) -> fxlora.CapturedModule:
    """Load a saved adapter, give it random A and B, and save it again."""
    lora = fxlora.load_adapter(fxlora.capture(model, args), folder)
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.normal_()
    fxlora.save_adapter(lora, folder)
    return lora.eval()


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() < 1e-10


# ---- all commands in sequence -------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["base.safetensors", "base.pt"])
def test_fold_writes_weights_that_the_source_class_loads(
    done: Callable[..., str], checkpoint: str
) -> None:
    ids = torch.randint(11, (3, 4))
    base = house("Mixed", seed=5)  # other weights than the command line would draw
    with torch.no_grad():
        base.get_buffer("bn.running_mean").normal_()
    if checkpoint.endswith(".pt"):
        torch.save(base.state_dict(), checkpoint)
    else:
        save_file(base.state_dict(), checkpoint)
    source = ("house:Mixed", *IDS, "--checkpoint", checkpoint)
    done("adapt", *source, "--target", "emb,conv", "--target", "lin", "-r", 2, "--out", "a/b")
    lora = train(base, "a/b", ids)
    assert (lora(ids) - base(ids)).abs().max() > 0.1
    assert "3 of them folded" in done(
        "fold", *source, "--adapter", "a/b", "--out", "folded.safetensors"
    )
    other = house("Mixed", seed=1)
    other.load_state_dict(load_file("folded.safetensors"))
    assert_close(other(ids), lora(ids))


def test_fold_of_tied_weights_loads_into_the_tied_class(done: Callable[..., str]) -> None:
    ids = torch.randint(11, (3, 4))
    base = house("Tied")
    done("adapt", "house:Tied", *IDS, "--target", "head,emb", "-r", 2, "--out", "adapter")
    lora = train(base, "adapter", ids)
    assert (lora(ids) - base(ids)).abs().max() > 0.1
    done("fold", "house:Tied", *IDS, "--adapter", "adapter", "--out", "folded.safetensors")
    other = house("Tied", seed=1)
    other.load_state_dict(load_file("folded.safetensors"))
    assert other.get_parameter("head.weight") is other.get_parameter("emb.weight")
    assert_close(other(ids), lora(ids))


def test_fold_of_one_name_of_a_tied_weight_says_what_to_do(
    done: Callable[..., str], refused: Refused
) -> None:
    """The tied class cannot hold two weights; an exported program can."""
    ids = torch.randint(11, (3, 4))
    base = house("Tied")
    done("adapt", "house:Tied", *IDS, "--target", "head", "-r", 2, "--out", "adapter")
    lora = train(base, "adapter", ids)
    source = ("house:Tied", *IDS, "--adapter", "adapter")
    said = refused("fold", *source, "--out", "folded.safetensors")
    assert "a tie that the adapter splits" in said
    assert 'tied="share"' in said and "fxlora export" in said
    done("export", *source, "--out", "folded.pt2")
    assert_close(torch.export.load("folded.pt2").module()(ids), lora(ids))


def test_verify_checks_an_adapter_and_a_folded_file(
    done: Callable[..., str], refused: Refused
) -> None:
    ids = torch.randint(11, (3, 4))
    done("adapt", "house:Mixed", *IDS, "--target", "emb,conv,lin", "-r", 2, "--out", "adapter")
    lora = train(house("Mixed"), "adapter", ids)
    source = ("house:Mixed", *IDS, "--adapter", "adapter")
    done("fold", *source, "--out", "folded.safetensors")
    verify = ("verify", *source, "--folded", "folded.safetensors")
    table = done(*verify)
    for entry in lora.plan or ():
        assert f"\n{entry.site} " in table
    assert "Each of the 6 reads of these weights has its adapter" in table
    data = json.loads(done(*verify, "--json"))
    assert all(site["effect"] > 0 for site in data["sites"])
    assert [read["mode"] for read in data["sites"][1]["reads"]] == ["train", "eval"]
    assert done(*verify, "--reads").endswith(table)
    assert "reads of these weights has its adapter" in done("verify", *source)

    good = load_file("folded.safetensors")
    for name, said in (
        ("lin.weight", "fold: 'lin': its folded weight is not W0 + s·BA"),
        ("conv.bias", "fold: 'conv.bias' has no adapter, and is another tensor"),
    ):
        bad = good[name].clone()
        bad.view(-1)[3] += 1e-8
        save_file(good | {name: bad}, "bad.safetensors")
        assert said in refused("verify", *source, "--folded", "bad.safetensors")
    save_file({n: t for n, t in good.items() if n != "conv.bias"}, "cut.safetensors")
    assert "missing in the file: conv.bias" in refused(
        "verify", *source, "--folded", "cut.safetensors"
    )
    save_file({n: t.float() for n, t in good.items()}, "float.safetensors")
    assert "'emb': its folded" in refused("verify", *source, "--folded", "float.safetensors")


def test_verify_of_what_the_inputs_do_not_reach(done: Callable[..., str], refused: Refused) -> None:
    done("adapt", "house:Tied", *IDS, "--target", "mid", "-r", 2, "--out", "adapter")
    assert "mid" in done("verify", "house:Tied", *IDS, "--adapter", "adapter")
    done("adapt", "house:Padded", *IDS, "--target", "emb,lin", "-r", 2, "--out", "padded")
    message = refused("verify", "house:Padded", *IDS, "--adapter", "padded")
    assert "effect and gradient: the adapter on 'emb' cannot change the outputs" in message
    found = done("verify", "house:Padded", "--input", "2x4:int64:11", "--adapter", "padded")
    assert "\nemb " in found


def test_weights_that_share_memory_are_refused(refused: Refused) -> None:
    words = (
        "adapt",
        "house:Stored",
        "--input",
        "2x4",
        "--target",
        "a",
        "-r",
        2,
        "--out",
        "adapter",
    )
    assert "shares memory with 'b.weight'" in refused(*words)


def test_export_writes_what_plain_pytorch_runs(done: Callable[..., str]) -> None:
    ids = torch.randint(11, (2, 4))
    scale = torch.randn(2, 4, 1, dtype=torch.float64)
    source = ("house:Mixed", *IDS, "--input", "scale=2x4x1:float64")
    base = house("Mixed")
    done("adapt", *source, "--target", "emb,conv,lin", "-r", 2, "--out", "adapter")
    lora = train(base, "adapter", ids, scale)
    done("export", *source, "--adapter", "adapter", "-o", "folded.pt2")
    done("export", *source, "--out", "base.pt2")
    folded, plain = (torch.export.load(f"{n}.pt2").module() for n in ("folded", "base"))
    assert (lora(ids, scale=scale) - base(ids, scale)).abs().max() > 0.1
    assert_close(folded(ids, scale=scale), lora(ids, scale))
    assert_close(plain(ids, scale=scale), base(ids, scale))


def test_adapt_is_seeded_and_untrained(done: Callable[..., str]) -> None:
    words = ("adapt", "house:Mixed", "--target", "all-linear", "--alpha", 16, "-r", 3, "--rslora")
    outs = [
        done(*words, "--seed", seed, "--out", name) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    ]
    assert "1 site adapted with 36 parameters." in outs[0]
    a, b, c = (load_file(f"{name}/adapter_model.safetensors") for name in "abc")
    key_a, key_b = (f"base_model.model.lin.lora_{x}.weight" for x in "AB")
    assert torch.equal(a[key_a], b[key_a])
    assert not torch.equal(a[key_a], c[key_a])
    assert a[key_a].any()
    assert not a[key_b].any()
    config = json.loads(Path("a/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 16, True)


# ---- checkpoints in place of a model -------------------------------------------------------------


def files(
    done: Callable[..., str], name: str = "Mixed", target: str = "emb,conv,lin"
) -> fxlora.CapturedModule:
    """Write the checkpoint base.safetensors and a trained adapter of a model of house.py."""
    base = house(name)
    save_model(base, "base.safetensors")
    ids = torch.randint(11, (3, 4))
    words = ("--target", target, "-r", 2, "--out", "adapter", "--force")
    done("adapt", f"house:{name}", *IDS, *words)
    return train(base, "adapter", ids)


@pytest.mark.parametrize("words", [("base.safetensors", "adapter"), ("--adapter", "adapter")])
def test_fold_and_verify_of_files(done: Callable[..., str], words: tuple[str, ...]) -> None:
    lora = files(done)
    before = sorted(Path().iterdir())
    start = words if words[0].startswith("base") else ("base.safetensors", *words)
    table = done("fold", *start, "-o", "out.safetensors", "--dry-run")
    assert "lin.weight" in table and "out.safetensors would hold the result" in table
    assert sorted(Path().iterdir()) == before
    assert "3 tensors folded" in done("fold", *start, "-o", "out.safetensors")
    found, expected = load_file("out.safetensors"), fxlora.fold(lora).state_dict()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-12), name
    same = done("verify", "base.safetensors", "adapter", "out.safetensors")
    assert "with the adapter folded in, bit for bit" in same
    data = json.loads(done("verify", "base.safetensors", "adapter", "out.safetensors", "--json"))
    assert [tensor["name"] for tensor in data["folded"]] == sorted(
        ["conv.weight", "emb.weight", "lin.weight"]
    )


def test_verify_of_files_says_which_tensor_differs(
    done: Callable[..., str], refused: Refused
) -> None:
    files(done)
    fxlora.fold_checkpoint("base.safetensors", "adapter", "out.safetensors")
    good = load_file("out.safetensors")
    good["conv.bias"].view(torch.int64)[2] += 1
    save_file(good, "out.safetensors")
    said = refused("verify", "base.safetensors", "adapter", "out.safetensors")
    assert "1 other tensor: 'conv.bias': 1 other byte" in said


def test_a_model_for_a_checkpoint(done: Callable[..., str], refused: Refused) -> None:
    files(done, "Tied", "emb")
    state = house("Tied").state_dict()
    del state["head.weight"]
    save_file(state, "one.safetensors")
    words = ("fold", "one.safetensors", "adapter", "-o", "out.safetensors")
    assert "which is tied to it" in refused(*words, "--model", "house:Tied")
    assert "no module 'hose'" in refused(*words, "--model", "hose:Tied")
    assert "the given model" in refused(*words, "--model", "house:Mixed")
    files(done)
    done("fold", "base.safetensors", *words[2:], "--model", "house:Mixed")


def test_a_progress_bar_is_for_terminals(
    done: Callable[..., str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(done)
    words = ("fold", "base.safetensors", "adapter", "-o", "out.safetensors")
    done(*words)  # nothing on stderr, which is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, _, err = run(*words)
    assert status == 0
    assert "100%" in err and "B/s" in err


def test_values_that_are_not_finite(refused: Refused, done: Callable[..., str]) -> None:
    files(done)
    path = Path("adapter/adapter_model.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    tensors["base_model.model.lin.lora_A.weight"][1, 2] = torch.nan
    save_file(tensors, path, header)
    for words in (("base.safetensors", "adapter"), ("house:Mixed", *IDS, "--adapter", "adapter")):
        command = ("fold", *words, "-o", "out.safetensors")
        assert "--allow-nonfinite" in refused(*command)
        done(*command, "--allow-nonfinite")
        assert load_file("out.safetensors")["lin.weight"].isnan().any()
        Path("out.safetensors").unlink()


# ---- plan and report ----------------------------------------------------------------------------


def test_plan_prints_the_plan(done: Callable[..., str]) -> None:
    config = fxlora.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["conv", "lin"],
        exclude_modules=["conv"],
        modules_to_save=["bn"],
        lora_dropout=0.25,
    )
    plan = fxlora.match(fxlora.capture(house("Mixed")), config)
    words = (
        *("plan", "house:Shop.make", "--target", "conv, lin", "--exclude", "conv", "-r", 2),
        *("--alpha", "4.0", "--modules-to-save", "bn", "--dropout", 0.25),
    )
    assert done(*words, "--out", "plan.toml") == f"{plan}\n"
    assert json.loads(done(*words, "--json", "--out", "plan.json")) == plan.to_data()
    assert [entry.site for entry in plan] == ["lin"]
    for name in ("plan.toml", "plan.json"):
        assert done("plan", "house:Mixed", "--rules", name) == f"{plan}\n"


def test_report_is_the_same_from_names_rules_and_adapter(done: Callable[..., str]) -> None:
    Path("lora.toml").write_text('[[rule]]\nname = "head"\n[rule.lora]\nr = 3\n')
    config = fxlora.LoraConfig(r=3, target_modules=["head"])
    lora = fxlora.adapt(house("Tied"), torch.zeros(2, 4, dtype=torch.int64), rules=config)
    fxlora.save_adapter(lora, "adapter")
    sources = [
        ("--target", "head", "-r", 3),
        ("--rules", "lora.toml", "--meta"),
        ("--adapter", "adapter", "--meta"),
    ]
    styles = ["table", "github", "json", "csv", "html"]
    # All sources in one style, and another source in each other style.
    pairs = [(source, "table") for source in sources]
    pairs += [(sources[n % 3], style) for n, style in enumerate(styles[1:])]
    for source, style in pairs:
        expected = fxlora.report(lora, style).removesuffix("\n") + "\n"
        assert done("report", "house:Tied", *IDS, "--format", style, *source) == expected


def test_report_as_data(done: Callable[..., str]) -> None:
    words = ("report", "house:Mixed", "--target", "conv", "-r", 2, "--meta")
    data = json.loads(done(*words, "--json"))
    assert data["adapter_parameters"] == 2 * (6 * 3 + 5)
    assert data["model_parameters"] == sum(p.numel() for p in house("Mixed").parameters())
    (row,) = csv.DictReader(io.StringIO(done(*words, "--format", "csv")))
    assert (row["site"], row["A and B"]) == ("conv", "46")


@pytest.mark.parametrize("given", [(), ("--input", "2x2000000")])
def test_meta_needs_no_memory(done: Callable[..., str], given: tuple[str, ...]) -> None:
    words = ("house:Huge", "--meta", "--target", "lin", "-r", 2, *given)
    assert json.loads(done("plan", *words, "--json"))["site"][0]["shape"] == [3_000_000, 2_000_000]
    assert "6,000,003,000,000" in done("report", *words)


def test_stdout_is_the_result_alone(run: Run) -> None:
    status, out, err = run("plan", "house:loud", "--target", "lin", "-r", 2, "--json")
    assert status == 0
    assert json.loads(out)["site"][0]["site"] == "lin"
    assert err == "I am being built\n"


@pytest.mark.filterwarnings("default::fxlora.FxLoraWarning")
def test_warnings_are_lines_on_stderr(run: Run) -> None:
    status, out, err = run("plan", "house:Mixed", "--target", "lin", "-r", 9, "--json")
    assert (status, len(json.loads(out)["site"])) == (0, 1)
    first, second = err.splitlines()
    assert first.startswith("fxlora: warning: r=9 for 'lin' is more than the rank 5")
    assert second.startswith("fxlora: warning: 1 adapter has more parameters than its weight: lin.")


# ---- MODEL --------------------------------------------------------------------------------------


def test_a_model_may_be_an_instance(done: Callable[..., str]) -> None:
    assert "1 site adapted" in done("plan", "house:ready", "--target", "mid", "-r", 2)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("house", ["'house'", "module:callable"]),
        ("house:", ["module:callable"]),
        (":Mixed", ["module:callable"]),
        ("huose:Mixed", ["no module 'huose'"]),
        ("house.rooms:Mixed", ["no module 'house.rooms'"]),
        ("house:Mixd", ["has no 'Mixd'", "mean 'Mixed'?"]),
        ("house:Shop.mkae", ["has no 'Shop.mkae'", "mean 'make'?"]),
        ("house:seven", ["neither a callable nor an nn.Module", "7"]),
        ("house:number", ["returned an int"]),
        ("house:needs", ["house:needs", "TypeError", "'size'"]),
        ("house:fails", ["KeyError: 'no such thing'", "--debug"]),
        ("house:leaves", ["SystemExit: 0"]),
        ("ruin:Mixed", ["importing 'ruin' failed", "ModuleNotFoundError: No module named 'nope'"]),
        ("torchvision:resnet19", ["no model 'resnet19'", "resnet18"]),
    ],
)
def test_a_model_that_cannot_be_had(refused: Refused, model: str, words: list[str]) -> None:
    Path("ruin.py").write_text("import nope\n")
    message = refused("plan", model, "--target", "lin")
    for word in words:
        assert word in message


@pytest.mark.filterwarnings("default")
def test_a_model_without_a_whole_graph(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    words = ("--input", "2x4", "--target", "lin", "-r", 2)
    status, out, err = run("plan", "house:Branching", *words)
    *prints, line, _ = err.splitlines()
    assert set(prints) == {"forward"}  # only the model prints; torch.export prints no graph
    assert (status, "1 site adapted" in out) == (0, True)
    assert line.startswith("fxlora: warning: Branching could not be captured")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    logging.getLogger().warning("heard")
    assert [record.message for record in caplog.records][-1] == "heard"


def test_an_instance_has_its_weights_already(refused: Refused) -> None:
    assert "--meta needs a callable" in refused("plan", "house:ready", "--target", "mid", "--meta")


def test_torchvision_models_by_name(
    done: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)  # no download
    words = ("--meta", "--target", "classifier.6", "-r", 4, "--input", "1x3x64x64")
    assert "1 site adapted" in done("plan", "torchvision:alexnet", *words)
    words = ("--meta", "--target", "high_classifier", "-r", 4)
    assert "1 site adapted" in done("plan", "torchvision:lraspp_mobilenet_v3_large", *words)


def test_torchvision_weights(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")
    asked: list[str] = []

    def get_model(name: str, *, weights: str) -> None:
        asked.append(weights)
        raise OSError("no route to host")

    monkeypatch.setattr(models, "get_model", get_model)
    words = ("plan", "torchvision:resnet18", "--target", "fc", "--weights")
    assert "no route to host" in refused(*words, "DEFAULT")
    assert "Known: IMAGENET1K_V1, DEFAULT" in refused(*words, "V1")
    assert asked == ["DEFAULT"]
    assert "--checkpoint" in refused("plan", "house:Mixed", "--target", "lin", "--weights", "X")


def test_torchvision_is_optional(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    message = refused("plan", "torchvision:resnet18", "--target", "fc")
    assert "pip install torchvision" in message


# ---- checkpoints --------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def _mixed_state() -> dict[str, torch.Tensor]:
    return house("Mixed").state_dict()


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing.pt": (lambda path: None, ["missing.pt: No such file"]),
    "missing.safetensors": (lambda path: None, ["missing.safetensors: No such file"]),
    "bomb.pt": (lambda path: torch.save({"a": Bomb()}, path), ["more than tensors", "was run"]),
    "bomb.pkl": (lambda path: path.write_bytes(pickle.dumps(Bomb())), ["more than tensors"]),
    "noise.pt": (lambda path: path.write_bytes(b"noise"), ["damaged"]),
    "noise.safetensors": (lambda path: path.write_bytes(b"noise"), ["damaged"]),
    "list.pt": (lambda path: torch.save([torch.ones(2)], path), ["not a state dict but a list"]),
    "nested.pt": (
        lambda path: torch.save({"epoch": 3, "state_dict": _mixed_state()}, path),
        ["not a state dict", "epoch, state_dict"],
    ),
    "keys.pt": (
        lambda path: torch.save({f"m.{k}": v for k, v in _mixed_state().items()}, path),
        ["does not fit Mixed", "missing in the file: emb.weight", "not in the model: m.emb.weight"],
    ),
    "shapes.pt": (
        lambda path: torch.save(_mixed_state() | {"lin.weight": torch.ones(5, 7)}, path),
        ["does not fit Mixed", "size mismatch for lin.weight", "[5, 7]", "[7, 5]"],
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_meant(refused: Refused, name: str) -> None:
    write, words = CHECKPOINTS[name]
    write(Path(name))
    message = refused("plan", "house:Mixed", "--target", "lin", "--checkpoint", name)
    for word in (name, *words):
        assert word in message
    assert not Path("exploded").exists()


def test_one_name_of_a_tied_weight_is_enough_and_two_must_agree(
    done: Callable[..., str], refused: Refused
) -> None:
    state = house("Tied").state_dict()
    words = ("plan", "house:Tied", "--target", "mid", "-r", 2, "--checkpoint")
    save_file({k: v for k, v in state.items() if k != "head.weight"}, "one.safetensors")
    assert "1 site adapted" in done(*words, "one.safetensors")
    save_file(state | {"head.weight": state["head.weight"] + 1}, "two.safetensors")
    assert "emb.weight are overwritten" in refused(*words, "two.safetensors")


# ---- usage --------------------------------------------------------------------------------------

PLAN = ("plan", "house:Mixed", "--target", "lin")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ["COMMAND"]),
        (["paln"], ["invalid choice: 'paln'"]),
        (["plan"], ["MODEL"]),
        (["plan", "house:Mixed"], ["--rules", "--target", "required"]),
        ([*PLAN, "--rules", "x.toml"], ["not allowed with"]),
        ([*PLAN, "--frobnicate"], ["--frobnicate"]),
        ([*PLAN, "-r", "two"], ["-r", "'two'"]),
        ([*PLAN, "-r", "0"], ["r must be a whole number"]),
        ([*PLAN, "--alpha", "nan"], ["lora_alpha must be a finite number"]),
        ([*PLAN, "--dropout", "1"], ["lora_dropout must be in [0, 1)"]),
        (["plan", "house:Mixed", "--target", "lin,,conv"], ["target_modules"]),
        (["plan", "house:Mixed", "--target", "lni"], ["'lni'", "mean 'lin'?"]),
        ([*PLAN, "--out", "nowhere/plan.toml"], ["no folder nowhere"]),
        ([*PLAN, "--out", "plan.yaml"], ["plan.yaml", ".toml or .json"]),
        ([*PLAN, "--meta", "--checkpoint", "x.pt"], ["not allowed with"]),
        ([*PLAN, "--input", "2x"], ["'2x'", "1x3x224x224"]),
        ([*PLAN, "--input", "0x3"], ["'0x3'"]),
        ([*PLAN, "--input", "2xfour"], ["'2xfour'"]),
        ([*PLAN, "--input", "=2x4"], ["'=2x4'"]),
        ([*PLAN, "--input", "2x4:int65"], ["'2x4:int65'", "Did you mean 'int16', 'int64' or"]),
        ([*PLAN, "--input", "2x4:int64:0"], ["'2x4:int64:0'"]),
        ([*PLAN, "--input", "2x4:int8:1000"], ["int8 has no integers up to that"]),
        ([*PLAN, "--input", "2x4:float32:9"], ["'2x4:float32:9'", "only for integers"]),
        ([*PLAN, "--input", "ids=2x4:int64", "--input", "ids=1:int64"], ["ids more than once"]),
        ([*PLAN, *IDS, "--input", "size=2x4"], ["Mixed does not run", "size"]),
        (["adapt", *PLAN[1:]], ["--out"]),
        (["adapt", *PLAN[1:], "-r", "2", "--out", "house.py"], ["cannot write house.py"]),
        (["fold", "house:Mixed", "--out", "x.safetensors"], ["--adapter"]),
        (["fold", "base.safetensors", "-o", "x.safetensors"], ["give one adapter"]),
        (["fold", "a.safetensors", "b", "-o", "x", "--input", "2x4"], ["--input", "checkpoint"]),
        (["fold", "a.safetensors", "b", "--adapter", "c", "-o", "x"], ["give one adapter"]),
        (["fold", "a.safetensors", "b", "-o", "x"], ["no checkpoint at a.safetensors"]),
        (["fold", "house:Mixed", "--adapter", "a", "-o", "x", "--dry-run"], ["--dry-run"]),
        (["fold", "house:Mixed", "--adapter", "a", "-o", "x", "--json"], ["--json"]),
        (["verify", "a.safetensors", "b"], ["fxlora verify BASE ADAPTER OUT"]),
        (["verify", "a.safetensors", "b", "c", "--reads"], ["--reads", "checkpoint"]),
        (["export", "house:Mixed", "--out", "x.pt2"], ["--input"]),
        (["verify", "house:Mixed", "--adapter", "a"], ["--input"]),
        (["verify", "house:Mixed", *IDS], ["--adapter"]),
        (["verify", "house:Mixed", *IDS, "--adapter", "a", "--json", "--reads"], ["not allowed"]),
        (["export", "house:Mixed", *IDS, "--out", "no/x.pt2"], ["no folder no"]),
        (["report", "house:Mixed", "--target", "lin", "--format", "pdf"], ["'pdf'"]),
        (["report", "house:Mixed", "--adapter", "a", "-r", "3"], ["--adapter", "r."]),
        (["plan", "house:Mixed", "--rules", "x.toml", "--alpha", "3"], ["--rules", "lora_alpha"]),
        (["plan", "house:Mixed", "--rules", "x.toml"], ["x.toml: No such file"]),
    ],
)
def test_usage_errors(refused: Refused, words: list[str], said: list[str]) -> None:
    message = refused(*words)
    for word in said:
        assert word in message


def test_rules_with_an_unknown_key(refused: Refused) -> None:
    Path("lora.toml").write_text('[[rule]]\nnmae = "lin"\n')
    message = refused("plan", "house:Mixed", "--rules", "lora.toml")
    assert "lora.toml, rule 1: unknown key 'nmae'. Did you mean 'name'?" in message


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["--version"], "fxlora 0"), (["plan", "--help"], "--target")):
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        assert said in capsys.readouterr().out


# ---- no partial output --------------------------------------------------------------------------


NAMES = ("model.safetensors", "config.json")


@pytest.mark.parametrize("harm", ["absent", "empty", "cut", "config", "foreign"])
def test_a_broken_adapter_is_refused(done: Callable[..., str], refused: Refused, harm: str) -> None:
    if harm != "absent":
        done("adapt", "house:Mixed", "--target", "lin", "-r", 2, "--out", "adapter")
    weights, config = (
        Path("adapter", f"adapter_{n}") for n in ("model.safetensors", "config.json")
    )
    if harm == "empty":
        weights.unlink()
    elif harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif harm == "config":
        config.write_text("{")
    model = "house:Tied" if harm == "foreign" else "house:Mixed"
    assert "adapter" in refused("fold", model, "--adapter", "adapter", "--out", "f.safetensors")
    assert "adapter" in refused("report", model, "--adapter", "adapter")


def test_a_write_that_fails_leaves_what_was_there(
    done: Callable[..., str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    done("adapt", "house:Mixed", "--target", "lin", "-r", 2, "--out", "adapter")
    Path("folded.safetensors").write_text("precious")
    monkeypatch.setattr(checkpoints, "save_file", full)
    message = refused("fold", "house:Mixed", "--adapter", "adapter", "--out", "folded.safetensors")
    assert "cannot write folded.safetensors: No space left" in message
    assert Path("folded.safetensors").read_text() == "precious"


def test_the_unexpected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: object) -> None:
        raise LookupError("lost\nand gone")

    monkeypatch.setattr(inputs, "capture", capture)
    line = "fxlora: error: unexpected LookupError: lost and gone (--debug shows the traceback)\n"
    assert run(*PLAN) == (1, "", line)
    status, out, err = run(*PLAN, "--debug")
    assert (status, out) == (1, "")
    assert err.startswith("Traceback")
    assert "in capture\n" in err
    assert err.endswith(line)


def test_debug_shows_where_a_refusal_comes_from(run: Run) -> None:
    status, out, err = run("plan", "house:fails", "--target", "lin", "--debug")
    assert (status, out) == (2, "")
    assert "in fails\n" in err
    assert err.splitlines()[-1].startswith("fxlora: error: building house:fails failed")


def test_an_interrupt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "capture", capture)
    assert run(*PLAN) == (130, "", "fxlora: error: interrupted.\n")


def test_a_reader_may_leave_early(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main([*PLAN, "-r", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_a_full_disk_behind_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main([*PLAN, "-r", "2"]) == 2
    assert capsys.readouterr().err == (
        "fxlora: error: cannot write to stdout: No space left on device.\n"
    )


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "house:loud", "--target", "emb", "-r", "2", "--json")
    monkeypatch.setattr(sys, "argv", ["fxlora", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("fxlora", run_name="__main__")
    out, err = capfd.readouterr()
    assert end.value.code == 0
    assert json.loads(out)["site"][0]["op"] == "embedding"
    assert err == "I am being built\n"


@pytest.mark.slow
def test_as_a_program() -> None:
    command = (sys.executable, "-m", "fxlora")
    words = ("plan", "house:loud", *IDS, "--target", "emb", "-r", "2", "--json")
    ran = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["site"][0]["op"] == "embedding"
    assert ran.stderr == "I am being built\n"
