"""Mutants of checkpoints on disk, and of command lines, for fuzz.py.

A checkpoint is folded (fxlora.fold_checkpoint): refused by type, with nothing written, or right by
a formula that shares no code with fxlora. A command line ends with status 0 or 2.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fxlora
from fxlora import FxLoraError, cli

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
INDEX = "model.safetensors.index.json"
ROOT = "base_model.model."
Tensors = dict[str, torch.Tensor]


class Wrong(Exception):
    """A mutant made another result than its files define."""


# ---- valid files --------------------------------------------------------------------------------


def shards() -> list[Tensors]:
    """Return the tensors of a checkpoint in two files."""
    first = {
        "model.a.weight": torch.randn(7, 5, dtype=torch.float64),
        "model.a.bias": torch.randn(7, dtype=torch.float64),
        "model.emb.weight": torch.randn(11, 6, dtype=torch.float64),
    }
    second = {
        "model.b.weight": torch.randn(4, 9, dtype=torch.float64),
        "model.conv.weight": torch.randn(3, 2, 5, dtype=torch.float64),
        "steps": torch.arange(3),
    }
    return [first, second]


def adapter() -> tuple[dict[str, Any], Tensors]:
    """Return the configuration and the tensors of an adapter for it, as PEFT writes them."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["a", "b"]}
    config |= {"rank_pattern": {"conv": 1}, "alpha_pattern": {"b": 3}, "use_rslora": False}
    config |= {"bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
    shapes = {
        "a.lora_A.weight": (2, 5),
        "a.lora_B.weight": (7, 2),
        "emb.lora_embedding_A": (2, 11),
        "emb.lora_embedding_B": (6, 2),
        "b.lora_A.weight": (2, 9),
        "b.lora_B.weight": (4, 2),
        "conv.lora_A.weight": (1, 2, 5),
        "conv.lora_B.weight": (3, 1, 1),
    }
    return config, {f"{ROOT}model.{n}": torch.randn(shape) for n, shape in shapes.items()}


# ---- checkpoints --------------------------------------------------------------------------------


def checkpoint(
    rng: random.Random,
    change: Callable[[random.Random, Any], Any],
    change_tensors: Callable[[random.Random, Tensors], None],
    change_bytes: Callable[[random.Random, bytes], bytes],
) -> list[str]:
    """Fold a mutant of a checkpoint or of its adapter; return what is printed."""
    base, folder, out = Path("base"), Path("adapter"), Path("out")
    for path in (base, folder, out):
        shutil.rmtree(path, ignore_errors=True)
    Path("elsewhere").unlink(missing_ok=True)
    base.mkdir()
    folder.mkdir()
    parts = shards()
    config, tensors = adapter()
    index: Any = {
        "weight_map": {n: f"{i}.safetensors" for i, part in enumerate(parts) for n in part}
    }
    files: dict[Path, Any] = {
        base / INDEX: index,
        base / "config.json": {"text_config": {"vocab_size": 11}, "tie_word_embeddings": False},
        folder / CONFIG: config,
    }
    saved = {
        base / "0.safetensors": parts[0],
        base / "1.safetensors": parts[1],
        folder / WEIGHTS: tensors,
    }
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            path = rng.choice(list(files))
            files[path] = change(rng, files[path])
        elif rng.random() < 0.2:  # a name in several files
            part, other = rng.sample(list(saved.values()), 2)
            name = rng.choice(list(part))
            other[name] = part[name] if rng.random() < 0.5 else part.pop(name)
        else:
            change_tensors(rng, saved[rng.choice(list(saved))])
    for path, data in files.items():
        text = data if isinstance(data, str) else json.dumps(data)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for path, held in saved.items():
        try:
            save_file({n: t.clone().contiguous() for n, t in held.items()}, path)
        except Exception:  # noqa: BLE001 - the format cannot hold the mutant: leave it out
            save_file({"x": torch.ones(2)}, path)
    if rng.random() < 0.4:
        path = rng.choice([*files, *saved])
        rng.choice((_bytes, _file, _link))(rng, path, change_bytes)
    if rng.random() < 0.25:
        _header(rng, rng.choice(list(saved)), change)
    before = sorted(Path().rglob("*"))
    try:
        report = fxlora.fold_checkpoint(base, folder, out)
    except FxLoraError:
        if sorted(Path().rglob("*")) != before:
            raise Wrong("a refused fold left files") from None
        raise
    fxlora.verify_checkpoint(base, folder, out)
    _check(base, folder, out, report)
    return [str(report), report.to_json()]


ChangeBytes = Callable[[random.Random, bytes], bytes]


def _bytes(rng: random.Random, path: Path, change_bytes: ChangeBytes) -> None:
    path.write_bytes(change_bytes(rng, path.read_bytes()))


def _file(rng: random.Random, path: Path, _: ChangeBytes) -> None:
    """Write a file with another length of its header, or nothing; or remove it."""
    content = path.read_bytes()
    sizes = (0, 1, 2, len(content), len(content) + 1, 10**8, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
    size = rng.choice(sizes).to_bytes(8, "little")
    found = rng.choice((b"", size, size + content[8:], content[:8], content * 2, None))
    path.unlink()
    if found is not None:
        path.write_bytes(found)


def _link(rng: random.Random, path: Path, _: ChangeBytes) -> None:
    """Put a link in place of a file: to its content elsewhere, to another file, or to nothing."""
    elsewhere = Path("elsewhere")
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    places = (elsewhere, path, Path("nowhere"), Path("base"), *sorted(Path("base").iterdir()))
    path.symlink_to(rng.choice(places).absolute())


def _header(rng: random.Random, path: Path, change: Callable[[random.Random, Any], Any]) -> None:
    """Change the header of a .safetensors file: names, dtypes, shapes and offsets."""
    try:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
    except (OSError, ValueError, MemoryError, OverflowError):  # changed before
        return
    codes = ("F8_E4M3", "F8_E5M2", "U8", "BOOL", "I64", "F4", "F64", "F32", "BF16", "C64", "X")
    for _ in range(rng.choice((1, 1, 2))):
        held = rng.choice([h for h in header.values() if isinstance(h, dict)] or [{}])
        if rng.random() < 0.4:
            held["dtype"] = rng.choice(codes)
        else:
            header = change(rng, header)
        if not isinstance(header, dict):
            break
    text = header if isinstance(header, str) else json.dumps(header)
    coded = text.encode("utf-8", "surrogatepass")
    path.write_bytes(len(coded).to_bytes(8, "little") + coded + content[8 + size :])


def _check(base: Path, folder: Path, out: Path, report: fxlora.CheckpointReport) -> None:
    """Raise Wrong unless the result is W0 + s·BA from the numbers in the files."""
    before, after = _tensors(base), _tensors(out)
    pairs = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    alphas = [config.get("lora_alpha", 8), *(config.get("alpha_pattern") or {}).values()]
    used = 0
    for name, tensor in before.items():
        sites = [s for s in _sites(pairs) if name.endswith(f".{s.rpartition('.')[2]}.weight")]
        if len(sites) != 1:
            replaced = [t for k, t in pairs.items() if k.endswith(name) and "lora_" not in k]
            if not _equal(after[name], tensor) and not replaced:
                raise Wrong(f"'{name}' changed")
            continue
        a, b = (
            pairs[
                next(k for k in pairs if k.startswith(f"{sites[0]}.lora") and f"_{x}" in k)
            ].double()
            for x in "AB"
        )
        found = [t for t in report.folded if t.name == name]
        if not found or not any(
            abs(found[0].scaling - alpha / scale) < 1e-9
            for alpha in alphas
            for scale in (len(a), len(a) ** 0.5)
        ):
            raise Wrong(f"'{name}' is scaled by a number that the configuration has not")
        used += 1
        delta = found[0].scaling * (b.flatten(1) @ a.flatten(1))
        turned = found[0].layout == "io"  # as an embedding, or transformers' Conv1D
        exact = tensor.double() + (delta.T if turned else delta).reshape(tensor.shape)
        good = tensor.isfinite()  # a base may have NaN
        error = (after[name].double() - exact)[good].abs().max() / exact[good].abs().max()
        if not error < 2 * torch.finfo(tensor.dtype).eps:
            raise Wrong(f"'{name}' is off by {float(error):g}")
    if used != len(_sites(pairs)):
        raise Wrong("a pair was not used")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b)]
    return a.shape == b.shape and torch.equal(*flat)


def _sites(pairs: Tensors) -> list[str]:
    return sorted({key.partition(".lora_")[0] for key in pairs if ".lora_" in key})


def _tensors(path: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            found |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    return found


# ---- command lines ------------------------------------------------------------------------------

HOUSE = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
"""
COMMANDS = (
    "fold base.safetensors small -o out.safetensors",
    "fold base.safetensors --adapter small -o out.safetensors --dry-run --json",
    "fold base.safetensors small --model fuzzed:build -o out.safetensors",
    "verify base.safetensors small done.safetensors",
    "verify base.safetensors --adapter small done.safetensors --strict-base --json",
    "fold base.safetensors small --allow-nonfinite --strict-base -o out.safetensors",
    "fold base.safetensors small --key-mapping ^0=0 -o out.safetensors",
    "verify base.safetensors small base.safetensors",
    "fold fuzzed:build --input 2x5 --adapter small -o out.safetensors",
    "verify fuzzed:build --input 2x5 --adapter small --reads",
    "plan fuzzed:build --target 0 -r 2 --alpha 3 --json --meta",
    "report fuzzed:build --adapter small --format csv",
    "adapt fuzzed:build --target 0,2 -r 2 --out new --budget 9%",
)
WORDS = (
    *(
        "",
        " ",
        "-",
        "--",
        "-o",
        "--out",
        "--model",
        "--dry-run",
        "--json",
        "--meta",
        "--help",
        "--adapter",
        "--strict-base",
        "--allow-nonfinite",
        "--reads",
        "--folded",
        "--checkpoint",
        "--rules",
        "--seed",
        "--key-mapping",
        "^=base_model.",
        "(=x",
        "^0=\\9",
    ),
    *(
        "base.safetensors",
        "small",
        "small/adapter_config.json",
        "/dev/null",
        "done.safetensors",
        "link.safetensors",
        "fuzzed:build",
        "fuzzed:nothing",
        "nothing:build",
        "nowhere",
        ".",
    ),
    *(
        "2x5",
        "0x3",
        "9" * 40,
        "-1",
        "nan",
        "1e400",
        "x=2x5:int64:9",
        "100%",
        "all-linear",
        "*",
        "re:(",
    ),
    *(
        "\x1b[31mred",
        "a\nb",
        "\udcff",
        "x" * 5000,
        "é",
        "..",
        "/",
        "out.safetensors/x",
        "--frobnicate",
    ),
)


def prepare() -> None:
    """Write the files that the command lines name, into the current folder."""
    Path("fuzzed.py").write_text(HOUSE)
    torch.manual_seed(0)
    state = {"0.weight": torch.randn(7, 5), "0.bias": torch.randn(7), "2.weight": torch.randn(3, 7)}
    state["2.bias"] = torch.randn(3)
    save_file(state, "base.safetensors")
    Path("small").mkdir(exist_ok=True)
    tensors = {
        f"{ROOT}0.lora_A.weight": torch.randn(2, 5),
        f"{ROOT}0.lora_B.weight": torch.randn(7, 2),
    }
    save_file(tensors, f"small/{WEIGHTS}")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"]}
    Path(f"small/{CONFIG}").write_text(json.dumps(config))
    if not Path("link.safetensors").is_symlink():
        Path("link.safetensors").symlink_to("base.safetensors")
    if not Path("done.safetensors").exists():
        fxlora.fold_checkpoint("base.safetensors", "small", "done.safetensors")


def command_line(rng: random.Random, code: tuple[str, ...]) -> list[str]:
    """Run a mutant of a command line; return its output, or raise what it reports."""
    prepare()
    words: list[str] = [*rng.choice(COMMANDS).split()]
    for _ in range(rng.choice((0, 1, 1, 2))):
        where = rng.randrange(len(words) + 1)
        new = rng.choice((*WORDS, *code))
        what = rng.random()
        if what < 0.3:
            words[where : where + 1] = []
        elif what < 0.6:
            words[where:where] = [new]
        elif what < 0.8:
            words[where : where + 1] = [new]
        else:
            other = rng.randrange(len(words))
            words[other : other + 1] = words[other : other + 1] * 2
    said, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            status = cli.main(words)
    except SystemExit as end:  # --help and --version
        status = end.code
    if status == 2:
        raise FxLoraError(errors.getvalue())
    if status != 0:
        raise RuntimeError(f"{words}: status {status}: {errors.getvalue()}")
    return [said.getvalue()]
