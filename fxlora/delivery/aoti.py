"""AOTInductor: a package of compiled code, whose adapters `load_constants` replaces in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .compared import Run
from .delivery import Delivery, Format
from .tensors import write_adapter

_KEPT = {
    # B = 0 and a scaling of 1 are constants of one value, which the compiler would write into code.
    "joint_graph_constant_folding": False,
    "aot_inductor.use_runtime_constant_folding": False,
}


def write(delivery: Delivery, path: Path) -> None:
    package: Any = torch._inductor.aoti_compile_and_package
    package(delivery.made.program, package_path=str(path), inductor_configs=dict(_KEPT))
    if delivery.adapters.way != "folded" and delivery.adapters.values:
        write_adapter(delivery.adapters.values, path.with_suffix(".safetensors"))


def load(delivery: Delivery, path: Path) -> Run:
    package: Any = torch._inductor.aoti_load_package
    return package(str(path))


FORMAT = Format(".pt2", write, load, flat=False, strict=True)
