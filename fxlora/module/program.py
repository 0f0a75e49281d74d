"""Program: one way of calling a model, as a graph per mode; and the module that runs it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from ..errors import InputError
from ..fx.targets import refuse_unwritable
from .contract import InputSpec

MODES = ("train", "eval")

# What GraphModule.recompile leaves on the module besides `forward`.
_GENERATED = ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec")


@dataclass(eq=False)
class Program:
    """One way of calling a model, or a submodule of it.

    Attributes:
        graphs: the graph of each mode; one object under both keys where they came out alike.
            They name parameters as the whole model does.
        inputs: what the graph of each mode holds for, or None where capture had no inputs.
        path: of the submodule; "" is the whole model.
    """

    graphs: dict[str, fx.Graph]
    inputs: dict[str, InputSpec | None]
    path: str = ""

    def distinct_graphs(self) -> list[fx.Graph]:
        """The graphs, each once."""
        return list({id(graph): graph for graph in self.graphs.values()}.values())

    def copied(self) -> Program:
        """The same over copies of the graphs."""
        copies = {id(graph): copy.deepcopy(graph) for graph in self.distinct_graphs()}
        graphs = {mode: copies[id(graph)] for mode, graph in self.graphs.items()}
        return replace(self, graphs=graphs, inputs=dict(self.inputs))


@dataclass(frozen=True)
class _Generated:
    """The code of one graph, which is kept alive with it: its id is the key."""

    graph: fx.Graph
    forward: Callable[..., Any]
    state: dict[str, Any]


class ProgramModule(fx.GraphModule):
    """Runs a program over a tree of parameters; its mode chooses the graph.

    Its forward is the one place where a call is held against the contract on the inputs.
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
        """What the graph of the mode holds for, or None where capture had no inputs."""
        return self.program.inputs[self.mode]

    def holds_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of the graph of the mode would be let through."""
        return self.contract is None or self.contract.holds_for(args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise InputError unless the graph of the mode holds for a call."""
        try:
            if self.contract is not None:
                self.contract.check(args, kwargs)
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
        """Take the graph of a mode, and leave the flags of submodules as they are."""
        self.training = training
        if self._graph is not self.program.graphs[self.mode]:
            self._activate(self.program.graphs[self.mode])

    @property
    def graph(self) -> fx.Graph:
        return self._graph

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        """Put another graph in the place of the current mode's one."""
        current = self.__dict__.get("_graph")
        program: Program | None = self.__dict__.get("program")
        if program:
            replaced = {mode: g for mode, held in program.graphs.items() if held is current}
            program.graphs.update(replaced)
        self._activate(g)

    def _activate(self, graph: fx.Graph) -> None:
        """Make a graph the one that runs; its code is kept, for torch.compile to know it again."""
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
        """Generate the code of the current graph anew, after it was edited in place."""
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
        """Check the graphs after a rewrite, and forget the code that they had."""
        for graph in self.program.distinct_graphs():
            graph.lint()
        self._generated.clear()
        self._activate(self.program.graphs[self.mode])


def code_of(graph: fx.Graph) -> str:
    """The code that a graph module runs for a graph."""
    return graph.python_code("self").src


def tensors_of(tree: nn.Module) -> Mapping[str, Any]:
    """What holds a module's parameters, buffers and children; not copies."""
    names = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    return {name: tree.__dict__[name] for name in names}


def _guarded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A graph's code behind the contract on its inputs."""

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
    """Whether torch.fx's tracer makes this call, whose proxies have no shapes to check."""
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
