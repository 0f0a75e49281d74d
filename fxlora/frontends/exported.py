"""Capture through torch.export, for a model with example inputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
)

from ..errors import CaptureError, warn
from ..fx.autocast import described
from ..fx.compare import alike
from ..module.autocasts import Autocasts
from ..module.blocks.recorded import ModuleCall
from ..module.contract import InputSpec, Update
from ..module.program import MODES
from .assumptions import contract_of, with_state
from .caller_modes import inside_autocast, wanted
from .examples import Example
from .failures import capture_error
from .kept.caches import searched_once
from .kept.checkpoints import marks_of
from .kept.containers import recorded_outputs, watch_updates
from .kept.module_calls import recorded_calls_of
from .kept.python_state import Attribute, Changes, noted, noted_reads
from .kept.tensor_state import StateReads
from .kept.undisturbed import mode_of
from .mode_proof import Proof
from .one_export import export_module, refuse_strides, refuse_unknown_squeezes
from .run_values import Values
from .sizes import refuse_fixed_sizes
from .small_sizes import allow_batch_of_one

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
    used: dict[str, Example] = {}
    for mode in MODES:
        of_mode = mode_of(root or model, mode == "train")
        with of_mode, noted(model, changes), noted_reads(model, reads):
            made = _export_mode(model, examples, mode, parts, values)
            modules[mode], inputs[mode], used[mode] = made
            calls[mode] = modules[mode].meta.pop(RECORDED, ())
        examples = examples[examples.index(used[mode]) :]
    same = used["train"] is used["eval"] and _same(modules, inputs, calls)
    proof: Proof | None = None
    for mode in MODES:
        of_mode = mode_of(root or model, mode == "train")
        with of_mode, noted_reads(model, reads):  # without the attributes of the export
            again = functools.partial(_attempt, model, used[mode], mode, parts, values)
            given = model, modules[mode], used[mode], values, again
            modules[mode], autocasts[mode], proof = _proved(*given, proof if same else None)
        calls[mode] = modules[mode].meta.pop(RECORDED, calls[mode])
    if _same(modules, inputs, calls):
        modules["train"] = modules["eval"]
    known = None if any(map(_has_unseen_code, modules.values())) else frozenset(reads)
    return Source(modules, inputs, path, calls, autocasts, changes=changes, reads=known)


def _same(modules: dict[str, fx.GraphModule], *others: dict[str, Any]) -> bool:
    """Whether the graphs of both modes, and what is known of them, are the same."""
    if any(known["train"] != known["eval"] for known in others):
        return False
    train, evaluation = modules["train"], modules["eval"]
    if train is evaluation:
        return True
    return alike(train, evaluation) and marks_of(train) == marks_of(evaluation)


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
    other: Proof | None,
) -> tuple[fx.GraphModule, Autocasts, Proof | None]:
    """Return a mode's graph, the autocasts that it holds for, and the proof of that.

    The caller's autocast is one of them: if the graph cannot follow it, the graph is made `again`
    with this autocast as a region inside it, without a proof.

    Args:
        other: the proof of the other mode, whose graph was the same before it was repaired. If it
            holds for this mode's source too, that graph is this mode's.
    """

    def export(given: Example) -> fx.GraphModule:
        return export_module(model, given, StateReads())[1]

    reads = module.meta.pop(_READS)
    proof = other and other.for_source(model, export, reads)
    if other is None or proof is None or not proof.is_as_good_as(other):
        proof = Proof(model, module, example, export, values, reads)
    found = proof.found
    context = wanted()
    if not context or context in found.proved:
        return proof.module, found, proof
    with inside_autocast(model, context):
        module, _ = again()
    module.meta.pop(_READS)
    warn(
        f"{type(model).__name__}: its graph does not follow the caller's autocast "
        f"({dict(found.differs).get(context, found.otherwise)}). It was captured with "
        f"{described(context)} inside, which every call of it runs under."
    )
    found = replace(
        found,
        proved=(context,),
        differs=(),
        otherwise="the graph was captured for another autocast",
        by_device=(),
    )
    return module, found, None


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
        program, module = export_module(model, example, reads)
    if example.reordered and reads.strides:
        raise CaptureError(f"{type(model).__name__} reads how its tensors lie in memory.")
    module.meta[RECORDED] = calls.taken(module.graph)
    module.meta[_READS] = reads
    refuse_unknown_squeezes(model, module.graph)
    refuse_strides(model, module, example)
    spec = with_state(contract_of(program, module, model, example), module, reads, example, model)
    names = {**dict(enumerate(spec.names)), **{name: name for name in spec.names}}
    spec = replace(spec, updates=tuple(Update(names[p], path) for p, path in updates.items()))
    return module, allow_batch_of_one(model, module, example.marked(spec), example, values)
