"""Train an adapted module on several processes: python -m torch.distributed.run -m tests.sharded.

Each process runs all KINDS in turn; the first writes what tests/test_sharded.py compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

import fxlora
from fxlora import LoraConfig
from fxlora.module.sharded import is_sharded, whole, write

SAMPLES, STEPS = 4, 3
HALF = "bfloat16"  # FSDP2 per layer over a base in bfloat16, with adapters in float32
BOTH = "both"  # FSDP2 over two groups of processes, tensor parallelism inside each
KINDS = ("ddp", "root", "blocks", "checkpointed", "optimized", "tensor_parallel")
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


def captured(modules: Any = "layers.*", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = Model().to(dtype)
    return fxlora.capture(model, torch.randint(17, (SAMPLES, 6)), modules=modules)


def adapted(gm: Any) -> Any:
    """Adapt linear layers and the embedding, and train the head; A and B are random."""
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["up", "down", "embed"], modules_to_save=["head"]
    )
    lora = fxlora.inject(gm, fxlora.match(gm, config)).train()
    generator = torch.Generator().manual_seed(5)
    for name in sorted(lora.adapter_parameters()):
        held = lora.get_parameter(name)
        write(held, 0.3 * torch.randn(held.shape, generator=generator, dtype=held.dtype))
    return lora


def train(lora: Any, run: nn.Module, rows: slice, start: int = 0, save: Any = None) -> Any:
    """Train with AdamW; return the losses, the first gradients and the optimizer.

    Args:
        lora: the captured module.
        run: the module to call: `lora`, or a wrapper around it.
        rows: the rows of each batch that this process takes.
        start: the first step, for a resumed run.
        save: called after each step with its number and the optimizer.
    """
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), 1e-2)
    if start:
        resume(lora, optimizer, Path(sys.argv[1]) / "checkpoint")
    generator = torch.Generator().manual_seed(1)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        batch = torch.randint(17, (SAMPLES, 6), generator=generator)
        if step < start:
            continue
        loss = run(batch[rows]).double().square().mean()
        loss.backward()
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in lora.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss.detach()))
        if save:
            save(step, optimizer)
    return losses, gradients, optimizer


def mean(value: torch.Tensor) -> float:
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def resume(lora: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    model, state = get_state_dict(lora, optimizer, options=OPTIONS)
    held = {"model": model, "optimizer": state}
    dcp.load(held, checkpoint_id=folder)
    set_state_dict(
        lora,
        optimizer,
        model_state_dict=held["model"],
        optim_state_dict=held["optimizer"],
        options=OPTIONS,
    )


def checkpoint_at(lora: Any, folder: Path) -> Callable[[int, Any], None]:
    def save(step: int, optimizer: Any) -> None:
        if step == STEPS - 2:
            model, state = get_state_dict(lora, optimizer, options=OPTIONS)
            dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder)

    return save


# ---- ways of sharding ---------------------------------------------------------------------------


def sharded(kind: str) -> tuple[Any, nn.Module]:
    """Return an adapted module that is sharded in one way, and the module to call."""
    if kind in ("tensor_parallel", BOTH):
        mesh = init_device_mesh(
            "cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor")
        )
        gm = captured(["layers.*", "layers.*.up", "layers.*.down"])
        styles = {
            "layers.*.up": ColwiseParallel(use_local_output=False),
            "layers.*.down": RowwiseParallel(),
        }
        parallelize_module(gm, mesh["tensor"], styles)
        torch.manual_seed(dist.get_rank())  # each process would start elsewhere
        lora = adapted(gm)
        for layer in (*lora.layers, lora) if kind == BOTH else ():
            fully_shard(layer, mesh=mesh["data"])
        return lora, lora
    lora = adapted(captured(dtype=torch.bfloat16 if kind == HALF else torch.float64))
    if kind == "optimized":
        lora = fxlora.optimize(lora, recompute=True).train()
    if kind == "ddp":
        return lora, nn.parallel.DistributedDataParallel(lora)
    for index in range(2 if kind in ("blocks", "checkpointed", "optimized", HALF) else 0):
        if kind == "checkpointed":
            lora.layers[index] = checkpoint_wrapper(lora.layers[index])
        fully_shard(lora.layers[index])
    fully_shard(lora)
    return lora, lora


def run_kind(kind: str, folder: Path) -> dict[str, Any]:
    """Train, verify and save a module that is sharded in one way; return what to compare."""
    rank = dist.get_rank()
    lora, run = sharded(kind)
    group = 2 if kind in ("tensor_parallel", BOTH) else 1  # processes that take the same rows
    each = SAMPLES * group // dist.get_world_size()
    rows = slice(rank // group * each, (rank // group + 1) * each)
    save = checkpoint_at(lora, folder / "checkpoint") if kind == "blocks" else None
    losses, gradients, _ = train(lora, run, rows, save=save)
    held = sum(local(parameter).numel() for parameter in lora.parameters())
    with torch.no_grad():
        run(torch.zeros(SAMPLES, 6, dtype=torch.long))
    found: dict[str, Any] = {
        "losses": losses,
        "after a forward": is_sharded(lora.get_parameter("layers.0.up.weight")),
        "gradients": gradients,
        "held": held,
    }
    ids = torch.randint(17, (SAMPLES, 6), generator=torch.Generator().manual_seed(2))
    gradient = {n: p.grad for n, p in lora.named_parameters()}
    found["verified"] = fxlora.verify(lora, ids).to_data()
    assert all(p.grad is gradient[n] for n, p in lora.named_parameters())
    if kind != "ddp":
        found["left"] = left_by_verify(kind, lora, ids)
    if kind == "tensor_parallel":
        found["outputs"] = [m.eval()(ids).detach() for m in (lora, fxlora.fold(lora))]
        found["base"] = fxlora.remove(lora).eval()(ids).detach()
        found["plan"] = str(fxlora.shard_plan(lora))
    if kind != "ddp":
        full = StateDictOptions(full_state_dict=True)
        found["state"] = get_model_state_dict(lora, options=full)
        fxlora.save_adapter(lora, folder / kind)
        found["failed"] = failures(kind, lora, ids, folder)
    elif rank == 0:
        fxlora.save_adapter(lora, folder / kind)
    return found


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def left_by_verify(kind: str, lora: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Return what `verify` leaves where it fails, and in the middle of a step."""
    before = {n: p.detach().clone() for n, p in lora.named_parameters()}
    found: dict[str, Any] = {}
    given = ids.float() if dist.get_rank() else ids  # one process has another input
    found["told"] = error_of(lambda: fxlora.verify(lora, given))

    def fail(*_: Any) -> None:
        raise ArithmeticError("in a hook")

    handle = lora.layers[1].register_forward_hook(fail)
    with suppress(ArithmeticError):
        fxlora.verify(lora, ids)
    handle.remove()
    lora.layers[0].eval()
    fxlora.verify(lora, ids)
    found["modes"] = (lora.training, lora.layers[0].training, lora.layers[1].training)
    lora.train()
    if kind != "tensor_parallel":
        found["accumulated"] = [accumulated(lora, ids, verifies) for verifies in (False, True)]
    same = [torch.equal(local(before[n]), local(p)) for n, p in lora.named_parameters()]
    found["same"] = all(same)
    return found


def accumulated(lora: Any, ids: torch.Tensor, verifies: bool) -> torch.Tensor:
    """Return a gradient of two micro-batches, with a `verify` between them or not."""
    lora.set_requires_gradient_sync(False)
    lora(ids).square().mean().backward()
    if verifies:
        fxlora.verify(lora, ids)
    lora.set_requires_gradient_sync(True)
    lora(ids.flip(0)).square().mean().backward()
    parameter = lora.get_parameter("layers.0.up.lora_B.default.weight")
    gradient = whole(parameter.grad)
    for each in lora.parameters():
        each.grad = None
    return gradient


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except fxlora.FxLoraError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def diverged(lora: Any, ids: torch.Tensor, folder: Path) -> list[str]:
    """Return the errors where one process of a tensor-parallel group has another copy of an A."""
    copied = local(lora.get_parameter("layers.0.up.lora_A.default.weight")).detach()
    before = copied.clone()
    if dist.get_rank() == 1:
        copied.mul_(3)
    told = [
        error_of(lambda: fxlora.verify(lora, ids)),
        error_of(lambda: fxlora.save_adapter(lora, folder)),
    ]
    copied.copy_(before)
    told.append(error_of(parallelize_adapted))
    return [f"diverged: {text}" for text in told]


def parallelize_adapted() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles: dict[str, ParallelStyle] = {"layers.*.up": ColwiseParallel(use_local_output=False)}
    parallelize_module(adapted(captured("layers.*.up")), mesh, styles)


def failures(kind: str, lora: Any, ids: torch.Tensor, folder: Path) -> list[str]:
    """Return the errors of every process where one has a bad value, or cannot write."""
    (folder / f"{kind}-file").write_text("not a folder")
    weight = local(lora.get_parameter("layers.1.up.weight")).detach()
    told = [error_of(lambda: fxlora.save_adapter(lora, folder / f"{kind}-file"))]
    if dist.get_rank() == 1:
        weight[0, 0] += 1
    told.append(error_of(lambda: fxlora.verify(lora, ids)))
    if dist.get_rank() == 1:
        weight[0, 0] -= 1
    if kind in ("tensor_parallel", BOTH):
        told += diverged(lora, ids, folder / f"{kind}-diverged")
    told.append(error_of(lambda: fxlora.fold(lora)))
    told.append(error_of(lambda: fxlora.export(lora, folder / "model.pt2", ids)))
    source: Any = fully_shard(Model())
    told.append(error_of(lambda: fxlora.capture(source, ids)))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    return [text for process in every for text in process]


def main(folder: Path, kinds: list[str]) -> None:
    dist.init_process_group("gloo")
    for kind in kinds:
        found = resumed() if kind == "resumed" else run_kind(kind, folder)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in another way


def resumed() -> dict[str, Any]:
    lora, run = sharded("blocks")
    each = SAMPLES // dist.get_world_size()
    rows = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    return {"losses": train(lora, run, rows, start=STEPS - 1)[0]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
