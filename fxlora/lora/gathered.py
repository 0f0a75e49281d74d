"""Branches with a low-rank pair for each sample of a batch, gathered from stacks of A and B.

Like the branches in `ops.py`, they are written in aten overloads and called on proxies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .row import Read, aten


@dataclass(frozen=True)
class BatchDim:
    """Where the samples of a batch are in a tensor.

    Attributes:
        dim: the dimension that counts the samples.
        several: whether it has several rows for each sample: (batch * k), as flattened tokens do.
        sample_first: whether these rows follow one another; else they are a batch apart.
    """

    dim: int
    several: bool = False
    sample_first: bool = True

    @property
    def plain(self) -> bool:
        """Whether it is the first dimension, with one row for each sample."""
        return self.dim == 0 and not self.several

    def along(self, values: Any, tensor: Any, dims: int) -> Any:
        """Return values (b,) in a shape that broadcasts over a tensor with this batch."""
        if self.several:
            each = aten.sym_size.int(tensor, self.dim) // aten.sym_size.int(values, 0)
            if self.sample_first:
                values = aten.repeat_interleave.self_int(values, each)
            else:
                values = aten.repeat.default(values, [each])
        return aten.reshape.default(values, [-1 if d == self.dim else 1 for d in range(dims)])


@dataclass(frozen=True)
class Samples:
    """One read, with stacks of low-rank pairs and the slot of each sample.

    Attributes:
        read: the read.
        slots: (b,), or (b, k) for a mixture: the row, or the k rows, of the stacks for each sample;
            -1 is the last.
        down: the stack (slots, r, in, …) of A, as the read's op takes it.
        up: the stack (slots, out, r, …) of B.
        scaling: the stack (slots, 1) of the scalings s.
        sizes: the numbers (in, out) of features.
        batch: where the samples are in x.
        dims: number of dimensions of x.
        gathered: marks a gathered factor, so that it is cast to the weight's dtype.
        weights: as slots: a further factor, or None.
        mixture: k, the number of rows for each sample. Their pairs are one of rank k·r: the sum of
            B_j·A_j is (B_1 … B_k)·(A_1 … A_k).
    """

    read: Read
    slots: Any
    down: Any
    up: Any
    scaling: Any
    sizes: tuple[int, int]
    batch: BatchDim
    dims: int
    gathered: Callable[[Any], Any]
    weights: Any = None
    mixture: int = 1

    @property
    def count(self) -> Any:
        """The number of samples, b."""
        return aten.sym_size.int(self.slots, 0)

    @property
    def rank(self) -> int:
        """The rank of the pair of each sample: r, or k·r."""
        return self.read.rank * self.mixture

    @property
    def own_down(self) -> Any:
        """A of each sample: (b, r, in, …)."""
        down = aten.index.Tensor(self.down, [self.slots])
        if self.mixture > 1:
            down = aten.flatten.using_ints(down, 1, 2)  # (b, k, r, in, …) -> (b, k·r, in, …)
        return self.gathered(down)

    @property
    def own_up(self) -> Any:
        """B of each sample: (b, out, r, …)."""
        up = aten.index.Tensor(self.up, [self.slots])
        if self.mixture > 1:  # (b, k, out, r, …) -> (b, out, k·r, …)
            up = aten.flatten.using_ints(aten.transpose.int(up, 1, 2), 2, 3)
        return self.gathered(up)

    def scaled(self, hidden: Any, dims: int, at: int, groups: int = 1) -> Any:
        """Multiply A(x), (b, …), by s of each sample, as `Read.scaled` does by one number.

        Args:
            hidden: A(x).
            dims: the number of its dimensions.
            at: the dimension of the ranks, which has them once for each group.
            groups: the number of groups.
        """
        own = aten.squeeze.dim(aten.index.Tensor(self.scaling, [self.slots]), -1)
        if self.weights is not None:
            own = aten.mul.Tensor(own, self.weights)
        sizes: list[Any] = [-1] + [1] * (dims - 1)
        if self.mixture > 1:  # (b, k) -> (b, groups·k·r)
            own = aten.repeat_interleave.self_int(own, self.read.rank, 1)
            own, sizes[at] = aten.repeat.default(own, [1, groups]), self.rank * groups
        own = aten.reshape.default(own, sizes)
        # s has the precision in which torch multiplies by a number, so this rounds once, too
        return aten.type_as.default(aten.mul.Tensor(hidden, own), hidden)

    def rows(self, tensor: Any, dims: int, features: int) -> Any:
        """Bring a tensor (…, features), with x's batch, to (b, n, features)."""
        if self.batch.plain and dims == 2:
            return aten.unsqueeze.default(tensor, 1)
        if self.batch.plain and dims == 3:
            return tensor
        if self._first:
            split = aten.reshape.default(tensor, [*self._split(tensor, dims), features])
            tensor = aten.permute.default(split, [*self._order(dims), -1])
        return aten.reshape.default(tensor, [self.count, -1, features])

    def restored(self, rows: Any, like: Any, dims: int, features: int) -> Any:
        """Bring (b, n, features) to the shape of `like`, but for its last dimension."""
        if self.batch.plain and dims == 2:
            return aten.squeeze.dim(rows, 1)
        if self.batch.plain and dims == 3:
            return rows
        if self._first:
            sizes, order = self._split(like, dims), self._order(dims)
            turned = aten.reshape.default(rows, [*(sizes[dim] for dim in order), features])
            back = [order.index(dim) for dim in range(len(order))]
            rows = aten.permute.default(turned, [*back, -1])
        whole = [aten.sym_size.int(like, dim) for dim in range(dims - 1)]
        return aten.reshape.default(rows, [*whole, features])

    def _split(self, tensor: Any, dims: int) -> list[Any]:
        """Return all sizes but the last; several rows of a sample get a dimension of their own."""
        sizes = [aten.sym_size.int(tensor, dim) for dim in range(dims - 1)]
        if self.batch.several:
            here = [self.count, -1] if self.batch.sample_first else [-1, self.count]
            sizes[self.batch.dim : self.batch.dim + 1] = here
        return sizes

    def _order(self, dims: int) -> list[int]:
        """Return the dimensions of `_split` with the samples first."""
        others = (d for d in range(dims - 1 + self.batch.several) if d != self._first)
        return [self._first, *others]

    @property
    def _first(self) -> int:
        """The dimension of the samples among those of `_split`."""
        return self.batch.dim + (self.batch.several and not self.batch.sample_first)


def times_weights(samples: Samples) -> Any:
    """Emit the branch of x @ W or x @ W^T: (…, in) -> (…, out)."""
    x, dims, (size_i, size_o) = samples.read.x, samples.dims, samples.sizes
    # (b, n, in) @ (b, in, r) -> (b, n, r)
    down, up = samples.own_down, samples.own_up
    hidden = aten.bmm.default(samples.rows(x, dims, size_i), aten.transpose.int(down, 1, 2))
    # (b, n, r) @ (b, r, out) -> (b, n, out)
    rows = aten.bmm.default(samples.scaled(hidden, 3, 2), aten.transpose.int(up, 1, 2))
    return samples.restored(rows, x, dims, size_o)


def looked_up(samples: Samples) -> Any:
    """Emit the branch of an embedding: (…) -> (…, dim)."""
    read, x, dims = samples.read, samples.read.x, samples.dims
    padding = read.arg(2)
    # The rows of all samples' tables, without a copy of a table: (slots, r, num) -> (…, r)
    tables = aten.transpose.int(samples.down, 1, 2)
    several = samples.mixture > 1
    each = [aten.select.int(samples.slots, 1, k) for k in range(samples.mixture)] if several else ()
    each = [samples.batch.along(slots, x, dims) for slots in each or (samples.slots,)]
    rows = [aten.index.Tensor(tables, [slots, x]) for slots in each]
    found = samples.gathered(aten.cat.default(rows, -1) if several else rows[0])
    padded = aten.unsqueeze.default(aten.eq.Scalar(x, padding), -1) if padding >= 0 else None
    if padded is not None and not read.padding_trains:  # A gets no gradient there
        found = aten.masked_fill.Scalar(found, padded, 0)
    hidden = samples.scaled(samples.rows(found, dims + 1, samples.rank), 3, 2)  # (b, n, r)
    up = aten.transpose.int(samples.own_up, 1, 2)
    outputs = aten.bmm.default(hidden, up)  # (b, n, r) @ (b, r, dim) -> (b, n, dim)
    branch = samples.restored(outputs, found, dims + 1, samples.sizes[1])
    if padded is None or not read.padding_trains:
        return branch
    return aten.where.self(padded, aten.detach.default(branch), branch)
