"""Autocast is the caller's: prove that a graph does under it what its source does.

torch.export evaluates every dtype that the source reads from a tensor, and every branch on one,
without autocast. So for each autocast that a caller may use, the source and its graph both run on
fake tensors, and must compute the same values (`values.py`). Where they do not, the source is
exported under that autocast too: a constant that differs between the two graphs becomes a choice by
the caller's autocast. Then the proof is tried again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import _compiling_state_context
from torch.amp.autocast_mode import is_autocast_available
from torch.utils import _pytree as pytree

from ..fx.autocast import Context, by_autocast, current_autocast
from ..fx.nested import nested_graph
from ..module.autocast import Autocasts
from .examples import Example
from .values import Run, Unknown, Values

_HALF = (torch.bfloat16, torch.float16)  # any other dtype of autocast is refused at the call
_caller: list[Context] = []  # a stack: the capture in progress is last


@contextmanager
def callers_autocast() -> Generator[None]:
    """Within the context, remember the caller's autocast, which a capture suspends."""
    _caller.append(current_autocast())
    try:
        yield
    finally:
        _caller.pop()


def wanted() -> Context:
    """Return the autocast that the caller of the capture is in, or ()."""
    return _caller[-1] if _caller else ()


@contextmanager
def under(context: Context) -> Generator[None]:
    """Enable the autocast of a context."""
    with ExitStack() as stack:
        for device, dtype in context:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield


@contextmanager
def inside_autocast(model: nn.Module, context: Context) -> Generator[None]:
    """Within the context, a model's forward runs under an autocast, as a region of its graph."""
    forward = model.forward
    own = model.__dict__.get("forward")

    @functools.wraps(forward)
    def region(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for device, dtype in context:
                stack.enter_context(torch.autocast(device, dtype))
            return forward(*args, **kwargs)

    model.__dict__["forward"] = region
    try:
        with under(context):
            yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def remove_metadata_assertions(module: fx.GraphModule) -> None:
    """Remove torch.export's assertions that a tensor that is cast has the dtype of the capture.

    They compute nothing, and under autocast the dtype may be another.
    """
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            target = torch.ops.aten._assert_tensor_metadata.default
            for node in inner.graph.find_nodes(op="call_function", target=target):
                inner.graph.erase_node(node)
            inner.recompile()


# ---- the proof ----------------------------------------------------------------------------------


@dataclass
class Proof:
    """The proof for one mode's graph.

    Attributes:
        model: the source, in that mode.
        module: its graph, which a repair changes in place.
        example: the inputs that it was exported with.
        export: exports the source again, under the current autocast.
        values: shared by all proofs of a capture.
    """

    model: nn.Module
    module: fx.GraphModule
    example: Example
    export: Callable[[], fx.GraphModule]
    values: Values
    _expected: dict[Context, Any] = field(default_factory=dict[Context, Any])

    def autocasts(self) -> Autocasts:
        """Return the autocasts that the graph holds for, and why it does not for others."""
        differs = {context: why for context in self._contexts() if (why := self._differs(context))}
        if any(not isinstance(why, str) for why in differs.values()):
            differs = self._after_repair(differs)
        proved = tuple(context for context in self._contexts() if context not in differs)
        return Autocasts(proved, tuple((c, self._told(c, why)) for c, why in differs.items()))

    def _after_repair(self, differs: dict[Context, Any]) -> dict[Context, Any]:
        graphs: dict[Context, fx.GraphModule] = {}
        for context in differs:
            try:
                with under(context):
                    graphs[context] = self.export()
            except Exception:  # noqa: BLE001, PERF203 - then the graph is refused there
                continue
        if graphs and choose_constants(self.module, graphs):
            return {context: why for context in differs if (why := self._differs(context))}
        return differs

    def _contexts(self) -> list[Context]:
        held = (*self.model.parameters(), *self.model.buffers())
        given = pytree.tree_leaves((self.example.args, self.example.kwargs))
        tensors = [value for value in (*held, *given) if isinstance(value, torch.Tensor)]
        devices = dict.fromkeys(tensor.device.type for tensor in tensors)
        usable = [device for device in devices if is_autocast_available(device)]
        return [((device, dtype),) for device in usable for dtype in _HALF]

    def _differs(self, context: Context) -> Any:
        """Return None if graph and source compute the same, else why not: words, or the run."""
        try:
            if context not in self._expected:
                self._expected[context] = self._run(self.model, context)
            expected, run = self._expected[context]
            found, own = self._run(self.module, context)
        except Exception as error:  # noqa: BLE001 - the source may raise anything
            told = str(error) if isinstance(error, Unknown) else f"{type(error).__name__}: {error}"
            return f"they cannot be compared ({told.strip().splitlines()[0] if told else told})"
        return None if found == expected else (run, own)

    def _run(self, call: Callable[..., Any], context: Context, locate: int = -1) -> Any:
        run = Run(self.values, locate)
        with under(context), _compiling_state_context():
            return run.of(call, self.example.args, self.example.kwargs), run

    def _told(self, context: Context, why: Any) -> str:
        """Return the first op of the source that the graph does not do, with its line."""
        if isinstance(why, str):
            return why
        run, own = why
        done = {made for made, _ in own.ops}
        missing = (n for n, (made, real) in enumerate(run.ops) if real and made not in done)
        number = next(missing, None)
        if number is None:
            return "they return different results"
        _, again = self._run(self.model, context, number)
        func = run.ops[number][0].made[0]
        return f"{again.place or type(self.model).__name__}: {func} differs"


# ---- the repair ---------------------------------------------------------------------------------


def choose_constants(module: fx.GraphModule, others: dict[Context, fx.GraphModule]) -> bool:
    """Replace the constants that differ in other graphs of the source by choices, in place.

    Args:
        module: the graph without autocast.
        others: the graphs that torch.export made under autocasts of one device.

    Returns:
        Whether the graphs differ in nothing else.
    """
    device = next(iter(others))[0][0]
    graphs = {context[0][1]: other for context, other in others.items()}
    pairs = list(_aligned(module, graphs))
    if any(pair is None for pair in pairs):
        return False
    for owner, node, same in filter(None, pairs):
        _choose(owner, node, same, device)
    for inner in module.modules():
        if isinstance(inner, fx.GraphModule):
            inner.recompile()
    return True


_Same = dict[torch.dtype, tuple[fx.GraphModule, fx.Node]]


def _aligned(
    module: fx.GraphModule, others: dict[torch.dtype, fx.GraphModule]
) -> Iterator[tuple[fx.GraphModule, fx.Node, _Same] | None]:
    """Yield each node with the nodes at its place in the other graphs; None if there are none."""
    nodes = list(module.graph.nodes)
    theirs = {dtype: list(other.graph.nodes) for dtype, other in others.items()}
    if any(len(found) != len(nodes) for found in theirs.values()):
        yield None
        return
    for index, node in enumerate(nodes):
        same = {dtype: (others[dtype], theirs[dtype][index]) for dtype in others}
        if any((n.op, n.name) != (node.op, node.name) for _, n in same.values()):
            yield None
            return
        inner = {dtype: nested_graph(n, owner) for dtype, (owner, n) in same.items()}
        if mine := nested_graph(node, module):
            graphs = {dtype: graph for dtype, graph in inner.items() if graph}
            yield from _aligned(mine, graphs)
        else:
            yield module, node, same


def _choose(owner: fx.GraphModule, node: fx.Node, same: _Same, device: str) -> None:
    if node.op == "get_attr":
        _choose_tensor(owner, node, same, device)
    elif node.op == "call_function":
        mine, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
        theirs = {d: pytree.tree_leaves((n.args, dict(n.kwargs))) for d, (_, n) in same.items()}
        if any(len(leaves) != len(mine) for leaves in theirs.values()):
            return
        new = [
            _choice(node, leaf, {dtype: leaves[i] for dtype, leaves in theirs.items()}, device)
            for i, leaf in enumerate(mine)
        ]
        if any(a is not b for a, b in zip(mine, new, strict=True)):
            node.args, node.kwargs = pytree.tree_unflatten(new, structure)


def _choice(node: fx.Node, leaf: Any, theirs: dict[torch.dtype, Any], device: str) -> Any:
    """Return a constant argument, or a node that chooses it where the others have another."""
    if isinstance(leaf, fx.Node) or all(type(o) is type(leaf) and o == leaf for o in theirs.values()):
        return leaf
    with node.graph.inserting_before(node):
        chosen = node.graph.call_function(by_autocast, (device, leaf, *theirs.items()))
    chosen.meta = {**node.meta, "val": leaf}
    return chosen


def _choose_tensor(owner: fx.GraphModule, node: fx.Node, same: _Same, device: str) -> None:
    """Choose between the constant tensors that the graphs fetch, if they differ."""
    mine = _fetched(owner, node)
    theirs = {dtype: _fetched(module, other) for dtype, (module, other) in same.items()}
    if isinstance(mine, nn.Parameter) or all(_equal(mine, other) for other in theirs.values()):
        return
    users = list(node.users)
    nodes: list[tuple[torch.dtype, fx.Node]] = []
    after = node
    for dtype, value in theirs.items():
        name = f"{str(node.target).replace('.', '_')}_{str(dtype).rpartition('.')[2]}"
        owner.register_buffer(name, value, persistent=False)
        with node.graph.inserting_after(after):
            after = node.graph.get_attr(name)
        after.meta = {**node.meta, "val": value}
        nodes.append((dtype, after))
    with node.graph.inserting_after(after):
        chosen = node.graph.call_function(by_autocast, (device, node, *nodes))
    chosen.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, chosen)


def _fetched(owner: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or (a.is_meta and b.is_meta):
        return True
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))

