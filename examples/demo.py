"""The complete workflow on real data; `make demo` runs it.

A torchvision network learns the digits 0 to 4 of scikit-learn's handwritten digits. fxlora
captures it and adapts it to the digits 5 to 9, with LoRA on its layers and a new head. The
result is verified, folded, exported, and run by a process that cannot import fxlora.

Every printed number is measured in this run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Set before torch is imported, so that idle threads sleep. If other work runs on the same cores,
# spinning threads make the demo several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxlora

CLASSES = 5  # in each half of the digits
PRETRAIN_LR, ADAPT_LR = 1e-3, 1e-2  # LoRA takes a higher rate than training in full
TOLERANCE = 1e-5  # relative to the largest logit: another process may choose other kernels

# Run by a new Python process. `None` in sys.modules makes any import of fxlora raise.
FRESH_PROCESS = """
import sys
sys.modules["fxlora"] = None
import torch
program, inputs, outputs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.backends.cudnn.deterministic = True
module = torch.export.load(program).module()
with torch.no_grad():
    torch.save(module(torch.load(inputs)), outputs)
assert sys.modules["fxlora"] is None
assert not any(name.startswith("fxlora.") for name in sys.modules)
"""


def main() -> None:
    options = parse_options()
    prepare(options)
    phases = Phases()
    low, high = load_halves(options)
    print_surroundings(options, low, high)

    with phases("pretrain"):
        model = pretrained(options, low)
    with phases("capture"):
        example = high.train.inputs(slice(0, 2))
        tensors_before = {name: t.clone() for name, t in model.state_dict().items()}
        base = fxlora.capture(model, example)
        plan = fxlora.match(base, lora_rule(model, options))
        print(plan)
    with phases("adapt"):
        adapted = adapt(base, plan, high, options)
        print_accuracies(base, adapted, high, options)
        print(f"\n{fxlora.report(adapted)}")
    with phases("fold and verify"):
        folded = fxlora.fold(adapted)
        print_verification(fxlora.verify(adapted, example, folded=folded))
    with phases("latency"):
        graphs = {"base": base, "unfolded": adapted, "folded": folded}
        print_latencies(graphs, high.held_out.inputs(slice(0, 8)), options.rounds)
    with phases("export"):
        save(adapted, folded, example, options.out)
    with phases("check what was written"):
        inputs = high.held_out.inputs(slice(None))
        check_fresh_process(folded, options.out / "model.pt2", inputs)
        check_adapter_from_disk(model, adapted, options.out / "adapter", example, inputs)
        same = same_bits(model.state_dict(), tensors_before)
        check(same, "the model that was captured has kept every tensor, bit for bit.")
    phases.print_times()


# ---- options ------------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="a torchvision classification network")
    parser.add_argument(
        "--weights", help="torchvision's weights (DEFAULT) instead of pretraining; needs a network"
    )
    parser.add_argument("--size", type=int, help="images are enlarged to SIZE x SIZE (64)")
    parser.add_argument("--r", type=int, default=8, help="rank of the adapters (8)")
    parser.add_argument("--pretrain-steps", type=int, help="batches of digits 0-4 (100)")
    parser.add_argument("--steps", type=int, help="batches of digits 5-9 (60)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (64)")
    parser.add_argument("--rounds", type=int, help="timed calls of each graph (60)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to test the demo")
    options = parser.parse_args()
    quick = {"size": 32, "pretrain_steps": 6, "steps": 6, "rounds": 3}
    usual = {"size": 64, "pretrain_steps": 100, "steps": 60, "rounds": 60}
    for name, value in (quick if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def prepare(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.backends.cudnn.deterministic = True  # two runs, and two processes, with the same bits
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device here.")


def print_surroundings(options: argparse.Namespace, low: Half, high: Half) -> None:
    device = options.device
    if device.startswith("cuda"):
        device = f"{device}, {torch.cuda.get_device_name(device)}"
    print(
        f"fxlora {fxlora.__version__}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}; "
        f"device: {device}; {torch.get_num_threads()} threads; seed {options.seed}\n"
        f"scikit-learn's digits, 8x8 enlarged to {options.size}x{options.size}: "
        f"{len(low.train)} images of 0-4 and {len(high.train)} of 5-9 to train on; "
        f"{len(low.held_out)} and {len(high.held_out)} held out"
    )


# ---- phases and checks --------------------------------------------------------------------------


@dataclass
class Phases:
    """Prints a heading for each phase, and at the end the seconds that each took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        print(f"\n== {name} ==", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def print_times(self) -> None:
        rows = [*self.seconds.items(), ("total", sum(self.seconds.values()))]
        print(f"\n{tabulate(rows, ('phase', 'seconds'), floatfmt='.1f')}")


def check(holds: bool, statement: str) -> None:
    """Print the statement if it holds, else end the demo with it."""
    if not holds:
        raise SystemExit(f"FAILED: {statement}")
    print(f"checked: {statement}")


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """scikit-learn's digits, which are enlarged when a batch is taken.

    Attributes:
        grey: grey levels from -1 to 1, (n, 1, 8, 8).
        labels: 0 to 4, (n,).
        size: height and width of the network's inputs.
    """

    grey: Tensor
    labels: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, chosen: Tensor | slice) -> Tensor:
        """Return the chosen images, (batch, 3, size, size)."""
        large = F.interpolate(self.grey[chosen], size=(self.size, self.size), mode="bilinear")
        return large.expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class Half:
    """Five of the ten digits, split once: no image is both trained on and held out."""

    train: Images
    held_out: Images


def load_halves(options: argparse.Namespace) -> tuple[Half, Half]:
    """Return the digits 0-4 and the digits 5-9."""
    data: Any = load_digits()
    grey = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # levels are 0 to 16
    digits = torch.tensor(data.target)
    grey, digits = grey.to(options.device), digits.to(options.device)
    low = digits < CLASSES
    return (
        split(grey[low], digits[low], options),
        split(grey[~low], digits[~low] - CLASSES, options),
    )


def split(grey: Tensor, labels: Tensor, options: argparse.Namespace) -> Half:
    """Hold out a random quarter of the images."""
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(labels), generator=generator)
    held_out, train = (
        Images(grey[chosen], labels[chosen], options.size)
        for chosen in order.tensor_split([len(labels) // 4])
    )
    return Half(train, held_out)


# ---- the network, and training it ---------------------------------------------------------------


def pretrained(options: argparse.Namespace, low: Half) -> nn.Module:
    """Return the base: a network trained on the digits 0-4 (or ImageNet), with a new head."""
    model = fetch(options.model, options.weights).to(options.device)
    if options.weights:
        print(f"{options.model} with torchvision's weights {options.weights}: no pretraining")
    else:
        print(
            f"{options.model} learns the digits 0-4 in {options.pretrain_steps} steps of "
            f"{options.batch} images: by default a minute or less on two free cores",
            flush=True,
        )
        steps = options.pretrain_steps
        train(model, list(model.parameters()), low.train, steps, PRETRAIN_LR, options)
        print(f"accuracy on held-out digits 0-4: {accuracy(model, low.held_out):.1%}")
    renew_head(model)
    return model.eval()


def fetch(name: str, weights: str | None) -> nn.Module:
    try:
        model = torchvision.models.get_model(name, weights=weights)
    except OSError as error:  # of the download
        raise SystemExit(f"--weights {weights}: {error}. It needs a network.") from error
    except (ValueError, KeyError) as error:
        raise SystemExit(f"--model {name} --weights {weights}: {error}") from error
    renew_head(model)
    return model


def head_of(model: nn.Module) -> str:
    """Return the path of the classifier: in torchvision, the last linear or convolution."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def renew_head(model: nn.Module) -> None:
    """Replace the model's classifier by a newly initialised one for five classes."""
    name = head_of(model)
    old = model.get_submodule(name)
    if isinstance(old, nn.Conv2d):
        height, width = old.kernel_size
        new = nn.Conv2d(old.in_channels, CLASSES, (height, width))
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, CLASSES)
    model.set_submodule(name, new.to(old.weight.device))


def train(
    module: nn.Module,
    parameters: list[Any],
    images: Images,
    steps: int,
    lr: float,
    options: argparse.Namespace,
) -> None:
    """Train with AdamW, with warm-up and decay, on batches in a new order each epoch."""
    module.train()
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    batches = epochs(len(images), min(options.batch, len(images)), options.seed)
    with tqdm(range(steps), file=sys.stderr, unit="step", mininterval=0.5) as bar:
        for _ in bar:
            chosen = next(batches)
            loss = F.cross_entropy(logits(module(images.inputs(chosen))), images.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def epochs(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield indices of full batches, endlessly: batch norm cannot train on a batch of one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch)


def logits(output: Any) -> Tensor:
    """Return the logits; in train mode GoogLeNet and Inception also return auxiliary heads."""
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def accuracy(module: nn.Module, images: Images) -> float:
    module.eval()
    batches = torch.arange(len(images)).split(128)
    right = sum(
        (module(images.inputs(b)).argmax(1) == images.labels[b]).sum().item() for b in batches
    )
    return right / len(images)


# ---- fxlora -------------------------------------------------------------------------------------


def lora_rule(model: nn.Module, options: argparse.Namespace) -> fxlora.Rule:
    """Return a rule: LoRA on every convolution and linear layer, the head trained in full."""
    config = fxlora.LoraConfig(r=options.r, lora_alpha=16, modules_to_save=[head_of(model)])
    return fxlora.Rule(op=["conv2d", "linear"], lora=config)


def adapt(
    base: fxlora.CapturedModule, plan: fxlora.Plan, high: Half, options: argparse.Namespace
) -> fxlora.CapturedModule:
    """Return the base with the plan's adapters, trained on the digits 5-9."""
    adapted = fxlora.inject(base, plan)
    train(adapted, fxlora.lora_parameters(adapted), high.train, options.steps, ADAPT_LR, options)
    return adapted


def print_accuracies(
    base: fxlora.CapturedModule,
    adapted: fxlora.CapturedModule,
    high: Half,
    options: argparse.Namespace,
) -> None:
    """Print the accuracy before and after, and that of a new head trained as long without LoRA.

    In both trainings the batch norms' statistics adapt to the new digits.
    """
    assert adapted.plan is not None
    plan = fxlora.match(base, fxlora.Rule(adapted.plan.modules_to_save[0], train=True))
    head = adapt(base, plan, high, options)
    modules = {
        "before: new head, untrained": base,
        "new head only": head,
        "LoRA, new head": adapted,
    }
    rows = [(name, f"{accuracy(m, high.held_out):.1%}") for name, m in modules.items()]
    print(f"{options.steps} steps of {options.batch} images; chance is {1 / CLASSES:.0%}")
    print(tabulate(rows, ("held-out digits 5-9", "accuracy"), colalign=("left", "right")))


def print_verification(verification: fxlora.Verification) -> None:
    """Print a summary of the laws that fxlora.verify has checked."""
    sites = verification.sites
    worst = max(site.weight_error / site.weight_tolerance for site in sites)
    print(
        f"fxlora.verify: all {len(sites)} adapters change the output; each folded weight is "
        f"W0 + s·BA (largest error: {worst:.2f} of the rounding bound);"
    )
    print(
        f"folded against unfolded: {verification.output_error:.1e} of the largest output "
        f"(tolerance {verification.tolerance:.0e})."
    )


def print_latencies(graphs: Mapping[str, nn.Module], inputs: Tensor, rounds: int) -> None:
    with threads(1):  # on a busy machine several threads would wait for each other
        seconds = interleaved(graphs, inputs, rounds)
    print(f"eval graphs, {len(inputs)} images per call, one thread, {rounds} interleaved rounds")
    rows = [
        (name, f"{statistics.median(times) * 1e3:.2f}", f"{ratio(times, seconds['base']):.3f}")
        for name, times in seconds.items()
    ]
    header = ("graph", "median ms", "median of graph / base, by round")
    print(tabulate(rows, header, disable_numparse=True, colalign=("left", "right", "right")))


def ratio(times: list[float], base: list[float]) -> float:
    """Return the median ratio within rounds, because the machine's load changes between them."""
    return statistics.median(mine / its for mine, its in zip(times, base, strict=True))


@contextmanager
def threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def interleaved(
    graphs: Mapping[str, nn.Module], inputs: Tensor, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each call; the graphs take turns, so that load affects all alike."""
    names = list(graphs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for module in graphs.values():
        module.eval()(inputs)  # warm up
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronise(inputs)
            start = time.perf_counter()
            graphs[name](inputs)
            synchronise(inputs)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


# ---- on disk ------------------------------------------------------------------------------------


def save(
    adapted: fxlora.CapturedModule, folded: fxlora.CapturedModule, example: Tensor, out: Path
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fxlora.save_adapter(adapted, out / "adapter")
    fxlora.export(folded, out / "model.pt2", example)
    files = [out / "model.pt2", *sorted((out / "adapter").iterdir())]
    rows = [(str(file), f"{file.stat().st_size:,}") for file in files]
    print(tabulate(rows, ("written", "bytes"), colalign=("left", "right")))


def check_fresh_process(folded: fxlora.CapturedModule, program: Path, inputs: Tensor) -> None:
    """Check that a process without fxlora gets the folded graph's outputs from the .pt2 file."""
    with torch.no_grad():
        expected = folded.eval()(inputs)
    found = run_fresh(program, inputs)
    where = f"a process without fxlora loaded {program}: {len(inputs)} held-out images,"
    if torch.equal(found, expected):
        check(True, f"{where} logits bit for bit the folded graph's.")
        return
    error = float((found - expected).abs().max() / expected.abs().max())
    check(error <= TOLERANCE, f"{where} logits within {error:.1e} of the largest ({TOLERANCE:g}).")


def run_fresh(program: Path, inputs: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "inputs.pt"), Path(folder, "outputs.pt")
        torch.save(inputs, given)
        arguments = [str(program), str(given), str(made), str(torch.get_num_threads())]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", FRESH_PROCESS, *arguments]
        subprocess.run(command, check=True, env=environment)
        return torch.load(made)


@torch.no_grad()
def check_adapter_from_disk(
    model: nn.Module,
    adapted: fxlora.CapturedModule,
    folder: Path,
    example: Tensor,
    inputs: Tensor,
) -> None:
    """Check that a new capture with the adapter from disk equals the trained module."""
    loaded = fxlora.load_adapter(fxlora.capture(model, example), folder)
    same = same_bits(loaded.state_dict(), adapted.state_dict())
    same &= torch.equal(loaded.eval()(inputs), adapted.eval()(inputs))
    check(same, f"base + {folder} is the trained module: tensors and logits bit for bit.")


if __name__ == "__main__":
    main()
