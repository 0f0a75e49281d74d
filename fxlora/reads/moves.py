"""How the ops between a weight and the op that reads it move the weight's entries.

This chain of ops is replayed on stand-ins for the weight. If its result is a view of the weight, it
runs on the meta device only. Otherwise it runs twice: on numbers that identify the entries, and on
random values for the same entries. An op moves data if and only if both runs agree on where every
entry went. No op is recognized by its name. The result of a chain that cannot be replayed is
unknown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..fx.calls import is_torch_call
from ..fx.effects import written_nodes
from ..fx.nested import Path, graph_around, operand_of
from ..lora.layout import Layout, Shape
from .replay import Replay, StandIn, Step, UnknownStepError, wide

# Weights with more entries are replayed as views only, to limit memory (60 bytes per entry).
MOST_ENTRIES = 2**26


@dataclass(frozen=True, eq=False)
class Moved:
    """Where the entries of a weight are in the tensor that a read takes as its operand.

    Attributes:
        shape: shape of the weight.
        dims: number of dimensions of the operand.
        same: whether the operand is the weight, unchanged and in its own dtype.
        transposed: whether it is the transpose of the matrix, or of each matrix of a stack.
        intact: whether the entries were only moved and cast, and not computed with.
        whole: whether the operand holds only entries of the weight, or values computed from one
            entry each.
        lines: for each dimension of the weight, the dimensions of the operand along which the
            entries' coordinates vary, and the coordinates along these.
        reached: for each dimension of the weight, the coordinates of the entries in the operand.
    """

    shape: Shape
    dims: int
    same: bool
    transposed: bool
    intact: bool
    whole: bool
    lines: tuple[tuple[frozenset[int], Tensor], ...]
    reached: tuple[Tensor, ...]

    def layout(self, read: Layout) -> Layout | None:
        """Return the weight's layout, from the layout `read` of the operand.

        A dimension of the weight has the role of the operand's dimensions along which its
        coordinates vary. None if these have several roles, or if the entries of a role are out of
        order: then the first outputs of the weight are not the first outputs of the op.
        """
        if not self.whole or len(read.roles) != self.dims:
            return None
        roles = self._along(["".join({read.roles[d] for d in dims}) for dims, _ in self.lines])
        known = all(len(role) == 1 for role in roles) and {"i", "o"} <= set(roles)
        if not known or not all(self._in_order(roles, role) for role in set(roles)):
            return None
        return Layout("".join(roles))

    def _along(self, roles: Sequence[str]) -> list[str]:
        """Fill in the roles of dimensions whose coordinate does not vary in the operand.

        A dimension of size 1 gets the role of its neighbor. From a longer dimension the operand
        has a single matrix, as from a stack.
        """
        known = next(filter(None, roles), "")
        stacked = (r or ("e" if n > 1 else "") for r, n in zip(roles, self.shape, strict=True))
        return [known := role or known for role in stacked]

    def _in_order(self, roles: Sequence[str], role: str) -> bool:
        """Whether the entries along one role have the same order as in the weight."""
        place = torch.zeros((), dtype=torch.int64)
        for size, (_, line), mine in zip(self.shape, self.lines, roles, strict=True):
            place = place * size + line if mine == role else place
        return bool((place.flatten().diff() > 0).all())


def moved(
    value: fx.Node, weight: Tensor, names: frozenset[str], owner: nn.Module, path: Path = ()
) -> Moved | None:
    """Return where a weight's entries are in a node that is computed from it; None if unknown.

    Args:
        value: the node.
        weight: the parameter; only its shape, strides and dtype matter.
        names: targets of the `get_attr` nodes that fetch the weight in the outermost graph.
        owner: the module that the outermost graph belongs to.
        path: the calls of nested graphs around the node, outermost first.
    """
    way = _OpChain(weight, names, owner)
    try:
        way.add(value, path)
        return way.viewed() or way.replayed()
    except Exception:  # noqa: BLE001 - a call raises anything for inputs that it does not support
        return None


class _OpChain:
    """The chain of ops from a weight to a read, as steps to run on stand-ins for the weight."""

    def __init__(self, weight: Tensor, names: frozenset[str], owner: nn.Module) -> None:
        self.weight, self.names, self.owner = weight, names, owner
        self.shape = tuple(weight.shape)
        self.steps: list[Step] = []
        self.constants: list[Tensor] = []
        self.numbers: dict[fx.Node, int] = {}  # 0: the weight; 1, 2, …: steps; -1, …: constants

    def add(self, node: fx.Node, path: Path) -> int:
        """Add a node and all nodes that it depends on, and return its number."""
        if node not in self.numbers:
            self.numbers[node] = self._added(node, path)
        return self.numbers[node]

    def _added(self, node: fx.Node, path: Path) -> int:
        owner = graph_around(path, node) if path else self.owner
        if node.op == "get_attr" and not path and str(node.target) in self.names:
            return 0
        if node.op == "get_attr":
            return self._constant(owner, str(node.target))
        outside = operand_of(path[-1], node) if path and node.op == "placeholder" else None
        if outside is not None:
            return self.add(outside, path[:-1])
        if not is_torch_call(node) or written_nodes(node, owner):
            raise UnknownStepError
        given = {source: self.add(source, path) for source in node.all_input_nodes}
        self.steps.append(Step(node, given))
        return len(self.steps)

    def _constant(self, owner: nn.Module, name: str) -> int:
        value: Any = owner
        for part in name.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor) or value.is_meta:
            raise UnknownStepError
        self.constants.append(value.detach())
        return -len(self.constants)

    def viewed(self) -> Moved | None:
        """Return the outcome if the last step returns a view of the weight; else None."""
        strides, dtype = self.weight.stride(), self.weight.dtype
        base = torch.empty_strided(self.shape, strides, dtype=dtype, device="meta")
        values: list[Any] = [base]
        try:
            for step in self.steps if not self.constants else ():
                values.append(step.run(values))
        except Exception:  # noqa: BLE001 - a trial raises anything: then nothing is known
            return None
        view = values[-1]
        if self.constants or not _is_view(view, base):
            return None
        inert = all(step.inert for step in self.steps)
        for order in _transpositions(len(self.shape)) if inert else ():
            if _same_view(view, base.permute(order)):
                return _permuted(self.shape, order)
        if not base.is_contiguous():  # offsets in memory are not indices of entries
            return None
        entries = torch.full((), view.storage_offset())
        for size, stride in zip(view.shape, view.stride(), strict=True):
            entries = entries.unsqueeze(-1) + torch.arange(size) * stride
        return _outcome(entries, self.shape, inert, True)

    def replayed(self) -> Moved | None:
        """Return the outcome of running the steps on stand-ins, cached by the chain of ops."""
        if self.weight.numel() > MOST_ENTRIES:
            return None
        if self.constants:  # their values matter, and are not part of the key
            return self._replayed()
        dtype, strides = self.weight.dtype, self.weight.stride()
        key = (self.shape, strides, dtype, *(step.key for step in self.steps))
        if key not in _KNOWN:
            for oldest in list(itertools.islice(_KNOWN, max(0, len(_KNOWN) - 63))):
                del _KNOWN[oldest]
            _KNOWN[key] = self._replayed()
        return _KNOWN[key]

    def _replayed(self) -> Moved | None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            replay = Replay(self.weight.numel())
            values: list[Any] = [replay.start(self.weight)]
            constants = [wide(value.cpu()) for value in reversed(self.constants)]
            for step in self.steps:
                values.append(replay.after(step, [*values, *constants]))
        last = values[-1]
        if not isinstance(last, StandIn):
            return None
        entries = torch.where(last.entry, last.names, 0.0).long() - 1
        return _outcome(entries, self.shape, last.verbatim and self._keeps_dtype(), last.intact)

    def _keeps_dtype(self) -> bool:
        """Whether the chain returns the weight's own dtype: `.double()` names none to look for."""
        values: list[Any] = [torch.empty_like(self.weight, device="meta")]
        constants = [torch.empty_like(value, device="meta") for value in reversed(self.constants)]
        try:
            for step in self.steps:
                values.append(step.run([*values, *constants]))
        except Exception:  # noqa: BLE001 - a trial raises anything: then nothing is known
            return False
        return values[-1].dtype == self.weight.dtype


_KNOWN: dict[Hashable, Moved | None] = {}


# ---- outcomes -----------------------------------------------------------------------------------


def _outcome(entries: Tensor, shape: Shape, verbatim: bool, intact: bool) -> Moved:
    """Describe where the entries of a weight are in an operand.

    Args:
        entries: for each position of the operand, the index of its entry in the flattened weight,
            or -1 if it holds no entry.
        shape: shape of the weight.
        verbatim: whether the steps only moved entries.
        intact: whether the steps only moved and cast entries.
    """
    for order in _transpositions(len(shape)) if verbatim else ():
        own = torch.arange(math.prod(shape)).reshape(shape).permute(order)
        if entries.shape == own.shape and torch.equal(entries, own):
            return _permuted(shape, order)
    of_weight = entries >= 0
    lines: list[tuple[frozenset[int], Tensor]] = []
    reached: list[Tensor] = []
    for dim, size in enumerate(shape):
        coordinate = entries // math.prod(shape[dim + 1 :]) % size
        lines.append(_line(coordinate))
        reached.append(coordinate[of_weight].unique())
    whole = bool(of_weight.all())
    held = (tuple(lines), tuple(reached))
    return Moved(shape, entries.ndim, False, False, intact, whole, *held)


def _permuted(shape: Shape, order: Sequence[int]) -> Moved:
    """Return the outcome for a weight whose dimensions are permuted to `order`."""
    behind = [len(order) - 1 - list(order).index(dim) for dim in range(len(shape))]
    lines = [
        (frozenset({list(order).index(dim)}), torch.arange(size).reshape([-1] + [1] * after))
        for dim, (size, after) in enumerate(zip(shape, behind, strict=True))
    ]
    same = list(order) == sorted(order)
    reached = tuple(torch.arange(size) for size in shape)
    return Moved(shape, len(shape), same, not same, True, True, tuple(lines), reached)


def _transpositions(dims: int) -> list[list[int]]:
    """Return the orders of dimensions of the weight itself and of its transpose."""
    own = list(range(dims))
    return [own, [*own[:-2], *reversed(own[-2:])]] if dims > 1 else [own]


def _line(coordinate: Tensor) -> tuple[frozenset[int], Tensor]:
    """Return the dimensions along which a coordinate varies, and its values along these."""
    dims = range(coordinate.ndim)
    varying = {d for d in dims if bool((coordinate != coordinate.narrow(d, 0, 1)).any())}
    for dim in set(dims) - varying:
        coordinate = coordinate.narrow(dim, 0, 1)
    return frozenset(varying), coordinate


def _is_view(value: Any, base: Tensor) -> bool:
    """Whether a value is a view of `base` in the same dtype, not negated or conjugated."""
    return (
        isinstance(value, Tensor)
        and value.dtype == base.dtype
        and not (value.is_neg() or value.is_conj())
        and value.untyped_storage()._cdata == base.untyped_storage()._cdata
    )


def _same_view(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.stride(), first.storage_offset()) == (
        second.shape,
        second.stride(),
        second.storage_offset(),
    )
