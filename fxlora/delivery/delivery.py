"""What a format writes, and what a format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .adapters import Adapters, Tensors
from .compared import Run
from .program import Exported


@dataclass(frozen=True)
class Delivery:
    """What a format writes.

    Attributes:
        made: the program.
        adapters: its adapters.
        inputs: names of a flat program's inputs, in order.
        outputs: names of its outputs.
    """

    made: Exported
    adapters: Adapters
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A format of files.

    Attributes:
        suffix: how its files end.
        write: writes the files of a delivery to a path.
        load: loads them with the format's own runtime, as a function of the program's arguments.
        flat: whether programs take and return tensors only (see `Form`).
        packages: the packages that it needs, of the extra with the format's name.
        strict: whether a path must have the suffix.
        stateful: whether a file keeps what calls write to buffers and inputs.
        checks: whether a file checks what the graph assumes about its inputs.
        bounded: whether a dimension without a maximum takes sizes up to the example's.
        fixed_groups: whether a convolution must have a constant number of groups.
        defaults: whether inputs that are adapters may be left out, which gives the base.
        adapter: the suffix of a file of an adapter alone, "" if there is none.
        write_adapter: writes that file.
    """

    suffix: str
    write: Callable[[Delivery, Path], None]
    load: Callable[[Delivery, Path], Run]
    flat: bool = True
    packages: tuple[str, ...] = ()
    strict: bool = False
    stateful: bool = False
    checks: bool = False
    bounded: bool = False
    fixed_groups: bool = False
    defaults: bool = False
    adapter: str = ""
    write_adapter: Callable[[Tensors, Path], None] | None = None
