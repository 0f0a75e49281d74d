"""export: write a file that PyTorch runs without fxlora."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..data import as_path
from ..errors import ConfigError, ExportError, InputError, warn
from ..frontends.examples import Example, example_for, examples_for
from ..frontends.exported import run_export
from ..frontends.kept.containers import counts
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.contract import InputSpec, TensorInput
from ..module.fsdp import mesh_of
from ..module.program import ProgramModule
from ..module.quantised import is_quantised
from ..tables import some
from .files import whole_file

FORMATS = ("pt2",)


@no_ambient_modes(defaults=False)  # the graph may use the process's default dtype and device
def export(
    module: CapturedModule,
    path: str | Path,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    method: str = "forward",
    format: str = "pt2",
    dynamic_shapes: Any = None,
) -> Path:
    """Write the eval graph to a file, for inference; `torch.export.load(path)` needs no fxlora.

    Args:
        module: a captured module, usually a folded one.
        args, kwargs: example inputs.
        path: path of the file, which is written whole or not at all.
        method: the captured method to write.
        format: "pt2".
        dynamic_shapes: as for `capture`; by default the dimensions that are dynamic in the captured
            graph are dynamic in the file.

    Returns:
        The path of the file.

    Raises:
        NotCapturedError: the module is not a captured one.
        ExportError: it has no whole graph, torch.export refuses it, or the file cannot be written.
        ConfigError: the format is unknown, or the path is invalid.
        InputError: the captured graph does not hold for the inputs.

    Example:
        >>> import tempfile, pathlib, torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Linear(6, 4), torch.randn(2, 6))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.pt2")
        >>> program = torch.export.load(fxlora.export(gm, path, torch.randn(2, 6)))
        >>> program.module()(torch.randn(5, 6)).shape
        torch.Size([5, 4])
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, not {format!r}.")
    check_captured(module, "export", routed=True)
    path = as_path(path, ConfigError)
    if mesh_of(module) is not None:
        raise ExportError(
            "the module is sharded over processes, and a file holds whole weights. Load its "
            "adapter (save_adapter, load_adapter) into a module that is not sharded, and export "
            "the fold of that."
        )
    positional = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    try:
        program = exported(module, positional, dict(kwargs or {}), dynamic_shapes, method)
    except InputError as error:
        if args is not None or kwargs:
            raise
        raise InputError(f"{error} export needs inputs: export(module, path, args).") from error
    # Saved to memory first, because torch's own writer aborts the process if the disk is full.
    content = io.BytesIO()
    try:
        torch.export.save(program, content)
    except Exception as error:
        raise ExportError(f"torch.export cannot write the graph: {error}") from error
    with whole_file(path, ExportError) as temporary, temporary.open("wb") as file:
        file.write(content.getbuffer())
    return path


def exported(
    module: CapturedModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    method: str = "forward",
) -> ExportedProgram:
    """Return the eval graph as an ExportedProgram.

    Args:
        module, args, kwargs, dynamic_shapes, method: as for `export`.

    Raises:
        ExportError: the module has no whole graph, or torch.export refuses it.
        InputError: the captured graph does not hold for the inputs.
    """
    if module.parent_module:
        raise ExportError(
            f"there is no whole graph to export: the model was captured by regions "
            f"({some(module.regions)}), between which its Python runs ({module.parent_module.why}) "
            "Change the source's branch to torch.where or torch.cond; or run the source with the "
            "folded weights: fxlora.merged(model, folded)."
        )
    evaluation = module.derive().eval()
    for parameter in evaluation.parameters():
        parameter.requires_grad_(False)
    call: ProgramModule = evaluation
    if evaluation.captured_calls(method) != (evaluation,):
        call = evaluation.chosen_call(args, kwargs, method)
    _refuse_counts(args, kwargs)
    _warn_of_state(call)
    program = _checked(call)
    failure: Exception | None = None
    for example in _examples(call.contract, args, kwargs, dynamic_shapes):
        try:
            with torch.no_grad():  # for inference: nothing has to mark where gradients stop
                return _with_plain_state(run_export(program, example))
        except Exception as error:  # noqa: BLE001 - torch.export raises whatever the graph does
            failure = error
    raise ExportError(f"torch.export refuses the graph: {failure}") from failure


def _with_plain_state(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose state has the parts of quantised weights, as plain tensors.

    A file would need the package of their classes to be read.
    """
    if not any(is_quantised(tensor) for tensor in program.state_dict.values()):
        return program
    return program.run_decompositions({})


def _refuse_counts(args: Any, kwargs: Any) -> None:
    """Raise ExportError for a cache of which only this process knows that it has integers."""
    if counts((args, kwargs)):
        raise ExportError(
            "the cache among the inputs counts tokens in integers, which are inputs of the graph: "
            "a file could be called by fxlora only. Export without a cache (use_cache=False), or "
            "capture this one call, in a process of its own."
        )


def _warn_of_state(call: ProgramModule) -> None:
    groups = call.contract.leaves if call.contract else ()
    tensors = [leaf for group in groups for leaf in group if isinstance(leaf, TensorInput)]
    if names := [leaf.name for leaf in tensors if leaf.order or leaf.gradient]:
        warn(
            f"the source reads how its tensors lie in memory, or their gradients: the file holds "
            f"for {some(names)} like the example's only (strides, requires_grad), and does not "
            "check it."
        )


def _checked(module: ProgramModule) -> nn.Module:
    """Return a plain nn.Module whose forward checks the input contract and runs the module.

    torch.export interprets the graph of a GraphModule without calling its forward, so the exported
    program would lose the guards of the capture.
    """

    @functools.wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)  # over the tensors that `program` gets below

    program: nn.Module = type("Program", (nn.Module,), {"forward": forward})()
    for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        program.__dict__[name] = module.__dict__[name]
    return program.eval()


def _examples(
    spec: InputSpec | None, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> list[Example]:
    """Return the examples to try exporting with, in order."""
    if spec is None or dynamic_shapes is not None:
        return examples_for(args, kwargs, dynamic_shapes)
    spec.check(args, kwargs)
    return [example_for(spec, args, kwargs)]
