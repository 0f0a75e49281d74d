"""Measure a training step of fxlora, explicit and optimized, of PEFT, and without adapters.

"frozen" is the limit: the same model without adapters, whose backward computes the gradients of
activations only, from the output of its first layer on. "full" trains every parameter.
The FLOP limit is the frozen step with the adapters' own products, at the speed of the others.
The traffic is what the ops of an eager step move, over the frozen step's; the traffic limit is that
of the optimized step, whose joint ops then move their operands once.

PEFT adapts no weight that something else than its layer's forward reads, and refuses some layers.
Its sides then train fewer weights, and the note below the table says how many.
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
    Traffic,
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import fxlora

R, ALPHA = 16, 32
EXPLICIT, FAST, FROZEN, FULL = "fxlora, explicit", "fxlora, optimized", "frozen", "full"
RECOMPUTE = "fxlora, optimized, recompute"
PEFT = "PEFT"  # with adapters in the dtype of fxlora's, which is its default
PEFT_NARROW = "PEFT, adapters in the model's dtype"
WIDE = "float64"  # in which the sides are compared
ALL_DTYPES = {WIDE: torch.float64, **DTYPES}
# Between two orders of summation. Norms of transformers compute in float32 also in a float64 model.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 1e-1}
# Of B's entries, so that the adapters' effect is more than the rounding.
STD = {torch.float64: 0.02, torch.float32: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Task:
    """A model, the layers to adapt, and the loss on one batch.

    Attributes:
        title: the table's title.
        model: the model.
        stem: the name of its first layer.
        targets: names of the layers to adapt.
        example: keyword arguments to capture the model with.
        loss: computes the loss of a module on the batch.
    """

    title: str
    model: nn.Module
    stem: str
    targets: list[str]
    example: dict[str, torch.Tensor]
    loss: Callable[[nn.Module], torch.Tensor]


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
    options_parser.add_argument("--models", nargs="+", default=["gpt2", "resnet50"], choices=TASKS)
    options_parser.add_argument("--text", type=int, nargs=2, default=[2, 128], help="batch, tokens")
    options_parser.add_argument("--images", type=int, nargs=2, default=[4, 224], help="batch, size")
    options_parser.add_argument("--full", action="store_true", help="also full fine-tuning")
    options = start(options_parser, rounds=15)
    report = Report(options)
    for name in options.models:
        agreement = agreed(name, options)
        task = TASKS[name](options)
        trainees = prepared(task, options)
        check(trainees, ALL_DTYPES[options.dtype], gradients=False)
        compare(task, trainees, agreement, options, report)


def agreed(name: str, options: argparse.Namespace) -> str:
    """Compare the sides in float64; or in float32, if the model has an op without float64."""

    def checked(dtype: str) -> str:
        wide = argparse.Namespace(**{**vars(options), "dtype": dtype, "compile": False})
        return check(prepared(TASKS[name](wide), wide), ALL_DTYPES[dtype])

    try:
        return checked(WIDE)
    except RuntimeError:
        return checked("float32")


def compare(
    task: Task,
    trainees: dict[str, Trainee],
    agreement: str,
    options: argparse.Namespace,
    report: Report,
) -> None:
    device = options.device
    flops = {name: operations(trainees[name]) for name in (EXPLICIT, FROZEN)}
    moved = {} if options.compile else {name: traffic(t) for name, t in trainees.items()}
    memory = {name: step_memory(t.loss, t.module, device) for name, t in trainees.items()}
    steps = interleave(
        {name: Side(step(t)) for name, t in trainees.items()}, options.rounds, device
    )
    measured = "peak over the step" if device.startswith("cuda") else "saved for backward"
    rows = [
        {
            "side": name,
            "forward + backward, ms": str(steps[name]),
            "× frozen": f"{steps[name].over(steps[FROZEN]):.3f}",
            "× PEFT": f"{steps[name].over(steps[PEFT]):.3f}",
            f"MB {measured}": f"{memory[name] / 1e6:.1f}",
            **({"traffic": f"{moved[name] / moved[FROZEN]:.2f}"} if moved else {}),
        }
        for name in trainees
    ]
    mode = "compiled" if options.compile else "eager"
    timings = {f"{name}, forward + backward": timing for name, timing in steps.items()}
    limit = f"FLOP limit: {flops[EXPLICIT] / flops[FROZEN]:.3f} × frozen. "
    title = f"{task.title}, {options.dtype}, r={R}, {mode}"
    report.add(title, rows, timings, limit + agreement)


def step(trainee: Trainee) -> Callable[[Any], Any]:
    parameters = list(trainee.trained.values())

    def run(_: object) -> None:
        for parameter in parameters:
            parameter.grad = None
        trainee.loss().backward()

    return run


def operations(trainee: Trainee) -> int:
    """Count the operations of a step's products and convolutions."""
    of_convolutions: Any = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=of_convolutions) as counter:
        trainee.loss().backward()
    return counter.get_total_flops()


def convolution_backward(
    grad: torch.Size, x: torch.Size, weight: torch.Size, *given: Any, out_shape: Any, **_: Any
) -> int:
    """Count a convolution's backward: as many as the forward for each of x and W, if wanted.

    torch's own formula takes a grouped one's gradient of W for that of a dense one.
    """
    transposed, wanted = given[4], given[-1]
    places = (x if transposed else grad).numel() // (x if transposed else grad)[1]
    return sum(wanted[:2]) * 2 * places * weight.numel()


def traffic(trainee: Trainee) -> int:
    """Count the bytes that the ops of a step move."""
    for parameter in trainee.trained.values():
        parameter.grad = None
    with Traffic() as counter:
        trainee.loss().backward()
    return counter.bytes


# ---- the sides ----------------------------------------------------------------------------------


def prepared(task: Task, options: argparse.Namespace) -> dict[str, Trainee]:
    """Return the sides with equal weights, fxlora's and PEFT's with equal A and B.

    The loss is compiled, and not the model: a compiled model that also returns its logits would
    have to compute their gradients, too.
    """

    def ready(module: nn.Module) -> Trainee:
        def loss() -> torch.Tensor:
            return task.loss(module)

        return Trainee(module, torch.compile(loss, dynamic=False) if options.compile else loss)

    rules = fxlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=task.targets)
    lora = fxlora.adapt(task.model, (), task.example, rules=rules).train()
    randomise_b(lora, STD[ALL_DTYPES[options.dtype]])
    sides = {
        EXPLICIT: ready(lora),
        FAST: ready(fxlora.optimize(lora)),
        RECOMPUTE: ready(fxlora.optimize(lora, recompute=True)),
    }
    for name, upcast in ((PEFT, True), (PEFT_NARROW, False)):
        if upcast or options.dtype == "bfloat16":
            peft = with_peft(task, upcast)
            copy_adapters(lora, peft)
            sides[name] = ready(peft)
    if options.full:
        sides[FULL] = ready(copy.deepcopy(task.model).train().requires_grad_(True))
    return {**sides, FROZEN: ready(frozen(task))}


def frozen(task: Task) -> nn.Module:
    """Return the model without anything to train, but the gradient of its first layer's output."""
    model = copy.deepcopy(task.model).train().requires_grad_(False)
    stem = model.get_submodule(task.stem)
    stem.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_())
    return model


def with_peft(task: Task, upcast: bool) -> nn.Module:
    """Return the model with PEFT's layers, but without PEFT's wrapper around the model.

    PEFT adapts those of the targets that it takes.
    """

    def adapted(targets: list[str], model: nn.Module) -> nn.Module:
        transposed = any(isinstance(m, Conv1D) for m in model.modules())
        config = PeftConfig(
            r=R, lora_alpha=ALPHA, target_modules=targets, fan_in_fan_out=transposed
        )
        peft = get_peft_model(model, config, autocast_adapter_dtype=upcast)
        return peft.get_base_model().train()

    def takes(target: str) -> bool:
        try:
            adapted([target], copy.deepcopy(task.model).to("meta"))
        except ValueError:
            return False
        return True

    try:
        return adapted(task.targets, copy.deepcopy(task.model))
    except ValueError:
        return adapted([t for t in task.targets if takes(t)], copy.deepcopy(task.model))


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.flatten()


def check(trainees: dict[str, Trainee], dtype: torch.dtype, gradients: bool = True) -> str:
    """Assert that the sides agree in loss and gradients, and that adapters have an effect.

    PEFT's do not where it adapts fewer weights. Gradients are not to be compared in the dtype of a
    run: rounding turns ReLUs on and off, which batch norms pass on, so that those of a ResNet in
    float32 differ by some per cent. Returns sentences with the differences.
    """
    losses = {name: trainee.loss() for name, trainee in trainees.items()}
    mine, peft = trainees[EXPLICIT].trained, trainees[PEFT].trained
    for name in (EXPLICIT, FAST, RECOMPUTE, PEFT):
        losses[name].backward()
    effect = error(losses[EXPLICIT], losses[FROZEN])
    assert all(map(is_adapter, mine))
    assert all(map(has_gradient, mine.values())), "a dead adapter"
    reached = {name for name, p in peft.items() if has_gradient(p)}
    alike = [FAST, RECOMPUTE, *([PEFT] if reached == mine.keys() else [])]
    said: list[str] = []
    for name in alike:
        theirs = trainees[name].trained
        gap = error(losses[EXPLICIT], losses[name])
        gradient = error(
            torch.cat([gradient_of(p) for p in mine.values()]),
            torch.cat([gradient_of(theirs[key]) for key in mine]),
        )
        small = f"the adapters change the loss by {effect:.1e} only"
        assert effect > 10 * gap or dtype is torch.bfloat16, small
        assert gap < TOLERANCES[dtype], f"the losses differ by {gap:.1e}"
        if gradients:
            assert gradient < TOLERANCES[dtype], f"the gradients differ by {gradient:.1e}"
        said.append(f"{name} by {gap:.0e} in the loss and {gradient:.0e} in the gradients")
    fewer = f" PEFT adapts {len(reached) // 2} of {len(mine) // 2} weights."
    return (
        f"In {dtype}, from the explicit module differ, relative to the largest: {', '.join(said)}. "
        f"The adapters change the loss by {effect:.0e}.{'' if PEFT in alike else fewer}"
    )


def has_gradient(parameter: torch.Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


# ---- the models ---------------------------------------------------------------------------------


def language(
    options: argparse.Namespace, title: str, model: Any, stem: str, targets: list[str]
) -> Task:
    batch, tokens = options.text
    model = model.to(options.device, ALL_DTYPES[options.dtype]).train()
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=options.device)
    example = {"input_ids": ids, "labels": ids.clone()}
    return Task(
        f"{title}, {batch}x{tokens} tokens",
        model,
        stem,
        targets,
        example,
        lambda module: module(**example).loss,
    )


def text(options: argparse.Namespace) -> Task:
    layers = 2 if options.quick else 12
    targets = ["c_attn", "c_proj", "c_fc"]
    return language(options, f"GPT-2, {layers} layers", gpt2(layers), "transformer.wte", targets)


def llama(options: argparse.Namespace) -> Task:
    layers, width = (2, 128) if options.quick else (8, 1024)
    config = LlamaConfig(**sizes(layers, width), intermediate_size=width * 11 // 4)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    title = f"Llama, {layers} layers of {width}"
    return language(options, title, causal(LlamaForCausalLM, config), EMBEDDING, targets)


def mixtral(options: argparse.Namespace) -> Task:
    layers, width = (2, 128) if options.quick else (4, 512)
    few: dict[str, Any] = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": width * 2,
    }
    config = MixtralConfig(**sizes(layers, width), **few)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    title = f"Mixtral, {layers} layers of {width}, 4 experts"
    return language(options, title, causal(MixtralForCausalLM, config), EMBEDDING, targets)


EMBEDDING = "model.embed_tokens"


def sizes(layers: int, width: int) -> dict[str, Any]:
    return {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "vocab_size": 4096,
        "use_cache": False,
    }


def causal(kind: Any, config: Any) -> Any:
    model = kind(config)
    model.loss_type = "ForCausalLM"  # the default, without its warning, which breaks graphs
    return model


def vision(name: str, stem: str) -> Callable[[argparse.Namespace], Task]:
    """Return the task for a torchvision model, with every convolution and linear layer adapted.

    Batch norms are in train mode; the random parts of ViT, Swin and ConvNeXt are off.
    """

    def task(options: argparse.Namespace) -> Task:
        batch, size = options.images
        chosen = "resnet18" if options.quick and name == "resnet50" else name
        model = torchvision.models.get_model(chosen)
        for module in model.modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0
        model = model.to(options.device, ALL_DTYPES[options.dtype]).train()
        images = torch.randn(batch, 3, size, size).to(next(model.parameters()))
        labels = torch.randint(0, 1000, (batch,), device=options.device)
        kinds = (nn.Conv2d, nn.Linear)
        return Task(
            f"{chosen}, {batch}x3x{size}x{size}",
            model,
            stem,
            [name for name, module in model.named_modules() if _adaptable(module, kinds)],
            {"x" if hasattr(model, "fc") else _first_argument(model): images},
            lambda module: F.cross_entropy(module(images).float(), labels),
        )

    return task


def _adaptable(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    # PEFT has no adapter for the output projection inside of nn.MultiheadAttention
    return type(module) in kinds


def _first_argument(model: nn.Module) -> str:
    return model.forward.__code__.co_varnames[1]


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "gpt2": text,
    "llama": llama,
    "mixtral": mixtral,
    "resnet50": vision("resnet50", "conv1"),
    "vit_b_16": vision("vit_b_16", "conv_proj"),
    "swin_t": vision("swin_t", "features.0"),
    "convnext_tiny": vision("convnext_tiny", "features.0"),
}


if __name__ == "__main__":
    main()
