"""Layout: how to read a weight as a matrix or a stack of matrices, by a role for each dimension.

A low-rank pair is A (…, r, in) and B (…, out, r) with ΔW = s·BA, however W is stored. A weight in
matrix form is M (…, d0, d1), with inputs and outputs in the same order as in W. Then ΔM = s·L·R:

    out first (linear, convolution; W is (out, in, …))   L = B     R = A
    in first  (embedding, addmm, x @ W; W is (in, out))  L = A^T   R = B^T

The methods that take tensors (except `with_kernels`) call aten overloads only, so they take
torch.fx's proxies too: the same code computes a value and emits the nodes that compute it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

Shape = tuple[int, ...]

STACK, INPUT, OUTPUT, KERNEL = "e", "i", "o", "k"


@dataclass(frozen=True)
class Layout:
    """The roles of a weight's dimensions, one letter per dimension.

    Attributes:
        roles: a string of the letters e (index of a matrix in a stack), i (input features), o
            (output features) and k (kernel; in matrix form it is flattened into the features that
            come later, while A and B keep a separate dimension for it). For example, "oi" is a
            linear layer, "io" an embedding, "oikk" a conv2d, "kkio" a conv2d of TensorFlow's
            weight, "iok" a conv_transpose1d, "eio" experts in a bmm, and "ioo" a projection
            (in, heads, features) in an einsum.
    """

    roles: str

    def __post_init__(self) -> None:
        letters = set(self.roles)
        if not {INPUT, OUTPUT} <= letters <= {STACK, INPUT, OUTPUT, KERNEL}:
            raise ValueError(f"no such layout: {self.roles!r}")

    @property
    def in_first(self) -> bool:
        """Whether the input dimensions come before the output dimensions."""
        return self.roles.index(INPUT) < self.roles.index(OUTPUT)

    @property
    def stacked(self) -> bool:
        return STACK in self.roles

    @property
    def swapped(self) -> Layout:
        """The layout with inputs and outputs exchanged, as between an embedding and a tied head."""
        return Layout(self.roles.translate(str.maketrans("io", "oi")))

    def sizes(self, shape: Shape) -> tuple[Shape, int, int]:
        """Return the sizes of the stack dimensions, the number of rows (d0) and columns (d1).

        Rows and columns are the features in storage order: (in, out) if `in_first`, else (out, in).
        Kernel dimensions count towards the columns.
        """
        stack, first, second = self._matrix_dims()
        size = [math.prod(shape[d] for d in group) for group in (first, second)]
        return tuple(shape[d] for d in stack), size[0], size[1]

    def max_rank(self, shape: Shape) -> int:
        """Return the largest rank that ΔW can have: min(d0, d1)."""
        return min(self.sizes(shape)[1:])

    def features(self, shape: Shape) -> tuple[int, int]:
        """Return the numbers of input and output features, without the kernel dimensions.

        The order is (in, out), however the weight is stored. A grouped weight's shape already has
        in/groups (out/groups for a transposed convolution), and so has the result.
        """
        size = [math.prod(self._of(shape, role)) for role in (INPUT, OUTPUT)]
        return size[0], size[1]

    def kernel(self, shape: Shape) -> Shape:
        """Return the kernel size, or () if there is no kernel."""
        return self._of(shape, KERNEL)

    @property
    def rank_dims(self) -> tuple[int, int]:
        """The rank dimensions of A and of B, as negative indices."""
        kernel = self.roles.count(KERNEL)
        return -2 - kernel, -1 - kernel

    def with_kernels(self, a: torch.Tensor, b: torch.Tensor, shape: Shape) -> tuple[Any, Any]:
        """Reshape A (…, r, in) and B (…, out, r), with flattened kernels, to `factor_shapes`."""
        shape_a, shape_b = self.factor_shapes(shape, a.shape[-2])
        if KERNEL in self.roles and self.in_first:  # (…, out·kernel, r) -> (…, out, r, *kernel)
            kernel = self.kernel(shape)
            stack_and_out = shape_b[: -1 - len(kernel)]
            b = b.reshape(*stack_and_out, *kernel, -1).movedim(-1, len(stack_and_out))
        return a.reshape(shape_a), b.reshape(shape_b)

    @property
    def part_dim(self) -> int:
        """The dimension along which the parts of a packed weight are slices."""
        return self.roles.index(OUTPUT)

    # ---- A and B --------------------------------------------------------------------------------

    def factor_shapes(self, shape: Shape, r: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and B, which are PEFT's where PEFT supports the layer.

        Returns:
            (r, in) and (out, r) for a matrix; (e, r, in) and (e, out, r) for a stack;
            `(r, in/groups, *kernel)` and (out, r, 1, …) for a convolution; (r, in, 1, …) and
            `(out/groups, r, *kernel)` for a transposed convolution.
        """
        stack = self._of(shape, STACK)
        size_i, size_o = self.features(shape)
        kernel = self.kernel(shape)
        ones = (1,) * len(kernel)
        kernel_a, kernel_b = (ones, kernel) if self.in_first else (kernel, ones)
        return (*stack, r, size_i, *kernel_a), (*stack, size_o, r, *kernel_b)

    def factor_dims(self, dim: int) -> tuple[int | None, int | None]:
        """Return the dimension of A, and the one of B, that a dimension of the weight is.

        An input is one of A, an output one of B, the index in a stack one of both. Both are None
        where A and B have no such dimension: a kernel is flattened, and so are several inputs.
        """
        role, stack = self.roles[dim], self.roles.count(STACK)
        if role == STACK:
            index = self.roles[:dim].count(STACK)
            return index, index
        if role == KERNEL or self.roles.count(role) > 1:
            return None, None
        return (stack + 1, None) if role == INPUT else (None, stack)

    @property
    def cut_dims(self) -> tuple[int, ...]:
        """The dimensions in which a block of the weight may be cut: its ΔW is of parts of A and B.

        They are those of the stack, and the first of the inputs and of the outputs.
        """
        first = self.roles.index(INPUT), self.roles.index(OUTPUT)
        return tuple(d for d, role in enumerate(self.roles) if role == STACK or d in first)

    def factors_of_block(
        self, a: torch.Tensor, b: torch.Tensor, start: Sequence[int], shape: Shape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parts of A and B for a block of the weight.

        Args:
            a, b: A (…, r, in) and B (…, out, r).
            start: the first index of the block in each dimension.
            shape: the shape of the block, which is the weight's except in `cut_dims`.
        """
        stack = self.roles.count(STACK)
        for index, dim in enumerate(d for d, role in enumerate(self.roles) if role == STACK):
            a, b = (factor.narrow(index, start[dim], shape[dim]) for factor in (a, b))
        a = a.narrow(stack + 1, *self._features_of_block(INPUT, start, shape))
        return a, b.narrow(stack, *self.outputs_of_block(start, shape))

    def outputs_of_block(self, start: Sequence[int], shape: Shape) -> tuple[int, int]:
        """Return the first one and the number of the outputs of a block, among all outputs."""
        return self._features_of_block(OUTPUT, start, shape)

    def _features_of_block(self, role: str, start: Sequence[int], shape: Shape) -> tuple[int, int]:
        first, *others = (d for d, mine in enumerate(self.roles) if mine == role)
        each = math.prod(shape[d] for d in others)
        return start[first] * each, shape[first] * each

    def transpose_factor(self, factor: Any) -> Any:
        """Exchange the rank dimension and the feature dimension of A or B."""
        if self.is_matrix:
            return aten.t.default(factor)
        return aten.transpose.int(factor, *self.rank_dims)

    def left_right(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return the pair as L (…, d0, r) and R (…, r, d1), with kernels not yet flattened."""
        return (self.transpose_factor(a), self.transpose_factor(b)) if self.in_first else (b, a)

    # ---- weights as matrices --------------------------------------------------------------------

    @property
    def is_matrix(self) -> bool:
        return len(self.roles) == 2

    def matrix(self, weight: Any, shape: Shape) -> Any:
        """Bring a weight of this shape into matrix form: (d0, d1), or (e, d0, d1) for a stack.

        Several stack dimensions are flattened into one.
        """
        if self._order() != list(range(len(shape))):
            weight = aten.permute.default(weight, self._order())
        size = self._matrix_shape(shape)
        return weight if size == list(shape) else aten.reshape.default(weight, size)

    def unmatrix(self, matrix: Any, shape: Shape) -> Any:
        """Bring a matrix form back into the weight's shape: the inverse of `matrix`."""
        order = self._order()
        permuted = [shape[d] for d in order]
        if permuted != self._matrix_shape(shape):
            matrix = aten.reshape.default(matrix, permuted)
        if order != list(range(len(shape))):
            matrix = aten.permute.default(matrix, [order.index(d) for d in range(len(shape))])
            matrix = aten.contiguous.default(matrix)  # an op that reads the weight may call view
        return matrix

    def add_pair(self, matrix: Any, a: Any, b: Any, scaling: float, shape: Shape) -> Any:
        """Return M + s·L·R, where M is a result of `matrix`."""
        left, right = self._operands(a, b, shape)
        multiply = aten.bmm.default if self.stacked else aten.mm.default
        # s is not the sum's alpha, which torch 2.14's Inductor leaves out when it makes an addmm of
        # a product and a sum. It scales the smaller factor.
        if scaling != 1:
            _, d0, d1 = self.sizes(shape)
            if d0 < d1:
                left = aten.mul.Tensor(left, scaling)
            else:
                right = aten.mul.Tensor(right, scaling)
        # Not a single addmm or baddbmm: autocast would compute the whole sum, M included, in half
        # precision.
        # (…, d0, r) @ (…, r, d1) -> (…, d0, d1)
        return aten.add.Tensor(matrix, multiply(left, right))

    def add_pair_in_place(
        self, matrix: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, shape: Shape
    ) -> torch.Tensor:
        """Add s·L·R to M, and return M."""
        left, right = self._operands(a, b, shape)
        add = torch.Tensor.baddbmm_ if self.stacked else torch.Tensor.addmm_
        return add(matrix, left, right, alpha=scaling)

    def _operands(self, a: Any, b: Any, shape: Shape) -> tuple[Any, Any]:
        """Return L and R as mm takes them, or bmm if there is a stack."""
        left, right = self.left_right(a, b)
        stack, d0, d1 = self.sizes(shape)
        if KERNEL in self.roles or len(stack) > 1:
            flat = [math.prod(stack)] if stack else []
            left = aten.reshape.default(left, [*flat, d0, -1])
            right = aten.reshape.default(right, [*flat, -1, d1])
        return left, right

    def outputs_first(self, matrix: Any, shape: Shape) -> Any:
        """Return M as (…, out, in), with the kernel dimensions flattened into in."""
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

    def broadcast_over_matrix(self, factor: Any, shape: Shape) -> Any:
        """Reshape a factor per output, (…, out), so that it broadcasts over M."""
        if not self.in_first:
            return aten.unsqueeze.default(factor, -1)
        if KERNEL in self.roles:
            kernel = math.prod(self.kernel(shape))
            factor = aten.repeat_interleave.self_int(factor, kernel, -1)
        return aten.unsqueeze.default(factor, -2)

    # ---- dimensions -----------------------------------------------------------------------------

    def _matrix_dims(self) -> tuple[list[int], list[int], list[int]]:
        """Return the dimensions that form the stack, the rows and the columns."""
        stack, inputs, outputs, kernel = (
            [d for d, mine in enumerate(self.roles) if mine == role]
            for role in (STACK, INPUT, OUTPUT, KERNEL)
        )
        first, second = (inputs, outputs) if self.in_first else (outputs, inputs)
        return stack, first, [*second, *kernel]

    def _order(self) -> list[int]:
        return [d for group in self._matrix_dims() for d in group]

    def _matrix_shape(self, shape: Shape) -> list[int]:
        stack, d0, d1 = self.sizes(shape)
        return [math.prod(stack), d0, d1] if stack else [d0, d1]

    def _of(self, shape: Shape, role: str) -> Shape:
        return tuple(size for size, mine in zip(shape, self.roles, strict=True) if mine == role)


def standard_layout(dims: int, in_first: bool, kernel: int = 0) -> Layout:
    """Return the layout with stack dimensions first, then the matrix, then the kernel.

    The kernel is ignored if the weight has fewer than `kernel + 2` dimensions.
    """
    kernel = kernel if kernel + 2 <= dims else 0
    matrix = INPUT + OUTPUT if in_first else OUTPUT + INPUT
    return Layout(STACK * (dims - 2 - kernel) + matrix + KERNEL * kernel)
