"""Captures and other threads: a capture's patches do not affect other threads."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora.frontends.kept.patches import patched

from .typed import Function, doubled, grad_of

WAIT = 20.0
EXAMPLE = (torch.ones(2, 5),)


class Waits(nn.Module):
    """A model whose forward, once during its capture, waits until another thread is done."""

    mark: str

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(5, 3), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _pause.reached()
        return self.drop(self.fc(x))


class _Pause:
    """Makes a thread wait in its `number`-th run of a forward (an export makes two runs)."""

    def __init__(self, thread: threading.Thread | None = None, number: int = 1) -> None:
        self.thread, self.number, self.runs = thread, number, 0
        self.inside, self.go = threading.Event(), threading.Event()

    def reached(self) -> None:
        if threading.current_thread() is self.thread:
            self.runs += 1
            if self.runs == self.number:
                self.inside.set()
                if not self.go.wait(WAIT):  # an assert would lead the capture into pytest
                    raise TimeoutError


_pause = _Pause()


@contextmanager
def during_capture(model: nn.Module, args: Any = EXAMPLE, number: int = 1) -> Generator[_Pause]:
    """A context during which another thread is in the middle of capturing the model."""
    global _pause
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with warnings.catch_warnings():
                fxlora.capture(model, args)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)
        finally:
            pause.inside.set()

    pause = _pause = _Pause(thread := threading.Thread(target=run), number)
    thread.start()
    try:
        assert pause.inside.wait(WAIT)
        assert not failures, failures
        yield pause
    finally:
        pause.go.set()
        thread.join(WAIT)
        _pause = _Pause()
    assert not failures, failures


ROADS = pytest.mark.parametrize(
    ("args", "number"),
    [((torch.ones(2, 5),), 1), ((torch.ones(2, 5),), 2), (None, 1)],
    ids=["export's first run", "export's second run", "tracer"],
)


@ROADS
def test_tensor_hooks_elsewhere(args: Any, number: int) -> None:
    with during_capture(Waits(), args, number):
        x = torch.ones(2, requires_grad=True)
        y = x * 3
        y.register_hook(lambda grad: grad * 5)
        y.sum().backward()
    assert x.grad is not None and grad_of(x).tolist() == [15, 15]


@ROADS
def test_modules_elsewhere(args: Any, number: int) -> None:
    other = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    expected = copy.deepcopy(other)(x := torch.randn(7, 5))
    with during_capture(Waits(), args, number):
        y = other(x)
        y.sum().backward()
        assert torch.equal(copy.deepcopy(other.eval())(x), other(x))
    assert torch.equal(y, expected)
    assert all(p.grad is not None for p in other.parameters())


@ROADS
def test_the_model_elsewhere_is_as_the_user_left_it(args: Any, number: int) -> None:
    model = Waits().eval()
    x = torch.randn(7, 5)
    expected = model(x)
    with during_capture(model, args, number):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(x), expected)
        model.fc.register_forward_hook(doubled)
        model.mark = "set meanwhile"
    assert torch.equal(model(x), expected.detach() * 2)  # exact: a factor of 2 does not round
    assert model.mark == "set meanwhile"


def test_inference_mode_entered_during_a_capture_and_left_after() -> None:
    mode = torch.inference_mode()
    with during_capture(Waits()):
        mode.__enter__()
        inside = torch.ones(1)
    after = torch.ones(1)
    mode.__exit__(None, None, None)
    assert inside.is_inference() and after.is_inference()
    assert not torch.is_inference_mode_enabled()


def test_inference_mode_entered_before_a_capture_and_left_during_it() -> None:
    model, mode = Waits(), torch.inference_mode()
    mode.__enter__()
    with during_capture(model):
        assert torch.ones(1).is_inference()
        mode.__exit__(None, None, None)
        assert not torch.ones(1).is_inference()
    assert not torch.is_inference_mode_enabled()


@ROADS
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_elsewhere(args: Any, number: int, reentrant: bool) -> None:
    runs: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x.sin()

    with during_capture(Waits(), args, number):
        x = torch.ones(2, requires_grad=True)
        checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    assert len(runs) == 2
    assert torch.allclose(grad_of(x), x.detach().cos())


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 7


@ROADS
def test_autograd_functions_elsewhere(args: Any, number: int) -> None:
    with during_capture(Waits(), args, number):

        class Tripled(Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                return x * 3

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                return grad * 11

        x = torch.ones(2, requires_grad=True)
        y = Tripled.apply(Doubled.apply(x))
        y.sum().backward()
    assert y.tolist() == [6, 6] and grad_of(x).tolist() == [77, 77]


@ROADS
@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(1).item(),
        lambda: float(random.random()),
        lambda: float(np.random.rand()),
        lambda: random.randint(0, 10**9),
    ],
    ids=["torch", "random", "numpy", "randint"],
)
def test_draws_elsewhere_are_neither_changed_nor_repeated(
    args: Any, number: int, draw: Callable[[], float]
) -> None:
    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    model = Waits()
    seed()
    expected = [draw() for _ in range(4)]
    assert len(set(expected)) == 4
    seed()
    drawn = [draw()]
    with during_capture(model, args, number):
        drawn += [draw(), draw()]
    drawn.append(draw())
    assert drawn == expected


def test_seeds_elsewhere() -> None:
    with during_capture(Waits()):
        torch.manual_seed(5)
        first = torch.rand(3)
    second = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(6), torch.cat([first, second]))


def test_warnings_elsewhere() -> None:
    with during_capture(Waits()), pytest.warns(UserWarning, match="said meanwhile"):
        warnings.warn("said meanwhile", UserWarning, stacklevel=1)


def test_two_captures_at_once() -> None:
    models = [nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(2)]
    x = torch.randn(7, 5)
    expected = [model.eval()(x) for model in models]
    start, captured = threading.Barrier(2), {}

    def run(number: int) -> None:
        start.wait(WAIT)
        for _ in range(2):
            captured[number] = fxlora.capture(models[number], x)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert torch.equal(captured[number].eval()(x), expected[number])


# ---- the mechanism ------------------------------------------------------------------------------


class Base:
    def inherited(self) -> str:
        return "base"

    @classmethod
    def named(cls) -> str:
        return cls.__name__


class Patched(Base):
    def method(self) -> str:
        return "method"

    @staticmethod
    def static() -> str:
        return "static"


def _in_a_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_patches_are_for_one_thread_and_leave_no_trace() -> None:
    before = dict(vars(Patched)), dict(vars(random))

    def seen() -> list[Any]:
        item = Patched()
        return [item.method(), item.inherited(), Patched.static(), Patched.named(), item.named()]

    original = seen()
    assert original == ["method", "base", "static", "Patched", "Patched"]
    new = {
        "method": lambda self: "new",
        "inherited": lambda self: "new",
        "static": staticmethod(lambda: "new"),
        "named": classmethod(lambda cls: f"new {cls.__name__}"),
    }
    with patched(Patched, **new):
        assert seen() == ["new", "new", "new", "new Patched", "new Patched"]
        assert _in_a_thread(seen) == original
        with patched(Patched, method=lambda self: "newer"):
            assert Patched().method() == "newer"
        assert Patched().method() == "new"
    assert seen() == original
    with patched(random, random=lambda: 5) as elsewhere:
        assert random.random() == 5 and elsewhere() == 0
        assert _in_a_thread(random.random) < 1 and elsewhere() == 1
    assert (dict(vars(Patched)), dict(vars(random))) == before


def test_patches_that_end_in_another_order() -> None:
    before = dict(vars(Patched))
    inside, leave = threading.Event(), threading.Event()

    def other() -> str:
        with patched(Patched, method=lambda self: "other"):
            inside.set()
            assert leave.wait(WAIT)
            return Patched().method()

    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(other()))
    with patched(Patched, method=lambda self: "mine"):
        thread.start()
        assert inside.wait(WAIT)
        assert Patched().method() == "mine"
    assert Patched().method() == "method"
    leave.set()
    thread.join()
    assert found == ["other"]
    assert dict(vars(Patched)) == before


# ---- models that cannot be copied ---------------------------------------------------------------


def test_a_model_that_cannot_be_copied_is_put_back() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    model.lock = threading.Lock()
    x = torch.randn(7, 5)
    gm = fxlora.capture(model, x)
    assert not any(module.training for module in model.modules())
    assert torch.equal(gm(x), model(x))


# ---- seeds in a forward -------------------------------------------------------------------------


class Seeds(nn.Module):
    def __init__(self, seed: Callable[[], Any]) -> None:
        super().__init__()
        self.fc, self.seed = nn.Linear(5, 3), seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        self.seed()
        return y + torch.randn_like(y)


@pytest.mark.parametrize("args", [(torch.ones(2, 5),), None])
def test_a_forward_that_seeds_is_no_graph(args: Any) -> None:
    """A graph would draw other numbers at every call, while the source draws the same ones."""
    model, state = Seeds(lambda: torch.manual_seed(5)), torch.get_rng_state()
    if args is None:
        with pytest.raises(fxlora.CaptureError, match="seeds torch's generator"):
            fxlora.capture(model, args)
        return
    with pytest.warns(fxlora.FxLoraWarning, match="seeds torch's generator"):
        gm = fxlora.capture(model, args)
    assert torch.equal(torch.get_rng_state(), state)
    assert gm.regions == ("fc",)
    assert torch.equal(gm(*args), model(*args))
