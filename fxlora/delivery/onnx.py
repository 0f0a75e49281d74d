"""ONNX, through torch's exporter, and onnxruntime's files of adapters."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapters import Tensors
from .compared import Run
from .delivery import Delivery, Format

# pyright: reportMissingImports=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false

_INLINE = 2**30  # bytes of weights up to which they are in the file itself; protobuf ends at 2 GiB


def write(delivery: Delivery, path: Path) -> None:
    adapters = delivery.adapters
    model = _model(delivery)
    _stay_replaceable(model, adapters.values)
    _optimize(model)
    if adapters.way == "inputs":
        for name, value in adapters.neutral.items():
            _set_default(model, name, value)
        write_adapter(adapters.values, path.with_suffix(ADAPTER))
    else:
        _as_constants(model, adapters.values)
    _save(model, path)


def _model(delivery: Delivery) -> Any:
    """Return torch's translation of the program, in onnx_ir, before any optimization.

    torch's own optimization would fold A and B into other constants, without their names.
    """
    with _quiet():
        made = torch.onnx.export(
            delivery.made.program,
            (),
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(delivery.inputs),
            output_names=list(delivery.outputs),
        )
    assert made is not None
    return made.model


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter and the optimizer from printing their progress."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _stay_replaceable(model: Any, names: Collection[str]) -> None:
    """Make initialisers graph inputs too: the optimizer knows that such a value may be another."""
    inputs = {value.name for value in model.graph.inputs}
    for name in names:
        if name in model.graph.initializers and name not in inputs:
            model.graph.inputs.append(model.graph.initializers[name])


def _as_constants(model: Any, names: Collection[str]) -> None:
    kept = [value for value in model.graph.inputs if value.name not in names]
    model.graph.inputs.clear()
    model.graph.inputs.extend(kept)


def _set_default(model: Any, name: str, value: torch.Tensor) -> None:
    """Give an input a value that holds where a call leaves the input out."""
    from onnx_ir.tensor_adapters import TorchTensor

    for given in model.graph.inputs:
        if given.name == name:
            given.const_value = TorchTensor(value.cpu().contiguous(), name=name)
            model.graph.initializers[name] = given


def _optimize(model: Any) -> None:
    from onnxscript import optimizer

    with _quiet():
        optimizer.optimize(model)


def _save(model: Any, path: Path) -> None:
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size < _INLINE:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")


# ---- onnxruntime --------------------------------------------------------------------------------

ADAPTER = ".onnx_adapter"


def write_adapter(values: Tensors, path: Path) -> None:
    """Write the tensors of an adapter for `onnxruntime.LoraAdapter`."""
    import onnxruntime

    adapter: Any = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    made = onnxruntime.OrtValue.ortvalue_from_numpy
    adapter.set_parameters({name: made(_array(value)) for name, value in values.items()})
    adapter.export_adapter(str(path))


def load(delivery: Delivery, path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if any(t.dtype is torch.float16 for t in delivery.made.program.state_dict.values()):
        # With all of its optimizations, onnxruntime 1.32 ends the process over some of these files.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    known = {given.name for given in session.get_inputs()}
    known |= {given.name for given in session.get_overridable_initializers()}

    def run(*args: torch.Tensor) -> Any:
        given = zip(delivery.inputs, args, strict=False)
        feed = {name: _array(value) for name, value in given if name in known}
        outputs: Any = session.run(None, feed)
        return tuple(map(torch.from_numpy, outputs))

    return run


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().numpy()


FORMAT = Format(
    ".onnx",
    write,
    load,
    packages=("onnx", "onnxscript", "onnxruntime"),
    fixed_groups=True,
    defaults=True,
    adapter=ADAPTER,
    write_adapter=write_adapter,
)
