"""Golden graphs: for each row of the table of ops, those of the smallest model that calls its op.

tests/golden/ops has a file for each kind of op. Its sections are the captured graph, which is also
the folded one, and the graphs with the adapter in each form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.fx.compare import difference
from fxlora.lora.ops import OPS
from fxlora.passes import ToWeightForm

from .graphs import Text
from .models import skip_unless_grouped

aten: Any = torch.ops.aten

INDEX = torch.tensor([[1, 4, 8], [0, 0, 3]])
OWNERS = ("w_adapter", "w_adapter.part")
NAMES = {f"{o}.lora_{x}.default.weight": x for o in OWNERS for x in "AB"} | {"w": "W"}


@dataclass(frozen=True)
class Case:
    """The smallest model that has a row, or a row's branch in another shape.

    Attributes:
        row: the overload, and the position of the weight.
        w: the weight's shape.
        x: the input, or its shape.
        call: the model's forward: a function of the model, x and the weight.
        note: how the case differs from the first one of its row.
        lora: options of the configuration.
        rule: options of the rule.
    """

    row: tuple[Any, int]
    w: tuple[int, ...]
    x: torch.Tensor | tuple[int, ...]
    call: Callable[[Smallest, torch.Tensor, torch.Tensor], torch.Tensor]
    note: str = ""
    lora: dict[str, Any] = field(default_factory=dict[str, Any])
    rule: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def title(self) -> str:
        overload, position = self.row
        name = str(overload).removesuffix(".default")
        return f"{name}, W is argument {position}{self.note and ': ' + self.note}"


class Smallest(nn.Module):
    """Calls a case's op once, if the case has no note."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.op, self.call = case.row[0], case.call
        self.w, self.b = nn.Parameter(torch.randn(case.w)), nn.Parameter(torch.randn(7))
        self.register_buffer("ends", torch.tensor([2, 7, 10], dtype=torch.int32))
        self.register_buffer("offsets", torch.tensor([0, 3]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self, x, self.w)


def convolutions(dims: int) -> list[Case]:
    conv, turned = getattr(aten, f"conv{dims}d"), getattr(aten, f"conv_transpose{dims}d")
    kernel, size = (3, 2, 4)[:dims], (8, 6, 5)[:dims]
    w, w_turned, x = (7, 5, *kernel), (5, 7, *kernel), (2, 5, *size)

    def strided(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return m.op(x, w, m.b, [2] * dims)

    return [
        Case((conv.default, 1), w, x, strided),
        Case((conv.padding, 1), w, x, lambda m, x, w: m.op(x, w, m.b, [1] * dims, "same")),
        Case((turned.default if dims == 1 else turned.input, 1), w_turned, x, strided),
    ]


def biased(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return m.op(x, w, m.b)


def left(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return m.op(w, x)


def right(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return m.op(x, w)


def of_transpose(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return m.op(x, aten.t.default(w), m.b)


def tied(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return aten.linear.default(m.op(w, x, 8), w)


def bags(m: Smallest, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return m.op(w, x, m.offsets, False, 0, False, None, False, None)[0]


LINEAR = Case((aten.linear.default, 1), (7, 5), (3, 5), biased)
STACK = Case((aten.matmul.default, 1), (4, 5, 7), (4, 3, 5), right, "a stack of matrices")
EMBEDDING = Case((aten.embedding.default, 0), (9, 5), INDEX, left)
GROUPS = (64, 32, 3, 3), (1, 64, 8, 8)
CASES = [
    LINEAR,
    replace(LINEAR, note="dropout 0.1, the train graph", lora={"lora_dropout": 0.1}),
    replace(LINEAR, note="a part, the outputs 1 to 3", rule={"parts": {"part": (1, 4)}}),
    replace(LINEAR, note="the transpose", w=(5, 7), call=of_transpose),
    Case((aten.addmm.default, 2), (5, 7), (3, 5), lambda m, x, w: m.op(m.b, x, w)),
    Case((aten.mm.default, 1), (5, 7), (3, 5), right),
    Case((aten.mm.default, 0), (7, 5), (5, 3), left),
    Case((aten.matmul.default, 1), (5, 7), (2, 3, 5), right),
    Case((aten.matmul.default, 0), (7, 5), (2, 5, 3), left),
    STACK,
    Case((aten.bmm.default, 1), (4, 5, 7), (4, 3, 5), right),
    Case((aten.bmm.default, 0), (4, 7, 5), (4, 5, 3), left),
    Case((aten.baddbmm.default, 2), (4, 5, 7), (4, 3, 5), lambda m, x, w: m.op(m.b, x, w)),
    Case((aten.baddbmm.default, 1), (4, 9, 5), (4, 5, 7), lambda m, x, w: m.op(m.b, w, x)),
    Case((aten._grouped_mm.default, 1), (3, 16, 24), (10, 16), lambda m, x, w: m.op(x, w, m.ends)),
    Case((aten.einsum.default, 1), (5, 7), (3, 5), lambda m, x, w: m.op("bi,io->bo", [x, w])),
    Case(
        (aten.einsum.default, 1),
        (5, 2, 7),
        (3, 5),
        lambda m, x, w: m.op("bi,iho->bho", [x, w]),
        "two dimensions of outputs",
    ),
    EMBEDDING,
    replace(
        EMBEDDING,
        note="the head, which reads W too, trains the row that the look-up pads",
        call=tied,
    ),
    Case((aten.embedding_bag.padding_idx, 0), (9, 5), INDEX.flatten(), bags),
    *(case for dims in (1, 2, 3) for case in convolutions(dims)),
    Case(
        (aten.conv2d.default, 1),
        *GROUPS,
        lambda m, x, w: m.op(x, w, None, [1, 1], [0, 0], [1, 1], 2),
        "2 groups",
    ),
    Case(
        (aten.conv_transpose2d.input, 1),
        *GROUPS,
        lambda m, x, w: m.op(x, w, None, [1, 1], [0, 0], [0, 0], 2),
        "2 groups",
    ),
]
ROWS = dict(OPS)  # before a test adds one


def test_every_row_has_a_graph() -> None:
    assert {case.row for case in CASES} == set(ROWS)


@pytest.mark.parametrize("kind", sorted({row.kind for row in ROWS.values()}))
def test_graphs(kind: str, golden: Callable[[str, str], None]) -> None:
    cases = [case for case in CASES if ROWS[case.row].kind == kind]
    if kind == "grouped_mm":
        skip_unless_grouped(torch.bfloat16)
    golden(f"ops/{kind}.txt", "\n\n\n".join(map(sections, cases)))


def sections(case: Case) -> str:
    """Return the graphs of a case as text, and check that the folded graph is the captured one."""
    x = case.x if isinstance(case.x, torch.Tensor) else torch.randn(case.x)
    dtype = torch.bfloat16 if "grouped" in str(case.row) else torch.float32
    model, x = Smallest(case).to(dtype), x.to(dtype) if x.is_floating_point() else x
    # A stack may be multiplied with a vector, as far as the tracer knows.
    gm = fxlora.capture(model, x) if case is STACK else fxlora.capture(model)
    rule = Rule("w", lora=LoraConfig(r=2, lora_alpha=3, **case.lora), **case.rule)
    branch = fxlora.inject(gm, fxlora.match(gm, rule))
    assert branch.plan
    (entry,) = branch.plan
    assert entry.form == "branch", entry.reason
    mode = "train" if entry.dropout else "eval"
    folded = fxlora.fold(branch).graphs[mode]
    assert difference(folded, gm.graphs[mode]) is None
    modules = {"captured, folded": gm, "branch": branch, "weight": ToWeightForm()(branch)}
    if case.note:
        del modules["weight"]
    a, b = entry.shapes
    return "\n\n".join(
        [
            f"# {case.title}\n# W {case.w}, A {a}, B {b}, s = {entry.scaling}",
            *(f"## {name}\n{Text(m, m.graphs[mode], NAMES).of(x)}" for name, m in modules.items()),
        ]
    )
