"""AOTInductor: a package of compiled code, whose adapters `load_constants` replaces in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError
from ..tables import some
from .compared import Run
from .delivery import Delivery, Format
from .tensors import write_adapter

# Without these, the compiler writes constants of one value (B = 0) and short ones into its code.
_KEPT = {"joint_graph_constant_folding": False, "always_keep_tensor_constants": True}


def write(delivery: Delivery, path: Path) -> None:
    package: Any = torch._inductor.aoti_compile_and_package
    package(delivery.made.program, package_path=str(path), inductor_configs=dict(_KEPT))
    if delivery.adapters.way != "folded" and delivery.adapters.values:
        write_adapter(delivery.adapters.values, path.with_suffix(".safetensors"))


def load(delivery: Delivery, path: Path) -> Run:
    package: Any = torch._inductor.aoti_load_package
    found = package(str(path))
    names = set(delivery.adapters.values) if delivery.adapters.way == "constants" else set()
    if lost := sorted(names - set(found.get_constant_fqns())):
        raise ExportError(f"the compiler did not keep {some(lost)} as a constant.")
    return found


FORMAT = Format(".pt2", write, load, flat=False, strict=True, stateful=True, fixed_groups=True)
