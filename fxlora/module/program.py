"""Program: a graph per mode for one way of calling a model; and the module that runs it."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn
from torch.fx.graph import PythonCode, _PyTreeCodeGen
from torch.fx.graph_module import _forward_from_src

from ..errors import InputError
from ..fx.autocast import current_autocast
from ..fx.targets import refuse_unwritable
from .autocasts import UNKNOWN, Autocasts
from .blocks.recorded import ModuleCall
from .contract import InputSpec
from .submodules import plain_view

MODES = ("train", "eval")

# Names under which a graph's code finds two modules besides its tensors. FACADE is the module as
# its user has it: outlined submodules are called through it, and so with the hooks, wrappers and
# replacements that the user gave them. OUTER, in the graph of an outlined submodule only, is the
# whole model, for all that is outside of that submodule.
FACADE = "facade"
OUTER = "outer"


@dataclass(eq=False)
class Program:
    """The graphs for one way of calling a model, or a submodule of it.

    Attributes:
        graphs: the graph of each mode; the same object under both keys if the graphs are equal.
            They name parameters as the whole model does.
        inputs: the input contract of each mode, or None where capture had no example inputs.
        path: the submodule's path; "" for the whole model.
        calls: the calls of submodules that capture recorded, in each mode's graph.
        autocasts: the callers' autocasts that the graph of each mode holds for.
        method: the method of the model that the graphs run.
        changes: names of the Python attributes that the source changes in these calls.
        reads: names of the Python attributes that it reads in them, or None if that is not known.
    """

    graphs: dict[str, fx.Graph]
    inputs: dict[str, InputSpec | None]
    path: str = ""
    calls: Mapping[str, tuple[ModuleCall, ...]] = field(default_factory=dict[str, Any])
    autocasts: dict[str, Autocasts] = field(default_factory=dict[str, Autocasts])
    method: str = "forward"
    changes: frozenset[str] = frozenset()
    reads: frozenset[str] | None = None

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
    """The code generated for a graph.

    Attributes:
        graph: the graph; kept alive, because its id is the key.
        forward: the function that runs it.
        state: the attributes that a GraphModule has for this code.
    """

    graph: fx.Graph
    forward: Callable[..., Any]
    state: dict[str, Any]


class ProgramModule(fx.GraphModule):
    """Runs a program over a tree of parameters; `training` chooses the graph at every call.

    Its forward is the only place where a call is checked against the input contract. It belongs to
    the class and never changes, so that whoever wraps it, sets `training` without `train()`, or
    changes the instance's class still runs the graph of the module's mode.
    """

    _generated: dict[int, _Generated]
    _forwards: dict[bool, Callable[..., Any]]
    _view: nn.Module

    def __init__(self, tree: nn.Module, program: Program, class_name: str, training: bool) -> None:
        self.__dict__.update(_generated={}, _forwards={})
        super().__init__(nn.Module(), fx.Graph(), class_name)
        for name, held in tensors_of(tree).items():
            self.__dict__[name] = held
        self.program = program
        self.look()
        if "forward" not in vars(type(self)):  # fx.GraphModule gives every instance a class
            type(self).forward = forward_function()
        self.training = training

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training" and "program" in self.__dict__:
            self._select_graph()

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

    def check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise InputError unless the current mode's graph is one for these arguments."""
        if self.contract is not None:
            self.contract.check(args, kwargs, assume=False)

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
        if current_autocast():  # an example of this dtype has no graph outside of autocast
            return InputError(
                f"region '{self.program.path}': the model has no whole graph, and under autocast "
                "its regions get tensors of other dtypes than in the capture. Call it outside of "
                "autocast, or capture the model in half precision (model.to(torch.bfloat16)). "
                f"{error}"
            )
        return InputError(
            f"region '{self.program.path}': {error} Give capture an example in which the region "
            "is called like this."
        )

    @property
    def graph(self) -> fx.Graph:
        return self._graph

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        """Replace the current graph, in every mode that uses it."""
        program: Program | None = self.__dict__.get("program")
        if program is None:  # set by the constructor of fx.GraphModule
            self.__dict__["_graph"] = g
            return
        replaced = {mode: g for mode, held in program.graphs.items() if held is self._graph}
        program.graphs.update(replaced)
        self._select_graph()

    def _select_graph(self) -> None:
        """Make the mode's graph the current one, and generate its code unless it has some."""
        graph = self.__dict__["_graph"] = self.program.graphs[self.mode]
        graph.owning_module = self
        made = self._generated.get(id(graph))
        if made is None:
            made = self._generated[id(graph)] = _generated(graph, self.running(graph))
            self._sign(inspect.signature(made.forward))
        self.__dict__.update(made.state)
        self._view.__dict__.update(made.state)  # the code reads its pytree specs there
        self._forwards[self.training] = made.forward

    def _sign(self, signature: inspect.Signature) -> None:
        """Give the forward the signature of its arguments, which libraries read."""
        type(self).forward.__signature__ = signature

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the code of the mode's graph on arguments that were checked."""
        return self._forwards[self.training](self._view, *args, **kwargs)

    def running(self, graph: fx.Graph) -> fx.Graph:
        """Return the graph that runs in place of one of the program's graphs."""
        return graph

    def recompile(self) -> PythonCode:
        """Regenerate the code of the current graph, after it was edited in place."""
        if "program" in self.__dict__:
            self._generated.pop(id(self._graph), None)
            self._forwards.clear()
            self._select_graph()
        return self._graph.python_code("self")

    def look(self) -> None:
        """Have the graphs' code run on the tensors and nested graphs that the module holds now."""
        self.__dict__["_view"] = plain_view(self, self.wrapped_blocks())

    def wrapped_blocks(self) -> Mapping[int, nn.Module]:
        """Return the blocks by the id of the modules at their paths; empty if none is wrapped."""
        return {}

    def is_stale(self) -> bool:
        """Whether a graph was edited after its code was generated."""
        known = self._generated.values()
        return any(made.state["_code"] != code_of(made.graph) for made in known)

    def refresh(self) -> None:
        """Lint the graphs after a rewrite, and discard the code generated before it."""
        for graph in self.program.distinct_graphs():
            graph.lint()
        self.forget_code()

    def forget_code(self) -> None:
        """Discard the generated code, and generate it anew for the tree as it is now."""
        self.look()
        self._generated.clear()
        self._forwards.clear()
        self._select_graph()


def code_of(graph: fx.Graph) -> str:
    """Return the code that a GraphModule runs for a graph."""
    return graph.python_code("self").src


def tensors_of(tree: nn.Module) -> Mapping[str, Any]:
    """Return the dicts that hold a module's parameters, buffers and children; not copies."""
    names = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
    return {name: tree.__dict__[name] for name in names}


def _generated(graph: fx.Graph, running: fx.Graph) -> _Generated:
    """Generate the code of a graph, as fx.GraphModule does, without setting it on a class."""
    refuse_unwritable(graph)
    made = graph.python_code("self")
    code = made if running is graph else running.python_code("self")
    state: dict[str, Any] = {
        "_code": made.src,
        "_lineno_map": made._lineno_map,
        "_prologue_start": made._prologue_start,
    }
    if isinstance(graph._codegen, _PyTreeCodeGen):  # the code reads these
        specs = graph._codegen.pytree_info
        state |= {"_in_spec": specs.in_spec, "_out_spec": specs.out_spec}
    return _Generated(graph, _function(code.src, code.globals), state)


_FUNCTIONS: dict[str, list[tuple[dict[str, Any], Callable[..., Any]]]] = {}


def _function(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """Return the function of generated code; equal code has one function (repeated blocks)."""
    known = _FUNCTIONS.setdefault(source, [])
    for others, function in known:
        if others == names:
            return function
    function = _forward_from_src(source, dict(names))
    known.append((names, function))
    return function


def forward_function() -> Any:
    """Return a copy of `_forward` with its own code object.

    torch.compile caches compiled code by code object, up to a limit that all captured modules of a
    process would otherwise share.
    """
    return types.FunctionType(_forward.__code__.replace(), _forward.__globals__, "forward")


def _forward(self: ProgramModule, *args: Any, **kwargs: Any) -> Any:
    if _traced(args, kwargs):
        return self._forwards[self.training](self._view, *args, **kwargs)
    self._check(args, kwargs)
    if self.contract is not None and self.contract.defaults:
        args, kwargs = self.contract.without_defaults(args, kwargs)
    output = self.run(args, kwargs)
    if self.contract is not None and self.contract.updates:
        self.contract.update(args, kwargs, output)
    return output


def _traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch.fx's tracer makes this call: proxies have no shapes to check."""
    return any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
