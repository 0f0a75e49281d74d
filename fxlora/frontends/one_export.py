"""One run of torch.export: what it may not change, its module, and what no graph can hold."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Collection, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import ScriptObject, fx, nn
from torch.export import ExportedProgram, _unlift
from torch.export.unflatten import _assign_attr
from torch.fx.experimental import _config as export_config
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..fx.targets import refuse_unwritable_names
from ..tables import a
from .autocast_choices import remove_metadata_assertions
from .examples import Example
from .kept.checkpoints import marked_checkpoints
from .kept.functions import opaque_functions
from .kept.generators import refuse_constant_draws
from .kept.hooks import no_tensor_hooks
from .kept.patches import patched
from .kept.recurrent import any_number_of_steps, restore_recurrent
from .kept.subclasses import kept_subclass_calls
from .kept.tensor_state import StateReads, kept_state, remove_aliases
from .kept.undisturbed import refuse_state


def export_module(
    model: nn.Module, example: Example, reads: StateReads
) -> tuple[ExportedProgram, fx.GraphModule]:
    """Export a model, and record its forward's reads of state; return the program and a module."""
    with ExitStack() as stack:
        stack.enter_context(kept_state(model, reads))
        functions = stack.enter_context(opaque_functions())
        stack.enter_context(no_tensor_hooks())
        stack.enter_context(marked_checkpoints())
        stack.enter_context(refuse_constant_draws(type(model).__name__))
        assigned = stack.enter_context(refuse_state(model))
        of_subclasses = stack.enter_context(kept_subclass_calls(model))
        program = run_export(model, example)
    _refuse_unanswered(model, reads)
    # Before `as_module`, which generates code from these names.
    refuse_unwritable_names(spec.target for spec in program.graph_signature.input_specs)
    module = as_module(program)
    assert isinstance(module, fx.GraphModule)
    _refuse_assigned_state(model, module, assigned)
    _refuse_other_constants(model, module)
    functions.restore(module)
    of_subclasses.restore(module)
    remove_metadata_assertions(module)
    return program, module


def run_export(model: nn.Module, example: Example) -> ExportedProgram:
    """Run torch.export without its assumption that a dynamic size is larger than 1.

    With that assumption, its default, a graph exported with a batch of 2 is silently wrong for a
    batch of 1 where the source checks for it (as batch norm in train mode does).
    """
    config: Any = export_config  # torch installs `patch` on the module at run time
    patience = nullcontext() if example.patience == math.inf else _Patience(example.patience)
    named = _declared_keywords(model, example)
    with config.patch(backed_size_oblivious=True), any_number_of_steps(), patience, named:
        program = torch.export.export(
            model,
            example.args,
            example.kwargs,
            dynamic_shapes=example.dynamic_shapes,
            strict=False,
        )
    restore_recurrent(program.graph_module)
    remove_aliases(program.graph_module)
    return program


@contextmanager
def _declared_keywords(model: nn.Module, example: Example) -> Generator[None]:
    """Within the context, a forward declares the keywords that it gets as `**kwargs`.

    torch 2.11 takes no dynamic shapes for a model with such keywords. A user's specification may
    have them as an item of its own.
    """
    signature = inspect.signature(model.forward)
    every = signature.parameters.values()
    named = [p for p in every if p.kind is not p.VAR_KEYWORD]
    others = [name for name in example.kwargs if name not in signature.parameters]
    asked = example.dynamic_shapes if example.asked else {}
    flat = isinstance(asked, dict) and not any(p.name in asked for p in every if p not in named)
    if not (others and flat):
        yield
        return
    forward, own = model.forward, model.__dict__.get("forward")

    @functools.wraps(forward)
    def declared(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others]
    declared.__dict__["__signature__"] = signature.replace(parameters=named)
    model.__dict__["forward"] = declared
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


class _Patience(TorchFunctionMode):
    """Raise TimeoutError after some seconds: with all sizes dynamic, some models take minutes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if time.monotonic() > self.end:
            self.end = math.inf  # do not raise again during cleanup
            raise TimeoutError("too many dynamic sizes: torch.export took more than a minute")
        return func(*args, **(kwargs or {}))


def as_module(program: ExportedProgram) -> fx.GraphModule:
    """Convert an exported program to a module.

    For each tensor, torch searches all children of each container for further calls of the same
    module ("name@1"), which takes N² steps for N layers. A program straight from torch.export has
    no names of this form, so that the search can be left out.
    """
    if any("@" in name for name in (*program.state_dict, *program.constants)):
        return program.module(check_guards=False)
    with patched(_unlift, _assign_attr=_assign):
        return program.module(check_guards=False)


def _assign(value: Any, root: nn.Module, target: str, **how: Any) -> None:
    """Do as torch.export's `_assign_attr`, but only for the container of exactly this name."""
    owner, _, name = target.rpartition(".")
    for part in owner.split(".") if owner else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    _assign_attr(value, root, name, **how)


def _refuse_unanswered(model: nn.Module, reads: StateReads) -> None:
    """Raise CaptureError if the forward reads tensor state that the contract does not check."""
    if reads.unanswered:
        raise CaptureError(
            f"{type(model).__name__} reads {reads.unanswered}: a graph has the answer of the "
            "example only, and calls cannot be told by it. Take it out of the forward, or pass "
            "what follows from it as an argument."
        )


def _refuse_assigned_state(
    model: nn.Module, module: fx.GraphModule, assigned: Collection[str]
) -> None:
    """Raise CaptureError if the forward both replaces and reads a tensor attribute."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in assigned:
        if name in read:
            raise CaptureError(
                f"{type(model).__name__} keeps state in its attribute '{name}', which a graph "
                f"cannot do. Use register_buffer('{name.rpartition('.')[2]}', …), and write to "
                "the buffer in place."
            )


def _refuse_other_constants(model: nn.Module, module: fx.GraphModule) -> None:
    """Raise CaptureError if a graph holds anything but tensors and graphs."""
    for node in module.graph.find_nodes(op="get_attr"):
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(module.get_submodule(owner), name)
        if not isinstance(value, torch.Tensor | fx.GraphModule | ScriptObject):
            raise CaptureError(
                f"{type(model).__name__}: torch.export puts {a(type(value).__name__)} into its "
                "graph, as it does for an index inside torch.vmap. Compute this outside of vmap "
                "(transformers: a mask from a function), or in a submodule of its own."
            )


def refuse_unknown_squeezes(model: nn.Module, graph: fx.Graph) -> None:
    """Raise CaptureError where a data-dependent size is squeezed: export assumes it is not 1."""
    for node in filter(is_squeeze, graph.nodes):
        value = node.all_input_nodes[0].meta.get("val")
        sizes: Any = value.shape if isinstance(value, torch.Tensor) else ()
        named: Any = node.args[1] if len(node.args) > 1 else range(len(sizes))
        axes = [named] if isinstance(named, int) else named
        if any(free_unbacked_symbols(sizes[axis]) for axis in axes):
            raise CaptureError(
                f"{type(model).__name__} squeezes a tensor whose size depends on the data: a graph "
                "cannot decide whether that drops a dimension. Pass squeeze the dimension whose "
                "size is 1."
            )


def is_squeeze(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is torch.ops.aten.squeeze


def refuse_strides(model: nn.Module, module: fx.GraphModule, example: Example) -> None:
    """Raise CaptureError if a dynamic graph may compute with strides that another tensor has.

    torch.export writes the stride of a copy of an input as a stride of the input, whose symbol is
    the same in the example. If the input does not lie in memory as its copies do, that is wrong.
    """
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.layout is torch.strided]
    if all(t.is_contiguous() for t in tensors) or not reads_strides(module):
        return
    raise CaptureError(
        f"{type(model).__name__} computes with strides, and an example input is not contiguous: "
        "its graph holds for no other size. Give contiguous examples (x.contiguous())."
    )


def reads_strides(module: fx.GraphModule) -> bool:
    """Whether a graph computes with how a tensor lies in memory."""
    packets = (torch.ops.aten.sym_stride, torch.ops.aten.sym_storage_offset)
    graphs = (m.graph for m in module.modules() if isinstance(m, fx.GraphModule))
    return any(
        getattr(node.target, "overloadpacket", None) in packets
        for graph in graphs
        for node in graph.nodes
    )
