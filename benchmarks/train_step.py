"""Measure a training step: fxlora and PEFT with adapters on every layer, and without adapters.

"frozen" is the limit: the same model without adapters, whose backward computes the gradients of
activations only. Its first activation (token embeddings, first convolution) requires grad.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from common import (
    DTYPES,
    Report,
    Side,
    copy_adapters,
    error,
    gpt2,
    interleave,
    is_adapter,
    parser,
    randomise_b,
    start,
    step_memory,
)
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import fxlora

R, ALPHA = 16, 32
FXLORA, PEFT, FROZEN = "fxlora", "PEFT", "frozen"
# Between two orders of summation; the errors of gradients add up over layers, or in bfloat16.
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 1e-1}

Loss = Callable[[nn.Module], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A model, the layers to adapt, and the loss on one batch.

    Attributes:
        title: the table's title.
        model: the model.
        targets: names of the layers to adapt.
        example: keyword arguments to capture the model with.
        loss: computes the loss of a module on the batch.
        stem: computes the first activation.
        rest: the model after the first activation.
        rest_loss: computes the loss of `rest` from the first activation.
    """

    title: str
    model: nn.Module
    targets: list[str]
    example: dict[str, torch.Tensor]
    loss: Loss
    stem: Callable[[], torch.Tensor]
    rest: nn.Module
    rest_loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Trainee:
    """One side: a module, and the function that computes its loss."""

    module: nn.Module
    loss: Callable[[], torch.Tensor]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options_parser.add_argument("--compile", action="store_true", help="torch.compile every side")
    options_parser.add_argument("--models", nargs="+", default=list(TASKS), choices=TASKS)
    options_parser.add_argument("--text", type=int, nargs=2, default=[2, 128], help="batch, tokens")
    options_parser.add_argument("--images", type=int, nargs=2, default=[4, 224], help="batch, size")
    options = start(options_parser, rounds=9)
    report = Report(options)
    for name in options.models:
        task = TASKS[name](options)
        trainees = prepared(task, options.compile)
        agreement = check(trainees, TOLERANCES[DTYPES[options.dtype]])
        compare(task, trainees, agreement, options, report)


def compare(
    task: Task,
    trainees: dict[str, Trainee],
    agreement: str,
    options: argparse.Namespace,
    report: Report,
) -> None:
    device = options.device
    memory = {name: step_memory(t.loss, t.module, device) for name, t in trainees.items()}
    steps = interleave(
        {name: Side(step(t)) for name, t in trainees.items()}, options.rounds, device
    )
    updates = interleave(
        {name: Side(step(t, adamw(t))) for name, t in trainees.items() if t.trained},
        options.rounds,
        device,
    )
    measured = "peak over the step" if device.startswith("cuda") else "saved for backward"
    rows = []
    for name in trainees:
        update = updates.get(name)
        rows.append(
            {
                "side": name,
                "forward + backward, ms": str(steps[name]),
                "× frozen": f"{steps[name].over(steps[FROZEN]):.2f}",
                "× PEFT": f"{steps[name].over(steps[PEFT]):.2f}",
                "with AdamW, ms": str(update) if update else "",
                "× PEFT with AdamW": f"{update.over(updates[PEFT]):.2f}" if update else "",
                f"MB {measured}": f"{memory[name] / 1e6:.1f}",
            }
        )
    mode = "compiled" if options.compile else "eager"
    timings = {f"{name}, forward + backward": timing for name, timing in steps.items()}
    timings |= {f"{name}, with AdamW": timing for name, timing in updates.items()}
    report.add(f"{task.title}, {options.dtype}, r={R}, {mode}", rows, timings, agreement)


def step(trainee: Trainee, optimizer: torch.optim.Optimizer | None = None) -> Callable[[Any], Any]:
    parameters = list(trainee.trained.values())

    def run(_: object) -> None:
        for parameter in parameters:
            parameter.grad = None
        trainee.loss().backward()
        if optimizer:
            optimizer.step()

    return run


def adamw(trainee: Trainee) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainee.trained.values(), lr=1e-4)


# ---- the sides ----------------------------------------------------------------------------------


def prepared(task: Task, compiled: bool) -> dict[str, Trainee]:
    """Return the three sides with equal weights, fxlora's and PEFT's with equal A and B.

    The loss is compiled, and not the model: a compiled model that also returns its logits would
    have to compute their gradients, too.
    """

    def ready(loss: Callable[..., torch.Tensor]) -> Any:
        return torch.compile(loss, dynamic=False) if compiled else loss

    rules = fxlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=task.targets)
    lora = fxlora.adapt(task.model, (), task.example, rules=rules, adapter_dtype=False).train()
    randomise_b(lora)
    peft = with_peft(task)
    copy_adapters(lora, peft)
    frozen = task.rest.requires_grad_(False)
    loss_after_stem = ready(lambda activation: task.rest_loss(frozen, activation))

    def frozen_loss() -> torch.Tensor:
        with torch.no_grad():
            activation = task.stem()
        return loss_after_stem(activation.requires_grad_())

    return {
        FXLORA: Trainee(lora, ready(lambda: task.loss(lora))),
        PEFT: Trainee(peft, ready(lambda: task.loss(peft))),
        FROZEN: Trainee(frozen, frozen_loss),
    }


def with_peft(task: Task) -> nn.Module:
    """Return the model with PEFT's layers, but without PEFT's wrapper around the model."""
    config = PeftConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=task.targets,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in task.model.modules()),
    )
    peft = get_peft_model(copy.deepcopy(task.model), config, autocast_adapter_dtype=False)
    return peft.get_base_model().train()


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.flatten()


def check(trainees: dict[str, Trainee], tolerance: float) -> str:
    """Assert that fxlora and PEFT agree in loss and gradients, and that adapters have an effect.

    Returns a sentence with the differences, for the report.
    """
    losses = {name: trainee.loss() for name, trainee in trainees.items()}
    for name in (FXLORA, PEFT):
        losses[name].backward()
    mine, theirs = trainees[FXLORA].trained, trainees[PEFT].trained
    assert mine.keys() == theirs.keys() and all(map(is_adapter, mine))
    assert all(p.grad is not None and p.grad.any() for p in mine.values()), "a dead adapter"
    gap = error(losses[FXLORA], losses[PEFT])
    effect = error(losses[FXLORA], losses[FROZEN])
    gradient = error(
        torch.cat([gradient_of(p) for p in mine.values()]),
        torch.cat([gradient_of(theirs[name]) for name in mine]),
    )
    assert effect > 10 * gap, f"the adapters change the loss by {effect:.1e} only"
    assert gap < tolerance, f"the losses differ by {gap:.1e}"
    assert gradient < tolerance, f"the gradients differ by {gradient:.1e}"
    return (
        f"fxlora and PEFT differ by {gap:.0e} in the loss and by {gradient:.0e} (of the largest) "
        f"in the gradients; the adapters change the loss by {effect:.0e}."
    )


# ---- the models ---------------------------------------------------------------------------------


def text(options: argparse.Namespace) -> Task:
    """Return the task for GPT-2 small, with adapters on every Conv1D."""
    batch, tokens = options.text
    layers = 2 if options.quick else 12
    model = gpt2(layers).to(options.device, DTYPES[options.dtype]).train()
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=options.device)
    example = {"input_ids": ids, "labels": ids.clone()}
    return Task(
        f"GPT-2, {layers} layers, {batch}x{tokens} tokens",
        model,
        ["c_attn", "c_proj", "c_fc"],
        example,
        lambda module: module(**example).loss,
        lambda: model.transformer.wte(ids),
        copy.deepcopy(model),
        lambda module, embeds: module(inputs_embeds=embeds, labels=example["labels"]).loss,
    )


def vision(options: argparse.Namespace) -> Task:
    """Return the task for ResNet-50, with adapters on every convolution and the classifier.

    Batch norms are in train mode.
    """
    batch, size = options.images
    build = torchvision.models.resnet18 if options.quick else torchvision.models.resnet50
    model = build().to(options.device, DTYPES[options.dtype]).train()
    images = torch.randn(batch, 3, size, size).to(next(model.parameters()))
    labels = torch.randint(0, 1000, (batch,), device=options.device)
    rest: Any = copy.deepcopy(model)
    rest.conv1 = nn.Identity()
    kinds = (nn.Conv2d, nn.Linear)
    return Task(
        f"{'ResNet-18' if options.quick else 'ResNet-50'}, {batch}x3x{size}x{size}",
        model,
        [name for name, module in model.named_modules() if isinstance(module, kinds)],
        {"x": images},
        lambda module: F.cross_entropy(module(images).float(), labels),
        lambda: model.conv1(images),
        rest,
        lambda module, activation: F.cross_entropy(module(activation).float(), labels),
    )


TASKS = {"gpt2": text, "resnet": vision}


if __name__ == "__main__":
    main()
