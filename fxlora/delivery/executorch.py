"""ExecuTorch: a .pte with the program, and a .ptd with its adapter, which another can replace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from .adapters import Tensors
from .compared import Run
from .delivery import Delivery, Format

# pyright: reportMissingImports=false, reportUnknownParameterType=false
# pyright: reportUnknownArgumentType=false

ADAPTER = ".ptd"
_TAG = "adapter"
_ALIGNMENT = 16  # bytes; of tensors in a .ptd


def write(delivery: Delivery, path: Path) -> None:
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

    program = delivery.made.program
    values = delivery.adapters.values if delivery.adapters.way == "constants" else {}
    held = {**program.graph_signature.inputs_to_parameters}
    held |= program.graph_signature.inputs_to_buffers
    nodes = {node for node, name in held.items() if name in values}

    def tag(node: torch.fx.Node) -> str | None:
        return _TAG if node.name in nodes else None

    with _quiet():
        lowered = to_edge_transform_and_lower(program, partitioner=[_partitioner(nodes)])
        made = lowered.to_executorch(
            ExecutorchBackendConfig(external_constants=tag if nodes else False)
        )
    path.write_bytes(made.buffer)
    if values:
        write_adapter(values, path.with_suffix(ADAPTER))
    elif delivery.adapters.way == "inputs":
        write_adapter(delivery.adapters.values, path.with_suffix(ADAPTER))


def _partitioner(nodes: Collection[str]) -> Any:
    """Return XNNPACK's partitioner for all but the ops that read these constants.

    XNNPACK names the constants that it packs by their hash, so that a program would belong to one
    adapter only.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    partitioner = XnnpackPartitioner()
    for config in partitioner.target_partitioner_configs.values():
        _leave(config, nodes)
    return partitioner


def _leave(config: Any, nodes: Collection[str]) -> None:
    takes = config.check_constraints

    def check_constraints(node: torch.fx.Node, program: Any) -> bool:
        read = {given.name for given in node.all_input_nodes}
        return read.isdisjoint(nodes) and takes(node, program)

    config.check_constraints = check_constraints


@contextlib.contextmanager
def _quiet() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def write_adapter(values: Tensors, path: Path) -> None:
    """Write the tensors of an adapter as a .ptd, under their names."""
    from executorch.exir._serialize.data_serializer import DataEntry, DataPayload
    from executorch.exir.tensor import dim_order_from_stride, scalar_type_enum
    from executorch.exir.tensor_layout import TensorLayout
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    buffers: list[bytes] = []
    named: dict[str, Any] = {}
    for name, value in values.items():
        tensor = value.detach().cpu().contiguous()
        layout = TensorLayout(
            scalar_type_enum(tensor.dtype),
            list(tensor.shape),
            list(dim_order_from_stride(tensor.stride())),
        )
        named[name] = DataEntry(len(buffers), _ALIGNMENT, layout)
        buffers.append(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    path.write_bytes(bytes(FlatTensorSerializer().serialize(DataPayload(buffers, named))))


def load(delivery: Delivery, path: Path) -> Run:
    from executorch.extension.pybindings import portable_lib

    with_data = delivery.adapters.way == "constants" and delivery.adapters.values
    data = path.with_suffix(ADAPTER).read_bytes() if with_data else None
    content = path.read_bytes()  # the runtime reads in this memory, and does not own it
    open_: Any = portable_lib._load_for_executorch_from_buffer
    program = open_(content, data_map_buffer=data)

    def run(*args: torch.Tensor, alive: tuple[bytes | None, ...] = (content, data)) -> Any:
        outputs = program.forward([tensor.contiguous() for tensor in args])
        return tuple(tensor.clone() for tensor in outputs)

    return run


FORMAT = Format(
    ".pte",
    write,
    load,
    packages=("executorch",),
    bounded=True,
    adapter=ADAPTER,
    write_adapter=write_adapter,
)
