"""Prove a graph for sizes of 0 and 1, which torch.export treats apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..fx.compare import same_graph_except_sizes
from ..module.contract import Dimension, InputSpec, TensorInput
from .assumptions import contract_of, drop_guards_on_small_sizes
from .examples import Example
from .kept.tensor_state import StateReads
from .mode_proof import computes_the_same
from .one_export import as_module, export_module, is_squeeze
from .run_values import Values


def allow_batch_of_one(
    model: nn.Module,
    module: fx.GraphModule,
    spec: InputSpec,
    example: Example,
    values: Values,
) -> InputSpec:
    """Allow batches of 1 in a contract if the graph is proved right for them, else exclude them.

    Each batch symbol is proved separately and, if there are several, also all of them together.
    If one proof fails, the contract allows none of them.
    """
    singles = [_cut_to_one(spec, example, {symbol}) for symbol in spec.batches()]
    if len(singles) > 1:
        singles.append(_cut_to_one(spec, example, set(spec.batches())))
    wider: InputSpec | None = spec
    for single in singles:
        wider = wider and widened_if_proved(model, module, wider, single, values)
    if wider is not None:
        return wider
    for single in singles:
        if spec.holds_for(single.args, single.kwargs):
            spec = spec.larger(spec.symbols(single.args, single.kwargs))
    return spec


def _cut_to_one(spec: InputSpec, example: Example, symbols: set[str]) -> Example:
    """Return the example's inputs with the first dimensions of these symbols cut to size 1."""
    single = {
        id(value): value[:1]
        for leaf, value in spec.pairs(example.args, example.kwargs)
        if isinstance(leaf, TensorInput)
        and leaf.dims
        and isinstance(first := leaf.dims[0], Dimension)
        and first.symbol in symbols
    }

    def cut(leaf: Any) -> Any:
        return single.get(id(leaf), leaf)

    args, kwargs = pytree.tree_map(cut, (example.args, example.kwargs))
    return Example(args, kwargs, None)


def widened_if_proved(
    model: nn.Module,
    module: fx.GraphModule,
    spec: InputSpec,
    single: Example,
    values: Values | None = None,
) -> InputSpec | None:
    """Widen a graph's contract to sizes of 0 and 1, if the graph is right for them.

    torch.export's guards against these sizes often come from a check of strides, not from the
    source; and where there is no guard, torch.export may have assumed a size larger than 1 (in a
    squeeze). The graph is right if source and graph compute the same values of these inputs; or,
    where values cannot be compared, if a static export of the inputs has the same ops on the same
    sizes.

    Args:
        model: the source model.
        module: the graph.
        spec: its contract.
        single: inputs with the sizes of 0 and 1 to allow.
        values: the values of other runs, which this proof can use.

    Returns:
        The wider contract, or None if the graph is not proved right for these inputs.
    """
    try:
        wider = spec.allowing(single.args, single.kwargs)
    except InputError:
        return None
    if wider is None or (wider == spec and not _squeezes(module.graph)):
        return wider
    if computes_the_same(model, module, single, values or Values()):
        return wider
    try:
        _, static = export_module(model, single, StateReads())
    except Exception:  # noqa: BLE001 - the source may raise anything for these inputs
        return None
    sizes = spec.symbols(single.args, single.kwargs)
    return wider if same_graph_except_sizes(module.graph, static.graph, sizes) else None


def contract_with_small_sizes(
    model: nn.Module, program: ExportedProgram, example: Example, singles: Iterable[Example]
) -> InputSpec:
    """Return a program's input contract, after it takes sizes of 0 and 1 if it is right for them.

    Args:
        model: the module that was exported.
        program: the program; guards that exclude only such sizes are taken out of it, if it is
            proved to compute the same as the module there.
        example: the inputs that it was exported with.
        singles: inputs to allow.
    """
    module = as_module(program)
    spec = contract_of(program, module, model, example)
    for single in singles:
        if spec.holds_for(single.args, single.kwargs):
            continue
        if wider := widened_if_proved(model, module, spec, single):
            items = [item for _, item in spec.pairs(single.args, single.kwargs)]
            drop_guards_on_small_sizes(program, module, spec, items)
            spec = wider
    return spec


def drop_small_guards(
    spec: InputSpec, program: ExportedProgram, singles: Iterable[Example]
) -> None:
    """Take guards out of a program that exclude small sizes which its contract allows.

    A program that was decomposed checks strides, and so these sizes, anew.

    Args:
        spec: the contract, of the program as it was before.
        program: the decomposed program; it is changed.
        singles: inputs of small sizes.
    """
    for single in singles:
        if spec.holds_for(single.args, single.kwargs):
            items = [item for _, item in spec.pairs(single.args, single.kwargs)]
            drop_guards_on_small_sizes(program, as_module(program), spec, items)


def _squeezes(graph: fx.Graph) -> bool:
    """Whether a graph has a squeeze: it drops a dimension only if its size is 1."""
    return any(is_squeeze(node) for node in graph.nodes)
