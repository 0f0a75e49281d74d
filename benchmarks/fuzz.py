"""Fuzz what fxlora reads: adapter folders, rules files, plans, checkpoints, and command lines.

Each mutant is a valid file with one to three changes: values of other types and sizes, names that
would be code, flipped bits, tensors that are renamed, cast or not finite. fxlora must refuse it
with a typed error, or make the module that the file's own numbers define, by a formula that shares
no code with fxlora. No text in it may run as code, or be printed with its control characters.

    python benchmarks/fuzz.py            # 5,400 mutants
    python benchmarks/fuzz.py --quick    # 540
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import torch
from fuzz_files import Wrong, checkpoint, command_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

import fxlora
from fxlora import FxLoraError, LoraConfig, Plan, Rule
from fxlora.lora.inits import STARTS
from fxlora.plan import Entry
from fxlora.tables import render

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = "base_model.model."
CANARY = "ran"  # the file that a mutant's text creates if it runs as code
RUNS = f"exec(\"open('{CANARY}','w')\".replace('.','\\x2e'))"
CODE = (
    f'W")\r{RUNS}\rdef f(self):\r    y = getattr(self, "y',
    f'x"); {RUNS}; ("',
    f"x'); {RUNS}; ('",
    f"x\n{RUNS}\n",
    f"{{{RUNS}}}",
    f"__import__('os').system('touch {CANARY}')",
    f"$(touch {CANARY})",
    f'"""{RUNS}"""',
    "\x1b[31mred\x1b]0;title\x07",
    "a\0b",
    "\u202eevil",
    "<script>x</script>|x",
    "..",
    "../../x",
    "__class__",
    "class",
)
POOL: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1.5, 1e308, math.nan, math.inf, -math.inf),
    *(10**18, 2**63, 10**400, -(10**400), "", "x", "0", "fc", "W", "[", "(", "(?i)x", "(a)", "*"),
    *(
        [],
        {},
        [[]],
        [None],
        [0],
        [-1, 2],
        ["x", 2],
        {"a": 1},
        {"": None},
        [["x"] * 3],
        "x" * 10_000,
    ),
    *("pissa", "branch", "weight", "oi", "io", "eoi", "dora", ["dora"], ["from_weight"], "\ud800"),
)
# Values that a field of a plan, of a rule or of PEFT's configuration may have, but not everywhere.
VALID: dict[str, tuple[Any, ...]] = {
    "init": (True, False, "kaiming_uniform", "orthogonal", "pissa", "olora"),
    "init_lora_weights": (True, False, "gaussian", "pissa", "olora", "eva"),
    "variants": ([], ["dora"], ["fa"], ["from_weight"], ["from_weight", "dora"]),
    "variant": (None, "fa", "dora", "from_weight"),
    "use_dora": (True, False),
    "use_rslora": (True, False),
    "form": ("branch", "weight"),
    "op": ("linear", "addmm", "embedding", "conv1d", "matmul"),
    "layout": ("oi", "io", "oik", "iok", "eio"),
    "r": (1, 2, 3, 4),
    "alpha": (0.0, -6.0, 3.0, 12.0),
    "scaling": (0.0, -1.5, 3.0, 12.0),
    "lora_alpha": (0, -6, 3, 12),
    "dropout": (0.0, 0.5),
    "bias": ("none", "all", "lora_only"),
    "part": (None, "q", "k", "v"),
    "rows": (None, [0, 4], [4, 6], [6, 9], [3, 6]),
    "parts": ({"q": 3, "k": 3, "v": 3}, {"v": 4, "k": 2, "q": 3}),
    "enable": (["q"], ["k", "v"], ["v", "q"]),
    "tokens": ([1], [0, 3], [3, 0]),
    "padding_idx": (None, 0, 3),
    "tied": ([], ["head.weight"], ["fc.weight"]),
    "autocast_adapter_dtype": (True, False),  # others round, with a warning
    "fan_in_fan_out": (True, False),
}


# ---- valid files --------------------------------------------------------------------------------


class Small(nn.Module):
    """Layers that PEFT supports, a head, and a packed bare weight; takes indices (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 7, 3)
        self.fc = nn.Linear(7, 5)
        self.W = nn.Parameter(torch.randn(9, 5) / 3)
        self.head = nn.Linear(9, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv(self.emb(ids).transpose(1, 2))).mean(2)
        x = torch.tanh(self.fc(x)) @ self.W.T
        return self.head(torch.tanh(x))


IDS = torch.tensor([[1, 2, 3, 4, 5], [10, 0, 7, 7, 2]])
LAYERS = [Rule(["emb", "conv", "fc"], lora=LoraConfig(r=2, lora_alpha=6, modules_to_save=["head"]))]
PARTS = [
    Rule("W", lora=LoraConfig(r=2, lora_alpha=3), parts={"q": 4, "k": 2, "v": 3}, enable=["q", "v"])
]
RULES = {
    "rule": [
        {
            "name": ["emb", "fc"],
            "op": ["linear", "embedding"],
            "min_features": 1,
            "lora": {"r": 2, "lora_alpha": 6, "rank_pattern": {"fc": 3}, "bias": "lora_only"},
        },
        {
            "name": "W",
            "parts": {"q": 4, "k": 2, "v": 3},
            "enable": ["q", "v"],
            "lora": {"r": 1, "init_lora_weights": "kaiming_uniform", "lora_alpha": 4},
        },
        {"name": "conv", "kernel_size": 3, "lora": {"r": 1, "use_rslora": True}},
        {"name": "head", "train": True},
    ]
}


@dataclass
class Folder:
    """The contents of an adapter folder, which can be changed."""

    config: Any
    header: Any
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, path: Path) -> Folder:
        with safe_open(path / WEIGHTS, "pt") as file:
            header = json.loads(file.metadata()["fxlora"])
        return cls(json.loads((path / CONFIG).read_text()), header, load_file(path / WEIGHTS))

    def write(self, path: Path) -> None:
        metadata = None if self.header is None else {"fxlora": written(self.header)}
        tensors = {key: tensor.clone().contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, path / WEIGHTS, metadata)
        (path / CONFIG).write_bytes(written(self.config).encode("utf-8", "surrogatepass"))


def written(data: Any) -> str:
    return data if isinstance(data, str) else json.dumps(data)


# ---- changes ------------------------------------------------------------------------------------


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value in data, as its container and its key."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in list(keys):
        yield data, key
        yield from places(data[key])


def value_for(rng: random.Random, now: Any) -> Any:
    """Return another value for a place: an odd one, code, or one near the present value."""
    kind = rng.random()
    if kind < 0.35:
        return copy.deepcopy(rng.choice(POOL))
    if kind < 0.6:
        return rng.choice(CODE)
    if isinstance(now, str):
        where = rng.randint(0, len(now))
        if now and rng.random() < 0.25:
            return with_a_flip(rng, now)
        return now[:where] + rng.choice((*CODE, "x", ".", "\n", "\0")) + now[where:]
    if isinstance(now, bool):
        return not now
    if isinstance(now, int | float) and abs(now) < 2**1000:
        return rng.choice((now + 1, now - 1, -now, now * 1.5, float(now), now * 10**30, str(now)))
    if isinstance(now, list) and now:
        return rng.choice((now[::-1], now[:-1], now + now[:1], now[0], [*now, rng.choice(POOL)]))
    return [now]


def change(rng: random.Random, data: Any) -> Any:
    """Return data with one change."""
    found = list(places(data))
    if not found or rng.random() < 0.02:
        return rng.choice((*POOL, "[" * 100_000, '{"a":' * 5000, "\udcff", "nonsense"))
    if rng.random() < 0.25:
        edit(rng, found)
        return data
    container, key = rng.choice(found)
    what = rng.random()
    if what < 0.12:
        del container[key]
    elif what < 0.2 and isinstance(container, dict):
        name = rng.choice((*CODE, "x", "r", "tied", "variant", "parts", "name", "use_dora"))
        container[name] = container.pop(key) if rng.random() < 0.5 else value_for(rng, None)
    elif what < 0.28:
        container[key] = copy.deepcopy(rng.choice(found)[0])
    else:
        container[key] = value_for(rng, container[key])
    return data


def edit(rng: random.Random, found: list[tuple[Any, Any]]) -> None:
    """Give a field another valid value: one of its own, or another place's under the same name.

    Or repeat an item of a list, as a plan that is edited by hand may have it twice.
    """
    lists = [c for c, _ in found if isinstance(c, list) and c]
    if lists and rng.random() < 0.1:
        held = rng.choice(lists)
        held.append(copy.deepcopy(rng.choice(held)))
        return
    fields = [(c, k) for c, k in found if isinstance(c, dict)]
    if not fields:
        return
    container, key = rng.choice([(c, k) for c, k in fields if k in VALID] or fields)
    if rng.random() < 0.2:  # a field that may not have been there
        key = rng.choice(list(VALID))
    others = [c[k] for c, k in fields if k == key]
    container[key] = copy.deepcopy(rng.choice([*others, *VALID.get(key, ())]))


def change_tensors(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    key = rng.choice(list(tensors))
    tensor = tensors[key]
    what = rng.randrange(11)
    if what == 0:
        del tensors[key]
    elif what == 9:  # as a flipped bit does
        tensors[with_a_flip(rng, key)] = tensors.pop(key)
    elif what == 10:  # a beginning, or another module, for some or all names
        old, new = rng.choice((("", "model."), (ROOT, f"{ROOT}x."), (ROOT, ""), ("fc", "head")))
        for name in [name for name in tensors if rng.random() < rng.choice((0.5, 1.0))]:
            renamed = name.replace(old, new, 1) if old else new + name
            tensors[renamed] = tensors.pop(name)
    elif what == 1:
        tensors[rng.choice((*CODE[:-3], key + "x", key.replace("lora_A", "lora_B")))] = tensor
    elif what == 2:
        tensors[rng.choice([*CODE, "x"])] = tensors.pop(key)
    elif what == 3 and tensor.is_floating_point() and tensor.numel():
        tensors[key] = tensor.clone().contiguous()
        tensors[key].view(-1)[0] = rng.choice((math.nan, math.inf, -math.inf))
    elif what == 4:
        dtypes = (torch.int64, torch.float16, torch.bfloat16, torch.complex64, torch.bool)
        narrow = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8)
        tensors[key] = tensor.to(rng.choice((*dtypes, *narrow, torch.float64)))
    elif what == 5:
        tensors[key] = rng.choice(
            (
                tensor.flatten(),
                tensor[:-1] if tensor.dim() else tensor,
                tensor.transpose(0, -1),
                tensor.new_zeros(()),
            )
        )
    elif what == 7:  # no entries
        tensors[key] = rng.choice((tensor[:0], tensor[..., :0])) if tensor.dim() else tensor
    elif what == 6:
        tensors[key] = tensor.double() * rng.choice((-2.0, 1e300, 0.0))
    else:
        other = rng.choice(list(tensors))
        tensors[key], tensors[other] = tensors[other], tensors[key]


def with_a_flip(rng: random.Random, text: str) -> str:
    """Return a text with one flipped bit in one letter."""
    where = rng.randrange(len(text))
    return text[:where] + chr(ord(text[where]) ^ 1 << rng.randrange(5)) + text[where + 1 :]


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    where = rng.randrange(len(content) + 1)
    what = rng.randrange(5)
    if what == 0:
        return content[:where]
    if what == 1:
        return content[:where] + rng.randbytes(rng.randint(1, 9)) + content[where:]
    if what == 2:
        return content[:where] + rng.choice(CODE).encode() + content[where + 1 :]
    if what == 3:
        return rng.choice(
            (b"", b"[" * 100_000, b"\xff\xfe", b"\x80\x04pickle", b"a=" + b"[" * 9999)
        )
    flipped = bytearray(content)
    flipped[where % len(content)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


# ---- mutants ------------------------------------------------------------------------------------


@dataclass
class Fuzz:
    """Runs mutants of every kind, and counts the outcomes."""

    seed: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._make()

    def _make(self) -> None:
        """Build the model, and the valid files of its adapters."""
        torch.manual_seed(self.seed)
        self.model = Small().double().eval()
        self.module = fxlora.capture(self.model, IDS).eval()
        self.folders = {name: self._honest(rules) for name, rules in KINDS.items()}
        layers = self.folders["a folder"]
        self.folders["a folder without a plan"] = Folder(layers.config, None, layers.tensors)
        self.plan = fxlora.match(self.module, fxlora.config.rules_from_data(RULES, "rules"))

    def _honest(self, rules: list[Rule]) -> Folder:
        lora = fxlora.inject(self.module, fxlora.match(self.module, rules))
        with torch.no_grad():
            for parameter in fxlora.lora_parameters(lora):
                parameter.normal_()
        with tempfile.TemporaryDirectory() as path:
            fxlora.save_adapter(lora, path)
            return Folder.read(Path(path))

    def run(self, count: int) -> None:
        """Run `count` mutants in a temporary folder, where the canary file would appear."""
        modules: list[tuple[str, Callable[[random.Random], fxlora.CapturedModule]]] = [
            *((name, lambda rng, n=name: self._folder(rng, n)) for name in self.folders),
            ("a rules file", self._rules),
            ("a written plan", self._written_plan),
            ("a plan's entries", self._entries),
            ("an adapter's name", self._adapter_name),
        ]
        roads: list[tuple[str, Callable[[random.Random], list[str]]]] = [
            *((name, lambda rng, m=make: self._shown(m(rng))) for name, make in modules),
            ("a checkpoint", self._checkpoint),
            ("a checkpoint under a plan", self._planned_checkpoint),
            ("a command line", lambda rng: command_line(rng, CODE)),
        ]
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.chdir(path)
            try:
                for number in range(count):
                    self._one(*roads[number % len(roads)], number)
            finally:
                os.chdir(before)

    def _one(self, road: str, make: Callable[[random.Random], list[str]], number: int) -> None:
        label = f"{road}, mutant {number} of seed {self.seed}"
        outcome = "accepted"
        try:
            said = make(random.Random(f"{self.seed} {number}"))
        except FxLoraError as error:
            outcome, said = "typed", [str(error)]
        except Wrong as error:
            outcome, said = "wrong", []
            self.failures.append(f"{label}: {error}")
        except Exception as error:  # noqa: BLE001 - untyped errors are findings
            outcome, said = "untyped", []
            self.failures.append(f"{label}: {type(error).__name__}: {str(error)[:200]!r}")
        if any(re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", s) for s in said):
            outcome = "wrong"
            self.failures.append(f"{label}: control characters are printed")
        if Path(CANARY).exists():
            Path(CANARY).unlink()
            outcome = "executed"
            self.failures.append(f"{label}: its text ran as code")
        self.counts[road, outcome] += 1

    def _shown(self, module: fxlora.CapturedModule) -> list[str]:
        """Return every printed form of a module's plan; check its fold, too."""
        assert module.plan is not None
        formats = ("table", "github", "html", "csv", "json")
        said = [str(module.plan), *(fxlora.report(module, f) for f in formats)]
        said += [module.plan.to_toml(), module.plan.to_json()] if module.plan.rules else []
        same(fxlora.fold(module)(IDS), module(IDS))
        return said

    def _checkpoint(self, rng: random.Random) -> list[str]:
        return checkpoint(rng, change, change_tensors, change_bytes)

    def _planned_checkpoint(self, rng: random.Random) -> list[str]:
        """Fold a mutant of fxlora's own folder into the files of the model."""
        path, base, out = Path("adapter"), Path("base.st"), Path("out.st")
        out.unlink(missing_ok=True)
        save_file(self.model.state_dict(), base)
        self._write_mutant(rng, rng.choice(list(KINDS)), path)
        report = fxlora.fold_checkpoint(base, path, out)
        fxlora.verify_checkpoint(base, path, out)
        held = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, expected in (held | self._weights(path, None)).items():
            same(load_file(out)[name], expected)
        return [str(report), report.to_json()]

    # ---- folders --------------------------------------------------------------------------------

    def _write_mutant(self, rng: random.Random, name: str, path: Path) -> Folder:
        """Write a folder with one to three changes; return its content."""
        honest = self.folders[name]
        found = Folder(*copy.deepcopy((honest.config, honest.header)), dict(honest.tensors))
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for _ in range(rng.choice((1, 1, 2, 3))):
            what = rng.random()
            if what < 0.35 and found.header is not None:
                found.header = change(rng, found.header)
            elif what < 0.65:
                found.config = change(rng, found.config)
            elif found.tensors:
                change_tensors(rng, found.tensors)
        try:
            found.write(path)
        except Exception:  # noqa: BLE001 - the format cannot hold the mutant: write the valid file
            honest.write(path)
        if rng.random() < 0.2:
            file = path / rng.choice((WEIGHTS, CONFIG))
            file.write_bytes(change_bytes(rng, file.read_bytes()))
        return found

    def _folder(self, rng: random.Random, name: str) -> fxlora.CapturedModule:
        path = Path("adapter")
        found = self._write_mutant(rng, name, path)
        loaded = fxlora.load_adapter(self.module, path).eval()
        # Inits that change W0 have another formula, which tests/test_variants.py checks.
        if found.header is not None or all(e.init not in STARTS for e in loaded.plan or ()):
            weights = self._weights(path, loaded.plan)
            same(loaded(IDS), functional_call(self.model, weights, (IDS,)))
        return loaded

    def _weights(self, path: Path, plan: Plan | None) -> dict[str, torch.Tensor]:
        """Return the source's parameters with W + s·BA, from the numbers in the file.

        The scalings are those of its header, or else of the plan.
        """
        with safe_open(path / WEIGHTS, "pt") as file:
            header = json.loads((file.metadata() or {}).get("fxlora", "null"))
        tensors = {k: t.double() for k, t in load_file(path / WEIGHTS).items()}
        said = {_site(e): e["scaling"] for e in header["entries"]} if header else None
        scalings = said or {entry.site: entry.scaling for entry in plan or ()}
        if plan is not None and {entry.site for entry in plan} != set(scalings):
            raise Wrong("it adapts other sites than the file says")
        tensors = without_beginning(tensors, scalings)
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        for site, s in scalings.items():
            ends = ENDS.get(site, ("lora_A.weight", "lora_B.weight"))
            a, b = (tensors[f"{prefix_of(site)}.{end}"] for end in ends)
            delta = s * (b.flatten(1) @ a.flatten(1))
            if site.startswith("W."):
                start = {"W.q": 0, "W.v": 6}[site]
                weights["W"] = weights["W"].clone()
                weights["W"][start : start + len(delta)] += delta
                continue
            weight = weights[f"{site}.weight"]
            weights[f"{site}.weight"] = weight + (delta.T if site == "emb" else delta).reshape(
                weight.shape
            )
        return weights | {n: tensors[n] for n in weights if n in tensors}

    # ---- rules and plans ------------------------------------------------------------------------

    def _rules(self, rng: random.Random) -> fxlora.CapturedModule:
        return self._matched(rng, copy.deepcopy(RULES))

    def _written_plan(self, rng: random.Random) -> fxlora.CapturedModule:
        return self._matched(rng, json.loads(self.plan.to_json()))

    def _matched(self, rng: random.Random, data: Any) -> fxlora.CapturedModule:
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = change(rng, data)
        path = Path(rng.choice(("rules.toml", "rules.json")))
        try:
            text = tomli_w.dumps(data) if path.suffix == ".toml" else written(data)
            content = text.encode("utf-8", "surrogatepass")
        except Exception:  # noqa: BLE001 - TOML cannot hold the value, but JSON can
            path = Path("rules.json")
            content = written(data).encode("utf-8", "surrogatepass")
        if rng.random() < 0.15:
            content = change_bytes(rng, content)
        path.write_bytes(content)
        return self._injected(fxlora.match(self.module, path))

    def _entries(self, rng: random.Random) -> fxlora.CapturedModule:
        entries = [entry.to_data() for entry in self.plan]
        for _ in range(rng.choice((1, 1, 2))):
            entries = change(rng, entries)
        listed = entries if isinstance(entries, list) else [entries]
        trained = self.plan.trained if rng.random() < 0.7 else (rng.choice(CODE),)
        return self._injected(Plan(tuple(map(Entry.from_data, listed)), trained))

    def _adapter_name(self, rng: random.Random) -> fxlora.CapturedModule:
        name = value_for(rng, "default")
        if rng.random() < 0.5:
            self.folders["a folder"].write(Path())
            return fxlora.load_adapter(self.module, ".", adapter_name=name).eval()
        return self._injected(fxlora.match(self.module, LAYERS, adapter_name=name))

    def _injected(self, plan: Plan) -> fxlora.CapturedModule:
        """Inject a plan; check that the outputs are the source's, unless B starts at random."""
        injected = fxlora.inject(self.module, plan).eval()
        if all(entry.init is not False for entry in plan):
            same(injected(IDS), self.model(IDS))
        return injected


def prefix_of(site: str) -> str:
    return f"W_adapter.{site[2:]}" if site.startswith("W.") else site


def without_beginning(
    tensors: dict[str, torch.Tensor], sites: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Return tensors without the beginnings of their names, of which each module must have one."""
    found = dict(tensors)
    for module in dict.fromkeys([*map(prefix_of, sites), "head"]):
        name = re.compile(rf"(?<![^.]){re.escape(module)}\.(lora_|weight$|bias$)")
        starts = {key[: at.start()] for key in tensors if (at := name.search(key))}
        if len(starts) > 1:
            raise Wrong(f"it reads several beginnings of '{module}' as one: {starts}")
        for start in starts:
            mine = [key for key in tensors if key.startswith(f"{start}{module}.")]
            found |= {key.removeprefix(start): found.pop(key) for key in mine}
    return found


def _site(entry: dict[str, Any]) -> str:
    """Return the name of a site from its parameter; the file's own name of it is only a label."""
    name = entry["parameter"]
    return entry["site"] if name == "W" else name.removesuffix(".weight")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.allclose(found, expected, rtol=1e-8, atol=1e-8, equal_nan=True):
        raise Wrong(f"outputs are off by {float((found - expected).abs().max()):g}")


ENDS = {"emb": ("lora_embedding_A", "lora_embedding_B")}
KINDS = {"a folder": LAYERS, "a folder that PEFT cannot read": PARTS}
OUTCOMES = ("accepted", "typed", "untyped", "wrong", "executed")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=5400, help="mutants")
    parser.add_argument("--quick", action="store_true", help="a tenth of them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fuzz = Fuzz(options.seed)
    fuzz.run(options.count // 10 if options.quick else options.count)
    roads = list(dict.fromkeys(road for road, _ in fuzz.counts))
    rows = [[road, *(fuzz.counts[road, o] for o in OUTCOMES)] for road in roads]
    rows = [[road, sum(numbers), *numbers] for road, *numbers in rows]
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 7))])
    print(render(["file", "inputs", *OUTCOMES], rows))
    print(*fuzz.failures[:40], sep="\n")
    raise SystemExit(1 if fuzz.failures else 0)


if __name__ == "__main__":
    main()
