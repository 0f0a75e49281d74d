"""export: write a file that a runtime without fxlora runs, after comparing it with the module."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..data import as_path
from ..disk.files import whole_file
from ..errors import ConfigError, ExportError, InputError
from ..module import CapturedModule, check_captured
from ..module.ambient import no_ambient_modes
from ..module.program import ProgramModule
from ..names import shown
from ..proof.wider import Wider
from .adapters import Adapters, base_of, check_way, held, idle_tensors, values_like
from .call import Call, Form, distinct_names
from .compared import ADVICE, Reference, Trial, check, trials
from .delivery import Delivery, Format
from .files import whole_files
from .formats import format_of, writer_of_adapters
from .program import Exported, exported, output_names
from .refusals import (
    refuse_counts,
    refuse_groups,
    refuse_hooks,
    refuse_lost_outputs,
    refuse_sharded,
    refuse_writes,
    warn_of_state,
    warn_of_unchecked,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@no_ambient_modes(defaults=False)  # the graph may use the process's default dtype and device
def export(
    module: CapturedModule,
    path: str | Path,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    method: str = "forward",
    format: str | None = None,
    adapters: str = "constants",
    dynamic_shapes: Any = None,
    plain: bool = False,
    tolerance: float | None = None,
) -> Path:
    """Write the eval graph to a file that a runtime without fxlora runs.

    The file is loaded again by that runtime, and its outputs are compared with the module's: on the
    example, on a batch of 1 and on larger sizes, where dimensions are dynamic. A file that computes
    something else is not written. See docs/delivery.md for how each format is loaded.

    Args:
        module: a captured module: folded, adapted, routed, or without adapters; or a host of one.
        path: path of the file. It, and the files next to it that belong to it, are written whole or
            not at all.
        args, kwargs: example inputs.
        method: the captured method to write.
        format: "pt2" (torch.export), "aoti" (AOTInductor), "onnx", "executorch" or "openvino"; by
            default what the path's suffix says (.pt2: "pt2", .onnx, .pte, .xml).
        adapters: "constants" keeps A and B as tensors of their own, under their names, which each
            runtime can replace by another adapter's. "folded" folds them into the weights. "inputs"
            makes them inputs: `adapters={name: tensor}` of a torch program, inputs of these names
            elsewhere. Without effect on a module that has none, except that "inputs" raises.
        dynamic_shapes: as for `capture`; by default the dimensions that are dynamic in the captured
            graph are dynamic in the file.
        plain: whether "pt2" and "aoti" take and return dicts and tuples instead of other libraries'
            containers (transformers' outputs), which must be imported to load the file.
        tolerance: the largest difference of a number allowed, relative to itself or to the median
            of its output, whichever is larger (integers and booleans must be equal). By default
            1e-9 in float64, 1e-4 in float32 and 4 ε in float16 and bfloat16; or more, if the file's
            error is not much more than the module's own, both against the same module in a wider
            dtype. With `math.inf`, the file is neither loaded nor compared.

    Returns:
        The path of the file.

    Raises:
        NotCapturedError: the module is not a captured one.
        ExportError: it has no whole graph, or has hooks around it; the format cannot hold what it
            returns or writes to; the format's exporter refuses it, a package is missing, the file
            computes something else, or it cannot be written.
        ConfigError: an argument is invalid, or the module has no such adapters.
        InputError: the captured graph does not hold for the inputs.

    Example:
        >>> import tempfile, pathlib, torch, fxlora
        >>> gm = fxlora.capture(torch.nn.Linear(6, 4), torch.randn(2, 6))
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.pt2")
        >>> program = torch.export.load(fxlora.export(gm, path, torch.randn(2, 6)))
        >>> program.module()(torch.randn(5, 6)).shape
        torch.Size([5, 4])
    """
    path = as_path(path, ConfigError)
    outside, module = module, _captured(module, "export")
    check_way(adapters)
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ConfigError(f"tolerance must be a number from 0, not {shown(tolerance)}.")
    _, form = format_of(path, format)
    refuse_sharded(module)
    for called_module in (outside, module):
        refuse_hooks(called_module, method)
    positional = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    called = positional, dict(kwargs or {})
    try:
        graph, ways = held(module, adapters)
        made = exported(_call(graph, called, method, form, ways, plain), dynamic_shapes)
        made = made.up_to_example() if form.bounded else made
    except InputError as error:
        if args is not None or kwargs:
            raise
        raise InputError(f"{error} export needs inputs: export(module, path, args).") from error
    refuse_writes(made, form)
    refuse_groups(made, form)
    warn_of_unchecked(made, form)
    delivery = _delivery(made, ways)
    with whole_files(path) as temporary:
        _write(form, delivery, temporary)
        _compare(form, delivery, temporary, graph, method, tolerance)
    return path


@no_ambient_modes()
def export_adapter(module: CapturedModule, path: str | Path, *, like: CapturedModule) -> Path:
    """Write a module's adapter alone, for a file that `export` made of another module.

    Its tensors have the names that they have in the module's `state_dict()`. The file may be
    `.onnx_adapter` (onnxruntime.LoraAdapter), `.ptd` (ExecuTorch), or `.safetensors`, for the
    `load_constants` of AOTInductor, the `load_state_dict` of a torch program, and the inputs of all
    others.

    Args:
        module: an adapted or a routed module.
        path: path of the file, which is written whole or not at all.
        like: the module that the program was exported from, or one with its plan. A program has the
            scalings s of its own module, so B is multiplied by what the module's differ by.

    Returns:
        The path of the file.

    Raises:
        NotCapturedError: a module is not a captured one.
        ConfigError: the module has no adapters, or others than `like` (targets, ranks, variants);
            or nothing reads a file with such a suffix.
        ExportError: a package is missing, or the file cannot be written.

    Example:
        >>> import tempfile, pathlib, torch, fxlora, safetensors.torch
        >>> gm = fxlora.capture(torch.nn.Sequential(torch.nn.Linear(6, 4)), torch.randn(2, 6))
        >>> config = fxlora.LoraConfig(r=2, target_modules="all-linear")
        >>> one, two = [fxlora.inject(gm, fxlora.match(gm, config)) for _ in range(2)]
        >>> path = pathlib.Path(tempfile.mkdtemp(), "two.safetensors")
        >>> sorted(safetensors.torch.load_file(fxlora.export_adapter(two, path, like=one)))
        ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    path = as_path(path, ConfigError)
    module, like = (_captured(given, "export_adapter") for given in (module, like))
    write = writer_of_adapters(path)
    values = values_like(module, like)
    with whole_file(path, ExportError) as temporary:
        write(values, temporary)
    return path


# ---- the module ---------------------------------------------------------------------------------


def _captured(module: Any, verb: str) -> CapturedModule:
    """Return the module itself, or the one that a host runs."""
    inside = getattr(module, "__dict__", {}).get("_captured")
    found = inside if isinstance(inside, CapturedModule) else module
    check_captured(found, verb, routed=True)
    return found


def _call(
    module: CapturedModule,
    called: Arguments,
    method: str,
    form: Format,
    adapters: Adapters,
    plain: bool,
) -> Call:
    runner = _runner(module, called, method)
    for parameter in runner.parameters():
        parameter.requires_grad_(False)
    refuse_counts(*called)
    warn_of_state(runner)
    inputs = adapters.values if adapters.way == "inputs" else {}
    # The file holds neither these nor adapters that are not active.
    for name in (*(adapters.aliases if inputs else ()), *idle_tensors(module)):
        owner, _, leaf = name.rpartition(".")
        del runner.get_submodule(owner)._parameters[leaf]
    call = Call(runner, *called, Form(form.flat, plain, inputs, adapters.aliases))
    refuse_lost_outputs(call)
    return call


def _runner(module: CapturedModule, called: Arguments, method: str) -> ProgramModule:
    """Return the module that runs a call, in eval mode, over tensors of its own."""
    return module.derive().eval().chosen_call(*called, method)


# ---- the file -----------------------------------------------------------------------------------


def _delivery(made: Exported, adapters: Adapters) -> Delivery:
    if not made.call.form.flat:
        return Delivery(made, adapters)
    names = distinct_names(made.call.names())
    outputs = output_names(made)
    return Delivery(made, adapters, (*names, *made.call.form.inputs), outputs)


def _write(form: Format, delivery: Delivery, path: Path) -> None:
    """Write the files of a delivery; what an exporter raises becomes an ExportError."""
    try:
        form.write(delivery, path)
    except (ExportError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"the exporter refuses the graph: {_reason(error)} Change what the source computes "
            'there, or export with format="pt2", which holds any graph.'
        ) from error


def _reason(error: BaseException) -> str:
    """Return the node that an exporter failed at, and the first cause: it adds general advice."""
    at = ""
    while error.__cause__ is not None:
        error = error.__cause__
        at = next((x for x in str(error).splitlines() if "translating node" in x), at)
    return f"{at.partition('. See the stack')[0]}{': ' if at else ''}{error}"


@no_ambient_modes()  # the file is to run without them
def _compare(
    form: Format,
    delivery: Delivery,
    path: Path,
    graph: CapturedModule,
    method: str,
    tolerance: float | None,
) -> None:
    """Raise ExportError unless the loaded file computes what the module does."""
    if tolerance == math.inf:
        return
    try:
        run = form.load(delivery, path)
    except Exception as error:
        raise ExportError(f"the file cannot be loaded again: {error} {ADVICE}") from error
    found = list(_trials(form, delivery, graph, method))
    check(run, found, [p.dtype for p in graph.parameters()], tolerance)


def _trials(
    form: Format, delivery: Delivery, graph: CapturedModule, method: str
) -> Iterator[Trial]:
    made, adapters = delivery.made, delivery.adapters
    called = made.call.args, made.call.kwargs
    inputs = made.call.form.inputs
    wider = Wider(graph)

    def own(module: CapturedModule) -> ProgramModule:
        return _runner(module, wider.cast(called), method)

    def base(module: CapturedModule) -> ProgramModule:
        return _base(module, adapters, wider.cast(called), method)

    reference = Reference(_runner(graph, called, method), wider, own)
    yield from trials(made, reference, inputs, "the module's own adapter")
    if not inputs:
        return
    reference, neutral = (
        Reference(_base(graph, adapters, called, method), wider, base),
        adapters.neutral,
    )
    yield from trials(made, reference, neutral, "the base's values of the inputs")
    if form.defaults:
        yield from trials(made, reference, neutral, "no adapter", left_out=True)


def _base(
    graph: CapturedModule, adapters: Adapters, called: Arguments, method: str
) -> ProgramModule:
    """Return the module that runs a call without adapters."""
    if not graph.known.routing:
        return _runner(base_of(graph), called, method)
    base = _runner(graph, called, method)  # with its further arguments
    with torch.no_grad():
        for name, value in adapters.neutral.items():
            base.get_parameter(name).copy_(value)
    return base
