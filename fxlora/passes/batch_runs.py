"""Runs of a graph with the samples of its inputs in several orders."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..fx.calls import example_value
from ..lora.gathered import BatchDim
from ..module import CapturedModule
from ..module.contract import InputSpec
from .batch_inputs import Batch, Inputs

# Arguments of ops that draw random numbers, with the values with which they draw none.
_NO_DRAWS = {"train": False, "training": False, "dropout_p": 0.0}


@dataclass
class Facts:
    """What runs of a graph tell about the samples of a batch.

    Attributes:
        dims: where the samples are in a node; nodes without them, or of which that is not known,
            are left out.
        writers: nodes that write to a buffer, or to another tensor that calls change.
        mixed: nodes in which a sample depends on other samples of the batch, or that depend on
            the samples and do not hold them (a mean of all, or a product of all pairs).
    """

    dims: dict[fx.Node, BatchDim] = field(default_factory=dict[fx.Node, BatchDim])
    writers: set[fx.Node] = field(default_factory=set[fx.Node])
    mixed: set[fx.Node] = field(default_factory=set[fx.Node])


def trial_of(
    module: CapturedModule,
    graph: fx.Graph,
    spec: InputSpec,
    batch: Batch,
    wanted: Collection[fx.Node],
    below: int,
    sign: int,
) -> Trial:
    """Return the facts from runs on one draw of inputs; none if no inputs fit the contract."""
    trial = Trial(module=module, graph=graph, batch=batch, wanted=wanted)
    drawn = Inputs.of(graph, spec, batch, below, sign).drawn()
    if drawn is not None:
        devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(list(devices)):
            trial.run(*drawn)
    return trial


@dataclass
class Trial(Facts):
    """Facts from runs of a graph on one draw of inputs, with the samples in several orders.

    Attributes:
        known: the nodes of which it is known where the samples are, or that they are nowhere.
    """

    module: CapturedModule = field(kw_only=True)
    graph: fx.Graph = field(kw_only=True)
    batch: Batch = field(kw_only=True)
    wanted: Collection[fx.Node] = field(kw_only=True)
    known: set[fx.Node] = field(default_factory=set[fx.Node])
    left: dict[fx.Node, list[BatchDim]] = field(default_factory=dict[Any, Any])
    tells: set[fx.Node] = field(default_factory=set[fx.Node])

    def run(self, leaves: list[Any], dims: list[list[int]], count: int) -> None:
        device = next(iter(self.module.parameters())).device
        leaves = [x.to(device) if isinstance(x, Tensor) else x for x in leaves]
        first = self._values(leaves)
        values_of = {
            n: v for n, v in first.items() if not v.is_floating_point() or v.isfinite().all()
        }
        for node, value in values_of.items():
            self.left[node] = list(_candidates(node, value, self.batch, count))

        def values(order: list[int]) -> Iterator[tuple[fx.Node, Tensor, Tensor]]:
            index = torch.tensor(order, device=device)
            pairs = zip(leaves, dims, strict=True)
            given = [_reordered_input(leaf, axes, index) for leaf, axes in pairs]
            for node, value in self._values(given).items():
                if node in values_of:
                    yield node, value, index

        swap, turn = [1, 0, *range(2, count)], [*range(1, count), 0]  # generate every permutation
        for order in (swap, turn):
            for node, value, index in values(order):
                self._compare(node, values_of[node], value, index)
        self.dims = {n: self.left[n][0] for n in self.tells if len(self.left[n]) == 1}
        self.known = {*self.dims, *(n for n in self.tells if not self.left[n])}
        for changed in range(count):  # one sample, to the next one's values
            order = [*range(count)]
            order[changed] = (changed + 1) % count
            for node, value, _ in values(order):
                if self._mixes(node, values_of[node], value, changed, count):
                    self.mixed.add(node)

    def _mixes(
        self, node: fx.Node, before: Tensor, after: Tensor, changed: int, count: int
    ) -> bool:
        """Whether a change of one sample changes a value other than in that sample."""
        if node in self.dims:
            before, after = (_others(v, self.dims[node], changed, count) for v in (before, after))
        return not _same(before, after)

    def _values(self, leaves: list[Any]) -> dict[fx.Node, Tensor]:
        """Return the values of the wanted nodes in a run from the module's present state."""
        state = list(self.module.state_tensors().values())
        before = [tensor.clone() for tensor in state]
        recorder = _Recorder(self.module._view, self.graph, self.wanted, state)
        try:
            recorder.run(*leaves, enable_io_processing=False)
        finally:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        self.writers |= recorder.writers
        return recorder.found

    def _compare(self, node: fx.Node, before: Tensor, after: Tensor, order: Tensor) -> None:
        """Leave the candidates under which reordering `before` gives `after`."""
        if not _same(before, after, 8.0):
            self.tells.add(node)
        slack = _slack(before, after)
        self.left[node] = [
            dim
            for dim in self.left[node]
            if _same(_reordered(before, dim, order), after, slack=slack)
        ]


def _candidates(node: fx.Node, value: Tensor, batch: Batch, count: int) -> Iterator[BatchDim]:
    """Yield the dimensions whose size is a multiple of the batch's."""
    example, symbols = example_value(node), set(batch.symbols)
    for dim, size in enumerate(value.shape):
        symbolic = example is None or not symbols.isdisjoint(_symbols_in(example.shape[dim]))
        if not symbolic or size % count or not size:
            continue
        if size == count:
            yield BatchDim(dim)
        else:
            yield BatchDim(dim, several=True)
            yield BatchDim(dim, several=True, sample_first=False)


def sized_like(node: fx.Node, batch: Batch) -> bool:
    """Whether a dimension of a node has a size that depends on the batch's."""
    value = example_value(node)
    sizes = () if value is None else value.shape
    return any(not _symbols_in(size).isdisjoint(batch.symbols) for size in sizes)


def _symbols_in(size: Any) -> set[str]:
    return set(map(str, size.node.expr.free_symbols)) if isinstance(size, torch.SymInt) else set()


def _reordered_input(leaf: Any, dims: Sequence[int], order: Tensor) -> Any:
    for dim in dims:
        leaf = leaf.index_select(dim, order)
    return leaf


def _reordered(value: Tensor, batch: BatchDim, order: Tensor) -> Tensor:
    count, dim = len(order), batch.dim
    split = (count, -1) if batch.sample_first else (-1, count)
    at = dim if batch.sample_first else dim + 1
    return value.unflatten(dim, split).index_select(at, order).flatten(dim, dim + 1)


def _others(value: Tensor, batch: BatchDim, sample: int, count: int) -> Tensor:
    """Return a value without one of its samples."""
    split = (count, -1) if batch.sample_first else (-1, count)
    at = batch.dim if batch.sample_first else batch.dim + 1
    others = torch.tensor([n for n in range(count) if n != sample], device=value.device)
    return value.unflatten(batch.dim, split).index_select(at, others)


def _slack(before: Tensor, after: Tensor) -> float:
    """Return the rounding to allow for in values that an order of the samples changes.

    Batch norms over few samples amplify it, but not to the size of what the order changes.
    """
    if before.shape != after.shape or not before.is_floating_point() or not before.numel():
        return 0.0
    return float((before - after).abs().max()) * torch.finfo(before.dtype).eps ** 0.6


def _same(one: Tensor, other: Tensor, factor: float = 1.0, slack: float = 0.0) -> bool:
    """Whether two values are equal, but for rounding: a kernel may sum rows in another order."""
    if one.shape != other.shape or not one.is_floating_point():
        return one.shape == other.shape and torch.equal(one, other)
    if not one.numel():
        return True
    tolerance = factor * 64 * torch.finfo(one.dtype).eps
    difference = (one - other).abs().max()
    return bool(difference <= max(min(tolerance, 0.1) * one.abs().max(), slack))


class _Recorder(fx.Interpreter):
    """Runs a graph without drawing random numbers, and keeps the tensors of some nodes."""

    def __init__(
        self, module: Any, graph: fx.Graph, wanted: Collection[fx.Node], state: Sequence[Tensor]
    ) -> None:
        super().__init__(module, graph=graph)
        self.wanted, self.state = wanted, {id(tensor): tensor for tensor in state}
        self.found: dict[fx.Node, Tensor] = {}
        self.writers: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        given = [self.env[node] for node in n.all_input_nodes] if n in self.wanted else []
        # Not every op's schema says that it writes (batch_norm's does not).
        held = [(t, t.clone()) for t in given if id(t) in self.state]
        result = super().run_node(n)
        if not all(torch.equal(now, before) for now, before in held):
            self.writers.add(n)
        # Inside of a torch.vmap, a tensor is not what its nodes say, and leads nowhere outside.
        if n in self.wanted and isinstance(result, Tensor) and not is_wrapped(result):
            self.found[n] = result.clone()
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(target, OpOverload):
            args = tuple(_Quiet(a, self) if isinstance(a, fx.GraphModule) else a for a in args)
        if not isinstance(target, OpOverload) or not _draws(target):
            return super().call_function(target, args, kwargs)
        names = [argument.name for argument in target._schema.arguments]
        quiet = {name: value for name, value in _NO_DRAWS.items() if name in names}
        given = {**dict(zip(names, args, strict=False)), **kwargs, **quiet}
        result = target(**given) if "self" not in given else target(given.pop("self"), **given)
        if quiet:
            return result
        # Numbers that know nothing of the samples: a permutation of them must not pass for one.
        return pytree.tree_map_only(Tensor, torch.zeros_like, result)


class _Quiet(nn.Module):
    """A nested graph that draws no random numbers, and keeps the tensors of some nodes, either."""

    def __init__(self, graph: fx.GraphModule, around: _Recorder) -> None:
        super().__init__()
        self.graph, self.around = graph, around

    def forward(self, *args: Any) -> Any:
        recorder = _Recorder(self.graph, self.graph.graph, self.around.wanted, ())
        try:
            return recorder.run(*args)
        finally:
            self.around.found |= recorder.found


def _draws(target: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in target.tags
