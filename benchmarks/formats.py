"""Adapter files of other libraries over the zoo, in float64: the error against each one's formula.

For each model and format, a file with random values for its linear layers (and convolutions, where
the format has them) is written under the library's names and loaded. The outputs are compared with
those of the source model, whose weights are changed by the library's own formula, written out here.

    python benchmarks/formats.py --library torchvision --only 'resnet18|vit_b'
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interop import LIMIT, distance, doubled
from safetensors.torch import save_file
from sweep import Record, add_failures, grouped, options_given, reason, sweep_parser, swept
from torch import nn
from torch.utils import _pytree as pytree
from zoo import Case

import fxlora

R, ALPHA = 2, 3.0
LAYERS = 6  # of each kind in a model
Tensors = dict[str, torch.Tensor]
# The tensors of one layer by the ends of their keys, and what they add to its weight.
Made = tuple[Tensors, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, dtype=torch.float64)


def pair(weight: torch.Tensor, down: str, up: str, *, alpha: bool) -> Made:
    """LoRA, and LoCon of a convolution: down with the kernel, up 1x1; s = alpha / r."""
    out, size, *kernel = weight.shape
    a, b = random(R, size, *kernel), random(out, R, *[1] * len(kernel))
    change = torch.einsum("or,ri...->oi...", b.flatten(1), a) * ALPHA / R
    held = {"alpha": torch.tensor(ALPHA, dtype=torch.float64)} if alpha else {}
    return {down: a, up: b, **held}, change


def loha(weight: torch.Tensor) -> Made:
    """(w1_a w1_b) ⊙ (w2_a w2_b) · alpha / r."""
    out, flat = weight.flatten(1).shape
    shapes = ((out, R), (R, flat), (out, R), (R, flat))
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    held = {name: random(*shape) for name, shape in zip(names, shapes, strict=True)}
    one, two = held[names[0]] @ held[names[1]], held[names[2]] @ held[names[3]]
    held["alpha"] = torch.tensor(ALPHA, dtype=torch.float64)
    return held, (one * two).reshape(weight.shape) * ALPHA / R


def lokr(weight: torch.Tensor) -> Made:
    """w1 ⊗ (w2_a w2_b) · alpha / r, with the smallest factors of the numbers of features."""
    out, size, *kernel = weight.shape
    first = (_divisor(out), _divisor(size))
    held = {
        "lokr_w1": random(*first),
        "lokr_w2_a": random(out // first[0], R),
        "lokr_w2_b": random(R, size // first[1] * weight[0, 0].numel()),
        "alpha": torch.tensor(ALPHA, dtype=torch.float64),
    }
    second = (held["lokr_w2_a"] @ held["lokr_w2_b"]).reshape(
        out // first[0], size // first[1], *kernel
    )
    w1 = held["lokr_w1"].reshape(*first, *[1] * len(kernel))
    return held, torch.kron(w1, second.contiguous()) * ALPHA / R


def _divisor(number: int) -> int:
    return next((n for n in range(2, number) if number % n == 0), 1)


def _flat(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}."


def _dotted(path: str) -> str:
    return f"{path}."


Format = tuple[Callable[[str], str], Callable[[torch.Tensor], Made], bool, dict[str, Any]]
# How a layer's keys begin, its tensors, whether convolutions have them, options of load_adapter
FORMATS: dict[str, Format] = {
    "kohya LoRA, LoCon": (
        _flat,
        lambda w: pair(w, "lora_down.weight", "lora_up.weight", alpha=True),
        True,
        {},
    ),
    "LyCORIS LoHa": (_flat, loha, True, {}),
    "LyCORIS LoKr": (_flat, lokr, True, {}),
    "diffusers": (
        lambda path: f"unet.{path}.",
        lambda w: pair(w, "lora.down.weight", "lora.up.weight", alpha=True),
        False,
        {},
    ),
    "loralib": (
        _dotted,
        lambda w: pair(w, "lora_A", "lora_B", alpha=False),
        False,
        {"lora_alpha": ALPHA},
    ),
    "torchtune": (
        _dotted,
        lambda w: pair(w, "lora_a.weight", "lora_b.weight", alpha=False),
        False,
        {"lora_alpha": ALPHA},
    ),
}


def main() -> None:
    report, records = swept(options_given(sweep_parser(__doc__)), work, line)
    for library, mine in grouped(records, "library").items():
        rows = []
        for name in FORMATS:
            found = [r["formats"][name] for r in mine if name in r.get("formats", {})]
            errors = [f["error"] for f in found if "error" in f]
            rows.append(
                {
                    "format": name,
                    "files": str(len(found)),
                    "refused": str(sum("refused" in f for f in found)),
                    "largest error": f"{max(errors, default=0):.1e}",
                }
            )
        report.add(library, rows)
    refused = [
        {"model": f"{r['library']} {r['name']}", "format": name, "reason": found["refused"]}
        for r in records
        for name, found in r.get("formats", {}).items()
        if "refused" in found
    ]
    if refused:
        report.add("Refused", refused)
    add_failures(report, records)


def line(record: Record) -> str:
    found = record.get("formats", {}).items()
    said = [f"{k} {v['error']:.0e}" if "error" in v else f"{k} refused" for k, v in found]
    return f"{record['library']} {record['name']}: {', '.join([*said, *record['failures']])}"


def work(build: Callable[[], Case], device: str, record: Record) -> None:
    torch.backends.mha.get_fastpath_enabled = lambda: False  # it reads weights by other paths
    model, args, kwargs = doubled(build(), device)
    try:
        gm = fxlora.capture(model, args, kwargs).eval()
    except fxlora.CaptureError as error:
        record["failures"].append(reason("capture", error))
        return

    def outputs(module: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            leaves = pytree.tree_leaves(module(*copy.deepcopy(args), **copy.deepcopy(kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    record["formats"] = {}
    for name, (begins, make, convolutions, options) in FORMATS.items():
        torch.manual_seed(1)
        kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
        layers = [
            path
            for kind in kinds
            for path in [p for p, m in model.named_modules() if type(m) is kind][:LAYERS]
        ]
        if not layers:
            continue
        tensors: Tensors = {}
        expected = copy.deepcopy(model)
        for path in layers:
            layer: Any = expected.get_submodule(path)
            held, change = make(layer.weight)
            tensors |= {begins(path) + end: t.contiguous() for end, t in held.items()}
            layer.weight = nn.Parameter(layer.weight.detach() + change)  # a tie is split
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            save_file(tensors, file)
            try:
                lora = fxlora.load_adapter(gm, file, **options).eval()
            except (fxlora.AdapterError, fxlora.UnsupportedOpError) as error:
                said = str(error).replace(str(file), "…")[:200]
                record["formats"][name] = {"refused": said}
                continue
        wanted = outputs(expected)
        if distance(outputs(model), wanted) == 0:
            continue  # the example does not reach these layers
        error = distance(outputs(lora), wanted)
        record["formats"][name] = {"error": error}
        if not error < LIMIT:
            record["failures"].append(f"{name}: {error:.1e}")


if __name__ == "__main__":
    main()
