"""Every row of the table of ops, and reads without a row, each against the source model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule, UnsupportedOpError
from fxlora.lora.ops import OPS
from fxlora.reads.sites import find_sites

from .laws import check_laws, merged_weights, randomise
from .models import Reads, Several, skip_unless_grouped
from .typed import examples, plan_of

W = Rule("w", lora=LoraConfig(r=2, lora_alpha=3))


class Scaled(Reads):
    """Reads one weight after a scaling of x and before a tanh."""

    def __init__(
        self, function: Any, shape: tuple[int, ...], x: tuple[int, ...], roles: str
    ) -> None:
        super().__init__(function, roles, *shape)
        self.scale = nn.Parameter(torch.rand(x[-1]) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x * self.scale))


class Looks(nn.Module):
    """Looks up rows of one weight by indices."""

    subscripts: ClassVar = {"w": "io"}

    def __init__(self, function: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.function(self.w, *given))


def together(
    cases: dict[str, Any], group: Any, **how: Any
) -> Iterator[tuple[str, Any, fxlora.Entry]]:
    """Check the laws on many reads, those of one group as one model; yield the plan's entries.

    Each weight has its own output, so that the laws hold for each read by itself.
    """
    groups: dict[Any, list[str]] = {}
    for name, case in cases.items():
        groups.setdefault(group(case), []).append(name)
    for names in groups.values():
        given = cases[names[0]][2]
        model = Several(Scaled(*cases[name]) for name in names)
        x = (torch.randn(given).double(),)
        _, lora = check_laws(model, x, rules=dataclasses.replace(W, name="parts.*.w"), **how)
        for name, entry in zip(names, plan_of(lora), strict=True):
            yield name, cases[name], entry


def inputs_and_stack(case: Any) -> tuple[Any, ...]:
    """Return a key for cases that one model can hold: a stack fixes the size of its batch."""
    _, shape, x, roles = case
    return x, shape[: roles.count("e")] if roles.startswith("e") else ()


def adapted(
    function: Any,
    shape: tuple[int, ...],
    x: tuple[int, ...],
    form: str,
    roles: str,
    **how: Any,
) -> fxlora.Entry:
    """Check the laws, the form and the weight's roles on one read; return the plan's entry."""
    model = Scaled(function, shape, x, roles)
    _, lora = check_laws(model, (torch.randn(x).double(),), rules=W, **how)
    (entry,) = plan_of(lora)
    assert (entry.form, entry.layout.roles) == (form, roles), entry.reason
    return entry


# ---- every row ----------------------------------------------------------------------------------

# (spelling, shape of W, shape of x, roles of W), by op and by the weight's position
ROWS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str]] = {
    "linear 1": (F.linear, (7, 5), (3, 5), "oi"),
    "addmm 2": (lambda x, w: torch.addmm(x[0, :1], x, w), (5, 7), (3, 5), "io"),
    "mm 1": (torch.mm, (5, 7), (3, 5), "io"),
    "matmul 1": (torch.matmul, (5, 7), (2, 3, 5), "io"),
    "mm 0": (lambda x, w: torch.mm(w, x), (7, 5), (5, 3), "oi"),
    "matmul 0": (lambda x, w: w @ x, (7, 5), (2, 5, 3), "oi"),
    "bmm 1": (torch.bmm, (3, 5, 7), (3, 4, 5), "eio"),
    "bmm 0": (lambda x, w: torch.bmm(w, x), (3, 7, 5), (3, 5, 4), "eoi"),
    "baddbmm 2": (lambda x, w: torch.baddbmm(x[..., :1], x, w), (3, 5, 7), (3, 4, 5), "eio"),
    "baddbmm 1": (lambda x, w: torch.baddbmm(x[:, :1], w, x), (3, 7, 5), (3, 5, 4), "eoi"),
    "einsum 1": (lambda x, w: torch.einsum("bi,io->bo", x, w), (5, 7), (3, 5), "io"),
    "conv1d 1": (F.conv1d, (7, 5, 3), (2, 5, 8), "oik"),
    "conv2d 1": (F.conv2d, (7, 5, 3, 2), (2, 5, 8, 6), "oikk"),
    "conv3d 1": (F.conv3d, (7, 5, 3, 2, 1), (2, 5, 4, 6, 3), "oikkk"),
    "conv_transpose1d 1": (F.conv_transpose1d, (5, 7, 3), (2, 5, 8), "iok"),
    "conv_transpose2d 1": (F.conv_transpose2d, (5, 7, 3, 2), (2, 5, 4, 6), "iokk"),
    "conv_transpose3d 1": (F.conv_transpose3d, (5, 7, 3, 2, 1), (2, 5, 2, 4, 3), "iokkk"),
}
TRANSPOSED_ROWS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str]] = {
    "linear 1": (lambda x, w: F.linear(x, w.T), (5, 7), (3, 5), "io"),
    "addmm 2": (lambda x, w: torch.addmm(x[0, :1], x, w.t()), (7, 5), (3, 5), "oi"),
    "mm 1": (lambda x, w: torch.mm(x, w.t()), (7, 5), (3, 5), "oi"),
    "matmul 1": (lambda x, w: x @ w.T, (7, 5), (2, 3, 5), "oi"),
    "mm 0": (lambda x, w: torch.mm(w.t(), x), (5, 7), (5, 3), "io"),
    "matmul 0": (lambda x, w: w.T @ x, (5, 7), (2, 5, 3), "io"),
    "bmm 1": (lambda x, w: torch.bmm(x, w.mT), (3, 7, 5), (3, 4, 5), "eoi"),
    "bmm 0": (lambda x, w: torch.bmm(w.mT, x), (3, 5, 7), (3, 5, 4), "eio"),
    "baddbmm 2": (lambda x, w: torch.baddbmm(x[..., :1], x, w.mT), (3, 7, 5), (3, 4, 5), "eoi"),
    "baddbmm 1": (lambda x, w: torch.baddbmm(x[:, :1], w.mT, x), (3, 5, 7), (3, 5, 4), "eio"),
}
LOOK_UPS = {
    "embedding 0": lambda w, index: F.embedding(index, w),
    "embedding_bag 0": lambda w, index: F.embedding_bag(index, w),
}


def test_every_row_has_a_model() -> None:
    def called(rows: Any) -> set[str]:
        return {f"{overload.overloadpacket.__name__} {at}" for overload, at in rows}

    grouped = {"_grouped_mm 1"}  # has no float64: see test_grouped_products
    assert called(OPS) == {*ROWS, *LOOK_UPS, *grouped}
    turned = {key for key, row in OPS.items() if row.transposed_kind}
    assert called(turned) == {*TRANSPOSED_ROWS, *grouped}


def pefts_shapes(roles: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return PEFT's shapes of A (e, 2, in) and B (e, out, 2).

    A kernel belongs to A, or to B if the inputs come first; the other factor has one of ones.
    """
    size = dict(zip(roles, shape, strict=True))
    stack, kernel = shape[: roles.count("e")], shape[2:] if "k" in roles else ()
    ones = (1,) * len(kernel)
    of_a, of_b = (ones, kernel) if roles.startswith("io") else (kernel, ones)
    return (*stack, 2, size["i"], *of_a), (*stack, size["o"], 2, *of_b)


@pytest.mark.parametrize("row", LOOK_UPS)
def test_look_up(row: str) -> None:
    index = torch.tensor([[1, 4, 8], [0, 0, 3]])
    _, lora = check_laws(Looks(LOOK_UPS[row], (9, 5)), (index,), rules=W)
    (entry,) = plan_of(lora)
    assert (entry.form, entry.layout.roles) == ("branch", "io")
    assert (entry.op, entry.shapes) == (row.partition(" ")[0], ((2, 9), (5, 2)))


def test_rows_as_traced() -> None:
    """Captured without inputs, every row takes the branch form, too."""
    for row, _, entry in together(ROWS, lambda case: case[2], capture=fxlora.capture):
        assert entry.form == "branch", f"{row}: {entry.reason}"


@pytest.mark.parametrize("row", LOOK_UPS)
def test_look_up_as_traced(row: str) -> None:
    class One(Looks):  # the tracer needs a named argument, not *given
        def forward(self, index: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return torch.tanh(self.function(self.w, index))

    index = torch.tensor([[1, 4, 8], [0, 0, 3]])
    model = One(LOOK_UPS[row], (9, 5))
    _, lora = check_laws(model, (index,), rules=W, capture=fxlora.capture)
    (entry,) = plan_of(lora)
    assert entry.form == "branch", entry.reason


# ---- stacks -------------------------------------------------------------------------------------

STACKS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str]] = {
    "broadcast over the stack": (torch.matmul, (3, 5, 7), (4, 5), "eio"),
    "a batch before the stack": (torch.matmul, (3, 5, 7), (2, 3, 4, 5), "eio"),
    "a stack of stacks": (torch.matmul, (2, 3, 5, 7), (2, 3, 4, 5), "eeio"),
    "a stack of one": (torch.matmul, (1, 5, 7), (3, 4, 5), "eio"),
    "one of the stacks is one": (torch.matmul, (2, 1, 5, 7), (2, 3, 4, 5), "eeio"),
    "the transpose": (lambda x, w: x @ w.mT, (3, 7, 5), (2, 3, 4, 5), "eoi"),
    "transpose(1, 2)": (lambda x, w: x @ w.transpose(1, 2), (3, 7, 5), (3, 4, 5), "eoi"),
    "permute": (lambda x, w: x @ w.permute(0, 2, 1), (3, 7, 5), (3, 4, 5), "eoi"),
    "to the left": (lambda x, w: w @ x, (3, 7, 5), (2, 3, 5, 4), "eoi"),
    "to the left, transposed": (lambda x, w: w.mT @ x, (3, 5, 7), (3, 5, 4), "eio"),
    "to the left of a matrix": (lambda x, w: w @ x, (3, 7, 5), (5, 4), "eoi"),
    "4-D to the left": (lambda x, w: w @ x, (2, 3, 7, 5), (3, 5, 4), "eeoi"),
}


def test_rows_and_stacks() -> None:
    """PEFT's shapes, with an A and a B for each matrix of a stack."""
    rows = ROWS | {f"{row}, transposed": case for row, case in TRANSPOSED_ROWS.items()} | STACKS
    for row, (_, shape, _, roles), entry in together(rows, inputs_and_stack):
        assert (entry.form, entry.layout.roles) == ("branch", roles), row
        assert entry.shapes == pefts_shapes(roles, shape), row


# Reads that take the weight form. (A stack times a vector: the output has no dimension for the
# vector's length.)
VECTORS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str]] = {
    "vector @ stack": (torch.matmul, (3, 5, 7), (5,), "eio"),
    "stack @ vector": (lambda x, w: w @ x, (3, 7, 5), (5,), "eoi"),
    "baddbmm with an alpha": (
        lambda x, w: torch.baddbmm(x[..., :1], x, w, alpha=2),
        (3, 5, 7),
        (3, 4, 5),
        "eio",
    ),
    "addmm with a beta": (
        lambda x, w: torch.addmm(x[0, :1], x, w, beta=3),
        (5, 7),
        (3, 5),
        "io",
    ),
    "chosen by an index": (lambda x, w: x @ w[torch.tensor([2, 0])], (3, 5, 7), (2, 4, 5), "eio"),
    "one of a stack": (lambda x, w: x @ w[1], (3, 5, 7), (4, 5), "eio"),
    "unbound": (lambda x, w: sum(x @ m for m in w.unbind(0)), (3, 5, 7), (4, 5), "eio"),
    # as TensorFlow stores them
    "kernel, in, out": (
        lambda x, w: F.conv2d(x, w.permute(3, 2, 0, 1)),
        (3, 2, 5, 7),
        (2, 5, 8, 6),
        "kkio",
    ),
    "kernel, out, in": (
        lambda x, w: F.conv_transpose2d(x, w.permute(3, 2, 0, 1)),
        (3, 2, 7, 5),
        (2, 5, 4, 6),
        "kkoi",
    ),
    "out, kernel, in": (
        lambda x, w: F.conv1d(x, w.permute(0, 2, 1)),
        (7, 3, 5),
        (2, 5, 8),
        "oki",
    ),
    "another permutation": (lambda x, w: x @ w.permute(2, 0, 1), (5, 7, 3), (3, 4, 5), "ioe"),
}


def test_no_branch() -> None:
    for name, _, entry in together(VECTORS, lambda case: case[2]):
        assert entry.form == "weight" and entry.reason, name


@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_a_vector_and_a_matrix(shape: tuple[int, ...]) -> None:
    if len(shape) == 1:
        adapted(torch.matmul, (5, 7), shape, "branch", "io")
    else:
        adapted(lambda x, w: w @ x[0], (7, 3), (4, 3), "branch", "oi")


# ---- einsum -------------------------------------------------------------------------------------

# equation, shape of x, shape of W, roles of W
EINSUMS = {
    "bi,io->bo": ((3, 5), (5, 7), "io"),
    "bi,oi->bo": ((3, 5), (7, 5), "oi"),
    "bi, oi -> bo": ((3, 5), (7, 5), "oi"),
    "bi,io->ob": ((3, 5), (5, 7), "io"),
    "bi,io": ((3, 5), (5, 7), "io"),
    "zi,ia": ((3, 5), (5, 7), "io"),
    "ibh,hnd->ibnd": ((2, 3, 5), (5, 4, 7), "ioo"),
    "bshd,hdm->bsm": ((2, 3, 4, 5), (4, 5, 7), "iio"),
    "bsd,hkd->bhsk": ((2, 3, 5), (4, 7, 5), "ooi"),
    "bhsk,hkd->bsd": ((2, 4, 3, 5), (4, 5, 7), "iio"),
    "ebi,eio->ebo": ((4, 3, 5), (4, 5, 7), "eio"),
    "ebi,eoi->ebo": ((4, 3, 5), (4, 7, 5), "eoi"),
    "bei,ioe->beo": ((3, 4, 5), (5, 7, 4), "ioe"),
    "bei,oei->boe": ((3, 4, 5), (7, 4, 5), "oei"),
    "...i,io->...o": ((2, 3, 5), (5, 7), "io"),
    "b...i,oi->b...o": ((2, 3, 4, 5), (7, 5), "oi"),
    "...i,io": ((2, 3, 5), (5, 7), "io"),
    "bsi,io->bo": ((3, 4, 5), (5, 7), "io"),  # s is summed over
    "bhi,oi->oh": ((3, 4, 5), (7, 5), "oi"),
    "ij,jk": ((3, 5), (5, 7), "io"),
    "BI,IO->BO": ((3, 5), (5, 7), "io"),
    "abcde,efghi->abcdfghi": ((2, 1, 2, 1, 5), (5, 2, 3, 1, 2), "ioooo"),
}


def turned(equation: str) -> str:
    """Return the equation with its operands in the other order."""
    inputs, arrow, output = equation.partition("->")
    return ",".join(reversed(inputs.split(","))) + arrow + output


def x_first(equation: str) -> Any:
    return lambda x, w: torch.einsum(equation, x, w)


def w_first(equation: str) -> Any:
    return lambda x, w: torch.einsum(turned(equation), w, x)


X_FIRST = {name: (x_first(name), w, x, roles) for name, (x, w, roles) in EINSUMS.items()}
W_FIRST = {turned(name): (w_first(name), w, x, roles) for name, (x, w, roles) in EINSUMS.items()}


@pytest.mark.parametrize(
    "cases",
    [
        X_FIRST | dict([*W_FIRST.items()][::3]),
        pytest.param(W_FIRST, marks=pytest.mark.slow),
    ],
    ids=["x first, some with W first", "W first"],
)
def test_einsums(cases: Any) -> None:
    for name, (_, _, _, roles), entry in together(cases, inputs_and_stack):
        assert (entry.form, entry.layout.roles) == ("branch", roles), f"{name}: {entry.reason}"


# Einsums that a low-rank pair cannot factor, or that are not a matrix product: they take the weight
# form, which is exact as well. BA is in torch's order, where a weight has no inputs and outputs.
OTHER_EINSUMS = {
    "bi,ii->bi": ((3, 5), (5, 5)),
    "bi,io->bi": ((3, 5), (5, 7)),  # W is summed over its outputs
    "bi,jo->bijo": ((3, 5), (4, 7)),  # no input in common
    "bio,io->bio": ((3, 5, 7), (5, 7)),  # elementwise
    "bio,io->b": ((3, 5, 7), (5, 7)),
    "bii,io->bo": ((3, 5, 5), (5, 7)),  # a diagonal of x
    "bi,...io->...bo": ((3, 5), (2, 5, 7)),
}


def test_einsums_without_a_branch() -> None:
    cases = {
        name: (lambda a, w, n=name: torch.einsum(n, a, w), shape, x, "eoi"[-len(shape) :])
        for name, (x, shape) in OTHER_EINSUMS.items()
    }
    for name, _, entry in together(cases, lambda case: case[2]):
        assert entry.form == "weight" and "einsum" in entry.reason, name


def test_einsum_of_the_weight_twice() -> None:
    adapted(lambda x, w: torch.einsum("bi,ij,jk->bk", x, w, w), (5, 5), (3, 5), "weight", "oi")


def test_einsum_of_three() -> None:
    def bilinear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oij,bj->bo", x, w, x + 1)

    adapted(bilinear, (4, 5, 5), (3, 5), "weight", "eoi")


def test_einsum_of_two_weights() -> None:
    class Two(nn.Module):
        subscripts: ClassVar = {"a": "oi", "b": "io"}

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(5, 7))
            self.b = nn.Parameter(torch.randn(7, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.einsum("ij,jk->ik", self.a, self.b)

    x = (torch.randn(3, 5).double(),)
    _, lora = check_laws(Two(), x, rules=Rule("re:[ab]", lora=LoraConfig(r=2)))
    assert [entry.form for entry in plan_of(lora)] == ["weight", "weight"]


def test_einsum_of_lists() -> None:
    """The sublist format of torch.einsum."""
    adapted(lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]), (7, 5), (3, 5), "branch", "oi")


# ---- transposed convolutions --------------------------------------------------------------------


class Transposed(nn.Module):
    """A transposed convolution of each number of dimensions and groups; takes (N, 6, 5, 3, 2)."""

    kinds: ClassVar = [(dims, groups) for dims in (1, 2, 3) for groups in (1, 3)]

    def __init__(self) -> None:
        super().__init__()
        how: Any = {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}
        self.layers = nn.ModuleList(
            getattr(nn, f"ConvTranspose{dims}d")(6, 9, 3, groups=groups, **how)
            for dims, groups in self.kinds
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        given = {1: x[..., 0, 0], 2: x[..., 0], 3: x}
        return [layer(given[n]) for (n, _), layer in zip(self.kinds, self.layers, strict=True)]


@pytest.mark.parametrize("capture", [None, fxlora.capture], ids=["exported", "traced"])
def test_transposed_convolution_modules(capture: Any) -> None:
    x = (torch.randn(2, 6, 5, 3, 2).double(),)
    rules = Rule(lora=LoraConfig(r=2))
    _, lora = check_laws(Transposed(), x, rules=rules, capture=capture)
    for entry, (dims, groups) in zip(plan_of(lora), Transposed.kinds, strict=True):
        assert entry.op == f"conv_transpose{dims}d"
        assert entry.shapes[0] == (2, 6, *[1] * dims)
        assert entry.shapes[1] == (9 // groups, 2, *[3] * dims)
    for site in find_sites(fxlora.remove(lora)):
        assert (site.in_features, site.out_features) == (6, 9)


def test_a_transposed_convolution_told_its_output_size() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 5, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x, output_size=[10, 12])

    check_laws(Sized(), (torch.randn(2, 3, 4, 5).double(),), rules=Rule("up", lora=LoraConfig(r=2)))


@examples(15)
@given(
    groups=st.integers(1, 3),
    in_each=st.integers(1, 3),
    out_each=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    extra=st.integers(0, 1),
    dilation=st.integers(1, 2),
    r=st.integers(1, 3),
    dropout=st.sampled_from([0.0, 0.5]),
)
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_transposed_convolution_geometry(
    groups: int,
    in_each: int,
    out_each: int,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    extra: int,
    dilation: int,
    r: int,
    dropout: float,
) -> None:
    """Any number of groups with any r, in both forms (dropout requires the branch form)."""
    extra = min(extra, max(stride, dilation) - 1)
    sizes = (groups * in_each, groups * out_each)
    layer = nn.ConvTranspose2d(
        *sizes, kernel, stride, padding, extra, groups, dilation=dilation
    ).double()
    x = torch.randn(2, sizes[0], 4, 5).double()
    gm = fxlora.capture(layer, x)
    config = LoraConfig(r=r, lora_alpha=5, lora_dropout=dropout)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=config)))
    randomise(lora, 1.0)
    (entry,) = plan_of(lora)
    assert entry.form == "branch" or not dropout
    weight = merged_weights(layer, lora, dict(lora.named_parameters()))["weight"]
    geometry = (stride, padding, extra, groups, dilation)
    expected = F.conv_transpose2d(x, weight, layer.bias, *geometry)
    assert (expected - layer(x)).abs().max() > 0
    for module in (lora.eval(), fxlora.fold(lora).eval()):
        assert (module(x) - expected).abs().max() <= 1e-10 * expected.abs().max()


# ---- look-ups -----------------------------------------------------------------------------------

BAG = torch.tensor([1, 4, 8, 0, 0, 3, 2])
OFFSETS = torch.tensor([0, 3, 3, 5])  # the second bag is empty
BAGS: dict[str, tuple[dict[str, Any], str]] = {
    "sum": ({"mode": "sum"}, "branch"),
    "mean": ({"mode": "mean"}, "branch"),
    "max": ({"mode": "max"}, "weight"),
    "padding": ({"mode": "mean", "padding_idx": 0}, "branch"),
    "padding from the end": ({"mode": "sum", "padding_idx": -1}, "branch"),
    "padding, maximum": ({"mode": "max", "padding_idx": 0}, "weight"),
    "last offset": ({"mode": "sum", "include_last_offset": True}, "branch"),
    "frequencies": ({"mode": "sum", "scale_grad_by_freq": True}, "weight"),
}


class Bags(nn.Module):
    """Reads every bag, each for its own output."""

    def __init__(self, **bags: dict[str, Any]) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(9, 5, **how) for how in bags.values())

    def forward(
        self, index: torch.Tensor, offsets: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        return [torch.tanh(bag(index, offsets)) for bag in self.bags]


def test_embedding_bags() -> None:
    model = Bags(**{name: options for name, (options, _) in BAGS.items()})
    rules = Rule(lora=LoraConfig(r=2, lora_alpha=3))
    _, lora = check_laws(model, (BAG, OFFSETS), rules=rules)
    folded = fxlora.fold(lora)
    for entry, (name, (_, form)) in zip(plan_of(lora), BAGS.items(), strict=True):
        assert entry.form == form, (name, entry.reason)
        bag: Any = model.get_submodule(entry.site)
        assert entry.padding_idx == bag.padding_idx, name
        if (row := bag.padding_idx) is not None:
            assert torch.equal(folded.get_parameter(entry.parameter)[row], bag.weight[row]), name


def test_embedding_bag_without_offsets() -> None:
    rules = Rule(lora=LoraConfig(r=2, lora_alpha=3))
    _, lora = check_laws(Bags(one={"mode": "mean"}), (BAG[:6].reshape(2, 3),), rules=rules)
    assert [entry.form for entry in plan_of(lora)] == ["branch"]


def test_embedding_bag_with_weights() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(9, 5, mode="sum")
            self.scores = nn.Parameter(torch.randn(7))

        def forward(self, index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return self.bag(index, offsets, per_sample_weights=self.scores)

    _, lora = check_laws(Weighted(), (BAG, OFFSETS), rules=Rule("bag", lora=LoraConfig(r=2)))
    assert [entry.form for entry in plan_of(lora)] == ["branch"]


def trained(lora: fxlora.CapturedModule, *given: torch.Tensor) -> fxlora.CapturedModule:
    randomise(lora)
    lora.train()
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), 0.1, weight_decay=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        lora(*given).square().sum().backward()
        optimizer.step()
    return lora


@pytest.mark.parametrize(
    ("tied", "padding"),
    [(False, 2), (True, 2), (False, -9), pytest.param(True, -9, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("capture", ["exported", "traced"])
def test_the_padding_row_never_changes(tied: bool, padding: int, capture: str) -> None:
    """Neither training nor the fold changes it. A tied head, not adapted, keeps its weight."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 5, padding_idx=padding)
            with torch.no_grad():
                self.emb.weight[self.emb.padding_idx] = 0.7  # torch's init is zero
            self.head = nn.Linear(5, 9, bias=False)
            if tied:
                self.head.weight = self.emb.weight

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.head(self.emb(index))

    model, index = Padded().double(), torch.tensor([[1, 2, 8], [0, 0, 3]])
    row = model.emb.padding_idx
    gm = fxlora.capture(model, index if capture == "exported" else None)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("emb", lora=LoraConfig(r=2))))
    folded = fxlora.fold(trained(lora, index))
    weight = folded.get_parameter("emb.weight")
    changed = (weight != model.emb.weight).any(1)
    assert changed.tolist() == [n != row for n in range(9)]
    found = [m.eval()(index) for m in (lora, folded)]
    assert torch.allclose(*found, rtol=1e-10, atol=1e-12)
    if tied:
        assert torch.equal(folded.get_parameter("head.weight"), model.emb.weight)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"padding_idx": 3}])
def test_an_embedding_with(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(9, 5, **options))
    index = torch.tensor([[1, 4, 8], [0, 0, 3]])
    _, lora = check_laws(model, (index,), rules=Rule("0", lora=LoraConfig(r=2)))
    form = "weight" if "scale_grad_by_freq" in options else "branch"
    assert [entry.form for entry in plan_of(lora)] == [form]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(kind: type[nn.Module]) -> None:
    """With sparse=True, A and B train exactly as with dense gradients."""
    index = torch.tensor([[1, 4, 8], [0, 0, 3]])
    model = nn.Sequential(kind(9, 5, sparse=True)).double()
    dense = nn.Sequential(kind(9, 5)).double()
    dense.load_state_dict(model.state_dict())
    loras = []
    for source in (model, dense):
        torch.manual_seed(0)
        gm = fxlora.capture(source, index)
        loras.append(fxlora.inject(gm, fxlora.match(gm, Rule("0", lora=LoraConfig(r=2)))))
        trained(loras[-1], index)
    found = [fxlora.fold(lora).get_parameter("0.weight") for lora in loras]
    assert not torch.equal(found[0], model.get_parameter("0.weight"))
    assert torch.equal(*found)


def test_sparse_gradients_of_what_takes_the_weight_form() -> None:
    model = nn.Embedding(9, 5, sparse=True, scale_grad_by_freq=True)
    gm = fxlora.capture(model, torch.tensor([1, 2]))
    with pytest.raises(UnsupportedOpError, match="sparse=False"):
        fxlora.match(gm, Rule(lora=LoraConfig(r=2)))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("exported", [True, False])
def test_max_norm_is_refused(kind: type[nn.Module], exported: bool) -> None:
    model, index = nn.Sequential(kind(9, 5, max_norm=1.0)), torch.tensor([[1, 4, 8]])
    before = model.get_parameter("0.weight").detach().clone()
    gm = fxlora.capture(model, index if exported else None)
    with pytest.raises(UnsupportedOpError, match=r"max_norm=None|example inputs"):
        fxlora.match(gm, Rule("0", lora=LoraConfig(r=2)))
    assert torch.equal(model.get_parameter("0.weight"), before)


def test_the_padding_row_of_bags_counts_from_the_end() -> None:
    def bags(w: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(index, w, padding_idx=-2)

    index = torch.tensor([[1, 7, 8], [7, 0, 3]])
    gm = fxlora.capture(Looks(bags, (9, 5)).double(), (index,))
    rule = Rule("w", lora=LoraConfig(r=2, init_lora_weights="gaussian"))
    lora = fxlora.inject(gm, fxlora.match(gm, rule))
    assert plan_of(lora).entries[0].padding_idx == 7
    folded = fxlora.fold(trained(lora, index)).get_parameter("w")
    changed = (folded != gm.get_parameter("w")).any(1)
    assert changed.tolist() == [n != 7 for n in range(9)]


@pytest.mark.parametrize("exported", [True, False])
def test_the_padding_row_of_a_function_counts_from_the_end(exported: bool) -> None:
    model = Reads(lambda index, w: F.embedding(index, w, padding_idx=-2), "io", 9, 5)
    index = torch.tensor([[1, 7, 8], [7, 0, 3]])
    gm = fxlora.capture(model.double(), index if exported else None)
    lora = fxlora.inject(gm, fxlora.match(gm, W))
    folded = fxlora.fold(trained(lora, index) if exported else _stepped(lora, index))
    assert torch.equal(folded.get_parameter("w")[7], gm.get_parameter("w")[7])
    assert not torch.equal(folded.get_parameter("w")[8], gm.get_parameter("w")[8])


def _stepped(lora: fxlora.CapturedModule, index: torch.Tensor) -> fxlora.CapturedModule:
    """Train from the init, where A is zero.

    A traced plan does not know the padding row, and random values there would get no gradient.
    """
    optimizer = torch.optim.SGD(fxlora.lora_parameters(lora), 0.1)
    for _ in range(2):
        lora.train()(index).square().sum().backward()
        optimizer.step()
    return lora


# ---- reads without a row ------------------------------------------------------------------------


def test_bilinear() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Bilinear(5, 4, 7)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.both(x, y)

    given = (torch.randn(3, 5).double(), torch.randn(3, 4).double())
    for capture in (None, fxlora.capture):
        _, lora = check_laws(
            Two(), given, rules=Rule("both", lora=LoraConfig(r=2)), capture=capture
        )
        assert [entry.form for entry in plan_of(lora)] == ["weight"]


@pytest.mark.filterwarnings("ignore:.*more parameters:fxlora.FxLoraWarning")
def test_deformable_convolution() -> None:
    ops = pytest.importorskip("torchvision.ops")

    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.offset = nn.Conv2d(4, 18, 3)
            self.conv = ops.DeformConv2d(4, 6, 3, groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x, torch.tanh(self.offset(x)))

    x = (torch.randn(2, 4, 6, 5).double(),)
    _, lora = check_laws(Deformed(), x, rules=Rule("conv", lora=LoraConfig(r=2)))
    (entry,) = plan_of(lora)
    assert (entry.form, entry.layout.roles) == ("weight", "oikk")


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_chosen_for_each_token(transposed: bool) -> None:
    class Experts(nn.Module):
        subscripts: ClassVar = {"w": "eoi"}  # fxlora follows no index: A and B in torch's order

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn((3, 7, 5) if transposed else (3, 5, 7)))

        def forward(self, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
            chosen = self.w[expert]  # (tokens, 5, 7)
            if transposed:
                return torch.bmm(chosen, x.unsqueeze(-1)).squeeze(-1)
            return torch.einsum("ti,tio->to", x, chosen)

    given = (torch.randn(4, 5).double(), torch.tensor([2, 0, 0, 1]))
    _, lora = check_laws(Experts(), given, rules=W)
    (entry,) = plan_of(lora)
    assert entry.shapes[0][0] == 3  # an A and a B per expert
    assert entry.form == "weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(dtype: torch.dtype, transposed: bool) -> None:
    """torch's kernel does not support float64, so the laws are checked here, up to rounding."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.subscripts = {"w": "eoi" if transposed else "eio"}
            self.w = nn.Parameter(torch.randn((3, 24, 16) if transposed else (3, 16, 24)))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            w = self.w.transpose(-2, -1) if transposed else self.w
            return torch.nn.functional.grouped_mm(x, w, offs=ends)

    skip_unless_grouped(dtype)
    model = Grouped().to(dtype)
    given = (torch.randn(10, 16, dtype=dtype), torch.tensor([2, 7, 10], dtype=torch.int32))
    gm = fxlora.capture(model, given)
    lora = fxlora.inject(gm, fxlora.match(gm, W))
    (entry,) = plan_of(lora)
    assert (entry.form, entry.layout.roles) == ("branch", "eoi" if transposed else "eio")
    randomise(lora, 2.0)
    factors = {n: lora.get_parameter(n).detach().double() for n in entry.tensors}
    assert [f.shape for f in factors.values()] == [(3, 2, 16), (3, 24, 2)]
    weight = merged_weights(copy.deepcopy(model).double(), lora, factors)["w"]
    weight = weight.mT if transposed else weight
    rows = given[0].double().tensor_split([2, 7])
    expected = torch.cat([a @ b for a, b in zip(rows, weight, strict=True)])
    scale = expected.abs().max()
    assert (expected - model(*given)).abs().max() > 0.05 * scale
    for module in (lora.eval(), fxlora.fold(lora).eval()):
        assert (module(*given) - expected).abs().max() <= 4 * torch.finfo(dtype).eps * scale
    lora(*given).float().square().sum().backward()
    for parameter in fxlora.lora_parameters(lora):
        assert parameter.grad.flatten(1).abs().amax(1).min() > 0  # of every expert


def test_a_row_that_is_added_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row for it, a user's op takes the branch form, and is reported by the row's kind."""

    @torch.library.custom_op("fxlora_tests::product", mutates_args=())
    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w.T

    @product.register_fake
    def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], w.shape[0])

    product.register_autograd(
        lambda ctx, grad: (grad @ ctx.saved_tensors[1], grad.T @ ctx.saved_tensors[0]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    overload = torch.ops.fxlora_tests.product.default
    row = OPS[torch.ops.aten.linear.default, 1]
    monkeypatch.setitem(OPS, (overload, 1), dataclasses.replace(row, kind="product"))

    class Products(nn.Module):
        subscripts: ClassVar = {"w": "oi", "u": "oi", "v": "oi"}

        def __init__(self) -> None:
            super().__init__()
            self.w, self.u, self.v = (
                nn.Parameter(torch.randn(n)) for n in ((7, 6), (4, 5), (7, 5))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return product(product(x, self.w), product(self.u, self.v))

    x = torch.randn(3, 6, dtype=torch.float64)
    _, lora = check_laws(Products(), (x,), rules=Rule(lora=LoraConfig(r=2)))
    forms = {entry.site: (entry.op, entry.form) for entry in plan_of(lora)}
    assert forms["w"] == ("product", "branch")
    assert forms["v"] == ("product", "weight")  # u times v: two branches would omit Δu·Δv
