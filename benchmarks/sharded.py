"""Compare ways of training on two processes, for fxlora, PEFT and the frozen base.

A small Llama with adapters on all linear layers trains as one process, under DDP, under FSDP2 (at
the root; per layer; per layer with activation checkpoints) and with tensor parallelism. For each:
how far the losses are from those of one process, the bytes that a process holds (parameters,
gradients, optimizer), the bytes sent over the loopback interface in a step, and the time of a step.
The base has no adapters: its step is a forward, and a backward to its inputs.

With `--kills N`, one of two processes is killed (SIGKILL) N times at random, and the run is resumed
from the last complete checkpoint each time. With `--checkpoint`, the size of a checkpoint over a
base of 1 GB is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Report, parser, start
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

import fxlora

PROCESSES, BATCH, TOKENS, WIDTH = 2, 8, 64, 256
LAYERS = "model.layers.*"
COLUMNS = [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
ROWS = ["self_attn.o_proj", "mlp.down_proj"]
TARGETS = [name.rpartition(".")[2] for name in COLUMNS + ROWS]
SIDES = ("fxlora", "PEFT", "base")
ONE, DDP, ROOT, BLOCKS, CHECKPOINTED, TENSOR = (
    "one process",
    "DDP",
    "FSDP2, root",
    "FSDP2, per layer",
    "FSDP2, per layer, checkpoints",
    "tensor parallel",
)
WRAPPERS = (ONE, DDP, ROOT, BLOCKS, CHECKPOINTED, TENSOR)
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


# ---- models -------------------------------------------------------------------------------------


def llama(layers: int = 4) -> nn.Module:
    """Return a random Llama, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    config._attn_implementation = "eager"  # torch cannot shard its CPU attention kernel
    return LlamaForCausalLM(config)


def inputs(step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator)


def styles() -> dict[str, ParallelStyle]:
    found: dict[str, ParallelStyle] = {f"{LAYERS}.{name}": RowwiseParallel() for name in ROWS}
    for name in COLUMNS:
        found[f"{LAYERS}.{name}"] = ColwiseParallel(use_local_output=False)
    return found


def draw(adapters: Iterator[tuple[str, nn.Parameter]]) -> None:
    """Give every B values that are not zero, the same in every process."""
    for number, (_, parameter) in enumerate(sorted(adapters)):
        generator = torch.Generator().manual_seed(number)
        value = torch.randn(parameter.shape, generator=generator) / 50
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(value, mesh, placements))
            else:
                parameter.copy_(value)


def made(side: str, wrapper: str) -> nn.Module:
    """Return a side's model before it is wrapped; a tensor-parallel one is sharded already."""
    model = llama()
    mesh = init_device_mesh("cpu", (PROCESSES,)) if wrapper == TENSOR else None
    if side == "base":
        model.requires_grad_(False)
        return parallelize_module(model, mesh, styles()) if mesh else model
    if side == "PEFT":
        config = PeftConfig(r=8, lora_alpha=16, target_modules=TARGETS)
        peft: Any = get_peft_model(model, config)
        draw((n, p) for n, p in peft.named_parameters() if "lora_B" in n)
        return peft
    modules = {ONE: None, DDP: None, ROOT: None, TENSOR: list(styles())}.get(wrapper, LAYERS)
    gm = fxlora.capture(model, kwargs={"inputs_embeds": inputs()}, modules=modules)
    if mesh:
        parallelize_module(gm, mesh, styles())
    config = fxlora.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    draw((n, p) for n, p in lora.named_parameters() if "lora_B" in n)
    return lora


def wrapped(model: Any, wrapper: str, side: str) -> nn.Module:
    if wrapper == DDP:
        trains = any(parameter.requires_grad for parameter in model.parameters())
        return nn.parallel.DistributedDataParallel(model) if trains else model
    if wrapper in (BLOCKS, CHECKPOINTED):
        inner = model.base_model.model if side == "PEFT" else model
        layers = inner.model.layers
        for index in range(len(layers)):
            if wrapper == CHECKPOINTED:
                layers[index] = checkpoint_wrapper(layers[index])
            fully_shard(layers[index])
    return fully_shard(model) if wrapper in (ROOT, BLOCKS, CHECKPOINTED) else model


# ---- steps --------------------------------------------------------------------------------------


class Run:
    """A model of one side under one wrapper, with its optimizer."""

    def __init__(self, side: str, wrapper: str) -> None:
        self.side, self.wrapper = side, wrapper
        self.model = wrapped(made(side, wrapper).train(), wrapper, side)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 1e-3) if self.trained else None
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.sent: list[int] = []
        self.held = 0

    @property
    def alone(self) -> bool:
        return self.wrapper == ONE

    def step(self, number: int) -> None:
        """Make a step, if this process takes part, and record its loss, time and traffic."""
        if not self.alone:
            dist.barrier()
        elif dist.get_rank():
            return
        sent, begin = loopback(), time.perf_counter()
        loss = self._loss(number)
        if self.optimizer:
            self.optimizer.step()
            self.held = self._held()
            self.optimizer.zero_grad()
        else:
            self.held = self._held()
        if not self.alone:
            dist.barrier()
        self.seconds.append(time.perf_counter() - begin)
        self.sent.append(loopback() - sent)
        self.losses.append(loss if self.alone or self.wrapper == TENSOR else _mean(loss))

    def _loss(self, number: int) -> float:
        given = inputs(number)
        if self.wrapper not in (ONE, TENSOR):
            given = given.chunk(PROCESSES)[dist.get_rank()]
        given.requires_grad_(self.optimizer is None)
        with ExitStack() as stack:
            if self.wrapper == TENSOR:
                stack.enter_context(implicit_replication())
            output = self.model(inputs_embeds=given).logits
            loss = output.square().mean()
            loss.backward()
        return float(loss.detach())

    def _held(self) -> int:
        """Return the bytes of this process's parameters, gradients and optimizer state."""
        states = self.optimizer.state.values() if self.optimizer else ()
        tensors = [*self.model.parameters(), *(p.grad for p in self.trained if p.grad is not None)]
        tensors += [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _mean(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / PROCESSES


def loopback() -> int:
    """Return the bytes sent over the loopback interface so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    sent = next(line.split(":")[1].split()[8] for line in lines if line.strip().startswith("lo:"))
    return int(sent)


def compare(rounds: int, out: Path) -> None:
    """Make steps of all sides and wrappers in turn; the first process writes a table."""
    pairs = [(side, wrapper) for wrapper in WRAPPERS for side in SIDES]
    runs = [Run(*pair) for pair in pairs if pair != ("PEFT", TENSOR)]  # its A and B stay whole
    for number in range(rounds):
        for run in runs:
            dist.barrier()
            run.step(number)
    if dist.get_rank() == 0:
        one = {run.side: run.losses for run in runs if run.alone}
        out.write_text(json.dumps([_row(run, one[run.side]) for run in runs]))


def _row(run: Run, losses: Sequence[float]) -> dict[str, Any]:
    pairs = zip(run.losses, losses, strict=True)
    gap = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    return {
        "wrapper": run.wrapper,
        "side": run.side,
        "losses differ": f"{gap:.0e}",
        "held, MB": f"{run.held / 1e6:.2f}",
        "sent in a step, MB": f"{statistics.median(run.sent[1:]) / 1e6:.2f}",
        "ms a step": f"{1e3 * statistics.median(run.seconds[1:]):.0f}",
    }


# ---- checkpoints --------------------------------------------------------------------------------


class Stack(nn.Module):
    """A base of 1 GB: linear layers of width 4096, in float32."""

    def __init__(self, layers: int = 15) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def checkpoint_size(out: Path) -> None:
    """Train a step over a base of 1 GB, save a checkpoint, and compare its size with A and B."""
    torch.manual_seed(0)
    x = torch.randn(4, 4096)
    config = fxlora.LoraConfig(r=8, target_modules="all-linear")
    lora: Any = fxlora.adapt(Stack(), x, rules=config, modules="layers.*")
    base = sum(4 * p.numel() for p in lora.parameters() if not p.requires_grad)
    trained = sum(4 * p.numel() for p in fxlora.lora_parameters(lora))
    for layer in lora.layers:
        fully_shard(layer)
    fully_shard(lora)
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora))
    lora(x).square().mean().backward()
    optimizer.step()
    folder = out.parent / "checkpoint"
    model, state = get_state_dict(lora, optimizer, options=OPTIONS)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)
    fxlora.save_adapter(lora, out.parent / "adapter")
    if dist.get_rank() == 0:
        row = {
            "base, MB": f"{base / 1e6:.1f}",
            "A and B, MB": f"{trained / 1e6:.2f}",
            "A, B and AdamW's state, MB": f"{3 * trained / 1e6:.2f}",
            "checkpoint, MB": f"{_bytes(folder) / 1e6:.2f}",
            "save_adapter, MB": f"{_bytes(out.parent / 'adapter') / 1e6:.2f}",
        }
        out.write_text(json.dumps([row]))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ---- kills --------------------------------------------------------------------------------------


def train_with_checkpoints(folder: Path, steps: int) -> None:
    """Train from the last complete checkpoint; save one, and the adapter, after each step."""
    run = Run("fxlora", BLOCKS)
    lora, optimizer, rank = run.model, run.optimizer, dist.get_rank()
    assert isinstance(lora, fxlora.CapturedModule) and optimizer is not None

    def note(phase: str) -> None:
        if rank == 0:
            (folder / "phase").write_text(phase)

    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    note("resume")
    losses = [0.0] * steps
    number = 0
    if last := complete(folder):
        model, state = get_state_dict(lora, optimizer, options=OPTIONS)
        held = {"model": model, "optimizer": state, "losses": losses, "step": 0}
        dcp.load(held, checkpoint_id=last[-1])
        set_state_dict(
            lora,
            optimizer,
            model_state_dict=held["model"],
            optim_state_dict=held["optimizer"],
            options=OPTIONS,
        )
        number, losses = held["step"], held["losses"]
    while number < steps:
        note("step")
        run.step(number)
        losses[number] = run.losses[-1]
        number += 1
        note("save")
        model, state = get_state_dict(lora, optimizer, options=OPTIONS)
        held = {"model": model, "optimizer": state, "losses": losses, "step": number}
        dcp.save(held, checkpoint_id=folder / f"step-{number:03}-{os.environ['ATTEMPT']}")
        fxlora.save_adapter(lora, folder / "adapter")
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(losses))


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, in order: .metadata is written last."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def killed(kills: int, steps: int) -> dict[str, str]:
    draw_from, phases, gaps = random.Random(0), list[str](), list[float]()
    whole = _to_the_end(Path(tempfile.mkdtemp()), steps)
    while len(phases) < kills:
        folder, attempt = Path(tempfile.mkdtemp()), 0
        while len(phases) < kills and not (folder / "losses.json").exists():
            phase = _kill(folder, steps, draw_from, attempt)
            phases += [phase] if phase else []
            attempt += 1
        losses = _to_the_end(folder, steps, attempt)
        gaps.append(max(abs(a - b) / abs(b) for a, b in zip(losses, whole, strict=True)))
        lora = made("fxlora", ONE)
        base = fxlora.remove(lora)  # pyright: ignore[reportArgumentType]
        fxlora.load_adapter(base, folder / "adapter")
    counts = {phase: phases.count(phase) for phase in ("resume", "step", "save")}
    return {
        "kills": str(len(phases)),
        **{f"in a {phase}": str(count) for phase, count in counts.items()},
        "runs that were resumed to the end": str(len(gaps)),
        "losses differ from a whole run's by": f"{max(gaps):.0e}",
    }


def _to_the_end(folder: Path, steps: int, attempt: int = 0) -> list[float]:
    if not (folder / "losses.json").exists():
        run = _launch("train", folder, steps, attempt)
        assert run.wait() == 0, "a resumed run failed"
    return json.loads((folder / "losses.json").read_text())


def _kill(folder: Path, steps: int, draw_from: random.Random, attempt: int) -> str:
    """Kill one process of a run at a random time; return its phase, or "" if the run had ended."""
    for path in folder.glob("pid-*"):
        path.unlink()
    run = _launch("train", folder, steps, attempt)
    rank, wait = draw_from.randrange(PROCESSES), draw_from.uniform(0, 3)
    pid = folder / f"pid-{rank}"
    while not (pid.exists() and pid.read_text()) and run.poll() is None:
        time.sleep(0.02)
    time.sleep(wait)
    if run.poll() is not None or (folder / "losses.json").exists():
        run.wait()
        return ""
    phase = (folder / "phase").read_text()
    os.kill(int(pid.read_text()), signal.SIGKILL)
    run.wait()
    return phase or "step"


# ---- processes ----------------------------------------------------------------------------------

WORK: dict[str, Callable[[Path, int], None]] = {
    "compare": lambda out, rounds: compare(rounds, out),
    "checkpoint": lambda out, _: checkpoint_size(out),
    "train": train_with_checkpoints,
}


def _launch(work: str, out: Path, number: int, attempt: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(PROCESSES), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTEMPT": str(attempt)}
    return subprocess.Popen(
        [*command, "--work", work, "--out", str(out), "--number", str(number)],
        env=environment,
        stderr=subprocess.DEVNULL if work == "train" else None,
    )


def _rows(work: str, number: int = 0) -> list[dict[str, Any]]:
    out = Path(tempfile.mkdtemp()) / "rows.json"
    if _launch(work, out, number).wait():
        raise SystemExit(f"{work} failed")
    return json.loads(out.read_text())


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--kills", type=int, default=0, help="also kill a run this often")
    options_parser.add_argument(
        "--checkpoint", action="store_true", help="only a checkpoint's size"
    )
    for name in ("--work", "--out"):
        options_parser.add_argument(name, help=argparse.SUPPRESS)
    options_parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    options = start(options_parser, rounds=9)
    warnings.simplefilter("ignore")
    if options.work:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        WORK[options.work](Path(options.out), options.number)
        dist.barrier()
        os._exit(0)  # gloo's threads may abort a process that ends in another way
    report = Report(options)
    if options.checkpoint:
        report.add("A checkpoint of two processes", _rows("checkpoint"))
    elif options.kills:
        report.add("FSDP2 per layer, killed", [killed(options.kills, 12)])
    else:
        title = f"LoRA (r = 8) on a Llama of 4 layers, width {WIDTH}, {PROCESSES} processes"
        report.add(title, _rows("compare", options.rounds))


if __name__ == "__main__":
    main()
