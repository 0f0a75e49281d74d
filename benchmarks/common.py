"""Shared by the benchmarks: options, header, interleaved timing, memory, tables."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

LIBRARIES = ("torch", "fxlora", "peft", "transformers", "torchvision")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- options and report -------------------------------------------------------------------------


def untimed_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the raw data here")
    return result


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark of time has."""
    result = untimed_parser(description)
    result.add_argument("--rounds", type=int, help="timed runs of every side")
    result.add_argument("--quick", action="store_true", help="small models, three rounds")
    return result


def start(options_parser: argparse.ArgumentParser, rounds: int = 0) -> argparse.Namespace:
    """Parse the options; set torch's threads and seed."""
    options = options_parser.parse_args()
    if rounds:
        options.rounds = options.rounds or (3 if options.quick else rounds)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


class Report:
    """Prints the header and the tables as they come, and keeps them for the JSON file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.file: Path | None = options.json
        self.data: dict[str, Any] = {"header": header(options), "tables": []}
        print("\n".join(f"{key}: {value}" for key, value in self.data["header"].items()))

    def add(
        self,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        timings: Mapping[str, Timing] | None = None,
        note: str = "",
    ) -> None:
        print(f"\n{title}\n\n{table(rows)}")
        if note:
            print(f"\n{note}")
        seconds = {side: timing.seconds for side, timing in (timings or {}).items()}
        self.data["tables"].append({"title": title, "rows": rows, "seconds": seconds})
        self.save()

    def save(self) -> None:
        """Write the data so far, if there is a JSON file."""
        if self.file:
            self.file.write_text(json.dumps(self.data, indent=2))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of formatted cells as a table; columns of numbers are right-aligned."""
    columns = zip(*(row.values() for row in rows), strict=True)
    align = ["right" if all(c[:1].isdigit() for c in column) else "left" for column in columns]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)


def header(options: argparse.Namespace) -> dict[str, str]:
    """Return everything that the measured numbers depend on."""
    libraries = dict.fromkeys((*LIBRARIES, *getattr(options, "library", ())))
    found = {
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in libraries)
        + f", python {platform.python_version()}",
        "device": device_name(options.device),
        "threads": f"{options.threads} of {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f} at the start",
        "memory": "huge pages for large CPU tensors "
        + ("on" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "off")
        + " (THP_MEM_ALLOC_ENABLE)",
        "options": ", ".join(
            f"{name}={_plain(value)}" for name, value in vars(options).items() if name != "json"
        ),
    }
    if "rounds" in options:
        found["times"] = (
            f"median (min–max) of {options.rounds} interleaved rounds; ratios are the median "
            "of the ratios within each round"
        )
    return found


def _plain(value: object) -> object:
    return " ".join(map(str, value)) if isinstance(value, list) else value


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = {
        word for line in lines if line.startswith(("flags", "Features")) for word in line.split()
    }
    units = ", ".join(sorted(flags & HALF_UNITS)) or "none"
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{models[0] if models else platform.processor()} ({kind}; half precision: {units})"


# Flags of CPUs that compute in half precision; the others convert to float32 and back.
HALF_UNITS = {
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
    "avx_ne_convert",
    "bf16",
    "fphp",
}


# ---- time ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the compared alternatives: `run` is timed, and gets the result of `prepare`."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Timing:
    """The times of one side in each round."""

    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        middle = statistics.median(self.seconds)
        decimals = 2 if middle < 0.01 else 1 if middle < 0.1 else 0
        low, middle, high = (
            f"{1e3 * s:.{decimals}f}" for s in (min(self.seconds), middle, max(self.seconds))
        )
        return f"{middle} ({low}–{high})"

    def over(self, other: Timing) -> float:
        """Return this side's time over the other's: the median of the ratios in each round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / its for mine, its in pairs)


def interleave(
    sides: Mapping[str, Side], rounds: int, device: str, warmup: int = 1
) -> dict[str, Timing]:
    """Time the sides round-robin (A B C, B C A, …), after untimed rounds to warm up."""
    timings = {name: Timing() for name in sides}
    names = list(sides)
    gc.collect()
    gc.freeze()  # collections between runs then skip imported objects
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = timed(sides[name], device)
            if number >= 0:
                timings[name].seconds.append(seconds)
    gc.unfreeze()
    return timings


def timed(side: Side, device: str) -> float:
    given = side.prepare()
    gc.collect()
    gc.disable()
    synchronize(device)
    begin = time.perf_counter()
    result = side.run(given)
    synchronize(device)
    seconds = time.perf_counter() - begin
    gc.enable()
    del result  # freed outside the timed interval, like `given`
    return seconds


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


# ---- memory -------------------------------------------------------------------------------------


def step_memory(forward: Callable[[], torch.Tensor], module: nn.Module, device: str) -> int:
    """Return the bytes that a training step takes besides the module's own tensors.

    On CUDA this is the peak minus the memory allocated before the step; on the CPU, the size of
    the tensors saved for backward, each storage counted once.
    """
    module.zero_grad(set_to_none=True)
    return _peak(forward, device) if device.startswith("cuda") else _saved(forward, module)


def _peak(forward: Callable[[], torch.Tensor], device: str) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward().backward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _saved(forward: Callable[[], torch.Tensor], module: nn.Module) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values())


class Traffic(TorchDispatchMode):
    """Counts the bytes that ops read and write when each moves its operands once.

    Ops that return views or metadata only move nothing. An op that is one call, as the joint op
    of `fxlora.optimize` is, counts as one, whatever it does inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not is_view(func):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
            self.bytes += sum(map(_held, tensors))
        return result


def _held(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, of which an expanded dimension repeats the same ones."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n for n, stride in sizes if stride)


def is_view(op: Any) -> bool:
    """Whether the results share the memory of arguments that the op does not write."""
    returned = [r.alias_info for r in op._schema.returns]
    return bool(returned) and all(a is not None and not a.is_write for a in returned)


# ---- models -------------------------------------------------------------------------------------


def gpt2(layers: int) -> GPT2LMHeadModel:
    """Return a random GPT-2 small without dropout and without a cache."""
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_layer=layers, use_cache=False, **dropouts)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the default, without its warning, which breaks graphs
    return model


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Copy A and B to the target, fxlora's or PEFT's module: both use the same names.

    The target may have adapters at fewer weights.
    """
    theirs = {name: p for name, p in target.named_parameters() if is_adapter(name)}
    adapters = {name: p for name, p in source.named_parameters() if is_adapter(name)}
    assert theirs and theirs.keys() <= adapters.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(adapters[name])


def randomise_b(module: nn.Module, std: float = 0.02) -> None:
    """Draw B ~ N(0, std²): with B = 0 an adapter has no effect, and a comparison no meaning."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter(name) and ".lora_B." in name:
                parameter.normal_(std=std)


def is_adapter(name: str) -> bool:
    return ".lora_A." in f".{name}" or ".lora_B." in f".{name}"


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected entry."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())
