"""Training loops of libraries on captured modules: the same losses, and checkpoints that resume."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

import fxlora
from fxlora import LoraConfig

transformers = pytest.importorskip("transformers", reason="transformers is optional")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": False}


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Texts of which some labels are padding, so that batches have different numbers of items."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 50, (8,), generator=generator)
        labels = torch.where(torch.arange(8) < 3 + index % 5, ids, -100)
        return {"input_ids": ids, "labels": labels}


def tied() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    texts = [Texts()[index] for index in range(4)]
    return {name: torch.stack([text[name] for text in texts]) for name in texts[0]} | more


@functools.cache
def captured(counted: bool) -> fxlora.CapturedModule:
    calls: list[Any] = [((), batch())]
    if counted:
        calls.append(((), batch(num_items_in_batch=torch.tensor(32.0))))
    return fxlora.capture(tied(), calls=calls)


def host(counted: bool, dropout: float = 0.1) -> Any:
    """Return a host that takes the number of items in a batch, or none of it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
    gm = captured(counted)
    return fxlora.hosted(tied(), fxlora.inject(gm, fxlora.match(gm, config)).train())


def merged_trainables(module: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def train(model: Any, folder: Path, resume: str | None = None, **options: Any) -> list[float]:
    """Train with transformers' Trainer and return the loss of each step."""
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        logging_steps=1,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts()
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_host_declares_what_its_graphs_take() -> None:
    named = [set(inspect.signature(host(c).forward).parameters) for c in (False, True)]
    assert "kwargs" not in named[0] and named[1] - named[0] == {"kwargs"}
    assert {"input_ids", "labels", "attention_mask"} <= named[0]


@pytest.mark.parametrize("counted", [False, True], ids=["", "items are counted"])
def test_trainers_losses_are_those_of_peft(counted: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is optional")
    ours = host(counted, dropout=0.0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(tied(), config)
    theirs.base_model.model.accepts_loss_kwargs = counted
    with torch.no_grad():
        held = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(held[name.removeprefix("base_model.model.")])
    losses = [train(module, tmp_path / name) for name, module in (("a", ours), ("b", theirs))]
    assert losses[0][0] != losses[0][-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_checkpoint_is_what_trains_and_resumes_with_the_same_losses(tmp_path: Path) -> None:
    whole = train(host(True), tmp_path / "whole", save_strategy="steps", save_steps=3)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = train(host(True), tmp_path / "again", resume=str(checkpoint))
    assert again == whole and len(set(whole)) > 3
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - it is no dict
    lora = fxlora.load_adapter(fxlora.capture(tied(), kwargs=batch()), checkpoint)
    assert lora.plan is not None and len(lora.plan) == 2


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = host(False)
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    train(model, tmp_path, **every, **best, greater_is_better=True)  # not the last one, here
    with safe_open(tmp_path / "checkpoint-2" / "model.safetensors", "pt") as file:
        for name, tensor in merged_trainables(model).items():
            assert torch.equal(tensor, file.get_tensor(name)), name


@pytest.mark.slow
@pytest.mark.autocast
def test_bfloat16(tmp_path: Path) -> None:
    captured.cache_clear()  # made without proofs of autocast
    model = host(False)
    before = copy.deepcopy(merged_trainables(model))
    losses = train(model, tmp_path, bf16=True)
    assert losses[-1] < losses[0]
    after = merged_trainables(model)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_what_a_host_with_adapters_cannot_save(tmp_path: Path) -> None:
    with pytest.raises(fxlora.InjectError, match="knows no push_to_hub"):
        host(False).save_pretrained(tmp_path, push_to_hub=True)
