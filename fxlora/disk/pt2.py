"""export: a file that plain PyTorch runs, without fxlora."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..data import as_path
from ..errors import ConfigError, ExportError
from ..frontends.examples import Example, example_for, examples_for
from ..frontends.exported import run_export
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..module.contract import InputSpec
from ..tables import some
from .files import whole_file

FORMATS = ("pt2",)


@no_ambient_modes(defaults=False)  # it runs the graph
def export(
    module: CapturedModule,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    path: str | Path | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    format: str = "pt2",
    dynamic_shapes: Any = None,
) -> Path:
    """Write the eval graph to a file, for inference; `torch.export.load(path)` needs no fxlora.

    Args:
        module: a captured module, usually a folded one.
        args, kwargs: example inputs.
        path: of the file; it is written whole or not at all.
        format: "pt2".
        dynamic_shapes: as for `capture`; by default what is dynamic in the captured graph is
            dynamic in the file.

    Raises:
        ExportError: torch.export refuses the module, or the file cannot be written.
        ConfigError: no such format.
        InputError: the inputs are not ones that the graph holds for.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    if path is None:
        raise ConfigError("export needs a path: export(module, args, path).")
    if not isinstance(module, CapturedModule):
        raise ExportError(f"expected a captured module, not {type(module).__name__}.")
    path = as_path(path, ConfigError)
    positional = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    program = exported(module, positional, dict(kwargs or {}), dynamic_shapes)
    # Through memory: on a full disk torch's own writer aborts the process.
    content = io.BytesIO()
    try:
        torch.export.save(program, content)
    except Exception as error:
        raise ExportError(f"torch.export cannot write the graph: {error}") from error
    with whole_file(path, ExportError) as temporary, temporary.open("wb") as file:
        file.write(content.getbuffer())
    return path


def exported(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """The eval graph as an ExportedProgram."""
    if module.parent_module:
        raise ExportError(
            f"there is no whole graph to export: the model was captured by regions "
            f"({some(module.regions)}), between which its Python runs ({module.parent_module.why})"
        )
    evaluation = module.derive().eval()
    for parameter in evaluation.parameters():
        parameter.requires_grad_(False)
    program = _checked(evaluation)
    failure: Exception | None = None
    for example in _examples(evaluation.inputs["eval"], args, kwargs, dynamic_shapes):
        try:
            with torch.no_grad():  # it is for inference, and needs no marks of where gradients stop
                return run_export(program, example)
        except Exception as error:  # noqa: BLE001 - torch.export raises whatever the graph does
            failure = error
    raise ExportError(f"torch.export refuses the graph: {failure}") from failure


def _checked(module: CapturedModule) -> nn.Module:
    """The module as one that torch.export runs through the contract on its inputs.

    It interprets the graph of a GraphModule without its forward, and would forget what the capture
    assumed.
    """

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)  # over the same tensors, which follow

    program: nn.Module = type("Program", (nn.Module,), {"forward": forward})()
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        program.__dict__[name] = module.__dict__[name]
    return program.eval()


def _examples(
    spec: InputSpec | None, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> list[Example]:
    if spec is None or dynamic_shapes is not None:
        return examples_for(args, kwargs, dynamic_shapes)
    spec.check(args, kwargs)
    return [example_for(spec, args, kwargs)]
