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

from .laws import randomise

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
    # Sizes are fixed: a Trainer's batches have one size, and a dynamic one takes twice as long.
    fixed = [dict.fromkeys(kwargs) for _, kwargs in calls]
    return fxlora.capture(tied(), calls=calls, dynamic_shapes=fixed)


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
        per_device_eval_batch_size=4,
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
    lora = fxlora.load_adapter(captured(False), checkpoint)
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


# ---- TRL -----------------------------------------------------------------------------------------


def fine_tune(model: Any, folder: Path, steps: int = 4, resume: Path | None = None) -> list[float]:
    """Train with TRL's SFTTrainer and return the loss of each step."""
    trl = pytest.importorskip("trl", reason="TRL is optional")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets")
    tokenizers = pytest.importorskip("tokenizers", reason="TRL needs tokenizers")
    names = {f"w{number}": number for number in range(48)} | {"<pad>": 48, "<eos>": 49}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, "<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    texts = [
        {"text": " ".join(f"w{(5 * i + j) % 48}" for j in range(4 + i % 5))} for i in range(24)
    ]
    arguments = trl.SFTConfig(
        str(folder),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=steps,
        logging_steps=1,
        save_steps=2,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    data = datasets.Dataset.from_list(texts)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def decoder() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, **HEADS, eos_token_id=49)
    )


@functools.cache
def captured_decoder() -> fxlora.CapturedModule:
    ids = torch.randint(1, 48, (4, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    shorter = {name: value[:3, :6] for name, value in given.items() if name != "use_cache"}
    methods: Any = {"model": [((), given), ((), shorter | {"use_cache": False})]}
    counted = given | {"labels": ids, "num_items_in_batch": torch.tensor(32)}
    return fxlora.capture(decoder(), kwargs=counted, methods=methods)


def fine_tuned_host(targets: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a host with random adapters, and these by PEFT's names."""
    gm = captured_decoder()
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=4, target_modules=targets)))
    randomise(lora)
    return fxlora.hosted(decoder(), lora.train()), merged_trainables(lora)


def test_trl_trains_as_with_peft_and_resumes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is optional")
    targets = ["q_proj", "v_proj"]
    ours, start = fine_tuned_host(targets)
    theirs = peft.get_peft_model(decoder(), peft.LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name.removeprefix("base_model.model.")])
    losses: list[list[float]] = []
    for name, module in (("ours", ours), ("theirs", theirs)):
        torch.manual_seed(1)
        losses.append(fine_tune(module, tmp_path / name))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][0] != losses[0][-1]
    torch.manual_seed(1)
    again, _ = fine_tuned_host(targets)
    torch.manual_seed(1)
    resumed = fine_tune(again, tmp_path / "again", resume=tmp_path / "ours" / "checkpoint-2")
    assert resumed == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
def test_trl_reads_the_adapted_head(tmp_path: Path) -> None:
    """SFTTrainer multiplies by `lm_head.weight` itself."""
    ours, start = fine_tuned_host(["lm_head"])
    source = decoder()
    a, b = (start[f"lm_head.lora_{part}.default.weight"] for part in "AB")
    with torch.no_grad():
        source.lm_head.weight += 2 * b @ a
    bare, wanted, found = (
        fine_tune(model, tmp_path / str(number), steps=1)[0]
        for number, model in enumerate((decoder(), source, ours))
    )
    assert abs(wanted - bare) > 1e-2 and found == pytest.approx(wanted, rel=1e-5)
    assert any(not torch.equal(p, start[n]) for n, p in merged_trainables(ours).items())


# ---- Lightning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_host", [False, True])
def test_lightning(in_host: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is optional")
    data = torch.utils.data.TensorDataset(torch.randn(12, 6), torch.randint(0, 3, (12,)))

    def batches() -> Any:
        return torch.utils.data.DataLoader(data, batch_size=4)

    def adapted() -> Any:
        model = torch.nn.Sequential(plain(), torch.nn.BatchNorm1d(3))
        config = LoraConfig(r=2, target_modules="all-linear")
        lora = fxlora.adapt(model, X, rules=config)
        return lora, (fxlora.hosted(model, lora) if in_host else lora)

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            lora, self.net = adapted()
            self.trained = list(fxlora.lora_parameters(lora))
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            assert not self.net.training
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.trained, 1e-1)

    def fit(epochs: int, **options: Any) -> Any:
        module = Classifier()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, batches(), batches(), **options)
        return module, trainer.checkpoint_callback.best_model_path

    whole, _ = fit(4)
    _, checkpoint = fit(2)
    resumed, _ = fit(4, ckpt_path=checkpoint)
    assert resumed.losses == whole.losses[6:] and whole.losses[-1] < whole.losses[0]
    loop = Classifier().train()
    optimizer = loop.configure_optimizers()
    for _ in range(4):
        for batch in batches():
            optimizer.zero_grad()
            loop.training_step(batch, 0).backward()
            optimizer.step()
    assert loop.losses == pytest.approx(whole.losses, rel=1e-5)


# ---- wrappers -----------------------------------------------------------------------------------


def plain() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


X = torch.randn(4, 6)


def test_a_compiled_model_is_captured_under_its_own_names() -> None:
    model = plain()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.warns(fxlora.FxLoraWarning, match="the wrapper of torch.compile") as caught:
        lora = fxlora.adapt(compiled, X, rules=LoraConfig(r=2, target_modules=["0"]))
    assert caught[0].filename == __file__
    assert torch.equal(lora(X), model(X)) and lora.plan is not None
    assert [entry.site for entry in lora.plan] == ["0"]
    for verb in (fxlora.hosted, lambda m, g: fxlora.merged(m, fxlora.fold(g))):
        with pytest.warns(fxlora.FxLoraWarning, match="the wrapper of torch.compile"):
            assert torch.allclose(verb(compiled, lora)(X), model(X))


def test_a_compiled_submodule_is_refused_with_advice_that_works() -> None:
    model: Any = plain()
    model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(fxlora.CaptureError) as refused:
        fxlora.capture(model, X)
    advice = str(refused.value).partition("back: ")[2].rstrip(".")
    exec(advice, {"model": model})
    assert torch.equal(fxlora.capture(model, X)(X), plain()(X))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        torch.nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda module: torch.nn.Sequential(torch.nn.Identity(), module),
    ],
    ids=["torch.compile", "DataParallel", "AveragedModel", "Sequential"],
)
def test_a_wrapper_is_refused_with_the_name_of_the_module_inside(wrap: Any, tmp_path: Path) -> None:
    lora = fxlora.adapt(plain(), X, rules=LoraConfig(r=2, target_modules=["0"]))
    wrapped = wrap(lora)
    with pytest.raises(fxlora.NotCapturedError) as refused:
        fxlora.save_adapter(wrapped, tmp_path)
    inside = str(refused.value).partition(".get_submodule('")[2].partition("')")[0]
    fxlora.save_adapter(wrapped.get_submodule(inside), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("mixed", ["no", "bf16"])
@pytest.mark.autocast
def test_accelerate(mixed: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed)
    lora = fxlora.adapt(plain(), X, rules=LoraConfig(r=2, target_modules=["0", "2"])).train()
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), 1e-2)
    model, optimizer = accelerator.prepare(lora, optimizer)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(X).float().square().sum()
        accelerator.backward(loss)
        optimizer.step()
        return loss.item()

    losses = [step()]
    accelerator.save_state(str(tmp_path))
    losses += [step(), step()]
    accelerator.load_state(str(tmp_path))
    assert [step(), step()] == losses[1:] and losses[2] < losses[0]
    assert accelerator.unwrap_model(model) is lora


def test_a_host_is_refused_with_the_module_to_pass() -> None:
    lora = fxlora.adapt(plain(), X, rules=LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(fxlora.NotCapturedError, match="that hosted\\(model, module\\) was given"):
        fxlora.lora_parameters(fxlora.hosted(plain(), lora))


def test_an_average_of_the_adapters() -> None:
    lora = fxlora.adapt(plain(), X, rules=LoraConfig(r=2, target_modules=["0", "2"])).train()
    average = torch.optim.swa_utils.AveragedModel(lora)
    optimizer = torch.optim.SGD(fxlora.lora_parameters(lora), 0.1)
    seen: list[dict[str, torch.Tensor]] = []
    for _ in range(3):
        optimizer.zero_grad()
        lora(X).square().sum().backward()
        optimizer.step()
        average.update_parameters(lora)
        seen.append(merged_trainables(lora))
    inside = average.get_submodule("module")
    assert isinstance(inside, fxlora.CapturedModule)
    for name, value in merged_trainables(inside).items():
        mean = torch.stack([values[name] for values in seen]).mean(0)
        assert torch.allclose(value, mean, atol=1e-6) and not torch.equal(value, seen[-1][name])
    fxlora.verify(inside, X)
