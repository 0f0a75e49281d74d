"""The ops that read weights, one row each. Nothing else in fxlora knows kinds of op.

A row says how its op applies a low-rank pair to its own input without forming the product: the
branch. What has no row, or an obstacle, takes the weight form. A branch is written once, in aten
overloads on torch.fx's proxies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..fx.calls import argument, example_value, flat_inputs, kind_of, named_argument, qualified_kind
from .convolutions import convolution, groups_cost_more, transposed_convolution
from .layout import INPUT, OUTPUT, STACK, Layout, Shape, plain
from .row import Op, Read, aten

# ---- matrix products ----------------------------------------------------------------------------


def _times_weight(read: Read, down: Any, up: Any) -> Any:
    """x @ W, or x @ W^T: (…, in) → (…, out)."""
    if read.layout.stacked:
        hidden = aten.matmul.default(read.x, read.layout.transposed(down))  # (…, e, n, r)
        return aten.matmul.default(read.scaled(hidden), read.layout.transposed(up))
    hidden = aten.linear.default(read.x, down)  # (…, r)
    return aten.linear.default(read.scaled(hidden), up)


def _weight_times(read: Read, down: Any, up: Any) -> Any:
    """W @ x: (…, in, n) → (…, out, n)."""
    hidden = aten.matmul.default(down, read.x)  # (…, r, n)
    return aten.matmul.default(up, read.scaled(hidden))


def _grouped_mm(read: Read, down: Any, up: Any) -> Any:
    """Rows of x in groups, each times a matrix of the stack."""
    ends = read.arg(2)
    pad = -read.rank % 8  # kernels want rows of multiples of 16 bytes
    down = aten.constant_pad_nd.default(down, [0, 0, 0, pad]) if pad else down
    up = aten.constant_pad_nd.default(up, [0, pad]) if pad else up
    turn = read.layout.transposed
    hidden = aten._grouped_mm.default(read.x, turn(down), ends)  # (n, r)
    return aten._grouped_mm.default(read.scaled(hidden), turn(up), ends)


def _grouped_mm_obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    return None if len(shape) == 3 else "groups of a matrix's own rows or columns"


def _own_alpha(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    scaled = any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
    return f"{kind_of(node)} with an alpha or beta of its own" if scaled else None


def _perhaps_vector(position: int) -> Callable[[fx.Node, fx.Node, Shape], str | None]:
    """An obstacle where a stack of matrices meets a vector, or what may be one."""

    def obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
        value = example_value(node.args[position])
        if len(shape) == 2 or (value is not None and value.ndim >= 2):
            return None
        return "a stack of matrices times a vector, as far as is known"

    return obstacle


# ---- einsum: any product of a weight and one other tensor ---------------------------------------


@dataclass(frozen=True)
class _Equation:
    """The subscripts of an einsum of an input and a weight; a "." stands for an ellipsis."""

    x: str
    weight: str
    output: str

    @classmethod
    def of(cls, node: fx.Node, weight: fx.Node) -> _Equation | None:
        text, operands = node.args[:2]
        assert isinstance(text, str) and isinstance(operands, list | tuple)
        if len(operands) != 2:
            return None
        inputs, arrow, output = text.replace(" ", "").replace("...", ".").partition("->")
        if not arrow:  # numpy's rule: what occurs once, in alphabetical order
            output = "".join(sorted(n for n in set(inputs) - {","} if inputs.count(n) == 1))
        parts = inputs.split(",")
        mine = [operand is weight for operand in operands].index(True)
        return cls(parts[1 - mine], parts[mine], output)

    @property
    def roles(self) -> str:
        return "".join(map(self._role, self.weight))

    def _role(self, letter: str) -> str:
        kept = letter in self.output
        if letter in self.x:
            return STACK if kept else INPUT
        return OUTPUT if kept else "?"

    @property
    def layout(self) -> Layout | None:
        """The weight's roles, or None where it is no product of matrices that a pair can split."""
        once = all(len(set(part)) == len(part) for part in (self.weight, self.x))
        roles = set(self.roles)
        if not once or "." in self.weight or not {INPUT, OUTPUT} <= roles <= {"e", "i", "o"}:
            return None
        return Layout(self.roles)

    def of_role(self, role: str) -> str:
        return "".join(n for n, r in zip(self.weight, self.roles, strict=True) if r == role)

    def split(self) -> tuple[str, str]:
        """The same as two products: of x and A, of that and B."""
        stack, inputs, outputs = map(self.of_role, "eio")
        used = {*self.x, *self.weight, *self.output}
        rank = next(n for n in "rzyxwvutsqponmlkjihgfedcba" if n not in used)
        hidden = "".join(n for n in self.output if n not in outputs) + rank
        first = f"{self.x},{stack}{rank}{inputs}->{hidden}"
        second = f"{hidden},{stack}{outputs}{rank}->{self.output}"
        return first.replace(".", "..."), second.replace(".", "...")


def _einsum_layout(node: fx.Node, weight: fx.Node) -> Layout | None:
    equation = _Equation.of(node, weight)
    return equation and equation.layout


def _einsum_obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    found = _einsum_layout(node, weight)
    return None if found else f"einsum '{node.args[0]}' is no product of an input and matrices"


def _einsum(read: Read, down: Any, up: Any) -> Any:
    equation = _Equation.of(read.node, read.weight)
    assert equation is not None
    size = dict(zip(equation.weight, read.shape, strict=True))
    stack, inputs, outputs = ([size[n] for n in equation.of_role(role)] for role in "eio")
    if len(inputs) > 1:
        down = aten.reshape.default(down, [*stack, -1, *inputs])
    if len(outputs) > 1:
        up = aten.reshape.default(up, [*stack, *outputs, -1])
    first, second = equation.split()
    hidden = aten.einsum.default(first, [read.x, down])
    return aten.einsum.default(second, [read.scaled(hidden), up])


# ---- look-ups -----------------------------------------------------------------------------------


def _embedding(read: Read, down: Any, up: Any) -> Any:
    # W's gradient may be sparse; A's is dense. Rows of padding_idx get none in either.
    table = read.layout.transposed(down)  # (num, r)
    rows = aten.embedding.default(table, read.x, read.arg(2))  # (…, r)
    branch = aten.linear.default(read.scaled(rows), up)  # (…, dim)
    if not read.padding_trains:
        return branch
    # A tied head moves that row: it is looked up as it is then, and B does not learn from it.
    padded = aten.unsqueeze.default(aten.eq.Scalar(read.x, read.arg(2)), -1)
    return aten.where.self(padded, aten.detach.default(branch), branch)


def _embedding_bag(read: Read, down: Any, up: Any) -> Any:
    table = read.layout.transposed(down)
    offsets, mode, weights, last = (read.arg(position) for position in (2, 4, 6, 7))
    padding = read.arg(8)
    given = (table, read.x, offsets, False, mode, False, weights, last, padding)
    bags = aten.embedding_bag.padding_idx(*given)[0]  # (bags, r)
    return aten.linear.default(read.scaled(bags), up)


def _frequencies(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    # It scales W's gradient by row, and so also what reaches B through it: no branch does that.
    return "scale_grad_by_freq" if named_argument(node, "scale_grad_by_freq") else None


def _bag_obstacle(node: fx.Node, weight: fx.Node, shape: Shape) -> str | None:
    if argument(node, 4, 0) not in (0, 1):  # sum, mean
        return "a maximum over each bag is not linear"
    return _frequencies(node, weight, shape)


def _conv_rows(dims: int) -> dict[tuple[Any, int], Op]:
    packet = getattr(aten, f"conv{dims}d")
    transposed = getattr(aten, f"conv_transpose{dims}d")
    row = Op(
        packet.__name__,
        0,
        convolution(dims),
        kernel=dims,
        costlier=groups_cost_more,
        output=-1 - dims,
        bias=2,
    )
    turned = dataclasses.replace(
        row, kind=transposed.__name__, branch=transposed_convolution(dims), in_first=True
    )
    overload = transposed.default if dims == 1 else transposed.input
    return {(packet.default, 1): row, (packet.padding, 1): row, (overload, 1): turned}


_LINEAR = Op("linear", 0, _times_weight, bias=2, turned="matmul")
_ADDMM = Op("addmm", 1, _times_weight, in_first=True, obstacle=_own_alpha, bias=0, turned="linear")
_MATMUL = Op(
    "matmul", 0, _times_weight, in_first=True, obstacle=_perhaps_vector(0), turned="linear"
)
_MATMUL_LEFT = Op(
    "matmul", 1, _weight_times, output=None, obstacle=_perhaps_vector(1), turned="matmul"
)
_BMM = Op("bmm", 0, _times_weight, in_first=True, turned="bmm")
_BMM_LEFT = Op("bmm", 1, _weight_times, output=None, turned="bmm")
_BADDBMM = Op("baddbmm", 1, _times_weight, in_first=True, obstacle=_own_alpha, turned="baddbmm")
_BADDBMM_LEFT = Op("baddbmm", 2, _weight_times, output=None, obstacle=_own_alpha, turned="baddbmm")
_GROUPED_MM = Op(
    "grouped_mm",
    0,
    _grouped_mm,
    in_first=True,
    obstacle=_grouped_mm_obstacle,
    layout=lambda node, weight: Layout("eio"),
    turned="grouped_mm",
)

# (overload, position of the weight among its arguments) → row
OPS: dict[tuple[Any, int], Op] = {
    (aten.linear.default, 1): _LINEAR,
    (aten.addmm.default, 2): _ADDMM,
    (aten.mm.default, 1): _MATMUL,
    (aten.matmul.default, 1): _MATMUL,
    (aten.mm.default, 0): _MATMUL_LEFT,
    (aten.matmul.default, 0): _MATMUL_LEFT,
    (aten.bmm.default, 1): _BMM,
    (aten.bmm.default, 0): _BMM_LEFT,
    (aten.baddbmm.default, 2): _BADDBMM,
    (aten.baddbmm.default, 1): _BADDBMM_LEFT,
    (aten._grouped_mm.default, 1): _GROUPED_MM,
    (aten.einsum.default, 1): Op(
        "einsum", 1, _einsum, obstacle=_einsum_obstacle, output=None, layout=_einsum_layout
    ),
    (aten.embedding.default, 0): Op(
        "embedding", 1, _embedding, in_first=True, obstacle=_frequencies, dropout=False
    ),
    (aten.embedding_bag.padding_idx, 0): Op(
        "embedding_bag",
        1,
        _embedding_bag,
        in_first=True,
        obstacle=_bag_obstacle,
        dropout=False,
        result=0,
    ),
    **_conv_rows(1),
    **_conv_rows(2),
    **_conv_rows(3),
}


LOOKUPS = frozenset(row.kind for row in OPS.values() if not row.dropout)


MATRIX_PRODUCTS = frozenset({"linear", "addmm", "matmul"})  # what "all-linear" takes


# Kinds without a branch whose weights are (out, in, *kernel), as torch declares them: the number of
# dimensions of the kernel.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
OUT_FIRST = {
    "torchvision.deform_conv2d": 2,
    **{f"aten.{kind}{cell}": 0 for kind in _RECURRENT for cell in ("", "_cell")},
}


def row_of(node: fx.Node, weight: fx.Node) -> Op | None:
    """The row of a call that is given a weight once."""
    positions = [i for i, given in enumerate(node.args) if _holds(given, weight)]
    uses = sum(n is weight for n in flat_inputs(node))
    if not positions or uses != 1:
        return None
    return OPS.get((node.target, positions[0]))


def layout_given(node: fx.Node, weight: fx.Node, row: Op | None, dims: int) -> Layout | None:
    """The roles of the dimensions of a tensor that a call reads as a weight; None where unknown."""
    if row:
        return row.layout_of(node, weight, dims)
    kernel = OUT_FIRST.get(qualified_kind(node))
    return plain(dims, False, kernel) if kernel is not None and dims > 1 else None


def _holds(given: Any, weight: fx.Node) -> bool:
    return given is weight or (isinstance(given, list | tuple) and any(g is weight for g in given))


def is_product(node: fx.Node) -> bool:
    """Whether a call is of an op with a row, whatever it is given."""
    return any(overload == node.target for overload, _ in OPS)  # rows may be added at run time
