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
        slots: (b,): the row of the stacks for each sample; -1 is the last.
        down: the stack (slots, r, in, …) of A, as the read's op takes it.
        up: the stack (slots, out, r, …) of B.
        scaling: the stack (slots,) of the scalings s.
        sizes: the numbers (in, out) of features.
        batch: where the samples are in x.
        dims: number of dimensions of x.
        gathered: marks a gathered factor, so that it is cast to the weight's dtype.
        strengths: (b,): a further factor for each sample, or None.
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
    strengths: Any = None

    @property
    def count(self) -> Any:
        """The number of samples, b."""
        return aten.sym_size.int(self.slots, 0)

    def own(self, stack: Any) -> Any:
        """Return the row of a stack for each sample: (b, …)."""
        return self.gathered(aten.index.Tensor(stack, [self.slots]))

    def scaled(self, hidden: Any, dims: int) -> Any:
        """Multiply A(x), (b, …), by s of each sample, as `Read.scaled` does by one number."""
        own = aten.index.Tensor(self.scaling, [self.slots])
        if self.strengths is not None:
            own = aten.mul.Tensor(own, self.strengths)
        own = aten.reshape.default(own, [-1] + [1] * (dims - 1))
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
    down, up = samples.own(samples.down), samples.own(samples.up)
    # (b, n, in) @ (b, in, r) -> (b, n, r)
    hidden = aten.bmm.default(samples.rows(x, dims, size_i), aten.transpose.int(down, 1, 2))
    # (b, n, r) @ (b, r, out) -> (b, n, out)
    rows = aten.bmm.default(samples.scaled(hidden, 3), aten.transpose.int(up, 1, 2))
    return samples.restored(rows, x, dims, size_o)


def looked_up(samples: Samples) -> Any:
    """Emit the branch of an embedding: (…) -> (…, dim)."""
    read, x, dims = samples.read, samples.read.x, samples.dims
    r, padding = read.rank, read.arg(2)
    # The rows of all samples' tables, without a copy of a table: (slots, r, num) -> (…, r)
    tables = aten.transpose.int(samples.down, 1, 2)
    slots = samples.batch.along(samples.slots, x, dims)
    found = samples.gathered(aten.index.Tensor(tables, [slots, x]))
    padded = aten.unsqueeze.default(aten.eq.Scalar(x, padding), -1) if padding >= 0 else None
    if padded is not None and not read.padding_trains:  # A gets no gradient there
        found = aten.masked_fill.Scalar(found, padded, 0)
    hidden = samples.scaled(samples.rows(found, dims + 1, r), 3)  # (b, n, r)
    up = aten.transpose.int(samples.own(samples.up), 1, 2)
    rows = aten.bmm.default(hidden, up)  # (b, n, r) @ (b, r, dim) -> (b, n, dim)
    branch = samples.restored(rows, found, dims + 1, samples.sizes[1])
    if padded is None or not read.padding_trains:
        return branch
    return aten.where.self(padded, aten.detach.default(branch), branch)
