"""CapturedModule: a GraphModule that holds one graph per mode over one parameter tree."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxLoraError, NotCapturedError
from ..plan import Plan
from .contract import InputSpec
from .fingerprints import fingerprint
from .memory import overlaps_of
from .parent import ParentModule, parent_program
from .program import Program, ProgramModule, code_of, tensors_of
from .regions import described, uncovered
from .retarget import moves_of, refuse_ambiguous_casts, retarget
from .state import State


class CapturedModule(ProgramModule):
    """The module that every fxlora function takes and returns.

    It is a real `torch.fx.GraphModule`, and its `state_dict()` keys are the source model's.
    `train()` and `eval()` choose between two graphs, because torch.export bakes the mode into a
    graph. If the whole model has no graph, the module holds graphs of its regions (submodules),
    and the source's Python code calls them.

    Attributes:
        programs: one program for the whole model, or one or more for each region.
        parent_module: the source's Python code around the regions, or None if one graph covers
            the whole model.
        known: all other state that a copy carries over.
    """

    known: State

    def __init__(
        self,
        tree: nn.Module,
        programs: Sequence[Program],
        parent_module: ParentModule | None = None,
        *,
        class_name: str,
        training: bool,
        state: State | None = None,
    ) -> None:
        whole = parent_program() if parent_module else programs[0]
        super().__init__(tree, whole, class_name, training)
        self.programs = tuple(programs)
        for graph in self.distinct_graphs():  # self holds the nested graphs that a graph calls
            graph.owning_module = self
        # A copied parameter no longer shares memory, so overlaps found earlier are kept too.
        self.known = (state or State()).with_mirrors(overlaps_of(self))
        self.parent_module = parent_module
        self.runners: list[ProgramModule] = []
        if parent_module:
            self.runners = [ProgramModule(self, p, class_name, training) for p in programs]
            self._bind_parent()
        self.train(training)

    # ---- state ------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """The injected plan, or None."""
        return self.known.plan

    @property
    def folded(self) -> tuple[Plan, ...]:
        """The plans folded into the weights, in order."""
        return self.known.folded

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters, other than the adapters', that train (in full, as copies)."""
        return self.known.trained

    def update_state(self, **changes: Any) -> None:
        """Record the effect of an in-place rewrite; `changes` are fields of `State`."""
        self.known = dataclasses.replace(self.known, **changes)

    # ---- modes ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> CapturedModule:
        """Choose the train graph (or the eval graph); frozen parameters stay frozen.

        The mode belongs to the whole graph: calling `train()` on a submodule has no effect.
        """
        super().train(mode)
        for module in (self, *self.runners):
            module.choose(mode)
        if self.parent_module:
            self.parent_module.choose(mode)
        return self

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The graph of each mode."""
        return self.program.graphs

    @property
    def inputs(self) -> dict[str, InputSpec | None]:
        """The input contract of each mode, or None where capture had no example inputs."""
        return self.program.inputs

    @property
    def exported(self) -> bool:
        """Whether capture had example inputs, and therefore traced every op of a call."""
        return all(program.inputs["eval"] is not None for program in self.programs)

    def distinct_graphs(self) -> list[fx.Graph]:
        """Return the graphs of all programs and modes, without duplicates."""
        return [graph for program in self.programs for graph in program.distinct_graphs()]

    def refresh(self) -> None:
        """Lint the graphs after a rewrite, and discard the code generated before it."""
        for nested in self.nested_graphs():
            nested.graph.lint()
            nested.recompile()
        for graph in self.distinct_graphs():
            graph.owning_module = self
        super().refresh()
        for runner in self.runners:
            runner.refresh()
        self._bind_parent()

    def _bind_parent(self) -> None:
        """Bind the parent module to this module's tensors; those that regions adapt raise there."""
        if self.parent_module:
            adapted = {name for entry in self.plan or () for name in entry.names}
            self.parent_module.bind(self, self.runners, adapted)
            self.parent_module.choose(self.training)

    def stale_graphs(self) -> list[str]:
        """Return the paths of graphs that were edited after their running code was generated."""
        programs = [self, *self.runners]
        found = [
            f"'{m.program.path}'" if m.program.path else "the module"
            for m in programs
            if m.is_stale()
        ]
        nested = (
            (name, m)
            for name, m in self.named_modules()
            if isinstance(m, fx.GraphModule) and m is not self
        )
        return found + [f"'{name}'" for name, m in nested if m.code != code_of(m.graph)]

    def nested_graphs(self) -> list[fx.GraphModule]:
        """Return the nested graphs, at every depth."""
        return [m for m in self.modules() if isinstance(m, fx.GraphModule) and m is not self]

    # ---- copies -----------------------------------------------------------------------------

    def derive(self) -> CapturedModule:
        """Return a copy to rewrite, with its own graphs and containers.

        Frozen parameters share storage with this module. Buffers and trainable parameters are
        copied, so that training one module leaves the other unchanged.
        """
        trains = self.known.adapter_parameters | self.trained
        memo: dict[int, Any] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            tensor = parameter.detach()
            tensor = tensor.clone() if name in trains else tensor
            memo.setdefault(id(parameter), nn.Parameter(tensor, parameter.requires_grad))
        return self._rebuilt(memo, self.known.with_originals(torch.clone))

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        originals = copy.deepcopy(dict(self.known.originals), memo)
        result = self._rebuilt(memo, dataclasses.replace(self.known, originals=originals))
        memo[id(self)] = result
        return result

    def __copy__(self) -> CapturedModule:
        """Return a module with its own graphs and containers over the same tensors."""
        tensors = (
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        )
        return self._rebuilt({id(tensor): tensor for _, tensor in tensors}, self.known)

    def _rebuilt(self, memo: dict[int, Any], state: State) -> CapturedModule:
        # A buffer that a call wrote to may be part of an autograd graph, which deepcopy refuses.
        for buffer in self.buffers():
            if not buffer.is_leaf:
                memo.setdefault(id(buffer), buffer.detach().clone())
        result = CapturedModule(
            copy.deepcopy(self.tree(), memo),
            [program.copied() for program in self.programs],
            self.parent_module and self.parent_module.copied(),
            class_name=type(self).__name__,
            training=self.training,
            state=state,
        )
        result.meta = copy.copy(self.meta)
        return result

    def tree(self) -> nn.Module:
        """Return the containers, parameters and buffers, without this module's own graphs."""
        tree = nn.Module()
        tree.__dict__.update(tensors_of(self))
        tree.training = self.training
        return tree

    def __reduce__(self) -> Any:
        raise FxLoraError(
            "a captured module cannot be pickled (loading a pickle runs code). Save the "
            "trained part with fxlora.save_adapter, the weights with state_dict, the graph "
            "with fxlora.export."
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as nn.Module does, without writing into the source model's storage."""
        if not assign:
            self._unshare_storage(state_dict)
        changed = self._changed()
        outcome = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.take_fingerprints()  # the loaded weights are the new base
        left = {n: mark for n, mark in changed.items() if state_dict.keys().isdisjoint(n)}
        loaded = {
            name: buffer.detach().clone()
            for name, buffer in self.named_buffers(remove_duplicate=False)
            if name in self.known.originals and name in state_dict
        }
        self.update_state(
            fingerprints={**self.known.fingerprints, **left},
            originals={**self.known.originals, **loaded},
        )
        return outcome

    def _unshare_storage(self, names: Container[str]) -> None:
        """Copy the storage of the named parameters; those that share storage share the copy."""
        held = list(self.named_parameters(remove_duplicate=False))
        written = {_memory(parameter) for name, parameter in held if name in names}
        memo: dict[int, Any] = {}
        for parameter in {id(p): p for _, p in held if _memory(p) in written}.values():
            parameter.data = copy.deepcopy(parameter.data, memo)

    # ---- the base under adapters ------------------------------------------------------------

    def fingerprints_under(self, state: State) -> dict[tuple[str, ...], int]:
        """Return the fingerprints of the weights that a state's plan does not train.

        Each is keyed by all names of its weight. Empty if the state has no plan.
        """
        trains = state.adapter_parameters | state.trained
        return {
            tuple(names): fingerprint(self.get_parameter(names[0]))
            for names in self.aliases().values()
            if state.plan is not None and trains.isdisjoint(names)
        }

    def take_fingerprints(self) -> None:
        """Record the fingerprints and the ties of the weights that the plan does not train."""
        self.update_state(fingerprints=self.fingerprints_under(self.known))

    def changed_weights(self) -> list[str]:
        """Return the names of recorded weights that were written to or untied since."""
        return [name for names in self._changed() for name in names]

    def _changed(self) -> dict[tuple[str, ...], int]:
        """Return the recorded fingerprints whose weights were written to or untied since."""
        return {
            names: mark
            for names, mark in self.known.fingerprints.items()
            if len({id(self.get_parameter(name)) for name in names}) > 1
            or fingerprint(self.get_parameter(names[0])) != mark
        }

    # ---- regions ----------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[str, ...]:
        """Paths of the captured submodules; ("",) if one graph covers the whole model."""
        return tuple(dict.fromkeys(program.path for program in self.programs))

    @property
    def uncovered(self) -> dict[str, str]:
        """Parameters whose reads are not all in graphs, with the place where Python reads them."""
        return uncovered(self)

    def __str__(self) -> str:
        """Return the code; for regions, a table of them and the parameters that none covers."""
        return described(self, self.parent_module.why) if self.parent_module else super().__str__()

    # ---- names ------------------------------------------------------------------------------

    def adapter_parameters(self) -> frozenset[str]:
        """Return the names of the parameters that injection added: A, B, and a variant's own."""
        return self.known.adapter_parameters

    def unplanned(self) -> list[str]:
        """Return the names of parameters that require gradients although no plan trains them."""
        planned = self.known.adapter_parameters | self.trained
        return [n for n, p in self.named_parameters() if p.requires_grad and n not in planned]

    def aliases(self) -> dict[str, list[str]]:
        """Return all names of each parameter, keyed by the first; tied weights have several."""
        first: dict[int, str] = {}
        names: dict[str, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(first.setdefault(id(parameter), name), []).append(name)
        return names

    def set_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Register a parameter under a dotted name, creating containers as needed."""
        owner, _, attribute = name.rpartition(".")
        container: nn.Module = self
        for part in owner.split(".") if owner else []:
            if part not in container._modules:
                container.add_module(part, nn.Module())
            container = container.get_submodule(part)
        container.register_parameter(attribute, parameter)

    def remove_parameter(self, name: str) -> None:
        """Remove a parameter, and the containers that this leaves empty."""
        owner, _, attribute = name.rpartition(".")
        del self.get_submodule(owner)._parameters[attribute]
        while owner and next(_contents(self.get_submodule(owner)), None) is None:
            owner, _, attribute = owner.rpartition(".")
            del self.get_submodule(owner)._modules[attribute]

    # ---- device and dtype -------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the weights, and update the devices and dtypes that the graphs name."""
        moves = moves_of(self, fn)
        nested = self.nested_graphs()
        graphs = [*self.distinct_graphs(), *(module.graph for module in nested)]
        for graph in graphs:
            refuse_ambiguous_casts(graph, moves)
        changed = self._changed()
        result = super()._apply(fn, recurse)
        self.take_fingerprints()
        # Keep the fingerprints of weights written to before: a move must not hide that.
        self.update_state(fingerprints={**self.known.fingerprints, **changed})
        self.known = self.known.with_originals(fn)
        if moves:
            for graph in graphs:
                retarget(graph, moves)
            for program in self.programs:
                specs = program.inputs.items()
                program.inputs = {mode: spec and spec.moved(moves) for mode, spec in specs}
                known = program.autocasts.items()
                program.autocasts = {mode: casts.moved(moves) for mode, casts in known}
            for module in nested:
                module.recompile()
            self.refresh()
        return result


def _memory(tensor: torch.Tensor) -> int:
    """Return an id of a tensor's storage, or of the tensor itself if it is not strided."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module._parameters.values()
    yield from module._buffers.values()


def check_captured(module: object, verb: str) -> None:
    """Raise NotCapturedError unless a verb was given a captured module."""
    if not isinstance(module, CapturedModule):
        raise NotCapturedError(
            f"{verb} takes a captured module, not {type(module).__name__}: "
            "fxlora.capture(model, args) makes one."
        )
