"""Where the samples of a batch are in the values of a graph.

A dimension holds the samples if the value is *equivariant*: reordering the samples of the inputs
reorders it in the same way, for every order. No size tells that (x.flip(0) has the same), so it is
found by running the graph: once as it is, and with the samples reordered by two permutations that
generate all others. Symbolic sizes only say which dimensions to try.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import fx, nn

from ..errors import UnsupportedOpError
from ..fx.calls import example_value
from ..fx.nested import call_of, every_call
from ..module import CapturedModule
from ..module.contract import InputSpec
from .batch_inputs import Batch
from .batch_runs import Facts, sized_like, trial_of

_INTEGERS = (64, 16, 4, 2)  # bounds to draw integers below: they may be indices of a small table


def facts_about(
    module: CapturedModule,
    graph: fx.Graph,
    spec: InputSpec,
    batch: Batch,
    wanted: Collection[fx.Node],
) -> Facts:
    """Return what is known of some nodes.

    Args:
        module: the module; its buffers are as before after the runs.
        graph: one of its graphs.
        spec: the contract of the graph.
        batch: the dimension that counts the samples.
        wanted: nodes of the graph.

    Raises:
        UnsupportedOpError: the graph runs on no random inputs that fit its contract.
    """
    facts, left, failure = Facts(), set(wanted), None
    statistics = _statistics(graph, batch)
    for below in _INTEGERS:
        if not left:
            break
        try:
            # Of two signs, so that a choice by a value (where, cond) goes both ways.
            seen = left | statistics
            trials = [trial_of(module, graph, spec, batch, seen, below, sign) for sign in (1, -1)]
            failure = None
        except (IndexError, RuntimeError, ValueError) as error:  # such as an index out of range
            failure = error
            continue
        for node in trials[0].known & trials[1].known:
            dims = [trial.dims.get(node) for trial in trials]
            if dims[0] is not None and dims[0] == dims[1]:
                facts.dims[node] = dims[0]
            elif sized_like(node, batch):
                facts.mixed.add(node)
            left.discard(node)
        for trial in trials:
            facts.writers |= trial.writers
            facts.mixed |= trial.mixed
        left = {node for node in left if example_value(node) is None or sized_like(node, batch)}
    facts.mixed |= _scaled_by(facts.mixed & statistics)
    _forget_chosen(module, graph, facts)
    if failure and left:
        raise UnsupportedOpError(
            "the graph fails on random inputs, which tell where the samples of a batch are in it: "
            f"{failure}"
        ) from failure
    return facts


_VALUES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)


def _statistics(graph: fx.Graph, batch: Batch) -> set[fx.Node]:
    """Return numbers and flags that are computed from the inputs, and have no place for samples.

    If one follows the samples, as a mean of all does, what is computed from it may mix them, though
    perhaps not for the values of a trial.
    """
    found = downstream(graph.find_nodes(op="placeholder"))
    values = {node: value for node in found if (value := example_value(node)) is not None}
    return {n for n, v in values.items() if v.dtype in _VALUES and not sized_like(n, batch)}


def _scaled_by(statistics: Collection[fx.Node]) -> set[fx.Node]:
    """Return what is computed from statistics, not by way of integers, as of counts of rows."""

    def counts(node: fx.Node) -> bool:
        value = example_value(node)
        return value is not None and value.dtype not in _VALUES

    return downstream(statistics, counts)


def _forget_chosen(module: CapturedModule, graph: fx.Graph, facts: Facts) -> None:
    """Drop what was found behind a cond or a loop: for other values, other ops run.

    There, every sample depends on what decides.
    """
    behind = _behind_choices(graph, module)
    facts.mixed |= behind
    facts.dims = {n: dim for n, dim in facts.dims.items() if n not in behind}


def _behind_choices(graph: fx.Graph, owner: nn.Module) -> set[fx.Node]:
    """Return the nodes of a graph, and of its nested graphs, that a choice by values decides."""
    behind = set[fx.Node]()
    for node in graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        if (call := call_of(node, owner)) is None:
            continue
        for nested in call.graphs:
            if call.chooses or node in behind:
                behind |= _every_node(nested)
            elif inner := _behind_choices(nested.graph, nested):
                behind |= inner
        if call.chooses or any(not behind.isdisjoint(g.graph.nodes) for g in call.graphs):
            behind.add(node)
    return behind


def _every_node(graph: fx.GraphModule) -> set[fx.Node]:
    inner = (nested.graph for call in every_call(graph.graph, graph) for nested in call.graphs)
    return {node for each in (graph.graph, *inner) for node in each.nodes}


def downstream(
    sources: Collection[fx.Node], ends: Callable[[fx.Node], bool] = lambda node: False
) -> set[fx.Node]:
    """Return the nodes that are computed from some nodes, at any distance.

    Args:
        sources: the nodes.
        ends: whether to leave out a node, and what is computed by way of it only.
    """
    found, ahead = set[fx.Node](), list(sources)
    while ahead:
        users = [user for user in ahead.pop().users if user not in found and not ends(user)]
        found.update(users)
        ahead += users
    return found
