"""Measure forms of one adapted layer: forward and backward, over the explicit branch's time.

"frozen" is the layer without an adapter, with the gradient of x only.

* linear layers: the joint op of `fxlora.optimize`; one layer with the weight W + s·BA
* convolutions: that weight; the branch added in place, with a backward of its own; and W and A as
  one convolution, with one gradient of x
* embeddings: the branch added in place to the rows that were looked up
* stacked experts: the adapted weights of all, and a branch of grouped products
* without gradients: a layer's output in memory that is there, as that of its x would be
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Report, Side, error, interleave, parser, start
from torch import Tensor
from torch.nn import functional as F

from fxlora.fast.linears import linears

R, S = 16, 0.5
Form = Callable[..., Tensor]
aten = torch.ops.aten

# rows, inputs, outputs: of Swin-T and ConvNeXt-T, a Llama's and GPT-2's
LINEAR = [
    *[(3136, 96, 96), (3136, 96, 288), (3136, 96, 384), (784, 192, 576), (196, 384, 1536)],
    *[(49, 768, 3072), (256, 512, 512), (256, 768, 3072), (256, 1024, 1024)],
]
# channels in and out, kernel, stride, size: those of ResNet-50
CONVOLUTION = [
    *[(64, 64, 1, 1, 56), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (256, 128, 1, 1, 56)],
    *[(128, 512, 1, 1, 28), (512, 128, 1, 1, 28), (256, 1024, 1, 1, 14)],
    *[(64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (128, 128, 3, 2, 56), (256, 256, 3, 1, 14)],
]
EMBEDDING = [(256, 50257, 768), (256, 32000, 1024)]  # tokens, rows of the table, width
EXPERTS = [(512, 4, 512, 2048), (512, 8, 1024, 2816)]  # rows, experts, inputs, outputs
IN_PLACE = [(1, 1024), (256, 1024)]  # rows, width


def main() -> None:
    options = start(parser(__doc__), rounds=25)
    report = Report(options)
    kinds: list[tuple[str, Any, Any]] = [
        ("linear: rows, in, out", LINEAR, linear_layer),
        ("convolution: in, out, kernel, stride, size", CONVOLUTION, convolution),
        ("embedding: tokens, rows, width", EMBEDDING, embedding),
        ("experts: rows, experts, in, out", EXPERTS, experts),
        ("without gradients: rows, width", IN_PLACE, in_place),
    ]
    for title, sizes, make in kinds:
        chosen = sizes[:1] if options.quick else sizes
        rows = [compare(size, make(*size), options) for size in chosen]
        report.add(f"{title}; r={R}, float32", rows)


def compare(
    size: Sequence[int],
    made: tuple[dict[str, Form], Sequence[Any], Sequence[Tensor]],
    options: argparse.Namespace,
) -> dict[str, str]:
    """Return a row, after a check that the forms are equal; the last one is the frozen layer.

    Args:
        size: the layer's sizes.
        made: its forms, what they take, and the tensors of which a gradient is wanted.
        options: of the command line.
    """
    forms, given, wanted = made

    def step(form: Form, of: Sequence[Tensor]) -> list[Tensor]:
        y = form(*given)
        return [y, *torch.autograd.grad(y, of, torch.ones_like(y))] if of else [y]

    names = list(forms)
    frozen = names.pop()
    expected = step(forms["explicit"], wanted)
    for name in names:
        gaps = [error(a, b) for a, b in zip(step(forms[name], wanted), expected, strict=True)]
        assert max(gaps) < 1e-2, f"{name} and the explicit branch differ by {max(gaps):.1e}"
    of_x = wanted[:1] if wanted and wanted[0] is given[0] else []
    sides = {
        name: Side(lambda _, f=form, n=name: step(f, of_x if n == frozen else wanted))
        for name, form in forms.items()
    }
    times = interleave(sides, options.rounds, options.device, warmup=3)
    base = times["explicit"]
    others = {n: f"{t.over(base):.2f}" for n, t in times.items() if n != "explicit"}
    return {"size": ", ".join(map(str, size)), "explicit, ms": str(base), **others}


def drawn(*shape: int, trains: bool = False) -> Tensor:
    return torch.randn(shape).requires_grad_(trains)


# ---- linear layers ------------------------------------------------------------------------------


def linear_layer(rows: int, inputs: int, outputs: int) -> Any:
    x, w, bias = drawn(1, rows, inputs, trains=True), drawn(outputs, inputs), drawn(outputs)
    a, b = drawn(R, inputs, trains=True), drawn(outputs, R, trains=True)
    forms: dict[str, Form] = {
        "explicit": lambda *_: F.linear(x, w, bias) + F.linear(F.linear(x, a) * S, b),
        "joint op": lambda *_: linears(x, [w], [bias], [a], [b], [S])[0],
        "one weight": lambda *_: F.linear(x, torch.add(w, b @ a, alpha=S), bias),
        "frozen": lambda *_: F.linear(x, w, bias),
    }
    return forms, (x,), (x, a, b)


# ---- convolutions -------------------------------------------------------------------------------


def convolution(inputs: int, outputs: int, kernel: int, stride: int, size: int) -> Any:
    x, w = drawn(1, inputs, size, size, trains=True), drawn(outputs, inputs, kernel, kernel)
    a = drawn(R, inputs, kernel, kernel, trains=True)
    b = drawn(outputs, R, 1, 1, trains=True)
    how = (stride, kernel // 2)

    def explicit(x: Tensor) -> Tensor:
        return F.conv2d(x, w, None, *how) + F.conv2d(F.conv2d(x, a, None, *how) * S, b)

    def one_weight(x: Tensor) -> Tensor:
        change = (b.flatten(1) @ a.flatten(1)).view_as(w)
        return F.conv2d(x, torch.add(w, change, alpha=S), None, *how)

    forms: dict[str, Form] = {
        "explicit": explicit,
        "one weight": one_weight,
        "in place": lambda x: InPlace.apply(x, w, a, b, *how),
        "one convolution": lambda x: OneConvolution.apply(x, w, a, b, *how),
        "frozen": lambda x: F.conv2d(x, w, None, *how),
    }
    return forms, (x,), (x, a, b)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, *how: int) -> Tensor:
        y, hidden = F.conv2d(x, w, None, *how), F.conv2d(x, a, None, *how).flatten(2)
        y.flatten(2).baddbmm_(b.flatten(1)[None], hidden, alpha=S)
        ctx.save_for_backward(x, w, a, b, hidden)
        ctx.how = how
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w, a, b, hidden = ctx.saved_tensors
        g, low, of_b = _low(grads[0], hidden, b)
        of_x, _ = _backward(g, x, w, ctx.how, (True, False))
        more, of_a = _backward(low, x, a, ctx.how, (True, True))
        return of_x.add_(more), None, of_a, of_b, None, None


class OneConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, *how: int) -> Tensor:
        both = F.conv2d(x, torch.cat([w, a]), None, *how)
        base, hidden = both.flatten(2).split([len(w), R], 1)
        ctx.save_for_backward(x, w, a, b, hidden.contiguous())
        ctx.how = how
        y = torch.baddbmm(base, b.flatten(1)[None], hidden, alpha=S)
        return y.view(1, len(w), *both.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w, a, b, hidden = ctx.saved_tensors
        g, low, of_b = _low(grads[0], hidden, b)
        joined = torch.cat([g, low], 1)
        of_x, _ = _backward(joined, x, torch.cat([w, a]), ctx.how, (True, False))
        _, of_a = _backward(low, x, a, ctx.how, (False, True))
        return of_x, None, of_a, of_b, None, None


def _low(g: Tensor, hidden: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of y, that of A(x), and that of B."""
    low = (b.flatten(1).t() @ g.flatten(2)).mul_(S).view(1, R, *g.shape[2:])
    return g, low, torch.bmm(g.flatten(2), hidden.transpose(1, 2)).sum(0).mul_(S).view_as(b)


def _backward(g: Tensor, x: Tensor, w: Tensor, how: Any, wanted: tuple[bool, bool]) -> Any:
    (stride, padding), rest = how, ([1, 1], False, [0, 0], 1, [*wanted, False])
    return aten.convolution_backward(g, x, w, None, [stride] * 2, [padding] * 2, *rest)[:2]


# ---- others -------------------------------------------------------------------------------------


def embedding(tokens: int, rows: int, width: int) -> Any:
    ids, w = torch.randint(rows, (1, tokens)), drawn(rows, width)
    a, b = drawn(R, rows, trains=True), drawn(width, R, trains=True)

    def in_place(ids: Tensor) -> Tensor:
        found, low = F.embedding(ids, w), F.embedding(ids, a.t())
        return found.view(-1, width).addmm_(low.view(-1, R), b.t(), alpha=S).view_as(found)

    forms: dict[str, Form] = {
        "explicit": lambda ids: F.embedding(ids, w) + F.linear(F.embedding(ids, a.t()) * S, b),
        "in place": in_place,
        "frozen": lambda ids: F.embedding(ids, w),
    }
    return forms, (ids,), (a, b)


def experts(rows: int, count: int, inputs: int, outputs: int) -> Any:
    x, w = drawn(rows, inputs, trains=True), drawn(count, inputs, outputs)
    a, b = drawn(count, inputs, R, trains=True), drawn(count, R, outputs, trains=True)
    ends = torch.arange(1, count + 1, dtype=torch.int32) * (rows // count)
    grouped = torch.nn.functional.grouped_mm
    forms: dict[str, Form] = {
        "explicit": lambda x: grouped(x, w + S * (a @ b), offs=ends),
        "grouped products": lambda x: (
            grouped(x, w, offs=ends) + grouped(grouped(x, a, offs=ends) * S, b, offs=ends)
        ),
        "frozen": lambda x: grouped(x, w, offs=ends),
    }
    return forms, (x,), (x, a, b)


def in_place(rows: int, width: int) -> Any:
    x, w, there = drawn(rows, width), drawn(width, width), drawn(rows, width)
    forms: dict[str, Form] = {
        "explicit": lambda x: torch.mm(x, w),
        "in memory that is there": lambda x: torch.mm(x, w, out=there),
        "frozen": lambda x: torch.mm(x, w),
    }
    return forms, (x,), ()


if __name__ == "__main__":
    main()
