"""The table of formats."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import ConfigError, ExportError
from ..names import shown
from . import aoti, executorch, onnx, openvino, pt2, tensors
from .adapters import Tensors
from .delivery import Format

FORMATS: Mapping[str, Format] = {
    "pt2": pt2.FORMAT,
    "aoti": aoti.FORMAT,
    "onnx": onnx.FORMAT,
    "executorch": executorch.FORMAT,
    "openvino": openvino.FORMAT,
}


def format_of(path: Path, name: object) -> tuple[str, Format]:
    """Return the format with a name, or that of a path's suffix.

    Raises:
        ConfigError: there is no such format, or its files must end otherwise.
        ExportError: a package that it needs is not installed.
    """
    if name is None:
        name = _of_suffix(path)
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {shown(name)}.")
    found = FORMATS[name]
    others = {form.suffix for form in FORMATS.values()} - {found.suffix}
    if path.suffix != found.suffix and (found.strict or path.suffix in others):
        raise ConfigError(
            f"a file of format {name} must end in {found.suffix}, unlike {path.name}."
        )
    check_installed(name, found)
    return name, found


def _of_suffix(path: Path) -> str:
    """Return the first format whose files end as a path does."""
    for name, form in FORMATS.items():
        if form.suffix == path.suffix:
            return name
    known = ", ".join(dict.fromkeys(form.suffix for form in FORMATS.values()))
    raise ConfigError(
        f"the suffix of {path.name} is of no format: end it in one of {known}; or say which, as in "
        'format="pt2".'
    )


def writer_of_adapters(path: Path) -> Callable[[Tensors, Path], None]:
    """Return the function that writes a file of an adapter alone, by the path's suffix.

    Raises:
        ConfigError: nothing reads a file with such a suffix.
        ExportError: a package that it needs is not installed.
    """
    if path.suffix == ".safetensors":
        return tensors.write_adapter
    for name, form in FORMATS.items():
        if form.write_adapter and form.adapter == path.suffix:
            check_installed(name, form)
            return form.write_adapter
    known = [form.adapter for form in FORMATS.values() if form.write_adapter]
    raise ConfigError(
        f"a file of an adapter ends in .safetensors, {', '.join(known)}, unlike {path.name}."
    )


def check_installed(name: str, form: Format) -> None:
    """Raise ExportError if a package that a format needs is not installed."""
    missing = [p for p in form.packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ExportError(
            f'format "{name}" needs {" and ".join(missing)}: pip install "fxlora[{name}]".'
        )
