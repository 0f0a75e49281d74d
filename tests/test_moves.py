"""Replay: the positions of a weight's moved entries, against the same moves run on numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from fxlora.lora.layout import Layout
from fxlora.reads import moves
from fxlora.reads.moves import Moved, moved

from .typed import examples

Move = Callable[[torch.Tensor], torch.Tensor]


class Moves(nn.Module):
    mask: torch.Tensor

    def __init__(self, move: Move, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.register_buffer("mask", torch.randn(shape[-1]))
        self.register_buffer("order", torch.randperm(shape[0]))
        self.move = move

    def forward(self) -> torch.Tensor:
        return self.move(self.w)


def outcome(move: Move, shape: tuple[int, ...]) -> Moved | None:
    model = Moves(move, shape)
    graph = fx.Tracer().trace(model)
    (value,) = graph.output_node().all_input_nodes
    return moved(value, model.w, frozenset({"w"}), model)


# Each move takes a tensor with two or more dimensions.
PURE: dict[str, Move] = {
    "t": lambda w: w.transpose(0, 1),
    "mT": lambda w: w.transpose(-1, -2),
    "flip": lambda w: w.flip(0),
    "roll": lambda w: w.roll(1, 0),
    "contiguous": lambda w: w.contiguous(),
    "clone": lambda w: w.clone(),
    "rows": lambda w: w[1:],
    "every other column": lambda w: w[..., ::2],
    "flat": lambda w: w.flatten(0, 1).unsqueeze(0),
    "unsqueeze": lambda w: w.unsqueeze(1),
    "movedim": lambda w: w.movedim(0, -1),
    "expand": lambda w: w.unsqueeze(0).expand(2, *[-1] * w.ndim),
    "second half": lambda w: w.chunk(2, 1)[-1],
    "twice": lambda w: torch.cat([w, w], 0),
    "stack": lambda w: torch.stack([w, w], 1)[:, 0],
}


def untraced(moves: list[str]) -> Move:
    """Return a function that applies the moves one after the other."""

    def chain(w: torch.Tensor) -> torch.Tensor:
        for name in moves:
            w = PURE[name](w)
        return w

    return chain


@examples(80)
@given(
    shape=st.sampled_from([(4, 6), (5, 3), (4, 2, 6), (2, 3, 5)]),
    names=st.lists(
        st.sampled_from([n for n in PURE if n not in ("expand", "unsqueeze")]), max_size=4
    ),
)
def test_where_entries_go(shape: tuple[int, ...], names: list[str]) -> None:
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    chain = untraced(names)
    there = chain(numbers)
    if not there.numel():
        return
    found = outcome(chain, shape)
    assert found is not None and found.whole and found.dims == there.ndim
    # After entries were there twice on the way, the answer may be no: that costs speed only.
    told = {True} if "twice" not in names else {True, False}
    turned = numbers.mT
    same = there.shape == numbers.shape and torch.equal(there, numbers)
    assert found.same in (told if same else {False})
    if not torch.equal(numbers, turned) if numbers.shape == turned.shape else True:
        transposed = there.shape == turned.shape and torch.equal(there, turned)
        assert found.transposed in (told if transposed else {False})
    for dim, size in enumerate(shape):
        coordinate = there // math.prod(shape[dim + 1 :]) % size
        assert torch.equal(found.reached[dim], coordinate.unique())
        varying, line = found.lines[dim]
        assert torch.equal(line.expand(there.shape), coordinate)
        assert all(line.shape[d] == 1 for d in range(line.ndim - there.ndim, 0) if d in varying)


EXACT: dict[str, Move] = {
    "einsum": lambda w: torch.einsum("ij->ji", w),
    "a unit matrix": lambda w: torch.eye(4) @ w,
    "index_select": lambda w: w.index_select(0, torch.arange(4)),
    "masked by ones": lambda w: torch.where(torch.ones(4, 6) > 0, w, torch.zeros(4, 6)),
}


@pytest.mark.parametrize("name", EXACT)
def test_ops_that_move_data_by_computing(name: str) -> None:
    found = outcome(EXACT[name], (4, 6))
    assert found is not None and found.whole
    order = "io" if name == "einsum" else "oi"
    assert found.layout(Layout("oi")) == Layout(order)


COMPUTED: dict[str, Move] = {
    "inverse": torch.linalg.inv,
    "sum": lambda w: w.sum(0, keepdim=True),
    "its mean": lambda w: w.mean().expand(6, 6),
    "cumsum": lambda w: w.cumsum(0),
    "square": lambda w: w @ w,
    "softmax": lambda w: w.softmax(-1),
    "sorted": lambda w: w.sort(0).values,
    "plus its transpose": lambda w: w + w.t(),
    "dropped out": lambda w: torch.nn.functional.dropout(w, 0.5, True),
    "written": lambda w: w.clone().mul_(2.0),
    "whole numbers": lambda w: w.to(torch.int64),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_what_computes_is_unknown(name: str) -> None:
    assert outcome(COMPUTED[name], (6, 6)) is None


def test_a_function_of_the_users_is_unknown() -> None:
    def contiguous(w: torch.Tensor) -> torch.Tensor:
        return w.flip(0)

    graph = fx.Graph()
    value = graph.call_function(contiguous, (graph.get_attr("w"),))
    model = Moves(lambda w: w, (4, 6))
    assert moved(value, model.w, frozenset({"w"}), model) is None


def test_an_order_that_is_drawn_is_unknown() -> None:
    graph = fx.Graph()
    order = graph.call_function(torch.randperm, (4,))
    value = graph.call_function(torch.index_select, (graph.get_attr("w"), 0, order))
    model = Moves(lambda w: w, (4, 6))
    assert moved(value, model.w, frozenset({"w"}), model) is None


def test_padding_is_not_of_the_weight() -> None:
    found = outcome(lambda w: torch.nn.functional.pad(w, (0, 0, 0, 2)), (4, 6))
    assert found is not None and not found.whole
    assert found.layout(Layout("oi")) is None
    assert torch.equal(found.reached[0], torch.arange(4))


def test_nothing_is_left_of_it() -> None:
    found = outcome(lambda w: torch.cat([torch.ones(4, 6), w])[:4], (4, 6))
    assert found is not None and not any(len(coordinates) for coordinates in found.reached)


def test_entries_out_of_order_have_no_roles() -> None:
    for move in (PURE["flip"], PURE["roll"], PURE["twice"]):
        found = outcome(move, (4, 6))
        assert found is not None and found.layout(Layout("oi")) is None


def test_large_weights_are_replayed_as_views_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "MOST_ENTRIES", 10)
    rows = outcome(PURE["rows"], (4, 6))
    assert rows is not None and rows.layout(Layout("oi")) == Layout("oi")
    assert outcome(PURE["flip"], (4, 6)) is None


def test_the_users_random_state_and_buffers_are_left_alone() -> None:
    model = Moves(lambda w: w, (4, 6))
    graph = fx.Graph()
    mask = graph.get_attr("mask")
    value = graph.call_function(
        torch.mul, (graph.get_attr("w"), graph.call_method("add_", (mask, 1.0)))
    )
    before, state = model.mask.clone(), torch.get_rng_state()
    assert moved(value, model.w, frozenset({"w"}), model) is None
    assert torch.equal(model.mask, before) and torch.equal(torch.get_rng_state(), state)
