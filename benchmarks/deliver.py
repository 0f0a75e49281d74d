"""Measure every format of export: the largest error, and the latency against the captured base.

A transformer encoder (`--hidden`, `--layers`) with adapters on all linear layers is exported to
every format with its adapter folded in, as constants and as inputs, and routed (several adapters in
one graph). Each file is run by its own runtime, in rounds interleaved with the base's.

    python benchmarks/deliver.py            # the formats that are installed; a few minutes
    python benchmarks/deliver.py --formats pt2 onnx
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Report, Side, Timing, error, interleave, parser, start
from torch import nn

import fxlora
from fxlora.delivery.formats import FORMATS

BASE = "captured base"
FORMS = ("folded", "constants", "inputs", "routed")


@dataclass
class File:
    """A file that was written and loaded again.

    Attributes:
        call: runs it on the example.
        expected: what the module returns for the example.
        size: bytes of all files of it.
    """

    call: Callable[[], Any]
    expected: torch.Tensor
    size: int


class Encoder(nn.Module):
    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean(1))


def main() -> None:
    options_parser = parser(__doc__)
    options_parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=[*FORMATS])
    options_parser.add_argument("--hidden", type=int, default=256)
    options_parser.add_argument("--layers", type=int, default=2)
    options_parser.add_argument("--batch", type=int, default=8)
    options_parser.add_argument("--tokens", type=int, default=32)
    options = start(options_parser, rounds=25)
    if options.quick:
        options.hidden, options.layers, options.batch, options.tokens = 32, 1, 4, 8
    options.library = ["onnx", "onnxruntime", "onnxscript", "executorch", "openvino"]
    options.library = [name for name in options.library if _version(name)]
    report = Report(options)
    base, modules, x, ids = prepared(options)
    rows, timings = [], {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = dict(written(options.formats, modules, x, ids, Path(folder)))
        sides = {BASE: _side(lambda: base(x))}
        made = {name: file for name, file in files.items() if isinstance(file, File)}
        sides |= {name: _side(file.call) for name, file in made.items()}
        timings = interleave(sides, options.rounds, options.device, warmup=3)
        rows = [_row(name, file, timings) for name, file in files.items()]
    title = (
        f"An encoder of {options.layers} layers of {options.hidden}, batch {options.batch} of "
        f"{options.tokens} tokens, r=8 on all linear layers"
    )
    note = "Errors are relative to the largest number of the module's own output."
    report.add(title, rows, timings, note)


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def prepared(
    options: argparse.Namespace,
) -> tuple[Any, dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return the captured base, an adapted and a routed module over it, and their inputs."""
    model = Encoder(options.hidden, options.layers).to(options.device).eval()
    x = torch.randn(options.batch, options.tokens, options.hidden, device=options.device)
    gm = fxlora.capture(model, x).eval()
    config = fxlora.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    loras = [fxlora.inject(gm, fxlora.match(gm, config)).eval() for _ in range(4)]
    ids = torch.arange(options.batch, device=options.device) % 5 - 1  # the base, too
    return gm, {"adapted": loras[0], "routed": fxlora.route(loras).eval()}, x, ids


def written(
    formats: list[str], modules: dict[str, Any], x: torch.Tensor, ids: torch.Tensor, folder: Path
) -> Iterator[tuple[str, File | str]]:
    """Yield each format and form with its file, or with the reason why there is none."""
    for name in formats:
        for form in FORMS:
            module = modules["routed" if form == "routed" else "adapted"]
            given = {"adapter_ids": ids} if form == "routed" else {}
            way = "constants" if form == "routed" else form
            path = folder / f"{name}-{form}{FORMATS[name].suffix}"
            print(f"… {name}, {form}", flush=True)
            try:
                fxlora.export(module, path, x, given, format=name, adapters=way)
                yield f"{name}, {form}", _loaded(name, form, path, module, x, given)
            except fxlora.FxLoraError as failure:
                yield f"{name}, {form}", f"{type(failure).__name__}: {failure}"


def _loaded(name: str, form: str, path: Path, module: Any, x: Any, given: Any) -> File:
    held = module.adapter_parameters()
    values = {n: p.detach() for n, p in module.named_parameters() if n in held}
    values = values if form == "inputs" else {}
    size = sum(p.stat().st_size for p in path.parent.iterdir() if p.stem.startswith(path.stem))
    with torch.no_grad():
        expected = module(x, **given)
    call = RUNNERS[name](path, x, given, values)
    return File(call, expected, size)


# ---- the runtimes, each as its users call it ----------------------------------------------------


def _torch_program(path: Path, x: Any, given: Any, values: Any) -> Callable[[], Any]:
    program = torch.export.load(path).module()
    named = {**given, "adapters": values} if values else given
    return lambda: program(x, **named)


def _package(path: Path, x: Any, given: Any, values: Any) -> Callable[[], Any]:
    package: Any = torch._inductor.aoti_load_package(str(path))
    named = {**given, "adapters": values} if values else given
    return lambda: package(x, **named)


def _onnx(path: Path, x: Any, given: Any, values: Any) -> Callable[[], Any]:
    import onnxruntime

    settings: Any = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 3
    session: Any = onnxruntime.InferenceSession(
        str(path), settings, providers=["CPUExecutionProvider"]
    )
    run, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    if values:
        adapter.Load(str(path.with_suffix(".onnx_adapter")))
        run.add_active_adapter(adapter)
    feed = {"x": x.numpy(), **{name: value.numpy() for name, value in given.items()}}

    def call(_alive: Any = adapter) -> Any:  # the options do not keep it
        return torch.from_numpy(session.run(None, feed, run)[0])

    return call


def _executorch(path: Path, x: Any, given: Any, values: Any) -> Callable[[], Any]:
    data = path.with_suffix(".ptd")
    library = importlib.import_module("executorch.extension.pybindings.portable_lib")
    load: Any = library._load_for_executorch
    program = load(str(path), str(data)) if data.exists() and not values else load(str(path))
    inputs = [x, *given.values(), *values.values()]
    return lambda: program.forward(inputs)[0]


def _openvino(path: Path, x: Any, given: Any, values: Any) -> Callable[[], Any]:
    openvino: Any = importlib.import_module("openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    model = openvino.Core().compile_model(path, "CPU", settings)
    inputs = [tensor.numpy() for tensor in (x, *given.values(), *values.values())]
    return lambda: torch.from_numpy(model(inputs)[0])


RUNNERS: dict[str, Callable[..., Callable[[], Any]]] = {
    "pt2": _torch_program,
    "aoti": _package,
    "onnx": _onnx,
    "executorch": _executorch,
    "openvino": _openvino,
}


# ---- the table ----------------------------------------------------------------------------------


def _side(call: Callable[[], Any]) -> Side:
    def run(_: Any) -> Any:
        with torch.inference_mode():
            return call()

    return Side(run)


def _row(name: str, file: File | str, timings: dict[str, Timing]) -> dict[str, str]:
    format_, form = name.split(", ")
    if isinstance(file, str):
        reason = " ".join(file.split())[:160]
        return {
            "format": format_,
            "form": form,
            "error": "",
            "MB": "",
            "ms": "",
            "/ base": "",
            "not written because": reason,
        }
    with torch.no_grad():
        found = file.call()
    time = timings[name]
    return {
        "format": format_,
        "form": form,
        "error": f"{error(found, file.expected):.1e}",
        "MB": f"{file.size / 1e6:.1f}",
        "ms": str(time),
        "/ base": f"{time.over(timings[BASE]):.2f}",
        "not written because": "",
    }


if __name__ == "__main__":
    main()
