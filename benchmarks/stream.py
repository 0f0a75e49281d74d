"""Fold an adapter into a checkpoint on disk, beside a plain copy, and PEFT's and mergekit's way.

The script makes the checkpoint (Llama's layers in bfloat16, in shards) and two adapters: of q and
v, and of all seven projections. Each side runs in a process of its own, which imports first and
then takes the time, in interleaved rounds: cold, with the base out of the page cache, and warm.
Memory is the peak of the process (VmHWM) above what it has after its imports. Sides in brackets
are no folds but limits of one, on one thread: bytes that are read, converted and written, and
products alone.

    python benchmarks/stream.py                        # 4 GB; ten minutes
    python benchmarks/stream.py --only "all linear"    # one of the adapters
    python benchmarks/stream.py --quick                # 100 MB

mergekit may be in another environment: --mergekit PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import Report, parser, start
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

R, ALPHA = 16, 32
PROJECTIONS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
ADAPTERS = {"q and v": ["q_proj", "v_proj"], "all linear": list(PROJECTIONS)}
SHARD = 2**30

COPY, PEFT, MERGEKIT = "copy", "PEFT merge_and_unload", "mergekit base+adapter"
PRODUCT = """
import torch
from safetensors.torch import load_file
def run():
    torch.set_num_threads(1)
    pairs = load_file(ADAPTER + "/adapter_model.safetensors")
    for key, b in pairs.items():
        if key.endswith("lora_B.weight"):
            a, b = pairs[key.replace("lora_B", "lora_A")].to(DTYPE), b.to(DTYPE)
            block = torch.zeros(256, a.shape[1], dtype=DTYPE)
            for rows in b.split(256):
                block[:len(rows)].addmm_(rows, a, alpha=2)
"""
SIDES = {
    COPY: "import shutil\nrun = lambda: shutil.copytree(BASE, OUT)",
    "fxlora.fold_checkpoint": (
        "import fxlora\nrun = lambda: fxlora.fold_checkpoint(BASE, ADAPTER, OUT)"
    ),
    PEFT: """
import torch, peft
from transformers import LlamaForCausalLM
def run():
    model = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, ADAPTER)
    model.merge_and_unload(progressbar=False).save_pretrained(OUT)
""",
    MERGEKIT: """
import torch, transformers, peft
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
def run():
    models = [{"model": f"{BASE}+{ADAPTER}"}]
    config = {"merge_method": "passthrough", "dtype": "bfloat16", "models": models}
    options = MergeOptions(
        lora_merge_cache=OUT + ".cache", lora_merge_dtype="bfloat16", copy_tokenizer=False,
        write_model_card=False, quiet=True,
    )
    run_merge(MergeConfiguration.model_validate(config), OUT, options)
""",
    "[read, to float32 and back, write]": """
import os, pathlib, torch
def run():
    os.mkdir(OUT)
    torch.set_num_threads(1)
    memory = torch.empty(2**21, dtype=torch.uint8)
    held, wide = memory.view(torch.bfloat16), torch.empty(2**20)
    for path in pathlib.Path(BASE).iterdir():
        target = open(f"{OUT}/{path.name}", "wb", buffering=0)
        with open(path, "rb", buffering=0) as source, target:
            while count := source.readinto(memory.numpy()):
                held.copy_(wide.copy_(held))
                target.write(memory.numpy()[:count])
""",
    "[B·A alone, in float64]": PRODUCT.replace("DTYPE", "torch.float64"),
    "[B·A alone, in float32]": PRODUCT.replace("DTYPE", "torch.float32"),
}
ONCE = (PEFT, MERGEKIT)  # their times are not near the others'
CHILD = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
BASE, ADAPTER, OUT, THREADS = sys.argv[1:]
{imports}
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(int(THREADS))
before = peak()
wall, cpu = time.perf_counter(), time.process_time()
run()
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak() - before]))
"""


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--folder", type=Path, help="where to make the files")
    options_parser.add_argument("--only", choices=ADAPTERS, help="one of the adapters")
    options_parser.add_argument(
        "--mergekit", default=sys.executable, metavar="PYTHON", help="an interpreter that has it"
    )
    options = start(options_parser, rounds=3)
    report = Report(options)
    sides = [side for side in SIDES if side != MERGEKIT or has_mergekit(options.mergekit)]
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        config = LlamaConfig(
            hidden_size=512 if options.quick else 2048,
            intermediate_size=1408 if options.quick else 5632,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_hidden_layers=8 if options.quick else 42,
            vocab_size=32000,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        size, largest = write_base(folder / "base", config)
        print(f"\ncheckpoint: {size / 1e9:.2f} GB, its largest tensor {largest / 2**20:.0f} MiB")
        for name, targets in ADAPTERS.items():
            if options.only not in (None, name):
                continue
            adapter = folder / name.replace(" ", "_")
            held = write_adapter(adapter, folder / "base", targets)
            title = f"{name}: r = {R}, the adapter has {held / 2**20:.0f} MiB"
            report.add(title, measured(folder, adapter, sides, options))


def has_mergekit(python: str) -> bool:
    """Whether an interpreter can import mergekit; if it cannot, say why."""
    check = [python, "-c", "from mergekit.merge import run_merge; from importlib import metadata; "]
    check[-1] += "print(metadata.version('mergekit'))"
    try:
        run = subprocess.run(check, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        print(f"mergekit: skipped, {said.strip().splitlines()[-1]}")
        return False
    print(f"mergekit: {run.stdout.strip()}")
    return True


# ---- files --------------------------------------------------------------------------------------


def shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden // config.num_attention_heads * config.num_key_value_heads
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        for name, owner in PROJECTIONS.items():
            out = narrow if name in ("k_proj", "v_proj") else hidden if owner != "mlp" else inner
            shape = (hidden, inner) if name == "down_proj" else (out, hidden)
            yield f"model.layers.{layer}.{owner}.{name}.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)


def write_base(folder: Path, config: Any) -> tuple[int, int]:
    """Write a checkpoint in shards; return its size, and that of its largest tensor."""
    config.save_pretrained(folder)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    largest = 0

    def flush() -> None:
        name = f"model-{len(set(places.values())):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(config):
        shard[name] = (torch.randn(shape) * 0.02).to(torch.bfloat16)
        largest = max(largest, shard[name].nbytes)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.iterdir()), largest


def write_adapter(folder: Path, base: Path, targets: list[str]) -> int:
    """Write an adapter in PEFT's layout, with random A and B; return its size."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.split(".")[-2] in targets:
                    out, into = file.get_slice(name).get_shape()
                    site = f"base_model.model.{name.removesuffix('.weight')}"
                    tensors[f"{site}.lora_A.weight"] = torch.randn(R, into) * into**-0.5
                    tensors[f"{site}.lora_B.weight"] = torch.randn(out, R) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    return (folder / "adapter_model.safetensors").stat().st_size


# ---- runs ---------------------------------------------------------------------------------------


def measured(folder: Path, adapter: Path, sides: list[str], options: Any) -> list[dict[str, Any]]:
    """Run all sides in turn, cold and warm; return the table's rows."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    wrong = {side: "" for side in sides if side == COPY or side.startswith("[")}
    for number in range(options.rounds):
        for cache in ("cold", "warm"):
            for side in sides:
                alone = side.startswith("[B") or side in ONCE
                if alone and (number or cache == "cold"):
                    continue
                out = folder / "out"
                for old in (out, folder / "out.cache"):
                    shutil.rmtree(old, ignore_errors=True)
                os.sync()
                set_cache(folder / "base", cache)
                found.setdefault((side, cache), []).append(
                    child(side, folder, adapter, out, options)
                )
                if side not in wrong:
                    wrong[side] = not_nearest(folder / "base", adapter, out)
    rows: list[dict[str, Any]] = []
    for (side, cache), runs in sorted(found.items(), key=lambda item: (item[0][1], -len(item[1]))):
        copies = found[COPY, cache]
        ratio = statistics.median(c[0] / run[0] for c, run in zip(copies, runs, strict=False))
        seconds = sorted(run[0] for run in runs)
        rows.append(
            {
                "cache": cache,
                "side": side,
                "seconds: median (min–max)": f"{statistics.median(seconds):.2f} "
                f"({seconds[0]:.2f}–{seconds[-1]:.2f})",
                "copy's seconds / this": f"{ratio:.2f}",
                "CPU seconds": f"{statistics.median(run[1] for run in runs):.2f}",
                "peak memory, MiB": f"{max(run[2] for run in runs) / 2**20:.0f}",
                "not correctly rounded": wrong[side],
            }
        )
    return rows


def set_cache(base: Path, cache: str) -> None:
    """Bring the base into the page cache, or out of it."""
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            if cache == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def child(side: str, folder: Path, adapter: Path, out: Path, options: Any) -> list[float]:
    """Run one side in a process; return its seconds, CPU seconds, and bytes."""
    script = CHILD.format(imports=SIDES[side])
    words = [str(folder / "base"), str(adapter), str(out), str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    run = subprocess.run(
        [options.mergekit if side == MERGEKIT else sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if run.returncode:
        raise RuntimeError(f"{side}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def not_nearest(base: Path, adapter: Path, out: Path) -> str:
    """Count the entries of the folded weights that are not W0 + s·BA, rounded once."""
    wrong = entries = 0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as pairs:
        where = {n: p for p in sorted(out.glob("*.safetensors")) for n in names(p)}
        for path in sorted(base.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    site = f"base_model.model.{name.removesuffix('.weight')}"
                    if f"{site}.lora_A.weight" not in pairs.keys():  # noqa: SIM118
                        continue
                    a = pairs.get_tensor(f"{site}.lora_A.weight").double()
                    b = pairs.get_tensor(f"{site}.lora_B.weight").double()
                    weight = file.get_tensor(name)
                    with safe_open(where[name], "pt") as folded:
                        found = folded.get_tensor(name)
                    for first in range(0, len(weight), 64):  # few rows, which stay in the cache
                        rows = slice(first, first + 64)
                        exact = weight[rows].double().addmm_(b[rows], a, alpha=ALPHA / R)
                        wrong += int((found[rows] != rounded(exact)).sum())
                    entries += found.numel()
    return f"{wrong:,} of {entries:,} ({wrong / entries:.4%})"


def names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def rounded(exact: torch.Tensor) -> torch.Tensor:
    """Round float64 to bfloat16 once: to odd first (Boldo and Melquiond 2008)."""
    single = exact.float()
    rest = exact - single.double()
    even = (single.view(torch.int32) & 1) == 0
    towards = torch.where(rest > 0, torch.inf, -torch.inf).float()
    return torch.where(even & (rest != 0), torch.nextafter(single, towards), single).bfloat16()


if __name__ == "__main__":
    main()
