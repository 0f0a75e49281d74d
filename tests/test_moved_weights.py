"""Parts and DoRA of a weight that is transformed before an op reads it: correct, or refused.

Both depend on which of the weight's dimensions are the layer's outputs. Here that is measured on
the source: a dimension belongs to the outputs if changes to different slices of it change
different output features. The tests take no layout from fxlora.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import called_with, distance, randomise
from .random_laws import products
from .typed import plan_of, untyped

R, ALPHA = 2, 3
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Move:
    """A transformation of a weight before an op that reads it as (8, 10) or (8, 8).

    Attributes:
        function: the transformation.
        stored: the stored weight's shape, as a function of the shape (out, in) that the op reads.
        known: whether the move is so common that fxlora must support it, and not refuse it.
        square: whether it takes square matrices only.
    """

    function: Function
    stored: Callable[[int, int], tuple[int, ...]] = lambda o, i: (o, i)
    known: bool = False
    square: bool = False


def _turned(o: int, i: int) -> tuple[int, ...]:
    return i, o


def _constant(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=torch.float64).sin().view(shape)


def _order(n: int) -> torch.Tensor:
    return (torch.arange(n) * 3 + 1) % n if n % 3 else (torch.arange(n) + 2) % n


LAST = untyped(([1], [1]))  # the dimensions that tensordot sums over
MOVES = {
    "as it is": Move(lambda w: w, known=True),
    "t": Move(lambda w: w.t(), _turned, known=True),
    "mT": Move(lambda w: w.mT, _turned),
    "permute, contiguous": Move(lambda w: w.permute(1, 0).contiguous(), _turned),
    "t twice": Move(lambda w: w.t().contiguous().t()),
    "movedim": Move(lambda w: w.movedim(0, 1), _turned),
    "swapaxes": Move(lambda w: torch.swapaxes(w, 0, 1), _turned),
    "einsum": Move(lambda w: torch.einsum("ij->ji", w), _turned),
    "einsum as it is": Move(lambda w: torch.einsum("ij->ij", w)),
    "tensordot": Move(lambda w: torch.tensordot(torch.eye(8).to(w), w, LAST), _turned),
    "tensordot of rows": Move(lambda w: torch.tensordot(_constant(8, 8).to(w), w, 1)),
    "matmul of rows": Move(lambda w: _constant(8, 8).to(w) @ w),
    "matmul of inputs": Move(lambda w: w @ _constant(w.shape[1], w.shape[1]).to(w)),
    "bmm": Move(lambda w: torch.bmm(_constant(1, 8, 8).to(w), w.unsqueeze(0))[0]),
    "addmm": Move(lambda w: torch.addmm(w, _constant(8, 8).to(w), w)),
    "linear": Move(lambda w: F.linear(torch.eye(8).to(w), w), _turned),
    "linear of rows": Move(lambda w: F.linear(_constant(8, 8).to(w), w.t())),
    "solve": Move(lambda w: torch.linalg.solve(_constant(8, 8).to(w) + 3 * torch.eye(8).to(w), w)),
    "inv": Move(torch.linalg.inv, square=True),
    "matrix_exp": Move(torch.linalg.matrix_exp, square=True),
    "squared": Move(lambda w: torch.mm(w, w), square=True),
    "symmetric": Move(lambda w: w + w.t(), square=True),
    "gram": Move(lambda w: w @ w.t() @ w),
    "flip outputs": Move(lambda w: w.flip(0)),
    "flip inputs": Move(lambda w: w.flip(1)),
    "rot90": Move(lambda w: torch.rot90(w), _turned),
    "rot90 twice": Move(lambda w: torch.rot90(w, 2)),
    "roll": Move(lambda w: torch.roll(w, 3, 0)),
    "roll flat": Move(lambda w: torch.roll(w, 3)),
    "index_select": Move(lambda w: w.index_select(0, _order(8))),
    "index": Move(lambda w: w[:, _order(w.shape[1])]),
    "gather": Move(lambda w: w.gather(0, _order(8)[:, None].repeat(1, w.shape[1]))),
    "as_strided": Move(lambda w: w.as_strided((w.shape[1], w.shape[0]), (1, w.shape[1])), _turned),
    "view": Move(lambda w: w.view(8, -1), lambda o, i: (2, o // 2, i)),
    "view of inputs": Move(lambda w: w.view(8, -1), lambda o, i: (o, 2, i // 2)),
    "view, turned": Move(lambda w: w.reshape(-1, 8).t(), lambda o, i: (i, 2, o // 2)),
    "view flat": Move(lambda w: w.reshape(-1, 8).reshape(8, -1)),
    "view exchanged": Move(lambda w: w.reshape(-1, 8), _turned, square=True),
    "heads exchanged": Move(lambda w: w.view(2, 4, -1).transpose(0, 1).reshape(8, -1)),
    "rows": Move(lambda w: w[2:10], lambda o, i: (o + 4, i)),
    "every other row": Move(lambda w: w[::2], lambda o, i: (2 * o, i)),
    "columns": Move(lambda w: w[:, 1:-1], lambda o, i: (o, i + 2)),
    "unbind": Move(lambda w: w.unbind(0)[1], lambda o, i: (4, o, i)),
    "cat": Move(lambda w: torch.cat([w, w * 2]), lambda o, i: (o // 2, i)),
    "cat in another order": Move(lambda w: torch.cat([w[4:], w[:4]])),
    "repeat_interleave": Move(lambda w: w.repeat_interleave(2, 0), lambda o, i: (o // 2, i)),
    "cast": Move(lambda w: w.to(torch.float64), known=True),
    "scale": Move(lambda w: w * 0.7),
    "mask": Move(lambda w: torch.where(_constant(*w.shape) > 0, w, 0.5)),
    "tanh": Move(torch.tanh),
    "clone": Move(lambda w: w.clone()),
    "softmax of outputs": Move(lambda w: w.softmax(0)),
    "softmax of inputs": Move(lambda w: w.softmax(1)),
    "normalize": Move(lambda w: F.normalize(w, dim=0)),
    "cumsum": Move(lambda w: w.cumsum(0)),
    "centred": Move(lambda w: w - w.mean(0)),
    "centred inputs": Move(lambda w: w - w.mean(1, keepdim=True)),
    "whole norm": Move(lambda w: w / w.norm()),
    "sort": Move(lambda w: w.sort(0).values),
    "tril": Move(lambda w: torch.tril(w)),
    "fft": Move(lambda w: torch.fft.fft(w, dim=0).real),
    "unfold": Move(lambda w: w.unfold(0, w.shape[0], 1)[0], _turned),
    "kron": Move(lambda w: torch.kron(torch.eye(2).to(w), w), lambda o, i: (o // 2, i // 2)),
    "vmap": Move(lambda w: torch.vmap(lambda row: row, out_dims=1)(w), _turned),
    "pad": Move(lambda w: F.pad(w, (1, 0)), lambda o, i: (o, i - 1)),
}


READERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w": lambda x, w: x[:, :8] @ w,
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "conv1d": lambda x, w: F.conv1d(x.unsqueeze(-1), w.unsqueeze(-1)).squeeze(-1),
    "embedding": lambda x, w: F.embedding(x[:, :1].long().abs() % 8, w),
}
WHAT = {
    "first part": Rule("w", lora=LoraConfig(r=R, lora_alpha=ALPHA), parts=2, enable=[True, False]),
    "last part": Rule("w", lora=LoraConfig(r=R, lora_alpha=ALPHA), parts=2, enable=[False, True]),
    "dora": Rule("w", lora=LoraConfig(r=R, lora_alpha=ALPHA, use_dora=True)),
}
X = _constant(4, 10) * 5


class Layer(nn.Module):
    """One op and its moved weight; the output's last dimension is its features."""

    def __init__(self, move: Move, read: str, features: int) -> None:
        super().__init__()
        shape = move.stored(8, features)
        self.w = nn.Parameter(_constant(*shape) + 0.1 * torch.randn(shape, dtype=torch.float64))
        self.function, self.read = move.function, READERS[read]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x, self.function(self.w))


def changed(model: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> frozenset[int]:
    """Return the output features that change when `weight` replaces the model's weight."""
    with torch.no_grad():
        (found,) = called_with(model, {"w": weight}, (x,))
        return features_of(found - model(x))


def features_of(difference: torch.Tensor) -> frozenset[int]:
    largest = difference.abs().flatten(0, -2).amax(0)
    return frozenset(torch.nonzero(largest > 1e-9).flatten().tolist())


def output_dims(model: Layer, x: torch.Tensor) -> dict[int, list[frozenset[int]]]:
    """Return the weight's output dimensions, with the features that each of their slices changes.

    In such a dimension no two slices change the same feature.
    """
    found: dict[int, list[frozenset[int]]] = {}
    weight = model.w.detach()
    for dim in range(weight.ndim):
        own: list[frozenset[int]] = []
        for index in range(weight.shape[dim]):
            other = weight.clone()
            other.select(dim, index).add_(torch.rand_like(other.select(dim, index)) + 0.5)
            own.append(changed(model, other, x))
        if sum(map(len, own)) == len(frozenset().union(*own)):
            found[dim] = own
    return found


def check_part(model: Layer, lora: fxlora.CapturedModule, x: torch.Tensor, last: bool) -> str:
    """Check that exactly the part's slice is adapted, and only its output features change.

    Returns "right" or a description of the error.
    """
    weight = model.w.detach()
    touched = (fxlora.fold(lora).get_parameter("w").detach() - weight).abs() > 1e-12
    with torch.no_grad():
        found = features_of(lora(x) - model(x))
    dims = output_dims(model, x)
    for dim, own in dims.items():
        half = weight.shape[dim] // 2
        part = slice(half, 2 * half) if last else slice(half)
        box = torch.zeros_like(touched)
        box.movedim(dim, 0)[part] = True
        if torch.equal(touched, box):
            expected = frozenset().union(*own[part])
            return "right" if found == expected else f"{[*found]} changed, not {[*expected]}"
    return f"{[*found]} changed; the outputs are in the dimensions {[*dims]}"


def check_dora(model: Layer, lora: fxlora.CapturedModule, x: torch.Tensor) -> str:
    """Check that the fold is m·V/‖V‖, V = W0 + s·BA, with a norm for each slice of outputs.

    Returns "right" or a description of the error.
    """
    (entry,) = plan_of(lora)
    a, b = (lora.get_parameter(name).detach() for name in (entry.name_a, entry.name_b))
    magnitude = lora.get_parameter(entry.name_of("lora_magnitude_vector")).detach()
    weight, folded = model.w.detach(), fxlora.fold(lora).get_parameter("w").detach()
    with torch.no_grad():
        if distance([lora(x)], called_with(model, {"w": folded}, (x,))) > 1e-10:
            return "a read does not see the folded weight"
    dims = [*output_dims(model, x)]
    for product in products(weight.shape, a, b, R):
        for formula in scaled(weight + ALPHA / R * product, magnitude, dims):
            if distance([formula], [folded]) < 1e-10:
                return "right"
    return f"is not m·V/‖V‖ where the outputs are, in the dimensions {dims}"


def scaled(v: torch.Tensor, magnitude: torch.Tensor, dims: list[int]) -> Iterator[torch.Tensor]:
    """Yield m·V/‖V‖ for each choice of `dims` that the number of magnitudes fits."""
    for number in range(1, len(dims) + 1):
        for kept in itertools.combinations(dims, number):
            sizes = [n if d in kept else 1 for d, n in enumerate(v.shape)]
            if torch.Size(sizes).numel() == magnitude.numel():
                others = [d for d in range(v.ndim) if d not in kept]
                yield magnitude.reshape(sizes) * v / v.norm(dim=others, keepdim=True)


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("frontend", ["export", "tracer"])
@pytest.mark.parametrize("name", MOVES)
def test_outputs_of_its_own_or_refused(name: str, frontend: str) -> None:
    move = MOVES[name]
    both = move.known and frontend == "tracer"  # the slow run exports square weights, too
    check(name, "linear", frontend, (8, 10) if both else (8,) if move.square else (10,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("name", MOVES)
def test_square_weights(name: str) -> None:
    check(name, "linear", "export", (8,))
    check(name, "linear", "tracer", (8,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize("read", [read for read in READERS if read != "linear"])
@pytest.mark.parametrize("name", MOVES)
def test_by_other_readers(name: str, read: str) -> None:
    sizes = (8,) if MOVES[name].square else (8, 10)
    check(name, read, "tracer", sizes)
    check(name, read, "export", sizes)


def check(name: str, read: str, frontend: str, sizes: tuple[int, ...]) -> None:
    """Check a move on a weight of 8 rows and these numbers of columns."""
    move = MOVES[name]
    plain = move.known and read == "linear" and (frontend == "export" or name == "as it is")
    for features in sizes:
        model, x = Layer(move, read, features), X[:, :features]
        # Twice as fast, and no layout depends on it.
        fixed: dict[str, Any] = {"dynamic_shapes": {"x": None}}
        try:
            gm = (
                fxlora.capture(model, x, **fixed) if frontend == "export" else fxlora.capture(model)
            )
        except fxlora.CaptureError:
            assert not plain
            return
        found = {what: outcome(model, gm, x, what) for what in WHAT}
        assert set(found.values()) <= ({"right"} if plain else {"right", "refused"}), found


def outcome(model: Layer, gm: fxlora.CapturedModule, x: torch.Tensor, what: str) -> str:
    """Return "right", "refused", or a description of the error."""
    try:
        lora = fxlora.inject(gm, fxlora.match(gm, WHAT[what])).eval()
    except fxlora.FxLoraError:
        return "refused"
    randomise(lora)
    if what == "dora":
        return check_dora(model, lora, x)
    return check_part(model, lora, x, last=what == "last part")
