"""Checkpoints and adapters for tests, and the formula of the fold, written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = "base_model.model."
Tensors = dict[str, torch.Tensor]


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Write an adapter folder as PEFT does, with keys that lack only their root."""
    folder.mkdir(parents=True, exist_ok=True)
    keyed = {ROOT + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(keyed, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pair(site: str, out: int, into: int, r: int = 2, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return random A (r, in) and B (out, r) of a linear layer."""
    return {
        f"{site}.lora_A.weight": torch.randn(r, into).to(dtype),
        f"{site}.lora_B.weight": torch.randn(out, r).to(dtype),
    }


def write_sharded(folder: Path, *shards: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a folder of shards with an index, a configuration, and a file of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name, metadata or {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")
    return folder


def read(path: Path) -> Tensors:
    """Return all tensors of a checkpoint."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def nearest(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to a dtype once: of the two neighbours, the nearer one, the even one if none.

    Written without fxlora's code: candidates come from torch's cast and the next numbers.
    """
    first = exact.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    found = first.clone()
    for step in (-1, 1):
        other = (first.view(bits) + step).view(dtype)
        ours, theirs = (found.double() - exact).abs(), (other.double() - exact).abs()
        even = (other.view(bits) & 1) == 0
        found = torch.where((theirs < ours) | ((theirs == ours) & even), other, found)
    return found
