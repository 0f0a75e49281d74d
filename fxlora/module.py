"""CapturedModule: a GraphModule that holds one graph per mode over one parameter tree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from .errors import CaptureError, FxLoraError
from .inputs import InputSpec
from .plan import Plan

MODES = ("train", "eval")


# What GraphModule.recompile leaves on the module besides `forward`.
_GENERATED = ("_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec")


@dataclass(frozen=True)
class _Generated:
    """The code of one graph, which is kept alive with it: its id is the key."""

    graph: fx.Graph
    forward: Callable[..., Any]
    state: dict[str, Any]


class CapturedModule(fx.GraphModule):
    """What every verb of fxlora takes and returns.

    A true `torch.fx.GraphModule` whose `state_dict()` keys are the source model's. `train()`
    and `eval()` choose between two graphs, because torch.export bakes the mode into a graph.

    Attributes:
        graphs: the graph of each mode; one object under both keys where they came out alike.
        inputs: the contract on the inputs of each mode, or None where capture had no inputs.
        plan: what was injected, or None.
        folded: what was folded into the weights, in order.
        trained: names of parameters outside A and B that train (in full, as copies).
        originals: the tensors that training may change, as they were before injection.
        grads: names of parameters that required gradients in the source.
        outputs: names of the source's output embeddings (what "all-linear" leaves out).
    """

    _generated: dict[int, _Generated]
    graphs: dict[str, fx.Graph]
    inputs: dict[str, InputSpec | None]

    def __init__(
        self,
        tree: nn.Module,
        graphs: Mapping[str, fx.Graph],
        inputs: Mapping[str, InputSpec | None],
        *,
        class_name: str,
        training: bool,
    ) -> None:
        self.__dict__["_generated"] = {}
        super().__init__(nn.Module(), fx.Graph(), class_name)
        self._generated.clear()
        self._modules, self._parameters = tree._modules, tree._parameters
        self._buffers = tree._buffers
        self._non_persistent_buffers_set = tree._non_persistent_buffers_set
        self.graphs = dict(graphs)
        self.inputs = dict(inputs)
        self.plan: Plan | None = None
        self.folded: tuple[Plan, ...] = ()
        self.trained: frozenset[str] = frozenset()
        self.originals: dict[str, torch.Tensor] = {}
        self.grads: frozenset[str] = frozenset()
        self.outputs: frozenset[str] = frozenset()
        self.register_forward_pre_hook(_check_inputs, with_kwargs=True)
        if any(spec and spec.updates for spec in inputs.values()):
            self.register_forward_hook(_update_inputs, with_kwargs=True)
        self.train(training)

    # ---- modes ------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        return "train" if self.training else "eval"

    def train(self, mode: bool = True) -> CapturedModule:
        """Choose the train graph (or the eval graph); frozen parameters stay frozen.

        The mode belongs to the whole graph: `train()` of a submodule of it has no effect.
        """
        super().train(mode)
        if self._graph is not self.graphs[self.mode]:
            self._activate(self.graphs[self.mode])
        return self

    @property
    def graph(self) -> fx.Graph:
        return self._graph

    @graph.setter
    def graph(self, g: fx.Graph) -> None:
        """Put another graph in the place of the current mode's one."""
        current = self.__dict__.get("_graph")
        for mode, held in self.__dict__.get("graphs", {}).items():
            if held is current:
                self.graphs[mode] = g
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
        code = super().recompile()
        state = {name: self.__dict__[name] for name in _GENERATED if name in self.__dict__}
        self._generated[id(self._graph)] = _Generated(self._graph, type(self).forward, state)
        return code

    def refresh(self) -> None:
        """Check the graphs after a rewrite, and forget the code that they had."""
        for graph in self.distinct_graphs():
            graph.lint()
        self._generated.clear()
        self._activate(self.graphs[self.mode])

    def distinct_graphs(self) -> list[fx.Graph]:
        """The graphs, each once."""
        return list({id(graph): graph for graph in self.graphs.values()}.values())

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
        copies = {id(graph): copy.deepcopy(graph) for graph in self.distinct_graphs()}
        result = CapturedModule(
            copy.deepcopy(self.tree(), memo),
            {mode: copies[id(graph)] for mode, graph in self.graphs.items()},
            self.inputs,
            class_name=type(self).__name__,
            training=self.training,
        )
        result.plan, result.folded = self.plan, self.folded
        result.trained, result.grads, result.outputs = self.trained, self.grads, self.outputs
        result.originals = originals
        result.meta = copy.copy(self.meta)
        return result

    def tree(self) -> nn.Module:
        """The containers, parameters and buffers, without the graphs."""
        tree = nn.Module()
        tree._modules, tree._parameters = self._modules, self._parameters
        tree._buffers = self._buffers
        tree._non_persistent_buffers_set = self._non_persistent_buffers_set
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
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    # ---- names ------------------------------------------------------------------------------

    def adapter_parameters(self) -> frozenset[str]:
        """Names of the injected A and B."""
        return frozenset(name for entry in self.plan or () for name in (entry.name_a, entry.name_b))

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
        moves = _moves(self, fn)
        nested = [m for m in self.modules() if isinstance(m, fx.GraphModule) and m is not self]
        graphs = [*self.distinct_graphs(), *(module.graph for module in nested)]
        for graph in graphs:
            _refuse_ambiguous_casts(graph, moves)
        result = super()._apply(fn, recurse)
        self.originals = {name: fn(tensor) for name, tensor in self.originals.items()}
        if moves:
            for graph in graphs:
                _retarget(graph, moves)
            self.inputs = {mode: spec and spec.moved(moves) for mode, spec in self.inputs.items()}
            for module in nested:
                module.recompile()
            self._generated.clear()
            self.recompile()
        return result


def _contents(module: nn.Module) -> Iterator[object]:
    yield from module.children()
    yield from module._parameters.values()
    yield from module._buffers.values()


def _check_inputs(module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    spec = module.inputs[module.mode]
    if spec is not None:
        spec.check(args, kwargs)


def _update_inputs(
    module: CapturedModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    spec = module.inputs[module.mode]
    if spec is not None:
        spec.update(args, kwargs, output)


# ---- devices and dtypes that a graph names ------------------------------------------------------

Moves = dict[Any, Any]  # old device → new device, old dtype → new dtype

_WIDTH = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1, torch.float64: 2}


def _moves(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> Moves:
    moves: Moves = {}
    kinds = {(t.device, t.dtype) for t in [*module.parameters(), *module.buffers()]}
    for device, dtype in kinds:
        old = torch.empty(0, device=device, dtype=dtype)
        new = fn(old)
        for before, after in ((old.device, new.device), (old.dtype, new.dtype)):
            if before != after:
                moves[before] = after
    return moves


def _retarget(graph: fx.Graph, moves: Moves) -> None:
    def moved(value: Any) -> Any:
        return moves.get(value, value) if isinstance(value, torch.device | torch.dtype) else value

    for node in graph.nodes:
        if node.op == "call_function":
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)


def _refuse_ambiguous_casts(graph: fx.Graph, moves: Moves) -> None:
    """Narrowing `x.to(float32)`: does the source mean float32, or whatever its weights have?

    The graph cannot tell, and a wrong guess loses precision silently.
    """
    for node in graph.nodes:
        for old in (*node.args, *node.kwargs.values()):
            new = moves.get(old) if isinstance(old, torch.dtype) else None
            if new in _WIDTH and _WIDTH[new] < _WIDTH.get(old, 0) and _is_cast(node):
                line = (node.stack_trace or "").strip().splitlines()[-2:]
                raise CaptureError(
                    f"the captured graph casts to {old} at node '{node.name}' "
                    f"({' '.join(part.strip() for part in line)}); whether that should become "
                    f"{new} is known to the source model only. Cast the source "
                    f"(model.to({new})) and capture that."
                )


def _is_cast(node: fx.Node) -> bool:
    aten = torch.ops.aten
    return getattr(node.target, "overloadpacket", None) in (aten.to, aten._to_copy)
