"""CapturedModule: a GraphModule that holds one graph per mode over one parameter tree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxLoraError
from ..plan import Plan
from ..tables import render, some
from .fingerprints import fingerprint
from .inputs import InputSpec
from .program import Program, ProgramModule, code_of, tensors_of
from .retarget import moves_of, refuse_ambiguous_casts, retarget
from .shell import Shell, shell_program


class CapturedModule(ProgramModule):
    """What every verb of fxlora takes and returns.

    A true `torch.fx.GraphModule` whose `state_dict()` keys are the source model's. `train()`
    and `eval()` choose between two graphs, because torch.export bakes the mode into a graph.
    Where the model has no whole graph, those of its regions (submodules) are held, and the
    source's Python calls them.

    Attributes:
        programs: the graphs: one program, or those of the regions.
        shell: the source's Python around the regions, or None where the graph is whole.
        plan: what was injected, or None.
        folded: what was folded into the weights, in order.
        trained: names of parameters outside A and B that train (in full, as copies).
        originals: the tensors that training may change, as they were before injection.
        fingerprints: of every weight that an adapted module leaves as it is, by all its names.
        grads: names of parameters that required gradients in the source.
        outputs: names of the source's output embeddings (what "all-linear" leaves out).
        mirrors: names of buffers and constants in a parameter's memory, by its name: the graphs
            read it there, too.
    """

    def __init__(
        self,
        tree: nn.Module,
        programs: Sequence[Program],
        shell: Shell | None = None,
        *,
        class_name: str,
        training: bool,
    ) -> None:
        whole = shell_program() if shell else programs[0]
        super().__init__(tree, whole, class_name, training)
        self.programs = tuple(programs)
        for graph in self.distinct_graphs():  # which holds the nested graphs that it calls
            graph.owning_module = self
        self.plan: Plan | None = None
        self.folded: tuple[Plan, ...] = ()
        self.trained: frozenset[str] = frozenset()
        self.originals: dict[str, torch.Tensor] = {}
        self.fingerprints: dict[tuple[str, ...], int] = {}
        self.grads: frozenset[str] = frozenset()
        self.outputs: frozenset[str] = frozenset()
        self.mirrors: Mapping[str, tuple[str, ...]] = {}
        self.shell = shell
        self.runners: list[ProgramModule] = []
        if shell:
            self.runners = [ProgramModule(self, p, class_name, training) for p in programs]
            shell.bind(self, self.runners)
        self.train(training)

    # ---- modes ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> CapturedModule:
        """Choose the train graph (or the eval graph); frozen parameters stay frozen.

        The mode belongs to the whole graph: `train()` of a submodule of it has no effect.
        """
        super().train(mode)
        for module in (self, *self.runners):
            module.choose(mode)
        if self.shell:
            self.shell.choose(mode)
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
        if self.shell:
            adapted = {name for entry in self.plan or () for name in entry.names}
            self.shell.bind(self, self.runners, adapted)
            self.shell.choose(self.training)

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
        trains = self.adapter_parameters() | self.trained
        memo: dict[int, Any] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            tensor = parameter.detach()
            tensor = tensor.clone() if name in trains else tensor
            memo.setdefault(id(parameter), nn.Parameter(tensor, parameter.requires_grad))
        originals = {name: tensor.clone() for name, tensor in self.originals.items()}
        return self._rebuild(memo, originals)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        result = self._rebuild(memo, copy.deepcopy(self.originals, memo))
        memo[id(self)] = result
        return result

    def _rebuild(self, memo: dict[int, Any], originals: dict[str, torch.Tensor]) -> CapturedModule:
        result = CapturedModule(
            copy.deepcopy(self.tree(), memo),
            [program.copied() for program in self.programs],
            self.shell and self.shell.copied(),
            class_name=type(self).__name__,
            training=self.training,
        )
        result.plan, result.folded = self.plan, self.folded
        result.trained, result.grads, result.outputs = self.trained, self.grads, self.outputs
        result.originals, result.fingerprints = originals, dict(self.fingerprints)
        result.meta = copy.copy(self.meta)
        result._bind_shell()
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
            for name, parameter in self.named_parameters(remove_duplicate=False):
                if name in state_dict:
                    parameter.data = parameter.data.clone()
        outcome = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.take_fingerprints()  # the base is what was asked for
        return outcome

    # ---- the base under adapters ------------------------------------------------------------

    def take_fingerprints(self) -> None:
        """Remember the weights that no plan trains as they are now, and which are tied."""
        trains = self.adapter_parameters() | self.trained
        self.fingerprints = {
            tuple(names): fingerprint(self.get_parameter(names[0]))
            for names in self.aliases().values()
            if self.plan and trains.isdisjoint(names)
        }

    def changed_weights(self) -> list[str]:
        """Names of these weights that are not what they were, or not one tensor any more."""
        return [name for names in self._changed() for name in names]

    def _changed(self) -> dict[tuple[str, ...], int]:
        """The fingerprints that do not fit any more."""
        return {
            names: mark
            for names, mark in self.fingerprints.items()
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
        """Where Python reads a parameter that no graph can stand for, by the parameter's name.

        All names of tied parameters; of those that nothing was seen to read, the place is "".
        """
        if not self.shell:
            return {}
        read = {
            str(n.target) for g in self.distinct_graphs() for n in g.nodes if n.op == "get_attr"
        }
        found: dict[str, str] = {}
        for names in self.aliases().values():
            place = next((self.shell.reads[n] for n in names if n in self.shell.reads), None)
            if place is not None or not read & set(names):
                found |= dict.fromkeys(names, place or "")
        return found

    def __str__(self) -> str:
        """The code; for a module of regions, a table of them and what none covers."""
        if not self.shell:
            return super().__str__()
        rows = [self._region_row(path) for path in self.regions]
        table = render(("region", "graphs", "nodes", "parameters"), rows)
        bare = [f"{name} ({place})" if place else name for name, place in self.uncovered.items()]
        return (
            f"{type(self).__name__}, captured by regions ({self.shell.why})\n{table}\n"
            f"covered by no region: {some(bare, 20) or 'no parameter'}"
        )

    def _region_row(self, path: str) -> list[str]:
        programs = [program for program in self.programs if program.path == path]
        nodes = sum(len(graph.nodes) for p in programs for graph in p.distinct_graphs())
        size = sum(parameter.numel() for parameter in self.get_submodule(path).parameters())
        return [path, str(len(programs)), str(nodes), f"{size:,}"]

    # ---- names ------------------------------------------------------------------------------

    def adapter_parameters(self) -> frozenset[str]:
        """Names of what injection added: A, B, and what a variant holds beside them."""
        return frozenset(name for entry in self.plan or () for name in entry.tensors)

    def unplanned(self) -> list[str]:
        """Names of parameters that require gradients although no plan trains them."""
        planned = self.adapter_parameters() | self.trained
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
        while owner and not list(_contents(self.get_submodule(owner))):
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
        self.fingerprints |= changed  # a move is no excuse
        self.originals = {name: fn(tensor) for name, tensor in self.originals.items()}
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


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module._parameters.values()
    yield from module._buffers.values()
