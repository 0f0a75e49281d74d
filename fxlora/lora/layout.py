"""Layout: how a weight is a matrix, or a stack of matrices: a role for each of its dimensions.

A low-rank pair is A (…, r, in) and B (…, out, r) with ΔW = s·BA, whatever way W is stored. As
matrices M (…, d0, d1), in the order in which W has its dimensions, ΔM = s·L·R:

    out first (linear, convolution; W is (out, in, …))   L = B     R = A
    in first  (embedding, addmm, x @ W; W is (in, out))  L = A^T   R = B^T

The functions here call aten overloads only, so they take tensors and torch.fx's proxies alike:
what is emitted into a graph and what is computed is the same text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

Shape = tuple[int, ...]

STACK, INPUT, OUTPUT, KERNEL = "e", "i", "o", "k"


@dataclass(frozen=True)
class Layout:
    """The roles of a weight's dimensions, a letter each.

    e: numbers the matrices of a stack. i: input features. o: output features. k: of a kernel; it
    goes with the dimension before it, and A and B keep it as an own dimension.

    "oi" is a linear layer's, "io" an embedding's, "oikk" a conv2d's, "iok" a conv_transpose1d's,
    "eio" that of experts read by bmm, "ioo" a projection (in, heads, features) in an einsum.
    """

    roles: str

    def __post_init__(self) -> None:
        letters = set(self.roles)
        if not {INPUT, OUTPUT} <= letters <= {STACK, INPUT, OUTPUT, KERNEL}:
            raise ValueError(f"no such layout: {self.roles!r}")

    @property
    def in_first(self) -> bool:
        """Whether the input's dimensions come before the output's."""
        return self.roles.index(INPUT) < self.roles.index(OUTPUT)

    @property
    def stacked(self) -> bool:
        return STACK in self.roles

    @property
    def swapped(self) -> Layout:
        """The same grouping of dimensions, read the other way round."""
        return Layout(self.roles.translate(str.maketrans("io", "oi")))

    def sizes(self, shape: Shape) -> tuple[Shape, int, int]:
        """Sizes of a weight's stack, rows (d0) and columns (d1)."""
        stack, first, second = self._groups()
        size = [math.prod(shape[d] for d in group) for group in (first, second)]
        return tuple(shape[d] for d in stack), size[0], size[1]

    def max_rank(self, shape: Shape) -> int:
        """The rank beyond which a low-rank pair says nothing more: min(d0, d1)."""
        return min(self.sizes(shape)[1:])

    def features(self, shape: Shape) -> tuple[int, int]:
        """Input and output features, kernels left out."""
        size = [math.prod(self._of(shape, role)) for role in (INPUT, OUTPUT)]
        return size[0], size[1]

    def kernel(self, shape: Shape) -> Shape:
        """The kernel's sizes, or ()."""
        return self._of(shape, KERNEL)

    @property
    def rank_dims(self) -> tuple[int, int]:
        """The dimension of A, and of B, that is r long."""
        kernel = self.roles.count(KERNEL)
        return -2 - kernel, -1 - kernel

    def packed(self, down: torch.Tensor, up: torch.Tensor, shape: Shape) -> tuple[Any, Any]:
        """A and B in their shapes, from (…, r, in) and (…, out, r) with kernels flat in these."""
        of_a, of_b = self.factor_shapes(shape, down.shape[-2])
        if KERNEL in self.roles and self.in_first:  # up is (out·kernel, r), B (out, r, *kernel)
            kernel = self.kernel(shape)
            stack_and_out = of_b[: -1 - len(kernel)]
            up = up.reshape(*stack_and_out, *kernel, -1).movedim(-1, len(stack_and_out))
        return down.reshape(of_a), up.reshape(of_b)

    @property
    def part_dim(self) -> int:
        """The dimension that parts of a packed weight are slices of."""
        return self.roles.index(OUTPUT)

    # ---- A and B --------------------------------------------------------------------------------

    def factor_shapes(self, shape: Shape, r: int) -> tuple[Shape, Shape]:
        """Shapes of A and B: PEFT's for what PEFT has.

        (r, in) and (out, r); in a stack (e, r, in) and (e, out, r); of a convolution
        (r, in/groups, *kernel) and (out, r, 1, …), of a transposed one (r, in, 1, …) and
        (out/groups, r, *kernel).
        """
        stack = self._of(shape, STACK)
        size_i, size_o = self.features(shape)
        kernel = self.kernel(shape)
        ones = (1,) * len(kernel)
        of_a, of_b = (ones, kernel) if self.in_first else (kernel, ones)
        return (*stack, r, size_i, *of_a), (*stack, size_o, r, *of_b)

    def transposed(self, factor: Any) -> Any:
        """A factor with its rank and its features exchanged."""
        if self.is_matrix:
            return aten.t.default(factor)
        return aten.transpose.int(factor, *self.rank_dims)

    def left_right(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The pair as L (…, d0, r) and R (…, r, d1), less the flattening of kernels."""
        return (self.transposed(a), self.transposed(b)) if self.in_first else (b, a)

    # ---- weights as matrices --------------------------------------------------------------------

    @property
    def is_matrix(self) -> bool:
        return len(self.roles) == 2

    def matrix(self, weight: Any, shape: Shape) -> Any:
        """A weight of this shape as (d0, d1), or as a stack (e, d0, d1)."""
        if self._order() != list(range(len(shape))):
            weight = aten.permute.default(weight, self._order())
        size = self._matrix_shape(shape)
        return weight if size == list(shape) else aten.reshape.default(weight, size)

    def unmatrix(self, matrix: Any, shape: Shape) -> Any:
        """The inverse of `matrix`."""
        order = self._order()
        permuted = [shape[d] for d in order]
        if permuted != self._matrix_shape(shape):
            matrix = aten.reshape.default(matrix, permuted)
        if order != list(range(len(shape))):
            matrix = aten.permute.default(matrix, [order.index(d) for d in range(len(shape))])
            matrix = aten.contiguous.default(matrix)  # a reader may take a view of it
        return matrix

    def product(self, matrix: Any, a: Any, b: Any, scaling: float, shape: Shape) -> Any:
        """M + s·L·R as one addmm or baddbmm, for M as `matrix` gives it."""
        left, right = self.left_right(a, b)
        stack, d0, d1 = self.sizes(shape)
        if KERNEL in self.roles or len(stack) > 1:
            flat = [math.prod(stack)] if stack else []
            left = aten.reshape.default(left, [*flat, d0, -1])
            right = aten.reshape.default(right, [*flat, -1, d1])
        add = aten.baddbmm.default if stack else aten.addmm.default
        return add(matrix, left, right, alpha=scaling)

    def by_output(self, matrix: Any, shape: Shape) -> Any:
        """M as (…, out, in), kernels with the inputs."""
        if not self.in_first:
            return matrix
        if KERNEL not in self.roles:
            return aten.transpose.int(matrix, -2, -1)
        size_i, size_o = self.features(shape)
        kernel = math.prod(self.kernel(shape))
        stack, order = ([-1], [0, 2, 1, 3]) if self.stacked else ([], [1, 0, 2])
        apart = aten.reshape.default(matrix, [*stack, size_i, size_o, kernel])
        turned = aten.permute.default(apart, order)
        return aten.reshape.default(turned, [*stack, size_o, size_i * kernel])

    def per_output(self, factor: Any, shape: Shape) -> Any:
        """A factor (…, out) as what M can be multiplied with."""
        if not self.in_first:
            return aten.unsqueeze.default(factor, -1)
        if KERNEL in self.roles:
            kernel = math.prod(self.kernel(shape))
            factor = aten.repeat_interleave.self_int(factor, kernel, -1)
        return aten.unsqueeze.default(factor, -2)

    # ---- dimensions -----------------------------------------------------------------------------

    def _groups(self) -> tuple[list[int], list[int], list[int]]:
        """The dimensions of the stack, of the rows and of the columns."""
        joined, before = "", ""
        for role in self.roles:
            before = role if role != KERNEL else before
            joined += before
        stack, inputs, outputs = ([d for d, j in enumerate(joined) if j == r] for r in "eio")
        return (stack, inputs, outputs) if self.in_first else (stack, outputs, inputs)

    def _order(self) -> list[int]:
        return [d for group in self._groups() for d in group]

    def _matrix_shape(self, shape: Shape) -> list[int]:
        stack, d0, d1 = self.sizes(shape)
        return [math.prod(stack), d0, d1] if stack else [d0, d1]

    def _of(self, shape: Shape, role: str) -> Shape:
        return tuple(size for size, mine in zip(shape, self.roles, strict=True) if mine == role)


def plain(dims: int, in_first: bool, kernel: int = 0) -> Layout:
    """A matrix in the last dimensions, with a kernel behind it, and a stack in those before."""
    kernel = kernel if kernel + 2 <= dims else 0
    matrix = INPUT + OUTPUT if in_first else OUTPUT + INPUT
    return Layout(STACK * (dims - 2 - kernel) + matrix + KERNEL * kernel)
