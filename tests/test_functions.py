"""torch.autograd.Function: the captured graph keeps the function's own backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import FxLoraWarning, LoraConfig, Rule

from .laws import check_laws
from .typed import Function, grad_of, plan_of


class Sign(Function):
    """A straight-through estimator: its gradient is 1 where autograd's is 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Reverse(Function):
    """Gradient reversal, with `setup_context`; its output is a view of its input."""

    @staticmethod
    def forward(x: torch.Tensor, strength: float) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.strength = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return -ctx.strength * grad, None


class Linear(Function):
    """Reads a weight, saves tensors, and has several outputs, one of which is not a tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, size: int, words: list[Any]
    ) -> Any:
        ctx.save_for_backward(x, weight)
        assert words == ["a", None]
        return "word", F.linear(x, weight) * size, x.sum()

    @staticmethod
    def backward(ctx: Any, _: Any, grad: torch.Tensor, total: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wide = grad.reshape(-1, grad.shape[-1])
        return 3 * grad @ weight + total, 5 * wide.T @ x.reshape(-1, x.shape[-1]), None, None


sign = Sign.apply  # bound at import, as in many modules: later calls do not go via the class


class Model(nn.Module):
    subscripts: ClassVar = {"mixing": "oi"}

    def __init__(self, middle: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)
        self.mixing = nn.Parameter(torch.randn(7, 7))
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.middle(self, torch.tanh(self.up(x))))


def local(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    class Local(Sign):  # defined while the model is captured
        pass

    return Local.apply(x)


def several(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    word, y, total = Linear.apply(x, model.mixing, x.shape[0], ["a", None])
    assert word == "word"
    return y + total


def without_gradient(_: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = Sign.apply(x)
    return x * y


MIDDLES = {
    "apply": lambda _, x: Sign.apply(x),
    "alias": lambda _, x: sign(x),
    "setup_context": lambda _, x: Reverse.apply(x, 0.5),
    "local": local,
    "several": several,
    "no_grad": without_gradient,
    "twice": lambda _, x: Reverse.apply(Reverse.apply(x, 0.5), 0.25) + sign(x),
    "lrn": lambda _, x: nn.CrossMapLRN2d(3)(x[..., None, None]).flatten(1),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_gradients_are_the_functions_own(name: str) -> None:
    model, x = Model(MIDDLES[name]), torch.randn(4, 5).double()
    gm, _ = check_laws(model, (x,), rules=Rule("up", lora=LoraConfig(r=2)))
    for training in (False, True):
        gm.train(training)
        model.train(training)
        for module in (gm, model):
            module.zero_grad()
            module(x).square().sum().backward()
        assert grad_of(model.up.weight).abs().max() > 0
        for parameter, source in zip(gm.parameters(), model.parameters(), strict=True):
            assert (parameter.grad is None) == (source.grad is None)
            assert source.grad is None or torch.equal(grad_of(parameter), source.grad)


def test_through_the_tracer() -> None:
    for name in ("apply", "alias", "setup_context", "twice"):
        check_laws(
            Model(MIDDLES[name]),
            (torch.randn(4, 5).double(),),
            rules=Rule("up", lora=LoraConfig(r=2)),
            capture=fxlora.capture,
        )


def test_a_weight_that_a_function_reads_is_a_site() -> None:
    model, x = Model(several), torch.randn(4, 5).double()
    _, lora = check_laws(model, (x,), rules=Rule("mixing", lora=LoraConfig(r=2)))
    (entry,) = plan_of(lora)
    assert entry.form == "weight" and "Linear" in entry.reason


def test_a_dynamic_size_goes_into_a_function() -> None:
    model = Model(several)
    gm = fxlora.capture(model, torch.randn(4, 5))
    x = torch.randn(3, 5)
    assert torch.equal(gm(x), model(x))


def test_copies_compiled_and_exported(tmp_path: Any) -> None:
    model, x = Model(MIDDLES["twice"]), torch.randn(4, 5)
    gm = fxlora.capture(model, x).eval()
    assert torch.equal(copy.deepcopy(gm)(x), model(x))
    assert "Reverse" in gm.code
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    compiled(x).sum().backward()
    torch.compiler.reset()  # code that once ran uncompiled would stay so, in other tests too
    model(x).sum().backward()
    assert torch.equal(grad_of(gm.get_parameter("up.weight")), grad_of(model.up.weight))
    fxlora.export(gm, tmp_path / "m.pt2", x)
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), model(x))
    assert torch.equal(gm.double()(x.double()), model.double()(x.double()))


def test_functions_are_as_before_after_a_capture() -> None:
    held = dict(Sign.__dict__), "forward" in Reverse.__dict__
    fxlora.capture(Model(MIDDLES["apply"]), torch.randn(4, 5))
    with pytest.warns(FxLoraWarning, match="captured instead"):
        fxlora.capture(Model(lambda _, x: x if x.sum() > 0 else Sign.apply(x)), torch.randn(4, 5))
    assert (dict(Sign.__dict__), "forward" in Reverse.__dict__) == held
    assert "__init_subclass__" not in Function.__dict__


# ---- functions that cannot be kept --------------------------------------------------------------


def closure(model: Any, x: torch.Tensor) -> torch.Tensor:
    class Closure(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, model.mixing)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    return Closure.apply(x)


class Writes(Sign):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.neg_()


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (closure, "Closure reads a weight or an activation"),
        (lambda _, x: Writes.apply(x * 1), "Writes writes to its arguments"),
    ],
)
def test_what_a_graph_cannot_show_stays_python(middle: Any, message: str) -> None:
    model = Model(middle)
    with pytest.warns(FxLoraWarning, match=message):
        gm = fxlora.capture(model, torch.randn(4, 5))
    assert set(gm.regions) == {"down", "up"}
    x = torch.randn(4, 5)
    assert torch.equal(gm(x), model(x))
