"""Compute chains of elementwise ops again in the backward, where that saves memory.

Autograd saves what each op needs: for a GELU that is written out, six tensors as wide as x. A chain
whose inner values nobody else reads can be computed again from its inputs, which are saved instead.
Which is less is found by a trial on the meta device, with the sizes of the example.

The dropout in front of an adapter's A is such a chain, too, with the product: its result and its
mask are drawn again, from the random state of the forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from ..fx.autocast import current_autocast
from ..fx.calls import example_value
from ..fx.marks import ADAPTER, RECOMPUTED
from ..fx.trials import concrete_sizes
from .layers import between, draws, hidden_of
from .plain import autocast_to, is_plain

aten = torch.ops.aten


@dataclass(frozen=True)
class Recomputed:
    """What the backward computes again.

    Attributes:
        ops: the chain's ops, in order.
        before, after: the bytes saved for the backward without and with it, in the example.
    """

    ops: tuple[str, ...]
    before: int
    after: int


def recompute_chains(graph: fx.Graph, is_barrier: Callable[[fx.Node], bool]) -> None:
    """Replace chains of elementwise ops by calls that compute them again in the backward."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    barriers = [number for node, number in order.items() if is_barrier(node)]
    written = _bases(n for node in graph.nodes if is_barrier(node) for n in node.all_input_nodes)
    (output,) = graph.find_nodes(op="output")
    returned = _bases(output.all_input_nodes)
    drawn = [number for node, number in order.items() if draws(node)]
    for number, chain in enumerate([*_chains(graph), *_dropouts(graph)]):
        begin, end = order[chain[0]], order[chain[-1]]
        if between(barriers, begin, end) or (draws(chain[0]) and between(drawn, begin, end)):
            continue
        inputs = _inputs(chain)
        if not written.isdisjoint(_bases(inputs)):
            continue  # autograd would refuse to read them in the backward
        inner = _graph_of(chain, inputs)
        exposed = [node for node in inputs if not _is_private(node, returned)]
        found = _measured(inner, inputs, chain, exposed)
        if found and found.after < found.before:
            _replace(chain, inputs, _Chain(inner, number, draws(chain[0])), found)


# ---- chains -------------------------------------------------------------------------------------


def _chains(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yield chains of at least two ops, in graph order, of which only the last one is read."""
    ends: dict[fx.Node, fx.Node] = {}  # the last op of each op's chain
    for node in reversed(list(graph.nodes)):
        if _is_elementwise(node):
            found = {ends.get(user) for user in node.users}
            end = found.pop() if len(found) == 1 else None
            ends[node] = end or node
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in ends:
            chains.setdefault(ends[node], []).append(node)
    yield from (chain for chain in chains.values() if len(chain) > 1)


def _dropouts(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yield each dropout in front of an adapter's A, with the product."""
    for node in graph.nodes:
        hidden = hidden_of(node)
        dropout = hidden.args[0] if hidden else None
        if not (hidden and isinstance(dropout, fx.Node)):
            continue
        if dropout.target == aten.dropout.default and len(dropout.users) == 1:
            yield [dropout, hidden]


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or ADAPTER in node.meta:
        return False
    value = example_value(node)
    tags = target.tags
    return (
        value is not None
        and value.is_floating_point()
        and torch.Tag.pointwise in tags
        and torch.Tag.nondeterministic_seeded not in tags
        and not target._schema.is_mutable
        and not any(value.alias_info for value in target._schema.returns)
    )


def _inputs(chain: list[fx.Node]) -> list[fx.Node]:
    given = itertools.chain.from_iterable(node.all_input_nodes for node in chain)
    return list(dict.fromkeys(node for node in given if node not in chain))


def _bases(nodes: Iterable[fx.Node]) -> set[Any]:
    """Return nodes, those that they are views of, and the names of tensors of the module."""
    found: set[Any] = set()
    ahead = list(nodes)
    while ahead:
        node = ahead.pop()
        base = node.target if node.op == "get_attr" else node
        if base in found:
            continue
        found.add(base)
        if isinstance(node.target, OpOverload):
            may_be_view = any(value.alias_info for value in node.target._schema.returns)
        else:
            may_be_view = node.op == "call_function"  # an item of a tuple, or unknown
        ahead += node.all_input_nodes if may_be_view else []
    return found


def _is_private(node: fx.Node, returned: set[Any]) -> bool:
    """Whether only the graph has a tensor: no module or caller does, who may write to it."""
    bases = _bases([node])
    computed = all(isinstance(base, fx.Node) and base.op == "call_function" for base in bases)
    return computed and bases.isdisjoint(returned)


def _graph_of(chain: list[fx.Node], inputs: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    made = {node: graph.placeholder(f"given_{n}") for n, node in enumerate(inputs)}
    for node in chain:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[chain[-1]])
    return fx.GraphModule(nn.Module(), graph)


def _replace(
    chain: list[fx.Node], inputs: list[fx.Node], function: _Chain, found: Recomputed
) -> None:
    last = chain[-1]
    with last.graph.inserting_before(last):
        call = last.graph.call_function(function, tuple(inputs))
    call.meta = {**last.meta, RECOMPUTED: found}
    last.replace_all_uses_with(call)
    for node in reversed(chain):
        node.graph.erase_node(node)


# ---- what is saved ------------------------------------------------------------------------------


def _measured(
    inner: fx.GraphModule, inputs: list[fx.Node], chain: list[fx.Node], exposed: list[fx.Node]
) -> Recomputed | None:
    """Return what a chain saves on the meta device; None if that cannot be tried.

    Weights, which are there anyway, do not count. None also if it would save an `exposed` input
    that autograd does not save without it: somebody might write to it before the backward.
    """
    examples = [_example(node) for node in inputs]
    if draws(chain[0]) and isinstance(examples[0], Tensor):  # A, of which one row is enough
        examples[1:] = [examples[0].new_empty(1, examples[0].shape[-1]).requires_grad_()]
    tensors = {node: e for node, e in zip(inputs, examples, strict=True) if isinstance(e, Tensor)}
    weights = {_memory(e) for node, e in tensors.items() if node.op == "get_attr"}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[_memory(tensor)] = tensor
        return tensor

    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, _same):
            inner(*examples)
    except Exception:  # noqa: BLE001 - an op may have no meta kernel
        return None
    held = {_memory(example): example for example in tensors.values()}
    if not draws(chain[0]):
        known = [_memory(tensors[node]) for node in exposed if node in tensors]
        if not saved.keys() >= set(known):
            return None
    before, after = (
        sum(t.untyped_storage().nbytes() for key, t in of.items() if key not in weights)
        for of in (saved, held)
    )
    return Recomputed(tuple(str(node.target) for node in chain), before, after)


def _example(node: fx.Node) -> Any:
    """Return a meta tensor like a node's example; what a weight does not compute has a gradient."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    made = torch.empty(concrete_sizes(value.shape), dtype=value.dtype, device="meta")
    return made.requires_grad_(value.is_floating_point() and node.op == "call_function")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(tensor: Tensor) -> Tensor:
    return tensor


# ---- the call -----------------------------------------------------------------------------------


class _Chain:
    """A function that computes a chain, and computes it again in the backward."""

    def __init__(self, inner: fx.GraphModule, number: int, draws: bool) -> None:
        self.inner, self.draws = inner, draws
        self.__name__, self.__module__ = f"recomputed_{number}", __name__  # which torch.fx asks for

    def __call__(self, *given: Any) -> Any:
        tensors = [value for value in given if isinstance(value, Tensor)]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.inner(*given)  # a compiler chooses what to compute again
        if not any(tensor.requires_grad for tensor in tensors) or not is_plain(tensors):
            return self.inner(*given)
        return _Recompute.apply(self.inner, self.draws, *given)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: fx.GraphModule, draws: bool, *given: Any) -> Any:
        ctx.inner, ctx.autocast = inner, current_autocast()
        ctx.random = _random_states(given) if draws else {}
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in given]
        ctx.save_for_backward(*(value for value in given if isinstance(value, Tensor)))
        return inner(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        twice = torch.is_grad_enabled()  # the gradient itself is to be differentiated
        needed = ctx.needs_input_grad[2:]
        saved = iter(ctx.saved_tensors)
        given = [next(saved) if other is None else other[0] for other in ctx.others]
        given = [
            _apart(value, need, twice) if isinstance(value, Tensor) else value
            for value, need in zip(given, needed, strict=True)
        ]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_with_random_states(ctx.random))
            for device in {t.device.type for t in grads}:
                stack.enter_context(autocast_to(device, dict(ctx.autocast).get(device)))
            output = ctx.inner(*given)
        wanted = [value for value, need in zip(given, needed, strict=True) if need]
        found = iter(
            torch.autograd.grad(output, wanted, grads, create_graph=twice, allow_unused=True)
        )
        return None, None, *(next(found) if need else None for need in needed)


def _apart(value: Tensor, needed: bool, twice: bool) -> Tensor:
    """Return a tensor whose gradient is that of one input alone, not of what it is computed from.

    If the gradient is to be differentiated (`twice`), it depends on the input.
    """
    return value.view_as(value) if twice else value.detach().requires_grad_(needed)


States = dict[torch.device, Tensor]  # of random generators


def _random_states(given: tuple[Any, ...]) -> States:
    devices = {value.device for value in given if isinstance(value, Tensor)}
    return {device: _generator(device).get_state() for device in devices}


def _generator(device: torch.device) -> torch.Generator:
    """Return the default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.get_device_module(device).default_generators[device.index]


@contextmanager
def _with_random_states(states: States) -> Generator[None]:
    """Within the context, the generators go on from these states."""
    before = {device: _generator(device).get_state() for device in states}
    try:
        for device, state in states.items():
            _generator(device).set_state(state)
        yield
    finally:
        for device, state in before.items():
            _generator(device).set_state(state)
