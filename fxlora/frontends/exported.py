"""Capture through torch.export, for a model with example inputs."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import ScriptObject, fx, nn
from torch.export import ExportedProgram, _unlift
from torch.export.unflatten import _assign_attr
from torch.fx.experimental import _config as export_config
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError, warn
from ..fx.autocast import described
from ..fx.compare import alike, same_graph_except_sizes
from ..fx.targets import refuse_unwritable_names
from ..module.autocasts import Autocasts
from ..module.blocks.recorded import ModuleCall
from ..module.contract import Dimension, InputSpec, TensorInput, Update
from ..module.program import MODES
from .assumptions import contract_of, drop_guards_on_small_sizes, with_state
from .autocast_choices import remove_metadata_assertions
from .caller_modes import inside_autocast, wanted
from .examples import Example
from .failures import capture_error
from .kept.caches import searched_once
from .kept.checkpoints import marked_checkpoints, marks_of
from .kept.containers import recorded_outputs, watch_updates
from .kept.functions import opaque_functions
from .kept.generators import refuse_constant_draws
from .kept.hooks import no_tensor_hooks
from .kept.module_calls import recorded_calls_of
from .kept.patches import patched
from .kept.python_state import Attribute, Changes, noted, noted_reads
from .kept.recurrent import any_number_of_steps, restore_recurrent
from .kept.subclasses import kept_subclass_calls
from .kept.tensor_state import StateReads, kept_state, remove_aliases
from .kept.undisturbed import mode_of, refuse_state
from .mode_proof import Proof, computes_the_same
from .run_values import Values
from .sizes import refuse_fixed_sizes

RECORDED = "module_calls"  # key in a fresh graph module's meta: the calls in its graph
_READS = "state_reads"  # key there: the StateReads of the forward


@dataclass(eq=False)
class Source:
    """The graphs that a frontend made of a model or a submodule, one per mode.

    Attributes:
        modules: the graph module of each mode; one object under both keys if they are equal.
        inputs: the input contract of each mode's graph, or None if the tracer made it.
        path: the submodule that names in the graphs are relative to; "" is the whole model.
        calls: the recorded calls of submodules in each mode's graph.
        autocasts: the callers' autocasts that each mode's graph holds for.
        method: the method of the model that was exported.
        changes: the Python attributes that the traces changed.
        reads: the Python attributes that the traces read, or None where that is not known.
    """

    modules: dict[str, fx.GraphModule]
    inputs: dict[str, InputSpec | None]
    path: str = ""
    calls: dict[str, tuple[ModuleCall, ...]] = field(default_factory=dict[str, Any])
    autocasts: dict[str, Autocasts] = field(default_factory=dict[str, Autocasts])
    method: str = "forward"
    changes: Changes = field(default_factory=Changes)
    reads: frozenset[Attribute] | None = None

    def copied(self) -> Source:
        """Copy the graphs; the copies share the tensors."""
        held = [(*m.parameters(), *m.buffers()) for m in self.modules.values()]
        memo = {id(tensor): tensor for tensors in held for tensor in tensors}
        copies = {id(m): copy.deepcopy(m, dict(memo)) for m in self.modules.values()}
        modules = {mode: copies[id(module)] for mode, module in self.modules.items()}
        return replace(
            self,
            modules=modules,
            inputs=dict(self.inputs),
            calls=dict(self.calls),
            autocasts=dict(self.autocasts),
        )

    def holds_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graphs of both modes accept a call."""
        return all(
            spec is not None and spec.holds_for(args, kwargs) for spec in self.inputs.values()
        )

    def distinct(self) -> dict[str, fx.GraphModule]:
        """Return each distinct graph module once, under the first mode that uses it."""
        modes = {id(module): mode for mode, module in reversed(self.modules.items())}
        return {mode: self.modules[mode] for mode in MODES if mode in modes.values()}


@searched_once()
def export_modes(
    model: nn.Module,
    examples: list[Example],
    *,
    root: nn.Module | None = None,
    path: str = "",
    parts: Sequence[str] = (),
) -> Source:
    """Export a model in train and in eval mode.

    Args:
        model: the model, or a submodule of `root`.
        examples: the examples to try, in order; eval mode starts with the one that train used.
        root: the module whose mode is set for each export; by default `model`.
        path: path of `model` in `root`.
        parts: paths of submodules whose calls to record.

    Raises:
        CaptureError: none of the examples exports.
    """
    modules: dict[str, fx.GraphModule] = {}
    calls: dict[str, tuple[ModuleCall, ...]] = {}
    inputs: dict[str, InputSpec | None] = {}
    autocasts: dict[str, Autocasts] = {}
    values, changes, reads = Values(), Changes(), set[Attribute]()
    for mode in MODES:
        of_mode = mode_of(root or model, mode == "train")
        with of_mode, noted(model, changes), noted_reads(model, reads):
            modules[mode], inputs[mode], used = _export_mode(model, examples, mode, parts, values)
            calls[mode] = modules[mode].meta.pop(RECORDED, ())
        of_mode = mode_of(root or model, mode == "train")
        with of_mode, noted_reads(model, reads):  # without the attributes of the export
            again = functools.partial(_attempt, model, used, mode, parts, values)
            modules[mode], autocasts[mode] = _proved(model, modules[mode], used, values, again)
        calls[mode] = modules[mode].meta.pop(RECORDED, calls[mode])
        examples = examples[examples.index(used) :]
    train, evaluation = modules["train"], modules["eval"]
    same_inputs = inputs["train"] == inputs["eval"] and calls["train"] == calls["eval"]
    if same_inputs and alike(train, evaluation) and marks_of(train) == marks_of(evaluation):
        modules["train"] = evaluation
    known = None if any(map(_has_unseen_code, modules.values())) else frozenset(reads)
    return Source(modules, inputs, path, calls, autocasts, changes=changes, reads=known)


# torch.export makes these of code that runs in the trace like any other.
_SEEN = (
    torch.ops.higher_order.wrap_with_autocast,
    torch.ops.higher_order.wrap_with_set_grad_enabled,
)


def _has_unseen_code(module: fx.GraphModule) -> bool:
    """Whether torch.compile's tracer read code for a graph, as for the branches of a cond."""
    graphs = (m.graph for m in module.modules() if isinstance(m, fx.GraphModule))
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator) and node.target not in _SEEN
        for graph in graphs
        for node in graph.nodes
    )


def _proved(
    model: nn.Module,
    module: fx.GraphModule,
    example: Example,
    values: Values,
    again: Callable[[], tuple[fx.GraphModule, InputSpec]],
) -> tuple[fx.GraphModule, Autocasts]:
    """Return a mode's graph with the autocasts that it holds for; the caller's is one of them.

    If the graph cannot follow the caller's autocast, it is made `again` with this autocast as a
    region inside it.
    """

    def export(given: Example) -> fx.GraphModule:
        return _exported(model, given, StateReads())[1]

    reads = module.meta.pop(_READS)
    found = Proof(model, module, example, export, values, reads).autocasts()
    context = wanted()
    if not context or context in found.proved:
        return module, found
    with inside_autocast(model, context):
        module, _ = again()
    module.meta.pop(_READS)
    warn(
        f"{type(model).__name__}: its graph does not follow the caller's autocast "
        f"({dict(found.differs).get(context, found.otherwise)}). It was captured with "
        f"{described(context)} inside, which every call of it runs under."
    )
    return module, replace(
        found,
        proved=(context,),
        differs=(),
        otherwise="the graph was captured for another autocast",
        by_device=(),
    )


def _export_mode(
    model: nn.Module, examples: list[Example], mode: str, parts: Sequence[str], values: Values
) -> tuple[fx.GraphModule, InputSpec, Example]:
    """Export the current mode with the first example that works.

    The last example has the user's own inputs. A graph whose contract excludes those is kept only
    if no later example exports: the inputs have a batch of 1, and the graph holds for larger
    batches only. In train mode there may be no other (batch norm refuses a batch of 1).

    Returns:
        The graph module, its input contract, and the example that it was exported with.

    Raises:
        CaptureError: none of the examples exports; the cause is the error of the last one.
    """
    own, failure = examples[-1], None
    outputs: list[Any] = []
    larger: tuple[fx.GraphModule, InputSpec, Example] | None = None
    for example in examples:
        try:
            with recorded_outputs(model) as outputs:
                module, spec = _attempt(model, example, mode, parts, values)
            if spec.holds_for(own.args, own.kwargs):
                return module, spec, example
            larger = (module, spec, example)
        except Exception as error:  # noqa: BLE001 - torch.export raises whatever the model does
            failure = error
            if depends_on_data(error):
                break
    if larger:
        return larger
    assert failure is not None
    if isinstance(failure, CaptureError):  # its message is already specific
        raise failure
    told = (own.args, own.kwargs, outputs)
    raise capture_error(model, mode, failure, values=told) from failure


def depends_on_data(error: BaseException | None) -> bool:
    """Whether Python branched on a tensor's value, so that no other input sizes would help."""
    return isinstance(error, GuardOnDataDependentSymNode)


def _attempt(
    model: nn.Module, example: Example, mode: str, parts: Sequence[str], values: Values
) -> tuple[fx.GraphModule, InputSpec]:
    reads = StateReads()
    fixed = refuse_fixed_sizes(model, mode) if example.asked else nullcontext()
    with fixed, watch_updates(model) as updates, recorded_calls_of(model, parts, reads) as calls:
        program, module = _exported(model, example, reads)
    if example.reordered and reads.strides:
        raise CaptureError(f"{type(model).__name__} reads how its tensors lie in memory.")
    module.meta[RECORDED] = calls.taken(module.graph)
    module.meta[_READS] = reads
    _refuse_unknown_squeezes(model, module.graph)
    _refuse_strides(model, module, example)
    spec = with_state(contract_of(program, module, model, example), module, reads, example, model)
    names = {**dict(enumerate(spec.names)), **{name: name for name in spec.names}}
    spec = replace(spec, updates=tuple(Update(names[p], path) for p, path in updates.items()))
    return module, _allow_batch_of_one(model, module, example.marked(spec), example, values)


def _exported(
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
    # Before `_as_module`, which generates code from these names.
    refuse_unwritable_names(spec.target for spec in program.graph_signature.input_specs)
    module = _as_module(program)
    assert isinstance(module, fx.GraphModule)
    _refuse_assigned_state(model, module, assigned)
    _refuse_other_constants(model, module)
    functions.restore(module)
    of_subclasses.restore(module)
    remove_metadata_assertions(module)
    return program, module


def _refuse_unanswered(model: nn.Module, reads: StateReads) -> None:
    """Raise CaptureError if the forward reads tensor state that the contract does not check."""
    if reads.unanswered:
        raise CaptureError(
            f"{type(model).__name__} reads {reads.unanswered}: a graph has the answer of the "
            "example only, and calls cannot be told by it. Take it out of the forward, or pass "
            "what follows from it as an argument."
        )


def _as_module(program: ExportedProgram) -> fx.GraphModule:
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
                f"{type(model).__name__}: torch.export puts a {type(value).__name__} into its "
                "graph, as it does for an index inside torch.vmap. Compute this outside of vmap "
                "(transformers: a mask from a function), or in a submodule of its own."
            )


def widened_if_proved(
    model: nn.Module,
    module: fx.GraphModule,
    spec: InputSpec,
    single: Example,
    values: Values | None = None,
) -> InputSpec | None:
    """Widen a graph's contract to sizes of 0 and 1, if the graph is right for them.

    torch.export's guards against these sizes often come from a check of strides, not from the
    source; and where there is no guard, torch.export may have assumed a size larger than 1 (in a
    squeeze). The graph is right if source and graph compute the same values of these inputs; or,
    where values cannot be compared, if a static export of the inputs has the same ops on the same
    sizes.

    Args:
        model: the source model.
        module: the graph.
        spec: its contract.
        single: inputs with the sizes of 0 and 1 to allow.
        values: the values of other runs, which this proof can use.

    Returns:
        The wider contract, or None if the graph is not proved right for these inputs.
    """
    try:
        wider = spec.allowing(single.args, single.kwargs)
    except InputError:
        return None
    if wider is None or (wider == spec and not _squeezes(module.graph)):
        return wider
    if computes_the_same(model, module, single, values or Values()):
        return wider
    try:
        _, static = _exported(model, single, StateReads())
    except Exception:  # noqa: BLE001 - the source may raise anything for these inputs
        return None
    sizes = spec.symbols(single.args, single.kwargs)
    return wider if same_graph_except_sizes(module.graph, static.graph, sizes) else None


def contract_with_small_sizes(
    model: nn.Module, program: ExportedProgram, example: Example, singles: Iterable[Example]
) -> InputSpec:
    """Return a program's input contract, after it takes sizes of 0 and 1 if it is right for them.

    Args:
        model: the module that was exported.
        program: the program; guards that exclude only such sizes are taken out of it, if it is
            proved to compute the same as the module there.
        example: the inputs that it was exported with.
        singles: inputs to allow.
    """
    module = _as_module(program)
    spec = contract_of(program, module, model, example)
    for single in singles:
        if spec.holds_for(single.args, single.kwargs):
            continue
        if wider := widened_if_proved(model, module, spec, single):
            items = [item for _, item in spec.pairs(single.args, single.kwargs)]
            drop_guards_on_small_sizes(program, module, spec, items)
            spec = wider
    return spec


def _squeezes(graph: fx.Graph) -> bool:
    """Whether a graph has a squeeze: it drops a dimension only if its size is 1."""
    return any(_is_squeeze(node) for node in graph.nodes)


def _is_squeeze(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is torch.ops.aten.squeeze


def _refuse_unknown_squeezes(model: nn.Module, graph: fx.Graph) -> None:
    """Raise CaptureError where a data-dependent size is squeezed: export assumes it is not 1."""
    for node in filter(_is_squeeze, graph.nodes):
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


def reads_strides(module: fx.GraphModule) -> bool:
    """Whether a graph computes with how a tensor lies in memory."""
    packets = (torch.ops.aten.sym_stride, torch.ops.aten.sym_storage_offset)
    graphs = (m.graph for m in module.modules() if isinstance(m, fx.GraphModule))
    return any(
        getattr(node.target, "overloadpacket", None) in packets
        for graph in graphs
        for node in graph.nodes
    )


def _refuse_strides(model: nn.Module, module: fx.GraphModule, example: Example) -> None:
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


def _allow_batch_of_one(
    model: nn.Module,
    module: fx.GraphModule,
    spec: InputSpec,
    example: Example,
    values: Values,
) -> InputSpec:
    """Allow batches of 1 in a contract if the graph is proved right for them, else exclude them.

    Each batch symbol is proved separately and, if there are several, also all of them together.
    If one proof fails, the contract allows none of them.
    """
    singles = [_cut_to_one(spec, example, {symbol}) for symbol in spec.batches()]
    if len(singles) > 1:
        singles.append(_cut_to_one(spec, example, set(spec.batches())))
    wider: InputSpec | None = spec
    for single in singles:
        wider = wider and widened_if_proved(model, module, wider, single, values)
    if wider is not None:
        return wider
    for single in singles:
        if spec.holds_for(single.args, single.kwargs):
            spec = spec.larger(spec.symbols(single.args, single.kwargs))
    return spec


def _cut_to_one(spec: InputSpec, example: Example, symbols: set[str]) -> Example:
    """Return the example's inputs with the first dimensions of these symbols cut to size 1."""
    single = {
        id(value): value[:1]
        for leaf, value in spec.pairs(example.args, example.kwargs)
        if isinstance(leaf, TensorInput)
        and leaf.dims
        and isinstance(first := leaf.dims[0], Dimension)
        and first.symbol in symbols
    }

    def cut(leaf: Any) -> Any:
        return single.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map(cut, (example.args, example.kwargs))
    return Example(args, kwargs, None)


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
