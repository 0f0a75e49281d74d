"""fully_shard on outlined submodules: two processes train as one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import fxlora
from fxlora import InjectError, LoraConfig

from .laws import assert_close, randomise


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


def adapted() -> Any:
    torch.manual_seed(0)
    gm = fxlora.capture(Model().double(), torch.randint(17, (4, 6)), modules="layers.*")
    config = LoraConfig(r=2, target_modules=["up", "down"], modules_to_save=["head"])
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    randomise(lora)
    return lora.train()


def train(lora: Any, rows: slice) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(fxlora.lora_parameters(lora), 0.1)
    for _ in range(3):
        ids = torch.randint(17, (4, 6), generator=generator)
        lora(ids[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, folder: str) -> None:
    """Train on half of each batch, and save all parameters (a process of its own)."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    lora = adapted()
    for layer in (*lora.layers, lora):
        fully_shard(layer)
    train(lora, slice(2 * rank, 2 * rank + 2))
    for verb in (fxlora.fold, fxlora.remove, lambda m: fxlora.save_adapter(m, folder)):
        with pytest.raises(InjectError, match=r"plain\.load_state_dict"):
            verb(lora)
    state = get_model_state_dict(lora, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(state, f"{folder}/state.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    single, plain = adapted(), adapted()
    before = fxlora.fold(single)(ids := torch.arange(12).view(2, 6))
    train(single, slice(None))
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    expected = fxlora.fold(single)(ids)
    assert float((expected - before).abs().max()) > 1e-3
    assert_close([fxlora.fold(plain)(ids)], [expected])
