"""Moving a captured module to another device or dtype: its graphs and its state follow."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .base import base_fingerprints, changed_fingerprints
from .casts import base_tensors, keeping_dtypes, set_casts
from .retarget import Moves, moves_of, refuse_ambiguous_casts, retarget

if TYPE_CHECKING:
    from .captured import CapturedModule

Fn = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def moving(module: CapturedModule, fn: Fn) -> Generator[Fn]:
    """Within the context, the caller moves the tensors; the rest of the module then follows.

    Args:
        module: the module.
        fn: the move that was asked for.

    Yields:
        The move to make: A, B and the parameters trained in full keep the plan's dtypes.

    Raises:
        CaptureError: a graph does not tell whether a dtype in it is that of the weights.
    """
    moves = moves_of(base_tensors(module), fn)
    nested = module.nested_graphs()
    for graph in (*module.distinct_graphs(), *(part.graph for part in nested)):
        refuse_ambiguous_casts(graph, moves)
    changed = changed_fingerprints(module)
    yield keeping_dtypes(module, fn)
    # Keep the fingerprints of weights written to before: a move must not hide that.
    module.update_state(base_fingerprints={**base_fingerprints(module), **changed})
    module.known = module.known.with_originals(fn)
    if moves:
        _follow(module, moves)


def _follow(module: CapturedModule, moves: Moves) -> None:
    """Update the graphs, the contracts and the plan, which name devices and dtypes."""
    nested = module.nested_graphs()
    for graph in (*module.distinct_graphs(), *(part.graph for part in nested)):
        retarget(graph, moves)
    for program in module.programs:
        specs = program.inputs.items()
        program.inputs = {mode: spec and spec.moved(moves) for mode, spec in specs}
        known = program.autocasts.items()
        program.autocasts = {mode: casts.moved(moves) for mode, casts in known}
    if module.known.adapters:
        weights = dict(module.named_parameters(remove_duplicate=False))
        module.known = module.known.with_plans(lambda plan: plan.over(weights))
    if module.plan is not None or module.known.routing is not None:
        set_casts(module)
    for part in nested:
        part.recompile()
    module.refresh()
