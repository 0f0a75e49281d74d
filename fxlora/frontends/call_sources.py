"""Export a model for several calls, in as few graphs as hold for all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..fx.compare import same_graph_except_sizes
from ..module.example_calls import Call
from ..module.program import MODES
from ..tables import some
from .examples import Example, examples_for, examples_for_kind, same_but_for_sizes
from .exported import Source, export_modes
from .kept.python_state import Attribute, Unknown, holding
from .methods import called_by
from .tree import working_copy

MOST_GRAPHS = 16  # the most calls that get graphs of their own


@dataclass
class Sources:
    """The graphs of a model for the calls that were added, in the order of preference.

    Attributes:
        model: the source model.
        method: the method of it that is called.
        parts: paths of submodules whose calls to record.
        made: the graphs.
    """

    model: nn.Module
    method: str
    parts: Sequence[str]
    made: list[Source] = field(default_factory=list[Source])
    _examples: list[Call] = field(default_factory=list[Call])  # the call that each was made for

    def add(self, call: Call, others: Collection[Call], asked: Any) -> None:
        """Add graphs for a call, unless one that was made before holds for it.

        Args:
            call: the call.
            others: all calls; graphs are made dynamic for those that differ in sizes only.
            asked: the user's `dynamic_shapes` for this call, or None.

        Raises:
            CaptureError: the call has no graph, or none that a call can be told by.
        """
        held = self._first_that_holds(call)
        if held is not None and not _of_one_state(call, self._examples[held]):
            self._check_same(self.made[held], call)
        if asked is not None:
            self._make(call, examples_for(*call, asked))
        elif held is None:
            self._make_for_kind(call, [c for c in others if self._first_that_holds(c) is None])

    def _first_that_holds(self, call: Call) -> int | None:
        """Return the number of the graphs that will run a call, or None."""
        holding = (n for n, source in enumerate(self.made) if source.holds_for(*call))
        return next(holding, None)

    def _make_for_kind(self, call: Call, others: Collection[Call]) -> None:
        """Make a graph for a call, dynamic for others that differ from it in sizes."""
        self._make(call, examples_for_kind([c for c in others if _told_alike(call, c)]))
        if not self.made[-1].holds_for(*call):
            self._make(call, examples_for(*call, None))

    def _make(self, given: Call, examples: list[Example]) -> None:
        self._keep(given, self._exported(examples, self.parts))

    def _keep(self, given: Call, source: Source) -> None:
        if len(self.made) >= MOST_GRAPHS:
            raise CaptureError(
                f"{type(self.model).__name__}: the calls need more than {MOST_GRAPHS} graphs. Give "
                "one example of each kind, and dynamic_shapes for its sizes."
            )
        self.made.append(source)
        self._examples.append(given)
        if source.changes.counts and not self._is_same_with(source.changes.counts, source, given):
            raise CaptureError(
                f"{type(self.model).__name__} counts in {_listed(source.changes.counts)}, and a "
                "call depends on the count, which a graph does not know. Make it a buffer, and "
                "add to it in place."
            )

    def refuse_state_of(self, others: Sequence[Source]) -> None:
        """Raise CaptureError if a call reads an attribute that only another call assigns."""
        for source, call in zip(self.made, self._examples, strict=True):
            foreign = [other.changes for other in others if other is not source]
            left = {name for changes in foreign for name in changes.names} - source.changes.names
            unknown: dict[Attribute, Any] = dict.fromkeys(left, Unknown())
            known = [
                {name: value for name, value in changes.plain.items() if name in left}
                for changes in foreign
            ]
            if not all(
                self._is_same_with(values, source, call, if_it_raises=False)
                for values in (unknown, *known)
                if values
            ):
                raise CaptureError(
                    f"{type(self.model).__name__}.{self.method} reads {_listed(unknown)}, which "
                    "another of the captured calls assigns, and a graph does not see. Return it "
                    "from that call, and pass it to this one."
                )

    def _is_same_with(
        self,
        values: Mapping[Attribute, Any],
        source: Source,
        call: Call,
        *,
        if_it_raises: bool = True,
    ) -> bool:
        """Whether a call has the same graphs where attributes of the model have other values."""
        static = examples_for(*call, None)[-1]
        try:
            own = self._exported([static], values=values)
        except CaptureError:
            return if_it_raises
        return all(_same_graphs(source, own, mode, call) for mode in MODES)

    def _exported(
        self,
        examples: list[Example],
        parts: Sequence[str] = (),
        values: Mapping[Attribute, Any] | None = None,
    ) -> Source:
        model = working_copy(self.model)
        with holding(model, values or {}), called_by(model, self.method):
            source = export_modes(model, examples, parts=parts)
        source.method = self.method
        return source

    def _check_same(self, source: Source, call: Call) -> None:
        """Raise if the model does something else in a call that an earlier one's graphs accept."""
        if self._does_same(source, call):
            return
        raise CaptureError(
            f"{type(self.model).__name__} does something else in one of the calls than in an "
            "earlier one, and they differ in nothing that a call is told by (but in the type "
            "of a tensor, for example). Pass a constant that says which is meant."
        )

    def _does_same(self, source: Source, call: Call) -> bool:
        """Whether graphs compute the same as the model in a call."""
        static = examples_for(*call, None)[-1]
        own = self._exported([static])
        return all(_same_graphs(source, own, mode, call) for mode in MODES)


def _listed(attributes: Collection[Attribute]) -> str:
    return some(sorted(".".join(filter(None, attribute)) for attribute in attributes))


def _same_graphs(source: Source, own: Source, mode: str, call: Call) -> bool:
    """Whether the graphs for several sizes and for those of one call have the same ops."""
    spec = source.inputs[mode]
    assert spec is not None
    graphs = source.modules[mode].graph, own.modules[mode].graph
    return same_graph_except_sizes(*graphs, spec.symbols(*call))


def _told_alike(call: Call, other: Call) -> bool:
    """Whether two calls are alike in all that a contract does not tell, except for sizes."""
    leaves = zip(pytree.tree_leaves(call), pytree.tree_leaves(other), strict=False)
    return same_but_for_sizes(call, other) and all(type(a) is type(b) for a, b in leaves)


def _of_one_state(call: Call, other: Call) -> bool:
    """Whether two calls are alike in all that a forward may ask of a tensor, except for sizes.

    If not, and one graph holds for both, it is proved for both: not every read of a tensor's state
    is noted.
    """
    leaves = zip(pytree.tree_leaves(call), pytree.tree_leaves(other), strict=False)
    return _told_alike(call, other) and all(_state(a) == _state(b) for a, b in leaves)


def _state(leaf: Any) -> Any:
    """Return whether a tensor has a gradient, and its order in memory."""
    if not isinstance(leaf, torch.Tensor):
        return None
    if leaf.layout is not torch.strided or leaf.is_nested:
        return leaf.requires_grad, leaf.layout
    strides = leaf.stride()
    order = sorted(range(leaf.ndim), key=lambda axis: -strides[axis])
    return leaf.requires_grad, order, leaf.is_contiguous()
