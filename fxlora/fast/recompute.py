"""Compute chains of elementwise ops again in the backward, where that saves memory.

Autograd saves what each op needs: for a GELU that is written out, six tensors as wide as x. A chain
whose inner values nobody else reads can be computed again from its inputs, which are saved instead.
Which is less is found by a trial on the meta device, with the sizes of the example.

A joint op saves its input for the gradients of A. If a chain ends there, the joint op computes it
again: a gate in front of a down projection, or a norm in front of q, k and v.

The dropout in front of an adapter's A is such a chain, too, with the product: its result and its
mask are drawn again, from the random state of the forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..fx.calls import example_value
from ..fx.marks import ADAPTER, INPUT, RECOMPUTED
from ..fx.trials import concrete_sizes
from ..lora.ops import OPS
from .again import Chain
from .layers import between, draws, hidden_of
from .linears import LinearsOf

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
        joint = _joint_of(chain)
        begin, end = order[chain[0]], order[joint or chain[-1]]  # where it will be computed
        if between(barriers, begin, end) or (draws(chain[0]) and between(drawn, begin, end)):
            continue
        inputs = _inputs(chain)
        if not written.isdisjoint(_bases(inputs)):
            continue  # autograd would refuse to read them in the backward
        inner = _graph_of(chain, inputs)
        exposed = [node for node in inputs if not _is_private(node, returned)]
        found = _measured(inner, inputs, chain, exposed, joint is not None)
        if found and found.after < found.before:
            function = Chain(inner, number, draws(chain[0]))
            if joint:
                alone = _measured(inner, inputs, chain, exposed, joint=False)
                repeats = alone is not None and alone.after < alone.before
                _read_by_joint(joint, chain, inputs, LinearsOf(function, repeats), found)
            else:
                _replace(chain, inputs, function, found)


# ---- chains -------------------------------------------------------------------------------------


def _chains(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yield chains of ops, in graph order, of which only the last one is read.

    One that ends in the input of a joint op may have a single op, and views and norms in it.
    """
    ends: dict[fx.Node, fx.Node] = {}  # the last op of each op's chain, or the joint op after it
    for node in reversed(list(graph.nodes)):
        found = {ends.get(user) for user in node.users}
        end = found.pop() if len(found) == 1 else None
        if _is_joint(node):
            ends[node] = node
        elif end and _is_joint(end) and (end not in node.users or _is_input_only(node, end)):
            if _is_elementwise(node) or _is_cheap(node):
                ends[node] = end
        elif _is_elementwise(node):
            ends[node] = node if end is None or _is_joint(end) else end
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in ends and not _is_joint(node):
            chains.setdefault(ends[node], []).append(node)
    yield from (chain for end, chain in chains.items() if len(chain) > 1 or _is_joint(end))


def _joint_of(chain: list[fx.Node]) -> fx.Node | None:
    """Return the joint op whose x a chain computes, and nothing else; or None."""
    (reader, *others) = chain[-1].users
    return (
        reader if not others and _is_joint(reader) and _is_input_only(chain[-1], reader) else None
    )


def _is_joint(node: fx.Node) -> bool:
    return node.target is torch.ops.fxlora.linears.default


def _is_input_only(node: fx.Node, joint: fx.Node) -> bool:
    """Whether a joint op reads a node as its x, and as nothing else."""
    x, *others = joint.args
    return node is x and node not in pytree.tree_leaves(others)


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


def _is_cheap(node: fx.Node) -> bool:
    """Whether an op takes little time beside a product: a view, a cast or a norm."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload) or ADAPTER in node.meta:
        return False
    is_view = any(value.alias_info for value in target._schema.returns)
    return not target._schema.is_mutable and (is_view or target.overloadpacket in _CHEAP)


# A norm that is not here is saved as it was.
_CHEAP = (aten.layer_norm, aten.rms_norm, aten.clone, aten._to_copy)


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
        ahead += node.all_input_nodes if _may_be_view(node) else []
    return found


def _may_be_view(node: fx.Node) -> bool:
    """Whether a result may share memory with an argument.

    The schema of an op with a decomposition for all devices does not say so: `dropout` in eval mode
    and `type_as` to the same dtype return their argument.
    """
    target = node.target
    if isinstance(target, LinearsOf):
        return False
    if not isinstance(target, OpOverload):
        return node.op == "call_function"  # an item of a tuple, or unknown
    if any(value.alias_info for value in target._schema.returns):
        return True
    decomposed = torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(), "CompositeImplicitAutograd"
    )
    known = target in _READ_OPS or target.overloadpacket in _FRESH
    return decomposed and not known and torch.Tag.pointwise not in target.tags


# Ops with a decomposition whose results have memory of their own. Of one that is not here, the
# arguments count as read for longer.
_READ_OPS = frozenset(op for (op, _), row in OPS.items() if row.kind != "einsum")
_FRESH = (
    *(torch.ops.fxlora.linears, aten.layer_norm, aten.rms_norm, aten.group_norm),
    *(aten.softmax, aten.log_softmax, aten.scaled_dot_product_attention),
)


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
    chain: list[fx.Node], inputs: list[fx.Node], function: Chain, found: Recomputed
) -> None:
    last = chain[-1]
    with last.graph.inserting_before(last):
        call = last.graph.call_function(function, tuple(inputs))
    call.meta = {**last.meta, RECOMPUTED: found}
    last.replace_all_uses_with(call)
    for node in reversed(chain):
        node.graph.erase_node(node)


def _read_by_joint(
    joint: fx.Node,
    chain: list[fx.Node],
    inputs: list[fx.Node],
    function: LinearsOf,
    found: Recomputed,
) -> None:
    """Replace a joint op by a call that has the chain in front of it in it."""
    _, *layers = joint.args
    with joint.graph.inserting_before(joint):
        call = joint.graph.call_function(function, (inputs, *layers))
    call.meta = {**joint.meta, RECOMPUTED: found, INPUT: chain[-1].meta.get("val")}
    joint.replace_all_uses_with(call)
    for node in (joint, *reversed(chain)):
        node.graph.erase_node(node)


# ---- what is saved ------------------------------------------------------------------------------


def _measured(
    inner: fx.GraphModule,
    inputs: list[fx.Node],
    chain: list[fx.Node],
    exposed: list[fx.Node],
    joint: bool,
) -> Recomputed | None:
    """Return what a chain saves on the meta device; None if that cannot be tried.

    Weights, which are there anyway, do not count. None also if it would save an `exposed` input
    that autograd does not save without it: somebody might write to it before the backward.

    Args:
        joint: whether a joint op reads the result, and saves it.
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
            result = inner(*examples)
    except Exception:  # noqa: BLE001 - an op may have no meta kernel
        return None
    if joint:
        note(result)
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
    if isinstance(value, torch.SymInt):
        return concrete_sizes([value])[0]
    if not isinstance(value, Tensor):
        return value
    made = torch.empty(concrete_sizes(value.shape), dtype=value.dtype, device="meta")
    return made.requires_grad_(value.is_floating_point() and node.op == "call_function")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same(tensor: Tensor) -> Tensor:
    return tensor
