"""CapturedModule: a GraphModule that holds one graph per mode over one parameter tree."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxLoraError
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
    """What every verb of fxlora takes and returns.

    A true `torch.fx.GraphModule` whose `state_dict()` keys are the source model's. `train()`
    and `eval()` choose between two graphs, because torch.export bakes the mode into a graph.
    Where the model has no whole graph, those of its regions (submodules) are held, and the
    source's Python calls them.

    Attributes:
        programs: the graphs: one program, or those of the regions.
        parent_module: the source's Python around the regions, or None where the graph is whole.
        known: everything else that a copy takes along.
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
        for graph in self.distinct_graphs():  # which holds the nested graphs that it calls
            graph.owning_module = self
        # A copy of a parameter has memory of its own, but what is said of it holds all the same.
        self.known = (state or State()).with_mirrors(overlaps_of(self))
        self.parent_module = parent_module
        self.runners: list[ProgramModule] = []
        if parent_module:
            self.runners = [ProgramModule(self, p, class_name, training) for p in programs]
            self._bind_shell()
        self.train(training)

    # ---- what is known ----------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """What was injected, or None."""
        return self.known.plan

    @property
    def folded(self) -> tuple[Plan, ...]:
        """What was folded into the weights, in order."""
        return self.known.folded

    @property
    def trained(self) -> frozenset[str]:
        """Names of parameters outside A and B that train (in full, as copies)."""
        return self.known.trained

    def update_state(self, **changes: Any) -> None:
        """Take note of what a rewrite of this very module did; see `State` for the names."""
        self.known = dataclasses.replace(self.known, **changes)

    # ---- modes ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> CapturedModule:
        """Choose the train graph (or the eval graph); frozen parameters stay frozen.

        The mode belongs to the whole graph: `train()` of a submodule of it has no effect.
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
        """The contract on the inputs of each mode, or None where capture had no inputs."""
        return self.program.inputs

    @property
    def exported(self) -> bool:
        """Whether capture had inputs, and so saw all that a call runs."""
        return all(program.inputs["eval"] is not None for program in self.programs)

    def distinct_graphs(self) -> list[fx.Graph]:
        """The graphs of all programs and modes, each once."""
        return [graph for program in self.programs for graph in program.distinct_graphs()]

    def refresh(self) -> None:
        """Check the graphs after a rewrite, and forget the code that they had."""
        for nested in self.nested_graphs():
            nested.graph.lint()
            nested.recompile()
        for graph in self.distinct_graphs():
            graph.owning_module = self
        super().refresh()
        for runner in self.runners:
            runner.refresh()
        self._bind_shell()

    def _bind_shell(self) -> None:
        """Python around regions has this module's tensors, and none that a region adapts."""
        if self.parent_module:
            adapted = {name for entry in self.plan or () for name in entry.names}
            self.parent_module.bind(self, self.runners, adapted)
            self.parent_module.choose(self.training)

    def stale_graphs(self) -> list[str]:
        """Paths of the graphs that were edited after the code that runs was generated."""
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
        """The graphs that the graphs call, and those that these call."""
        return [m for m in self.modules() if isinstance(m, fx.GraphModule) and m is not self]

    # ---- copies -----------------------------------------------------------------------------

    def derive(self) -> CapturedModule:
        """A module to rewrite: own graphs and containers, frozen storage shared, the rest copied.

        Buffers and whatever trains are copied, so that training either module leaves the
        other as it is.
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
        """Graphs and containers of its own over the same tensors."""
        tensors = (
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        )
        return self._rebuilt({id(tensor): tensor for _, tensor in tensors}, self.known)

    def _rebuilt(self, memo: dict[int, Any], state: State) -> CapturedModule:
        for buffer in self.buffers():  # one that a call wrote to may be part of an autograd graph
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
        """The containers, parameters and buffers, without the graphs."""
        tree = nn.Module()
        tree.__dict__.update(tensors_of(self))
        tree.training = self.training
        return tree

    def __reduce__(self) -> Any:
        raise FxLoraError(
            "a captured module is not pickled (a pickle runs code when it is read). Keep the "
            "trained part with fxlora.save_adapter, the weights with state_dict, the graph "
            "with fxlora.export."
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As nn.Module's, into storage of its own: the source model's weights stay as they are."""
        if not assign:
            self._leave_the_source(state_dict)
        changed = self._changed()
        outcome = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.take_fingerprints()  # what was loaded is the base that was asked for
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

    def _leave_the_source(self, names: Container[str]) -> None:
        """Copy the memory of parameters; those that share it do so in the copy, too."""
        held = list(self.named_parameters(remove_duplicate=False))
        written = {_memory(parameter) for name, parameter in held if name in names}
        memo: dict[int, Any] = {}
        for parameter in {id(p): p for _, p in held if _memory(p) in written}.values():
            parameter.data = copy.deepcopy(parameter.data, memo)

    # ---- the base under adapters ------------------------------------------------------------

    def fingerprints_under(self, state: State) -> dict[tuple[str, ...], int]:
        """Of the weights that a state's plan does not train, as they are now, by all names."""
        trains = state.adapter_parameters | state.trained
        return {
            tuple(names): fingerprint(self.get_parameter(names[0]))
            for names in self.aliases().values()
            if state.plan is not None and trains.isdisjoint(names)
        }

    def take_fingerprints(self) -> None:
        """Remember the weights that no plan trains as they are now, and which are tied."""
        self.update_state(fingerprints=self.fingerprints_under(self.known))

    def changed_weights(self) -> list[str]:
        """Names of these weights that are not what they were, or not one tensor any more."""
        return [name for names in self._changed() for name in names]

    def _changed(self) -> dict[tuple[str, ...], int]:
        """The fingerprints that do not fit any more."""
        return {
            names: mark
            for names, mark in self.known.fingerprints.items()
            if len({id(self.get_parameter(name)) for name in names}) > 1
            or fingerprint(self.get_parameter(names[0])) != mark
        }

    # ---- regions ----------------------------------------------------------------------------

    @property
    def regions(self) -> tuple[str, ...]:
        """Paths of the captured submodules; ("",) where the graph is whole."""
        return tuple(dict.fromkeys(program.path for program in self.programs))

    @property
    def uncovered(self) -> dict[str, str]:
        """Where Python reads a parameter that no graph can stand for, by the parameter's name."""
        return uncovered(self)

    def __str__(self) -> str:
        """The code; for a module of regions, a table of them and what none covers."""
        return described(self, self.parent_module.why) if self.parent_module else super().__str__()

    # ---- names ------------------------------------------------------------------------------

    def adapter_parameters(self) -> frozenset[str]:
        """Names of what injection added: A, B, and what a variant holds beside them."""
        return self.known.adapter_parameters

    def unplanned(self) -> list[str]:
        """Names of parameters that require gradients although no plan trains them."""
        planned = self.known.adapter_parameters | self.trained
        return [n for n, p in self.named_parameters() if p.requires_grad and n not in planned]

    def aliases(self) -> dict[str, list[str]]:
        """Every name of each parameter, by the first one: tied weights have several."""
        first: dict[int, str] = {}
        names: dict[str, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            names.setdefault(first.setdefault(id(parameter), name), []).append(name)
        return names

    def set_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Put a parameter under a dotted name, making containers as needed."""
        owner, _, attribute = name.rpartition(".")
        container: nn.Module = self
        for part in owner.split(".") if owner else []:
            if part not in container._modules:
                container.add_module(part, nn.Module())
            container = container.get_submodule(part)
        container.register_parameter(attribute, parameter)

    def remove_parameter(self, name: str) -> None:
        """Take a parameter away, and the containers that this leaves empty."""
        owner, _, attribute = name.rpartition(".")
        del self.get_submodule(owner)._parameters[attribute]
        while owner and next(_contents(self.get_submodule(owner)), None) is None:
            owner, _, attribute = owner.rpartition(".")
            del self.get_submodule(owner)._modules[attribute]

    # ---- device and dtype -------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the weights, and with them the devices and dtypes that the graphs name."""
        moves = moves_of(self, fn)
        nested = self.nested_graphs()
        graphs = [*self.distinct_graphs(), *(module.graph for module in nested)]
        for graph in graphs:
            refuse_ambiguous_casts(graph, moves)
        changed = self._changed()
        result = super()._apply(fn, recurse)
        self.take_fingerprints()
        self.update_state(fingerprints={**self.known.fingerprints, **changed})  # no excuse to write
        self.known = self.known.with_originals(fn)
        if moves:
            for graph in graphs:
                retarget(graph, moves)
            for program in self.programs:
                specs = program.inputs.items()
                program.inputs = {mode: spec and spec.moved(moves) for mode, spec in specs}
            for module in nested:
                module.recompile()
            self.refresh()
        return result


def _memory(tensor: torch.Tensor) -> int:
    """What tensors over the same memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module._parameters.values()
    yield from module._buffers.values()
