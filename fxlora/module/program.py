"""Program: a graph per mode for one way of calling a model; and the module that runs it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from ..errors import InputError
from ..fx.targets import refuse_unwritable
from .autocast import UNKNOWN, Autocasts
from .contract import InputSpec

MODES = ("train", "eval")

# Attributes, besides `forward`, that GraphModule.recompile sets on the module.
_GENERATED = ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec")


@dataclass(eq=False)
class Program:
    """The graphs for one way of calling a model, or a submodule of it.

    Attributes:
        graphs: the graph of each mode; the same object under both keys if the graphs are equal.
            They name parameters as the whole model does.
        inputs: the input contract of each mode, or None where capture had no example inputs.
        path: the submodule's path; "" for the whole model.
        autocasts: the callers' autocasts that the graph of each mode holds for.
    """

    graphs: dict[str, fx.Graph]
    inputs: dict[str, InputSpec | None]
    path: str = ""
    autocasts: dict[str, Autocasts] = field(default_factory=dict[str, Autocasts])

    def distinct_graphs(self) -> list[fx.Graph]:
        """Return the graphs without duplicates."""
        return list({id(graph): graph for graph in self.graphs.values()}.values())

    def copied(self) -> Program:
        """Return the program over copies of the graphs."""
        copies = {id(graph): copy.deepcopy(graph) for graph in self.distinct_graphs()}
        graphs = {mode: copies[id(graph)] for mode, graph in self.graphs.items()}
        return replace(
            self, graphs=graphs, inputs=dict(self.inputs), autocasts=dict(self.autocasts)
        )


@dataclass(frozen=True)
class _Generated:
    """The code generated for a graph; keeps the graph alive, because its id is the key."""

    graph: fx.Graph
    forward: Callable[..., Any]
    state: dict[str, Any]


class ProgramModule(fx.GraphModule):
    """Runs a program over a tree of parameters; its mode chooses the graph.

    Its forward is the only place where a call is checked against the input contract.
    """

    _generated: dict[int, _Generated]

    def __init__(self, tree: nn.Module, program: Program, class_name: str, training: bool) -> None:
        self.__dict__["_generated"] = {}
        super().__init__(nn.Module(), fx.Graph(), class_name)
        self._generated.clear()
        for name, held in tensors_of(tree).items():
            self.__dict__[name] = held
        self.program = program
        if any(spec and spec.updates for spec in program.inputs.values()):
            self.register_forward_hook(_update_inputs, with_kwargs=True)
        self.choose(training)

    @property
    def mode(self) -> str:
        return "train" if self.training else "eval"

    @property
    def contract(self) -> InputSpec | None:
        """The input contract of the current mode, or None where capture had no example inputs."""
        return self.program.inputs[self.mode]

    def holds_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the current mode's graph accepts these arguments."""
        return self.contract is None or self.contract.holds_for(args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise InputError unless the current mode's graph accepts these arguments."""
        try:
            if self.contract is not None:
                self.contract.check(args, kwargs)
            self.program.autocasts.get(self.mode, UNKNOWN).check()
        except InputError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: InputError) -> InputError:
        if not self.program.path:
            return error
        return InputError(
            f"region '{self.program.path}': {error} Give capture an example in which the region "
            "is called like this."
        )

    def choose(self, training: bool) -> None:
        """Switch to the graph of a mode, without changing the training flags of submodules."""
        self.training = training
        if self._graph is not self.program.graphs[self.mode]:
            self._activate(self.program.graphs[self.mode])

    @property
    def graph(self) -> fx.Graph:
        return self._graph

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        """Replace the current graph, in every mode that uses it."""
        current = self.__dict__.get("_graph")
        program: Program | None = self.__dict__.get("program")
        if program:
            replaced = {mode: g for mode, held in program.graphs.items() if held is current}
            program.graphs.update(replaced)
        self._activate(g)

    def _activate(self, graph: fx.Graph) -> None:
        """Make a graph the current one; its code is reused, so that torch.compile recognizes it."""
        known = self._generated.get(id(graph))
        if known is None:
            setter: Any = fx.GraphModule.graph
            setter.fset(self, graph)
            return
        self._graph = graph
        graph.owning_module = self
        self.__dict__.update(known.state)
        type(self).forward = known.forward

    def recompile(self) -> Any:
        """Regenerate the code of the current graph, after it was edited in place."""
        refuse_unwritable(self._graph)
        code = super().recompile()
        type(self).forward = _guarded(type(self).forward)
        state = {name: self.__dict__[name] for name in _GENERATED if name in self.__dict__}
        self._generated[id(self._graph)] = _Generated(self._graph, type(self).forward, state)
        return code

    def is_stale(self) -> bool:
        """Whether a graph was edited after its code was generated."""
        known = self._generated.values()
        return any(made.state["_code"] != code_of(made.graph) for made in known)

    def refresh(self) -> None:
        """Lint the graphs after a rewrite, and discard the code generated before it."""
        for graph in self.program.distinct_graphs():
            graph.lint()
        self._generated.clear()
        self._activate(self.program.graphs[self.mode])


def code_of(graph: fx.Graph) -> str:
    """Return the code that a GraphModule runs for a graph."""
    return graph.python_code("self").src


def tensors_of(tree: nn.Module) -> Mapping[str, Any]:
    """Return the dicts that hold a module's parameters, buffers and children; not copies."""
    names = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    return {name: tree.__dict__[name] for name in names}


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a graph's forward in the check of the input contract."""

    @functools.wraps(forward)
    def guarded(self: ProgramModule, *args: Any, **kwargs: Any) -> Any:
        if not _traced(args, kwargs):
            self._check(args, kwargs)
        return forward(self, *args, **kwargs)

    return guarded


def _update_inputs(
    module: ProgramModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if module.contract is not None:
        module.contract.update(args, kwargs, output)


def _traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch.fx's tracer makes this call: proxies have no shapes to check."""
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
