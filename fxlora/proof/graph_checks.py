"""Static checks of a module's graphs."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter

from torch import fx

from ..errors import InjectError, VerificationError
from ..fx.calls import kind_of, source_line
from ..fx.compare import difference, first_difference
from ..fx.marks import ADAPTER
from ..module import CapturedModule
from ..module.program import MODES, ProgramModule, code_of
from ..passes import Inject, Remove
from ..passes.structure import Insertion, insertions
from ..tables import some
from .runs import fixed_seed


def check_code(module: CapturedModule, subject: str) -> None:
    """Raise unless the code that runs was generated from the graphs as they are now.

    Args:
        module: the module to check.
        subject: its description in the message.
    """
    if stale := _stale_graphs(module):
        raise VerificationError(
            f"code: in {subject}, the graph of {some(stale)} was edited, but the code that runs is "
            "still that from before. Call refresh() on the captured module after an edit."
        )


def _stale_graphs(module: CapturedModule) -> list[str]:
    """Return the paths of graphs that were edited after their running code was generated."""
    programs = [module, *module.runners]
    found = [
        f"'{m.program.path}'" if m.program.path else "the module" for m in programs if m.is_stale()
    ]
    nested = (
        (name, m)
        for name, m in module.named_modules()
        if isinstance(m, fx.GraphModule) and not isinstance(m, ProgramModule)
    )
    return found + [f"'{name}'" for name, m in nested if m.code != code_of(m.graph)]


def without_adapters(module: CapturedModule) -> CapturedModule:
    """Return the module without its adapters; the rest keeps its trained values.

    Raises:
        VerificationError: the graphs do not have the form that injection gives them.
    """
    try:
        return Remove(restore=False)(module).eval()
    except (AttributeError, KeyError, RuntimeError) as error:  # KeyError: a mark without an entry
        raise VerificationError(
            f"coverage: the adapters cannot be taken out of the graphs again ({error})."
        ) from error


def check_modes(module: CapturedModule, base: CapturedModule) -> CapturedModule:
    """Raise unless injection into the base gives each mode's graph, node for node.

    Then every read of an adapted weight has its adapter.

    Args:
        module: an adapted module.
        base: the same module without adapters.

    Returns:
        The result of that injection: the same graphs over other adapter tensors, with B = 0.

    Raises:
        VerificationError: the plan does not fit the base, or a graph differs; names the site.
    """
    assert module.plan is not None
    entries = tuple(dataclasses.replace(e, init="kaiming_uniform") for e in module.plan)  # B = 0
    try:
        with fixed_seed(module):
            again = Inject(dataclasses.replace(module.plan, entries=entries))(base)
    except InjectError as error:
        raise VerificationError(f"coverage: the plan does not fit the graphs: {error}") from error
    for ours, theirs in zip(module.programs, again.programs, strict=True):
        for mode in MODES:
            where = f"the {mode} graph{_of(ours.path)}"
            graph, expected = ours.graphs[mode], theirs.graphs[mode]
            if pair := first_difference(graph, expected):
                added = insertions(again, expected)
                _refuse_missing(insertions(module, graph), added, where)
                _refuse_bypass(pair, {insertion.output: insertion for insertion in added}, where)
                raise VerificationError(
                    f"modes agree: {where} is not the captured one with the plan's adapters; "
                    f"{_around(module, graph, pair[0])} it has {pair[0].format_node()} instead of "
                    f"{pair[1].format_node()}."
                )
    return again


def _refuse_missing(found: list[Insertion], expected: list[Insertion], where: str) -> None:
    """Raise if a read has no adapter; name its op and line."""
    for site, read in Counter(map(_place, expected)) - Counter(map(_place, found)):
        raise VerificationError(
            f"coverage: '{site}' is read without its adapter by {read} in {where}."
        )


def _refuse_bypass(
    pair: tuple[fx.Node, fx.Node], adapted: dict[fx.Node, Insertion], where: str
) -> None:
    """Raise if a node reads the base of an adapter instead of the adapter's output."""
    ours, theirs = pair
    for taken, expected in zip(ours.all_input_nodes, theirs.all_input_nodes, strict=False):
        if expected in adapted and ADAPTER not in taken.meta:
            raise VerificationError(
                f"coverage: '{adapted[expected].entry.site}': {_read(ours)} bypasses its adapter "
                f"in {where}."
            )


def _place(insertion: Insertion) -> tuple[str, str]:
    """Return the site of an adapter, and the op and line that read its weight."""
    users = iter(insertion.output.users)
    node = insertion.base if insertion.form == "branch" else next(users, insertion.output)
    if node.target is operator.getitem:  # a result of an op that has several
        (node,) = node.all_input_nodes
    return insertion.entry.site, _read(node)


def _read(node: fx.Node) -> str:
    """Describe a reading node: its op and, if known, its line."""
    line = source_line(node)
    return f"{kind_of(node)} at {line}" if line else kind_of(node)


def _around(module: CapturedModule, graph: fx.Graph, node: fx.Node) -> str:
    """Describe where a node is: at the first adapter whose last node does not come before it."""
    for insertion in insertions(module, graph):
        if insertion.output.graph is node.graph and not insertion.output < node:
            return f"at '{insertion.entry.site}'"
    return "after the last adapter"


def check_folded_graphs(base: CapturedModule, folded: CapturedModule) -> None:
    """Raise unless the folded graphs are the captured ones, node for node."""
    if [p.path for p in base.programs] != [p.path for p in folded.programs]:
        raise VerificationError("fold: the folded module has other regions than the captured one.")
    for before, after in zip(base.programs, folded.programs, strict=True):
        for mode in MODES:
            if found := difference(before.graphs[mode], after.graphs[mode]):
                raise VerificationError(
                    f"fold: the folded {mode} graph{_of(before.path)} is not the captured one "
                    f"node for node: {found}."
                )


def _of(path: str) -> str:
    return f" of '{path}'" if path else ""
