"""Train one Llama with LoRA in the loops of several libraries: fxlora's module and PEFT's.

For each loop: whether the losses of both are equal, from equal A and B; the bytes of a checkpoint;
and by how much the losses after resuming from one differ from those of a run that went on. With
`--kills N`, a run of transformers' Trainer is killed (SIGKILL) N times and resumed each time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lightning
import torch
import transformers
import trl
from accelerate import Accelerator
from common import Report, copy_adapters, randomise_b, start, untimed_parser
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.func import functional_call, grad_and_value
from torch.utils.data import DataLoader, Dataset

import fxlora

WORDS, LENGTH, BATCH, RATE = 200, 8, 4, 1e-2
TARGETS = ["q_proj", "v_proj"]
Losses = list[float]
# trains for a number of steps, from a checkpoint in the folder or from the start
Loop = Callable[["Trained", Path, int, Path | None], Losses]


# ---- the model and the data ---------------------------------------------------------------------


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Texts of which some labels are padding, so that batches have different numbers of items."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, WORDS - 2, (LENGTH,), generator=generator)
        labels = torch.where(torch.arange(LENGTH) < 3 + index % 5, ids, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    special = {"pad_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "use_cache": False}
    config = transformers.LlamaConfig(vocab_size=WORDS, num_attention_heads=4, **sizes, **special)
    return transformers.LlamaForCausalLM(config)


def captured(*, decoder: bool = True) -> fxlora.CapturedModule:
    """Capture the model's calls in all the loops.

    Args:
        decoder: whether to capture calls of the decoder alone, which TRL makes.
    """
    batch = next(batches(0))
    counted = batch | {"num_items_in_batch": torch.tensor(32.0)}
    inner = {name: value for name, value in batch.items() if name != "labels"}
    shorter = {name: value[:, :6] for name, value in inner.items()}
    parts: Any = [((), each | {"use_cache": False}) for each in (inner, shorter)]
    calls: Any = [((), batch), ((), counted)]
    return fxlora.capture(llama(), calls=calls, methods={"model": parts} if decoder else None)


def batches(first: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of the texts, without end, from the batch with number `first`."""
    texts = Texts()
    while True:
        chosen = [texts[(first * BATCH + n) % len(texts)] for n in range(BATCH)]
        yield {name: torch.stack([text[name] for text in chosen]) for name in chosen[0]}
        first += 1


class Trained:
    """An adapted model: fxlora's or PEFT's.

    Attributes:
        model: the module to train, of a class that transformers knows.
        module: the module that fxlora's functions take; None for PEFT's model.
    """

    def __init__(self, model: Any, module: fxlora.CapturedModule | None = None) -> None:
        self.model, self.module = model.train(), module

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, folder: Path) -> None:
        if self.module:
            fxlora.save_adapter(self.module, folder)
        else:
            self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        if self.module:
            saved = load_file(folder / "adapter_model.safetensors")
            own = dict(self.module.named_parameters())
            with torch.no_grad():
                for name, value in saved.items():
                    inner = name.removeprefix("base_model.model.").removesuffix(".weight")
                    own[f"{inner}.default.weight"].copy_(value)
        else:
            set_peft_model_state_dict(self.model, load_peft_weights(str(folder)))


def pair(gm: fxlora.CapturedModule) -> dict[str, Trained]:
    """Return fxlora's model and PEFT's, with equal random A and B."""
    config = fxlora.LoraConfig(r=8, target_modules=TARGETS)
    torch.manual_seed(1)
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    randomise_b(lora, std=0.1)
    theirs: Any = get_peft_model(llama(), PeftConfig(r=8, target_modules=TARGETS))
    copy_adapters(lora, theirs.base_model.model)
    return {"fxlora": Trained(fxlora.hosted(llama(), lora), lora), "PEFT": Trained(theirs)}


# ---- loops --------------------------------------------------------------------------------------


def written(loss: Callable[[Any, dict[str, Any]], Any] | None = None) -> Loop:
    """Return a loop in plain PyTorch, which saves the adapter and the optimizer half-way."""

    def loop(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
        optimizer = torch.optim.AdamW(trained.parameters(), RATE)
        done = 0
        if resume:
            trained.load(resume)
            state = torch.load(resume / "optimizer.pt", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            done = state["steps"]
        losses: Losses = []
        for number, batch in zip(range(done, steps), batches(done), strict=False):
            optimizer.zero_grad()
            value = loss(trained.model, batch) if loss else trained.model(**batch).loss
            value.backward()
            optimizer.step()
            losses.append(value.item())
            if number + 1 == steps // 2 and not resume:
                checkpoint = folder / f"checkpoint-{number + 1}"
                trained.save(checkpoint)
                state = {"optimizer": optimizer.state_dict(), "steps": number + 1}
                torch.save(state, checkpoint / "optimizer.pt")
        return losses

    return loop


def compiled(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    """Compile the model and its loss; a second compilation is an error."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def loss(model: Any, batch: dict[str, Any]) -> Any:
        return model(**batch).loss

    with torch._dynamo.config.patch(error_on_recompile=True):
        return written(loss)(trained, folder, steps, resume)


def functional(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    """Take the gradients of a functional call, with torch.func."""
    names = [name for name, p in trained.model.named_parameters() if p.requires_grad]

    def loss(model: Any, batch: dict[str, Any]) -> Any:
        held = dict(model.named_parameters())

        def of(values: dict[str, torch.Tensor]) -> Any:
            return functional_call(model, values, (), batch).loss

        own = {name: held[name].detach() for name in names}
        grads, value = grad_and_value(of)(own)
        terms = [(held[name] * grads[name]).sum() for name in names]
        total = torch.stack(terms).sum()
        return total - total.detach() + value  # has these gradients, and the loss's value

    return written(loss)(trained, folder, steps, resume)


def averaged(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    """Train, and return the losses of an average of the weights (which is not resumed)."""
    average = torch.optim.swa_utils.AveragedModel(trained.model)
    optimizer = torch.optim.AdamW(trained.parameters(), RATE)
    losses: Losses = []
    for _, batch in zip(range(steps), batches(0), strict=False):
        optimizer.zero_grad()
        trained.model(**batch).loss.backward()
        optimizer.step()
        average.update_parameters(trained.model)
        with torch.no_grad():
            losses.append(average(**batch).loss.item())
    return losses


def accelerated(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(trained.parameters(), RATE)
    model, optimizer = accelerator.prepare(trained.model, optimizer)
    done = 0
    if resume:
        accelerator.load_state(str(resume))
        done = int(resume.name.partition("-")[2])
    losses: Losses = []
    for number, batch in zip(range(done, steps), batches(done), strict=False):
        optimizer.zero_grad()
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if number + 1 == steps // 2 and not resume:
            accelerator.save_state(str(folder / f"checkpoint-{number + 1}"))
    return losses


def _options(folder: Path, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": steps // 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def _losses(trainer: Any) -> Losses:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trainer(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    torch.manual_seed(2)  # the order of the texts
    arguments = transformers.TrainingArguments(**_options(folder, steps))
    found = transformers.Trainer(trained.model, arguments, train_dataset=Texts())
    found.train(resume_from_checkpoint=resume and str(resume))
    losses = _losses(found)
    return losses[steps // 2 :] if resume else losses


def fine_tuned(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    torch.manual_seed(2)
    names = {f"w{n}": n for n in range(WORDS - 2)} | {"<pad>": WORDS - 2, "<eos>": WORDS - 1}
    words = Tokenizer(WordLevel(names, "<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    texts = [
        {"text": " ".join(f"w{(7 * i + j) % 150}" for j in range(4 + i % 5))} for i in range(64)
    ]
    arguments = trl.SFTConfig(**_options(folder, steps), bf16=False, gradient_checkpointing=False)
    data = datasets.Dataset.from_list(texts)
    found = trl.SFTTrainer(trained.model, arguments, train_dataset=data, processing_class=tokenizer)
    found.train(resume_from_checkpoint=resume and str(resume))
    losses = _losses(found)
    return losses[steps // 2 :] if resume else losses


def lightning_trained(trained: Trained, folder: Path, steps: int, resume: Path | None) -> Losses:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = trained.model, []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.net(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(trained.parameters(), RATE)

    every = ModelCheckpoint(
        folder, every_n_train_steps=steps // 2, save_top_k=-1, filename="checkpoint-{step}"
    )
    module = Module()
    off = ("logger", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys(off, False)
    found = lightning.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[every], default_root_dir=folder, **quiet
    )
    found.fit(module, DataLoader(Texts(), BATCH), ckpt_path=resume and str(resume))
    return module.losses


LOOPS: dict[str, Loop] = {
    "plain PyTorch": written(),
    "torch.compile of the loss": compiled,
    "torch.func": functional,
    "AveragedModel (EMA)": averaged,
    "transformers' Trainer": trainer,
    "TRL's SFTTrainer": fine_tuned,
    "Lightning": lightning_trained,
    "accelerate": accelerated,
}


# ---- the table ----------------------------------------------------------------------------------


def measured(loop: Loop, gm: fxlora.CapturedModule, steps: int) -> dict[str, str]:
    """Train both sides, and each again from its checkpoint, and return a row of the table."""
    losses: dict[str, Losses] = {}
    resumed: dict[str, str] = {}
    size: dict[str, str] = {}
    for side in ("fxlora", "PEFT"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            losses[side] = loop(pair(gm)[side], folder, steps, None)
            found = sorted(folder.glob("checkpoint-*"), key=_step)
            size[side] = f"{_bytes(found[0]) / 1024:.0f}" if found else "–"
            if found:
                rest = loop(pair(gm)[side], folder / "again", steps, found[0])
                resumed[side] = f"{_gap(rest, losses[side][-len(rest) :]):.0e}"
    return {
        "losses differ by": f"{_gap(losses['fxlora'], losses['PEFT']):.0e}",
        "loss falls": f"{losses['fxlora'][0]:.3f} → {losses['fxlora'][-1]:.3f}",
        **{f"checkpoint, KiB: {side}": size[side] for side in size},
        **{f"resumed, differs by: {side}": resumed.get(side, "–") for side in size},
    }


def _gap(found: Losses, expected: Losses) -> float:
    """Return the largest relative difference; the runs must have as many steps."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def _step(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.name)))


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- killed runs --------------------------------------------------------------------------------


def last_whole(folder: Path) -> Path | None:
    """Return the last checkpoint that Trainer finished: it writes its own state last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=_step, default=None)


def child(folder: Path, steps: int) -> None:
    """Train on from the last whole checkpoint, and write the losses at the end."""
    trained = pair(captured(decoder=False))["fxlora"]
    (folder / "ready").touch()
    resume = last_whole(folder)
    arguments = transformers.TrainingArguments(**_options(folder, steps, save_steps=1))
    found = transformers.Trainer(trained.model, arguments, train_dataset=Texts())
    found.train(resume_from_checkpoint=resume and str(resume))
    (folder / "losses.json").write_text(json.dumps(_losses(found)))


def killed(kills: int, steps: int) -> dict[str, str]:
    """Kill runs at random times, resume each until its end, and compare with a whole run."""
    draw, done, inside, gaps = random.Random(0), 0, 0, list[float]()
    whole = _run_to_the_end(tempfile.mkdtemp(), steps)
    while done < kills:
        name = tempfile.mkdtemp()
        while done < kills and _was_killed(name, steps, draw.uniform(0, 3)):
            done += 1
            inside += _broken(Path(name))
        gaps.append(_gap(_run_to_the_end(name, steps), whole))
    return {
        "kills": str(done),
        "while a checkpoint was written": str(inside),
        "runs that were resumed to the end": str(len(gaps)),
        "losses differ from a whole run's by": f"{max(gaps):.0e}",
    }


def _command(name: str, steps: int) -> list[str]:
    return [sys.executable, __file__, "--steps", str(steps), "--child", name]


def _run_to_the_end(name: str, steps: int) -> Losses:
    if not (Path(name) / "losses.json").exists():
        subprocess.run(_command(name, steps), check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(name) / "losses.json").read_text())


def _was_killed(name: str, steps: int, seconds: float) -> bool:
    """Kill a run these seconds after its training starts; False if it was at its end by then."""
    ready = Path(name) / "ready"
    ready.unlink(missing_ok=True)
    run = subprocess.Popen(_command(name, steps), stdout=subprocess.DEVNULL)
    while not ready.exists() and run.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    if run.poll() is not None:
        return False
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return True


def _broken(folder: Path) -> bool:
    """Remove the checkpoints that a killed run left unfinished; whether there was one."""
    found = [p for p in folder.glob("checkpoint-*") if not (p / "trainer_state.json").exists()]
    for path in found:
        shutil.rmtree(path)
    return bool(found)


def main() -> None:
    options_parser = untimed_parser(__doc__)
    options_parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    options_parser.add_argument("--only", nargs="+", choices=LOOPS, default=list(LOOPS))
    options_parser.add_argument("--kills", type=int, default=0, help="also kill a run this often")
    options_parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = start(options_parser)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.child:
        child(options.child, options.steps)
        return
    options.library = ["accelerate", "lightning", "trl"]
    report = Report(options)
    gm = captured()
    rows = [{"loop": name, **measured(LOOPS[name], gm, options.steps)} for name in options.only]
    report.add("LoRA (r = 8) on a Llama of 2 layers, width 64", rows)
    if options.kills:
        report.add("transformers' Trainer, killed", [killed(options.kills, 40)])


if __name__ == "__main__":
    main()
