"""CapturedModule: a GraphModule that holds one graph per mode over one parameter tree."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..errors import FxLoraError, InjectError, InputError, SubmoduleError
from ..fast import fast_graph
from ..fx.calls import part_of
from ..fx.effects import written_attributes
from ..fx.literals import same_literal
from ..plan import Plan
from ..tables import some
from .adapted_weight import adapted_weight
from .autocasts import OtherModeError
from .base import changed_fingerprints, loading
from .blocks.block import Block
from .blocks.calls import outline
from .blocks.tree import block_around, check_not_replaced, named_modules, place, wrapped
from .contract import InputSpec
from .copies import complete_memo, deep_copy, derived, shallow_copy
from .guarded import check_kinds
from .host_attributes import ALL, DATA, MISSING, TRAINING, joined
from .memory import overlaps_of
from .merge_aware import merge_aware_graph
from .moving import moving
from .parameters import aliases, remove_parameter, set_parameter
from .parent import ParentModule, parent_program
from .program import FACADE, MODES, Program, ProgramModule, tensors_of
from .quantised import dequantised
from .regions import described, uncovered
from .schedule import Schedule
from .seal import Seal
from .sealed_dicts import children_of, seal_part
from .several_calls import (
    CHOOSER,
    CallRunner,
    choosing_program,
    first_that_holds,
    signature_of_all,
)
from .sharing import copy_when_trained, unshare
from .simplified import Simplification
from .state import State
from .submodules import Container, check_absent


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
    _wrapped: Mapping[int, nn.Module]
    _own_names: frozenset[str]

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
        self.__dict__.update(
            known=state or State(), _seal=Seal(self), _running={}, outlined_modules={}
        )
        self._seal.own.update(own_modes)
        super().__init__(tree, whole, class_name, training)
        self.programs = tuple(programs)
        self.captured_methods = tuple(dict.fromkeys(program.method for program in programs))
        for graph in self.distinct_graphs():  # self holds the nested graphs that a graph calls
            graph.owning_module = self
        # A copied parameter no longer shares memory, so overlaps found earlier are kept too.
        self.known = self.known.with_mirrors(overlaps_of(self))
        self.parent_module = parent_module
        self.look()
        others = self.programs if whole not in self.programs else ()
        self.runners = [CallRunner(self, p, training) for p in others]
        self._bind_parent()
        self._outline()
        self._select_graph()
        self._sign(inspect.signature(type(self).forward))
        self.__dict__["_own_names"] = frozenset(self.__dict__)
        self._seal_submodules()

    # ---- submodules -------------------------------------------------------------------------

    def _outline(self) -> None:
        """Put the outlined submodules into the tree, over the containers of their tensors."""
        paths = self.known.outlined
        self._running, calls = (
            outline(self, self.programs, paths, self.known.optimized) if paths else ({}, {})
        )
        if not paths:
            return
        place(self, calls)
        for module in (self, *self.runners):
            module.forget_code()
        for block in self.outlined_modules.values():
            block.look_from(self._view)

    def look(self) -> None:
        self.__dict__["_wrapped"] = wrapped(self)
        super().look()
        parent = self.__dict__.get("parent_module")
        self._view.__dict__.update({FACADE: self, CHOOSER: self, "parent_module": parent})

    def wrapped_blocks(self) -> Mapping[int, nn.Module]:
        return self._wrapped

    def running(self, graph: fx.Graph) -> fx.Graph:
        if id(graph) in self._running:
            return self._running[id(graph)]
        if self.known.merge_aware and self.plan is not None:
            return merge_aware_graph(graph, self.plan, self.known.merge_aware)
        how = self.known.optimized
        return fast_graph(graph, how, self) if how else graph

    @property
    def schedule(self) -> Schedule | None:
        """The form of each adapter in the graphs that run, or None if these are the explicit ones.

        See `fxlora.optimize`.
        """
        if not self.known.optimized:
            return None
        whole = [
            (mode, self.running(graph))
            for program in self.programs
            for mode, graph in program.graphs.items()
        ]
        blocks = [
            (mode, call.graph)
            for block in self.outlined_modules.values()
            for mode, calls in block.calls.items()
            for call in calls
        ]
        return Schedule.of([*whole, *blocks], self.plan)

    def _seal_submodules(self) -> None:
        """Have all submodules refuse changes without effect on the graphs (see submodules.py)."""
        seal = self._seal
        seal.replaceable = frozenset(self.known.outlined)
        read = self.reads or ()
        seal.following = tuple(p for p in self.outlined_modules if joined(p, TRAINING) in read)
        seal.note_absent(self)
        seal.reads, seal.regions = self.reads, self.parent_module is not None
        seal.adapted = self.adapted
        seal.calls = {m: functools.partial(self._call_method, m) for m in self.captured_methods}
        seal.matters = functools.cache(self.mode_matters)
        seal.owners = {}
        for path, part in self.named_modules():
            if path and isinstance(part, Container | Block):
                seal_part(part, path, seal)
            if isinstance(part, Container):
                seal.owners[path] = block_around(self, path)
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
        if wrappers := wrapped(self):
            seen = set[nn.Module]() if memo is None else memo
            yield from named_modules(self, prefix, wrappers, seen, remove_duplicate)
        else:
            yield from super().named_modules(memo, prefix, remove_duplicate)

    def check_blocks(self, verb: str) -> None:
        """Raise SubmoduleError if a block was replaced, and not only wrapped."""
        check_not_replaced(self, verb)

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
        value = (
            dequantised(self.get_parameter(name)) if self.known.plan else self.get_parameter(name)
        )
        dtype = value.dtype
        for entry in self.known.plan or ():
            if name in entry.names:
                tensors = {n: self.get_parameter(n).to(dtype) for n in entry.tensors}
                value = adapted_weight(entry, value, tensors)
        return value

    def get_submodule(self, target: str) -> nn.Module:
        """Return a submodule; nn.Module's own version asks every module on the way twice."""
        found: nn.Module | None = self
        for name in target.split(".") if target else ():
            found = found._modules.get(name)
            if found is None:
                return super().get_submodule(target)
        return found

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
        if name == "training":
            self._check_mode(value)
        seal: Seal | None = self.__dict__.get("_seal")
        if seal is not None and not seal.open:
            check_absent(seal, name, value)
            self._check_read(name, value)
        super().__setattr__(name, value)
        if name == "training" and "runners" in self.__dict__:
            for runner in () if self.parent_module else self.runners:
                runner.training = value
        if name == "training" and "_seal" in self.__dict__:
            self._seal.owner_set(self)

    def _check_read(self, name: str, value: Any) -> None:
        """Raise SubmoduleError for an attribute of the source, which its graphs may depend on."""
        ours = hasattr(CapturedModule, name) and not hasattr(nn.Module, name)
        held = (self._own_names, self._parameters, self._buffers, self._modules)
        if ours or any(name in group for group in held) or not isinstance(value, DATA):
            return  # an object is mostly the source's own: `gm.config = model.config`
        if same_literal(self.known.read_values.get(name, MISSING), value):
            return
        around = self.parent_module.module if self.parent_module else None
        found = inspect.getattr_static(around, name, MISSING)
        in_source = found is not MISSING and not isinstance(found, property)
        if in_source or not {name, ALL}.isdisjoint(self.reads or ()):
            raise SubmoduleError(
                f"setting '{name}' would have no effect: graphs have the value that the source had "
                "in the capture. Set it on the source model, and capture that; or make it an "
                "argument of the forward."
            )

    def train(self, mode: bool = True) -> CapturedModule:
        self._check_mode(mode)
        super().train(mode)
        self._seal.all_set(self)
        return self

    def _check_mode(self, mode: bool) -> None:
        """Raise InjectError for the train mode of a module that is for inference only."""
        known: State | None = self.__dict__.get("known")
        if mode and known is not None and known.simplified and "_own_names" in self.__dict__:
            raise InjectError(
                "a simplified module is for inference: it has no train mode. Train the module that "
                "was given to simplify, and simplify that again."
            )

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
        unshare(self, {name for name, p in named if id(p) in held})

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seal.refuse_apart()
        super()._check(args, kwargs)

    def _refusal(self, error: InputError) -> InputError:
        known = self.known
        addable = self.exported and not (self.parent_module or known.folded or known.routing)
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
        """Whether the two modes' graphs of a call differ in a submodule's part, or by its flag."""
        if self.parent_module or joined(path, TRAINING) in (self.reads or ()):
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
    def simplified(self) -> Simplification | None:
        """What `fxlora.simplify` did to make this module, or None."""
        return self.known.simplified

    @property
    def retention(self) -> Mapping[str, float]:
        """How much of s·BA the last fold kept in each weight that it quantised anew, by site."""
        return self.known.retention

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
        return derived(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        return deep_copy(self, memo)

    def __copy__(self) -> CapturedModule:
        return shallow_copy(self)

    def rebuilt(self, memo: dict[int, Any], state: State) -> CapturedModule:
        """Return a copy of the graphs and containers, with the tensors that `memo` has for ours."""
        complete_memo(self, memo)
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
        """Load as nn.Module does, without writing into the source model's storage.

        Raises:
            InputError: calls change buffers, and the module has adapters that are not active: these
                have values of their own for the buffers, which a state dict does not hold.
        """
        inactive = self.known.adapters.keys() - {*self.known.active}
        if inactive and (written := self.written_tensors()):
            raise InputError(
                f"calls change {some(sorted(written))}: each adapter has its own values, and a "
                "state dict has those of the active one only. Save every adapter "
                "(save_adapter(module, folder, adapter=name)) and load it (load_adapter); or copy "
                "the module (copy.deepcopy)."
            )
        if assign:
            check_kinds(self, state_dict, "")
        else:
            unshare(self, state_dict)
        with loading(self, state_dict.keys()):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def copy_when_trained(self) -> None:
        """Have the parameters, whose storage other modules share, copied when they first train."""
        own = self.known.adapter_parameters | self.trained | self.state_parameters().keys()
        held = self.named_parameters(remove_duplicate=False)
        copy_when_trained(self, (parameter for name, parameter in held if name not in own))

    def changed_weights(self) -> list[str]:
        """Return the names of recorded weights that were written to or untied since."""
        return [name for names in changed_fingerprints(self) for name in names]

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

    def written_tensors(self) -> set[str]:
        """Return the names of the parameters and buffers that a graph writes to."""
        nodes = (node for graph in self.distinct_graphs() for node in graph.nodes)
        return {name for node in nodes for name in written_attributes(node, self)}

    def unplanned(self) -> list[str]:
        """Return the names of parameters that require gradients although no plan trains them."""
        planned = self.known.adapter_parameters | self.trained
        return [n for n, p in self.named_parameters() if p.requires_grad and n not in planned]

    def aliases(self) -> dict[str, list[str]]:
        """Return all names of each parameter, keyed by the first; tied weights have several."""
        return aliases(self)

    def set_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """Register a parameter under a dotted name, creating containers as needed."""
        set_parameter(self, name, parameter)

    def remove_parameter(self, name: str) -> None:
        """Remove a parameter, and the containers that this leaves empty."""
        remove_parameter(self, name)

    # ---- device and dtype -------------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the weights, and update the devices and dtypes that the graphs name.

        A, B and the parameters trained in full keep the dtypes that the plan asks for.
        """
        with moving(self, fn) as move, self.editing():  # the submodules move with the module
            return super()._apply(move, recurse)
