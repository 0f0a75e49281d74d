"""CapturedModule: a GraphModule that holds one graph per mode over one parameter tree."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxLoraError, InputError, NotCapturedError, SubmoduleError
from ..fx.calls import part_of
from ..plan import Plan
from ..tables import some
from .adapted_weight import adapted_weight
from .autocasts import OtherModeError
from .block import Block
from .block_calls import outline
from .casts import base_tensors, keeping_dtypes, set_casts
from .contract import InputSpec
from .fingerprints import fingerprint
from .fsdp import refuse_copy
from .memory import memory_id, overlaps_of
from .outlining import FACADE
from .parent import ParentModule, parent_program
from .program import MODES, Program, ProgramModule, code_of, tensors_of
from .regions import described, uncovered
from .retarget import moves_of, refuse_ambiguous_casts, retarget
from .several_calls import (
    CHOOSER,
    CallRunner,
    choosing_program,
    first_that_holds,
    signature_of_all,
)
from .sharing import copy_memory, copy_when_trained, is_shared
from .state import State
from .submodules import HOOKS, Container, Seal, check_kinds, children_of, container, seal_part


class CapturedModule(ProgramModule):
    """The module that every fxlora function takes and returns.

    It is a real `torch.fx.GraphModule`, and its `state_dict()` keys are the source model's.
    `train()` and `eval()` choose between two graphs, because torch.export bakes the mode into a
    graph. A module that was captured for several calls has graphs for each, and runs those that
    hold for the call. If the whole model has no graph, the module holds graphs of its regions
    (submodules), and the source's Python code calls them.

    Attributes:
        programs: one program for each call that was captured, or one or more for each region.
        captured_methods: the methods of the model that were captured, which the module has too,
            and the paths of submodules that were captured for calls from outside.
        parent_module: the source's Python code around the regions, or None if one graph covers
            the whole model.
        known: all other state that a copy carries over.
    """

    known: State
    outlined_modules: dict[str, Block]
    _seal: Seal
    _running: dict[int, fx.Graph]

    def __init__(
        self,
        tree: nn.Module,
        programs: Sequence[Program],
        parent_module: ParentModule | None = None,
        *,
        class_name: str,
        training: bool,
        state: State | None = None,
        own_modes: Collection[str] = (),
    ) -> None:
        only = programs[0] if len(programs) == 1 and programs[0].method == "forward" else None
        whole = parent_program() if parent_module else only or choosing_program()
        self.__dict__.update(_seal=Seal(self), _running={}, outlined_modules={})
        self._seal.own.update(own_modes)
        super().__init__(tree, whole, class_name, training)
        self.programs = tuple(programs)
        self.captured_methods = tuple(dict.fromkeys(program.method for program in programs))
        for graph in self.distinct_graphs():  # self holds the nested graphs that a graph calls
            graph.owning_module = self
        # A copied parameter no longer shares memory, so overlaps found earlier are kept too.
        self.known = (state or State()).with_mirrors(overlaps_of(self))
        self.parent_module = parent_module
        self.look()
        others = self.programs if whole not in self.programs else ()
        self.runners = [CallRunner(self, p, training) for p in others]
        self._bind_parent()
        self._outline()
        self._select_graph()
        self._sign(inspect.signature(type(self).forward))
        self._seal_submodules()

    # ---- submodules -------------------------------------------------------------------------

    def _outline(self) -> None:
        """Put the outlined submodules into the tree, over the containers of their tensors."""
        paths = self.known.outlined
        self._running, calls = outline(self, self.programs, paths) if paths else ({}, {})
        if not paths:
            return
        with self.editing():
            for path in sorted(paths, key=lambda path: path.count(".")):
                if path in self.outlined_modules:  # with its hooks, perhaps in a wrapper
                    self.outlined_modules[path].renew(calls[path])
                    continue
                held = self.get_submodule(path)
                self.outlined_modules[path] = Block(held, path, calls[path])
                self.set_submodule(path, self.outlined_modules[path])
        for module in (self, *self.runners):
            module.forget_code()
        for block in self.outlined_modules.values():
            block.look_from(self._view)

    def look(self) -> None:
        super().look()
        parent = self.__dict__.get("parent_module")
        self._view.__dict__.update({FACADE: self, CHOOSER: self, "parent_module": parent})

    def running(self, graph: fx.Graph) -> fx.Graph:
        return self._running.get(id(graph), graph)

    def _seal_submodules(self) -> None:
        """Have all submodules refuse changes without effect on the graphs (see submodules.py)."""
        seal = self._seal
        seal.replaceable = frozenset(self.known.outlined)
        seal.adapted = self.adapted
        seal.calls = {m: functools.partial(self._call_method, m) for m in self.captured_methods}
        seal.matters = functools.cache(self.mode_matters)
        seal.owners = {}
        for path, part in self.named_modules():
            if path and isinstance(part, Container | Block):
                seal_part(part, path, seal)
            if isinstance(part, Container):
                seal.owners[path] = self._block_around(path)
        self.__dict__["_modules"] = children_of(self._modules, "", seal)
        for runner in self.runners:  # they run on this module's tensors
            runner.__dict__["_modules"] = self._modules
        for owner in (self, *self.outlined_modules.values()):
            seal.owner_set(owner)
        seal.open = False

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module]]:
        """Yield the modules by the source's names: a wrapper of a block has the block's name."""
        blocks = self.outlined_modules
        wrappers = {id(self._standing(path)): block for path, block in blocks.items()}
        if all(id(block) in wrappers for block in blocks.values()):
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        yield from _named(self, prefix, wrappers, set() if memo is None else memo, remove_duplicate)

    def _standing(self, path: str) -> nn.Module | None:
        """Return the module that is at the path of a block: the block, unless somebody changed it.

        A block inside a wrapper's block is found through the wrapper.
        """
        owner, _, name = path.rpartition(".")
        around = self.outlined_modules.get(owner) or self.get_submodule(owner)
        return around._modules.get(name)

    def check_blocks(self, verb: str) -> None:
        """Raise SubmoduleError if a block was replaced, and not only wrapped."""
        for path, block in self.outlined_modules.items():
            standing = self._standing(path)
            if standing is None or not any(part is block for part in standing.modules()):
                raise SubmoduleError(
                    f"{verb}: '{path}' was replaced by a {type(standing).__name__}, which has no "
                    "graph. Put the captured one back (a copy of this module still has none): "
                    f"module.set_submodule({path!r}, module.outlined_modules[{path!r}])."
                )

    def _block_around(self, path: str) -> ProgramModule:
        """Return the innermost called module around a submodule: a block, or this module."""
        around = [outer for outer in self.outlined_modules if path.startswith(f"{outer}.")]
        return self.outlined_modules[max(around, key=len)] if around else self

    @property
    def adapted(self) -> Mapping[str, Callable[[], torch.Tensor]]:
        """Functions that compute the adapted weights, by each name that an adapter adapts."""
        names = dict.fromkeys(name for entry in self.known.plan or () for name in entry.names)
        return {name: functools.partial(self.adapted_weight, name) for name in names}

    @contextmanager
    def editing(self) -> Generator[None]:
        """Allow submodules to be added, replaced and deleted in a `with` block, as a pass does."""
        with self._seal.opened():
            yield

    def adapted_weight(self, name: str) -> torch.Tensor:
        """Return W0 + s·BA of a weight, with gradients to A and B; W0 if it is not adapted."""
        value: torch.Tensor = self.get_parameter(name)
        dtype = value.dtype
        for entry in self.known.plan or ():
            if name in entry.names:
                tensors = {n: self.get_parameter(n).to(dtype) for n in entry.tensors}
                value = adapted_weight(entry, value, tensors)
        return value

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter itself; reading an adapted weight as an attribute computes it."""
        owner, _, name = target.rpartition(".")
        found = self.get_submodule(owner)._parameters.get(name)
        return super().get_parameter(target) if found is None else found

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("captured_methods", ()) and name not in self._modules:
            return functools.partial(self._call_method, name)
        value = super().__getattr__(name)
        seal: Seal | None = self.__dict__.get("_seal")
        return value if seal is None else seal.outside("", name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and "runners" in self.__dict__:
            for runner in () if self.parent_module else self.runners:
                runner.training = value
        if name == "training" and "_seal" in self.__dict__:
            self._seal.owner_set(self)

    def train(self, mode: bool = True) -> CapturedModule:
        super().train(mode)
        self._seal.all_set(self)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> CapturedModule:
        """Set `requires_grad` of all parameters; those that would train are copied first."""
        if requires_grad:
            self.unshare(self)
        super().requires_grad_(requires_grad)
        return self

    def share_memory(self) -> CapturedModule:
        """Move copies of the parameters, and the buffers, to memory that processes share.

        Training does not copy these parameters again, so they stay in that memory.
        """
        self.unshare(self)
        super().share_memory()
        return self

    def unshare(self, part: nn.Module, names: Collection[str] | None = None) -> None:
        """Copy the storage of a part's parameters: training them must not change the source's.

        Args:
            part: this module or a submodule.
            names: the part's names of the parameters to copy; None for all of them.
        """
        inner = part.named_parameters(remove_duplicate=False)
        held = {id(parameter) for name, parameter in inner if names is None or name in names}
        named = self.named_parameters(remove_duplicate=False)
        self._unshare_storage({name for name, p in named if id(p) in held})

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seal.refuse_apart()
        super()._check(args, kwargs)

    def _refusal(self, error: InputError) -> InputError:
        addable = self.exported and not self.parent_module and not self.folded
        if isinstance(error, OtherModeError) or not addable:
            return super()._refusal(error)
        return type(error)(f"{error} fxlora.capture_more adds a call to a captured module.")

    @property
    def call_chooser(self) -> CapturedModule:
        """The module itself, for the graph that chooses (see several_calls.py)."""
        return self

    def captured_calls(self, method: str = "forward") -> tuple[ProgramModule, ...]:
        """Return the modules that run the captured calls of a method; itself, if there is one."""
        calls = self.runners if self.runners and not self.parent_module else (self,)
        return tuple(call for call in calls if call.program.method == method)

    def chosen_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "forward"
    ) -> ProgramModule:
        """Return the module whose graph runs a call: the first whose contract holds.

        Raises:
            InputError: none of the captured calls of the method is like this one.
        """
        if calls := self.captured_calls(method):
            try:
                return first_that_holds(calls, args, kwargs)
            except InputError as error:
                raise self._refusal(error) from None
        raise InputError(
            f"the method {method} was not captured ({some(self.captured_methods)} were): capture "
            "again with an example call of it."
        )

    def _call_method(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self._seal.refuse_apart()
        return self.chosen_call(args, kwargs, method).forward(*args, **kwargs)

    def _sign(self, signature: inspect.Signature) -> None:
        calls = self.captured_calls() if "runners" in self.__dict__ else ()
        if len(calls) > 1:
            signature = signature_of_all([call.contract for call in calls])
        elif calls and calls[0] is not self:
            signature = inspect.signature(type(calls[0]).forward)
        super()._sign(signature)

    def mode_matters(self, path: str) -> bool:
        """Whether the two modes' graphs of a call differ in a submodule's part."""
        if self.parent_module:
            return True
        parts = [[part_of(p.graphs[mode], path) for mode in MODES] for p in self.programs]
        return any(train != evaluation for train, evaluation in parts)

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

    @property
    def changes(self) -> frozenset[str]:
        """Names of the Python attributes that the source changes in the captured calls.

        (Around regions, the source's own code runs, and changes them.)
        """
        if self.parent_module:
            return frozenset()
        return frozenset(name for program in self.programs for name in program.changes)

    @property
    def reads(self) -> frozenset[str] | None:
        """Names of the Python attributes that the source reads in them, or None if not known."""
        known = [program.reads for program in self.programs]
        if self.parent_module or None in known:
            return None
        return frozenset(name for names in known for name in names or ())

    # ---- graphs -----------------------------------------------------------------------------

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
        self._outline()
        self._seal_submodules()

    def _bind_parent(self) -> None:
        """Bind the parent module to this module's tensors; those that regions adapt raise there."""
        if self.parent_module:
            adapted = {name for entry in self.plan or () for name in entry.names}
            self.parent_module.bind(self, self.runners, adapted)

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
            if isinstance(m, fx.GraphModule) and not isinstance(m, ProgramModule)
        )
        return found + [f"'{name}'" for name, m in nested if m.code != code_of(m.graph)]

    def nested_graphs(self) -> list[fx.GraphModule]:
        """Return the nested graphs, at every depth."""
        found = (m for m in self.modules() if isinstance(m, fx.GraphModule))
        return [m for m in found if not isinstance(m, ProgramModule)]

    # ---- copies -----------------------------------------------------------------------------

    def derive(self) -> CapturedModule:
        """Return a copy to rewrite, with its own graphs and containers.

        Parameters share storage with this module until they train. Buffers, the parameters that the
        plan trains and those that a call may write to are copied at once. So training or calling
        one module leaves the other unchanged.
        """
        refuse_copy(self)
        trains, kept = self.known.adapter_parameters | self.trained, self.state_parameters()
        memo: dict[int, Any] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name in kept:
                continue
            tensor = parameter.detach()
            tensor = tensor.clone() if name in trains else tensor
            memo.setdefault(id(parameter), nn.Parameter(tensor, parameter.requires_grad))
        result = self.rebuilt(memo, self.known.with_originals(torch.clone))
        copy_hooks(self, result, copy.copy)
        for module in (self, result):
            module.copy_when_trained()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        refuse_copy(self)
        self.check_blocks("deepcopy")
        originals = copy.deepcopy(dict(self.known.originals), memo)
        result = self.rebuilt(memo, dataclasses.replace(self.known, originals=originals))
        memo[id(self)] = result
        copy_hooks(self, result, functools.partial(copy.deepcopy, memo=memo))
        return result

    def __copy__(self) -> CapturedModule:
        """Return a module with its own graphs and containers over the same tensors."""
        refuse_copy(self)
        tensors = (
            *self.named_parameters(remove_duplicate=False),
            *self.named_buffers(remove_duplicate=False),
        )
        result = self.rebuilt({id(tensor): tensor for _, tensor in tensors}, self.known)
        copy_when_trained(result, filter(is_shared, result.parameters()))
        return result

    def rebuilt(self, memo: dict[int, Any], state: State) -> CapturedModule:
        """Return a copy of the graphs and containers, with the tensors that `memo` has for ours."""
        for path, block in self.outlined_modules.items():
            standing = self._standing(path)
            if standing is not block:  # a wrapper: the copy is the block itself
                memo[id(standing)] = copy.deepcopy(block, memo)
        # A buffer that a call wrote to may be part of an autograd graph, which deepcopy refuses.
        for buffer in self.buffers():
            if not buffer.is_leaf and id(buffer) not in memo:
                memo[id(buffer)] = copy.deepcopy(buffer.detach(), memo)
        for parameter in self.state_parameters().values():  # views of a buffer stay views of it
            if id(parameter) not in memo:
                data = copy.deepcopy(parameter.detach(), memo)
                memo[id(parameter)] = nn.Parameter(data, parameter.requires_grad)
        result = CapturedModule(
            copy.deepcopy(self.tree(), memo),
            [program.copied() for program in self.programs],
            self.parent_module and self.parent_module.copied(),
            class_name=type(self).__name__,
            training=self.training,
            state=state,
            own_modes=self._seal.own,
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
        if assign:
            check_kinds(self, state_dict, "")
        else:
            self._unshare_storage(state_dict)
        changed = self._changed()
        outcome = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self.take_fingerprints()  # the loaded weights are the new base
        left = {n: mark for n, mark in changed.items() if state_dict.keys().isdisjoint(n)}
        held = self.state_tensors()
        given = {id(held[name]) for name in state_dict if name in held}
        loaded = {
            name: tensor.detach().clone()
            for name, tensor in held.items()
            if name in self.known.originals and id(tensor) in given
        }
        self.update_state(
            base_fingerprints={**self.known.base_fingerprints, **left},
            originals={**self.known.originals, **loaded},
        )
        return outcome

    def _unshare_storage(self, names: Collection[str]) -> None:
        """Copy the storage of the named parameters; those that share storage share the copy."""
        held = list(self.named_parameters(remove_duplicate=False))
        own = self.known.written  # no module shares these
        memory = {memory_id(p) for name, p in held if name in names and name not in own}
        copy_memory((p for _, p in held), memory)

    def copy_when_trained(self) -> None:
        """Have the parameters, whose storage other modules share, copied when they first train."""
        own = self.known.adapter_parameters | self.trained | self.state_parameters().keys()
        held = self.named_parameters(remove_duplicate=False)
        copy_when_trained(self, (parameter for name, parameter in held if name not in own))

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
            if self.known.written.isdisjoint(names)
        }

    def take_fingerprints(self) -> None:
        """Record the fingerprints and the ties of the weights that the plan does not train."""
        self.update_state(base_fingerprints=self.fingerprints_under(self.known))

    def changed_weights(self) -> list[str]:
        """Return the names of recorded weights that were written to or untied since."""
        return [name for names in self._changed() for name in names]

    def _changed(self) -> dict[tuple[str, ...], int]:
        """Return the recorded fingerprints whose weights were written to or untied since."""
        return {
            names: mark
            for names, mark in self.known.base_fingerprints.items()
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

    def state_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a call writes to, or may write to in Python, by name."""
        names = self.known.written.union(self.parent_module.reads if self.parent_module else ())
        held = self.named_parameters(remove_duplicate=False) if names else ()
        return {name: parameter for name, parameter in held if name in names}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a call may change: the buffers and the `state_parameters`."""
        return {**dict(self.named_buffers(remove_duplicate=False)), **self.state_parameters()}

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
        parent: nn.Module = self
        with self.editing():
            for part in owner.split(".") if owner else []:
                if part not in parent._modules:
                    parent.add_module(part, container())
                parent = parent.get_submodule(part)
            parent.register_parameter(attribute, parameter)

    def remove_parameter(self, name: str) -> None:
        """Remove a parameter, and the containers that this leaves empty."""
        owner, _, attribute = name.rpartition(".")
        del self.get_submodule(owner)._parameters[attribute]
        with self.editing():
            while owner and next(_contents(self.get_submodule(owner)), None) is None:
                owner, _, attribute = owner.rpartition(".")
                del self.get_submodule(owner)._modules[attribute]

    # ---- device and dtype -------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the weights, and update the devices and dtypes that the graphs name.

        A, B and the parameters trained in full keep the dtypes that the plan asks for.
        """
        moves = moves_of(base_tensors(self), fn)
        nested = self.nested_graphs()
        graphs = [*self.distinct_graphs(), *(module.graph for module in nested)]
        for graph in graphs:
            refuse_ambiguous_casts(graph, moves)
        changed = self._changed()
        with self.editing():  # the submodules move with the module
            result = super()._apply(keeping_dtypes(self, fn), recurse)
        self.take_fingerprints()
        # Keep the fingerprints of weights written to before: a move must not hide that.
        self.update_state(base_fingerprints={**self.known.base_fingerprints, **changed})
        self.known = self.known.with_originals(fn)
        if moves:
            for graph in graphs:
                retarget(graph, moves)
            for program in self.programs:
                specs = program.inputs.items()
                program.inputs = {mode: spec and spec.moved(moves) for mode, spec in specs}
                known = program.autocasts.items()
                program.autocasts = {mode: casts.moved(moves) for mode, casts in known}
            if self.plan is not None:
                weights = dict(self.named_parameters(remove_duplicate=False))
                self.update_state(plan=self.plan.over(weights))
                set_casts(self)
            for module in nested:
                module.recompile()
            self.refresh()
        return result


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module._parameters.values()
    yield from module._buffers.values()


def _named(
    module: nn.Module,
    prefix: str,
    wrappers: Mapping[int, Block],
    seen: set[nn.Module],
    remove_duplicate: bool,
) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    if remove_duplicate:
        seen.add(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            path = f"{prefix}.{name}" if prefix else name
            inner = wrappers.get(id(child), child)
            yield from ((path, part) for part in _around(child, inner) if part not in seen)
            yield from _named(inner, path, wrappers, seen, remove_duplicate)


def _around(wrapper: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """Yield a wrapper, and all that is in it, without the module that it is around."""
    if wrapper is not inner:
        yield wrapper
        for child in wrapper.children():
            yield from _around(child, inner)


def copy_hooks(
    module: CapturedModule, copied: CapturedModule, copy_of: Callable[[Any], Any]
) -> None:
    """Give a copy the hooks of a module and of its blocks.

    Raises:
        SubmoduleError: the forward of a block was assigned: it may call the block of this module.
    """
    blocks = copied.outlined_modules
    for path, block in module.outlined_modules.items():
        if "forward" in block.__dict__:
            raise SubmoduleError(
                f"a copy of the module would lose the forward that was assigned to '{path}'. Take "
                "it off, and assign it to the copy: del module.get_submodule("
                f"{path!r}).forward."
            )
    pairs = [(module, copied), *((b, blocks[path]) for path, b in module.outlined_modules.items())]
    for old, new in pairs:
        for name in HOOKS:
            new.__dict__[name] = copy_of(old.__dict__[name])


def _captured_inside(module: object) -> str:
    """Return the path of the only captured module inside a wrapper (compiled, DDP, EMA), or ""."""
    parts = module.named_modules() if isinstance(module, nn.Module) else ()
    found = [path for path, part in parts if isinstance(part, CapturedModule)]
    return found[0] if len(found) == 1 else ""


def check_captured(module: object, verb: str) -> None:
    """Raise unless a function was given a captured module that runs only its own graphs.

    Args:
        module: the argument to check.
        verb: the function's name, for the message.

    Raises:
        NotCapturedError: it is not a captured module.
        SubmoduleError: one of its outlined submodules was replaced by a module without a graph.
    """
    if not isinstance(module, CapturedModule):
        if isinstance(getattr(module, "__dict__", {}).get("_captured"), CapturedModule):
            raise NotCapturedError(
                f"{verb} takes the captured module itself, not a host that runs it: pass the "
                "module that hosted(model, module) was given."
            )
        if inside := _captured_inside(module):
            raise NotCapturedError(
                f"{verb} takes the captured module itself, not the {type(module).__name__} around "
                f"it: pass it .get_submodule('{inside}') of that."
            )
        raise NotCapturedError(
            f"{verb} takes a captured module, not {type(module).__name__}: "
            "fxlora.capture(model, args) makes one."
        )
    module.check_blocks(verb)
