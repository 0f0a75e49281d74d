"""OpenVINO's intermediate representation: an .xml and a .bin."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .compared import Run
from .delivery import Delivery, Format


def write(delivery: Delivery, path: Path) -> None:
    openvino: Any = import_module("openvino")
    shapes = [openvino.PartialShape(shape) for shape in _shapes(delivery.made.program)]
    model = openvino.convert_model(delivery.made.program, input=shapes)
    for given, name in zip(model.inputs, delivery.inputs, strict=True):
        given.get_tensor().set_names({name})
    for given, name in zip(model.outputs, delivery.outputs, strict=True):
        given.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)


def _shapes(program: ExportedProgram) -> list[list[int]]:
    """Return the shape of each input, with -1 for a dynamic dimension."""
    names = program.graph_signature.user_inputs
    values = {n.name: n.meta["val"] for n in program.graph.find_nodes(op="placeholder")}
    return [[s if isinstance(s, int) else -1 for s in values[name].shape] for name in names]


def load(delivery: Delivery, path: Path) -> Run:
    openvino: Any = import_module("openvino")
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*args: torch.Tensor) -> Any:
        found = model([tensor.detach().cpu().numpy() for tensor in args])
        return tuple(torch.from_numpy(found[port].copy()) for port in model.outputs)

    return run


FORMAT = Format(".xml", write, load, packages=("openvino",), strict=True, fixed_groups=True)
