"""Capture through torch.export: the road for a model with example inputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, _unlift
from torch.export.unflatten import _assign_attr
from torch.fx.experimental import _config as export_config
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from ..fx.compare import alike, alike_but_for_sizes
from ..fx.targets import refuse_unwritable_names
from ..module.contract import Dimension, InputSpec, TensorInput, Update
from ..module.program import MODES
from .assumptions import contract_of
from .examples import Example
from .failures import capture_error
from .kept.checkpoints import marked_checkpoints, marks_of
from .kept.containers import recorded_outputs, watch_updates
from .kept.functions import opaque_functions
from .kept.generators import refuse_constant_draws
from .kept.hooks import no_tensor_hooks
from .kept.patches import patched
from .kept.undisturbed import mode_of, refuse_state
from .sizes import refuse_fixed_sizes


@dataclass(eq=False)
class Source:
    """What torch.export or the tracer made of a model, or of a submodule: a graph per mode.

    Attributes:
        modules: by mode; one object under both keys where they came out alike.
        inputs: what each holds for.
        path: of the submodule whose names the graphs use; "" is the whole model.
    """

    modules: dict[str, fx.GraphModule]
    inputs: dict[str, InputSpec | None]
    path: str = ""

    def copied(self) -> Source:
        """The same with graphs of its own, over the same tensors."""
        held = [(*m.parameters(), *m.buffers()) for m in self.modules.values()]
        memo = {id(tensor): tensor for tensors in held for tensor in tensors}
        copies = {id(m): copy.deepcopy(m, dict(memo)) for m in self.modules.values()}
        modules = {mode: copies[id(module)] for mode, module in self.modules.items()}
        return Source(modules, dict(self.inputs), self.path)

    def distinct(self) -> dict[str, fx.GraphModule]:
        """The graph modules, each once, by (the first) mode."""
        modes = {id(module): mode for mode, module in reversed(self.modules.items())}
        return {mode: self.modules[mode] for mode in MODES if mode in modes.values()}


def export_modes(
    model: nn.Module, examples: list[Example], *, root: nn.Module | None = None, path: str = ""
) -> Source:
    """Both modes of a model, or of a submodule of `root` as it is in the root's modes.

    Raises:
        CaptureError: none of the examples exports.
    """
    modules: dict[str, fx.GraphModule] = {}
    inputs: dict[str, InputSpec | None] = {}
    for mode in MODES:
        with mode_of(root or model, mode == "train"):
            modules[mode], inputs[mode], used = _export_mode(model, examples, mode)
        examples = examples[examples.index(used) :]
    train, evaluation = modules["train"], modules["eval"]
    same_inputs = inputs["train"] == inputs["eval"]
    if same_inputs and alike(train, evaluation) and marks_of(train) == marks_of(evaluation):
        modules["train"] = evaluation
    return Source(modules, inputs, path)


def _export_mode(
    model: nn.Module, examples: list[Example], mode: str
) -> tuple[fx.GraphModule, InputSpec, Example]:
    """The graph of the current mode from the first example that exports, with its contract.

    A graph that does not hold for the user's own inputs (the last example) is passed over while
    there is another: those are of batch 1, and the graph is for larger ones only. In train mode
    that may be all there is (batch norm refuses a batch of 1).

    Raises:
        CaptureError: none of the examples exports; the cause is the last one's error.
    """
    own, failure = examples[-1], None
    outputs: list[Any] = []
    larger: tuple[fx.GraphModule, InputSpec, Example] | None = None
    for example in examples:
        try:
            with recorded_outputs(model) as outputs:
                module, spec = _attempt(model, example, mode)
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
    if isinstance(failure, CaptureError):  # of the contract, which says it better
        raise failure
    values = (own.args, own.kwargs, outputs)
    raise capture_error(model, mode, failure, values=values) from failure


def depends_on_data(error: BaseException | None) -> bool:
    """Whether Python branched on a value: no other sizes of the inputs will help."""
    return isinstance(error, GuardOnDataDependentSymNode)


def _attempt(model: nn.Module, example: Example, mode: str) -> tuple[fx.GraphModule, InputSpec]:
    fixed = refuse_fixed_sizes(model, mode) if example.asked else nullcontext()
    with fixed, watch_updates(model) as updates:
        program, module = _exported(model, example)
    _refuse_unknown_squeezes(model, module.graph)
    spec = contract_of(program, module, model, example)
    names = {**dict(enumerate(spec.names)), **{name: name for name in spec.names}}
    spec = replace(spec, updates=tuple(Update(names[p], path) for p, path in updates.items()))
    return module, _proved_for_one(model, module, spec, example)


def _exported(model: nn.Module, example: Example) -> tuple[ExportedProgram, fx.GraphModule]:
    with ExitStack() as stack:
        functions = stack.enter_context(opaque_functions())
        stack.enter_context(no_tensor_hooks())
        stack.enter_context(marked_checkpoints())
        stack.enter_context(refuse_constant_draws(type(model).__name__))
        assigned = stack.enter_context(refuse_state(model))
        program = run_export(model, example)
    # (what follows generates code)
    refuse_unwritable_names(spec.target for spec in program.graph_signature.input_specs)
    module = _as_module(program)
    assert isinstance(module, fx.GraphModule)
    _refuse_assigned_state(model, module, assigned)
    functions.restore(module)
    return program, module


def _as_module(program: ExportedProgram) -> fx.GraphModule:
    """The program as a module.

    For each tensor torch looks through all children of each container for further calls of one
    module ("name@1"), which takes N² steps for N layers. A program just exported has none.
    """
    if any("@" in name for name in (*program.state_dict, *program.constants)):
        return program.module(check_guards=False)
    with patched(_unlift, _assign_attr=_assign):
        return program.module(check_guards=False)


def _assign(value: Any, root: nn.Module, target: str, **how: Any) -> None:
    """As torch.export's `_assign_attr`, in the container of this very name only."""
    owner, _, name = target.rpartition(".")
    for part in owner.split(".") if owner else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    _assign_attr(value, root, name, **how)


def _refuse_assigned_state(
    model: nn.Module, module: fx.GraphModule, assigned: Collection[str]
) -> None:
    """Raise if a tensor that the forward replaces is also one that it reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in assigned:
        if name in read:
            raise CaptureError(
                f"{type(model).__name__} keeps state in its attribute '{name}', which a graph "
                f"cannot: register_buffer('{name.rpartition('.')[2]}', …), and write into that."
            )


def proved_for(
    model: nn.Module, module: fx.GraphModule, spec: InputSpec, single: Example
) -> InputSpec | None:
    """The contract of a graph with sizes of 0 and 1 like these allowed, if it is right there.

    torch.export's guards against them often come from a question about strides, not from the
    source; and where there is no guard, it may have taken a size for larger than 1 (a squeeze).
    The graph is right if that of these very inputs has the same ops on the same sizes.
    """
    try:
        wider = spec.allowing(single.args, single.kwargs)
    except InputError:
        return None
    if wider is None or (wider == spec and not _squeezes(module.graph)):
        return wider
    try:
        _, static = _exported(model, single)
    except Exception:  # noqa: BLE001 - the source refuses such inputs, each in its own way
        return None
    sizes = spec.symbols(single.args, single.kwargs)
    return wider if alike_but_for_sizes(module.graph, static.graph, sizes) else None


def _squeezes(graph: fx.Graph) -> bool:
    """Whether the number of dimensions may depend on sizes of 1."""
    return any(_is_squeeze(node) for node in graph.nodes)


def _is_squeeze(node: fx.Node) -> bool:
    return getattr(node.target, "overloadpacket", None) is torch.ops.aten.squeeze


def _refuse_unknown_squeezes(model: nn.Module, graph: fx.Graph) -> None:
    """Raise where a squeeze may find a 1 in the data: torch.export takes it that it does not."""
    for node in filter(_is_squeeze, graph.nodes):
        value = node.all_input_nodes[0].meta.get("val")
        sizes: Any = value.shape if isinstance(value, torch.Tensor) else ()
        named: Any = node.args[1] if len(node.args) > 1 else range(len(sizes))
        axes = [named] if isinstance(named, int) else named
        if any(free_unbacked_symbols(sizes[axis]) for axis in axes):
            raise CaptureError(
                f"{type(model).__name__} squeezes a tensor whose size depends on the data: whether "
                "that drops a dimension, no graph can say. Give squeeze the dimension that is 1."
            )


def _proved_for_one(
    model: nn.Module, module: fx.GraphModule, spec: InputSpec, example: Example
) -> InputSpec:
    """The contract with batches of 1 where they are proved to be right, and without where not.

    A proof is of one symbol alone; where there are several, also of all together.
    """
    singles = [_cut_to_one(spec, example, {symbol}) for symbol in spec.batches()]
    if len(singles) > 1:
        singles.append(_cut_to_one(spec, example, set(spec.batches())))
    wider: InputSpec | None = spec
    for single in singles:
        wider = wider and proved_for(model, module, wider, single)
    if wider is not None:
        return wider
    for single in singles:  # what was not proved is not allowed
        if spec.holds_for(single.args, single.kwargs):
            spec = spec.larger(spec.symbols(single.args, single.kwargs))
    return spec


def _cut_to_one(spec: InputSpec, example: Example, symbols: set[str]) -> Example:
    """The example's inputs, with first dimensions of these symbols cut to 1."""
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
    """torch.export, told not to take a dynamic size for larger than 1.

    By default it does: a graph from a batch of 2 is then silently wrong for a batch of 1 where
    the source asks (batch norm in train mode does).
    """
    config: Any = export_config  # torch installs `patch` on the module at run time
    patience = nullcontext() if example.patience == math.inf else _Patience(example.patience)
    with config.patch(backed_size_oblivious=True), patience:
        return torch.export.export(
            model,
            example.args,
            example.kwargs,
            dynamic_shapes=example.dynamic_shapes,
            strict=False,
        )


class _Patience(TorchFunctionMode):
    """Gives up after some seconds: with every size dynamic, some models take minutes."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.monotonic() + seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if time.monotonic() > self.end:
            self.end = math.inf  # what is left to do is to put things back
            raise TimeoutError("more dynamic sizes than torch.export works out in a minute")
        return func(*args, **(kwargs or {}))
