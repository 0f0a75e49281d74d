"""Further calls for a module that is adapted, and perhaps trained, already."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule

from .laws import randomise

X, GATE = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
RULES = [
    Rule("up", lora=LoraConfig(r=2, lora_dropout=0.3, modules_to_save=["norm"])),
    Rule("down", lora=LoraConfig(r=3)),
]


class Gated(nn.Module):
    """Its further calls branch on a value, hold a constant, and read `down` functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(6, 9), nn.BatchNorm1d(9)
        self.down, self.extra = nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        h = self.norm(self.up(x)).tanh()
        if gate is None:
            return self.down(h)
        h = h * gate + torch.arange(9.0, dtype=h.dtype)
        doubled, weight = lambda h: h * 2, self.down.weight
        return self.extra(F.linear(torch.cond(h.sum() > 0, doubled, torch.neg, (h,)), weight))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


@pytest.fixture(scope="module")
def model() -> Gated:
    torch.manual_seed(0)
    return Gated().double().eval()


@pytest.fixture(scope="module")
def lora(model: Gated) -> fxlora.CapturedModule:
    """Trained, so that its buffers, and what it trains in full, are no longer the model's."""
    adapted = fxlora.adapt(model, X, rules=RULES)
    randomise(adapted)
    adapted.train()(X).square().sum().backward()
    torch.optim.SGD(fxlora.lora_parameters(adapted), lr=1e-2).step()
    assert bool((adapted.get_buffer("norm.running_mean") != model.norm.running_mean).any())
    assert not torch.equal(adapted.norm.weight, model.norm.weight)
    return adapted.eval()


@pytest.fixture(scope="module")
def more(model: Gated, lora: fxlora.CapturedModule) -> fxlora.CapturedModule:
    return fxlora.capture_more(lora, model, (X, GATE), methods={"encode": X})


def test_further_calls_run_with_the_same_adapters(
    model: Gated, lora: fxlora.CapturedModule, more: fxlora.CapturedModule
) -> None:
    merged = fxlora.merged(model, fxlora.fold(lora)).eval()
    assert torch.equal(more(X), lora(X))
    pairs = (
        (more(X, GATE), merged(X, GATE), model(X, GATE)),
        (more(X[:1], -GATE[:1]), merged(X[:1], -GATE[:1]), model(X[:1], -GATE[:1])),
        (more.encode(X), merged.encode(X), model.encode(X)),
    )
    for found, expected, bare in pairs:
        assert (found - bare).abs().max() > 1e-3
        assert (found - expected).abs().max() <= 1e-10
    fxlora.verify(more, calls=[((X,), {}), ((X, GATE), {})], methods={"encode": X})


def test_everything_else_is_as_it_was(
    lora: fxlora.CapturedModule, more: fxlora.CapturedModule
) -> None:
    assert len(lora.programs) == 1 and more.plan == lora.plan
    state = more.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in lora.state_dict().items())
    flags = {name: p.requires_grad for name, p in more.named_parameters()}
    assert all(flags[name] == p.requires_grad for name, p in lora.named_parameters())
    removed = (fxlora.remove(more), fxlora.remove(lora))
    assert torch.equal(removed[0].norm.running_mean, removed[1].norm.running_mean)
    assert torch.equal(removed[0](X), removed[1](X))


def test_it_trains_copies_and_is_saved(
    model: Gated, lora: fxlora.CapturedModule, more: fxlora.CapturedModule, tmp_path: Path
) -> None:
    ours = copy.deepcopy(more).train()
    torch.manual_seed(0)
    ours(X, GATE).square().sum().backward()
    grads = {n for n, p in ours.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert grads == {n for n, p in ours.named_parameters() if p.requires_grad}
    before = lora(X)
    torch.optim.SGD(fxlora.lora_parameters(ours), lr=0.1).step()
    assert torch.equal(lora(X), before) and not torch.equal(ours.eval()(X), before)
    fxlora.save_adapter(more, tmp_path)
    both = fxlora.capture(model, calls=[((X,), {}), ((X, GATE), {})])
    loaded = fxlora.load_adapter(both, tmp_path)
    for name in (*more.adapter_parameters(), *more.trained):
        assert torch.equal(loaded.get_parameter(name), more.get_parameter(name))


def test_again_and_without_adapters(model: Gated) -> None:
    gm = fxlora.capture(model, X)
    gm = fxlora.capture_more(gm, model, kwargs={"x": X, "gate": GATE})
    gm = fxlora.capture_more(gm, model, methods={"encode": X})
    assert len(gm.programs) == 3
    for found, expected in ((gm(X), model(X)), (gm(X, GATE), model(X, GATE))):
        assert torch.equal(found, expected)
    assert torch.equal(gm.encode(X), model.encode(X))


def test_a_moved_module_takes_a_moved_model(model: Gated) -> None:
    gm, moved = fxlora.capture(model, X).to(torch.bfloat16), copy.deepcopy(model).bfloat16()
    x = X.bfloat16()
    with pytest.raises(fxlora.InputError, match="differ from the module's"):
        fxlora.capture_more(gm, model, methods={"encode": X})
    more = fxlora.capture_more(gm, moved, methods={"encode": x})
    assert torch.equal(more.encode(x), moved.encode(x))


def test_hooks_stay_and_modes_must_be_as_they_were(model: Gated) -> None:
    frozen = copy.deepcopy(model).train()
    frozen.norm.eval()
    gm = fxlora.capture(frozen, X)
    seen: list[Any] = []
    gm.register_forward_hook(lambda *call: seen.append(call))
    frozen.eval()
    with pytest.raises(fxlora.InputError, match="norm were in another mode"):
        fxlora.capture_more(gm, frozen, (X, GATE))
    frozen.train().norm.eval()
    more = fxlora.capture_more(gm, frozen, (X, GATE))
    more(X, GATE)
    assert len(seen) == 1
    with pytest.raises(fxlora.CaptureError, match="not int"):
        fxlora.capture_more(gm, 3, X)  # type: ignore[arg-type]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        if rows is not None:
            return self.head.weight[rows] @ self.table(ids).T
        return self.head(self.table(ids))


def refusals() -> dict[str, Callable[[Gated, fxlora.CapturedModule], Any]]:
    torch.manual_seed(1)
    other = Gated().double().eval()
    folded = lambda lora: fxlora.fold(lora)  # noqa: E731
    return {
        "runs a call like one of these already": lambda model, lora: (lora, model, X[:2]),
        "give the further calls": lambda model, lora: (lora, model),
        "capture before fold": lambda model, lora: (folded(lora), model, (X, GATE)),
        "up.weight.*differ from the module's": lambda model, lora: (lora, other, (X, GATE)),
        "with the same ties": lambda model, lora: (lora, Tied(), torch.tensor([1])),
        "takes a captured module": lambda model, lora: (model, lora, X),
    }


@pytest.mark.parametrize("message", list(refusals()))
def test_refusals(message: str, model: Gated, lora: fxlora.CapturedModule) -> None:
    with pytest.raises(fxlora.FxLoraError, match=message):
        fxlora.capture_more(*refusals()[message](model, lora))


def test_a_read_for_which_the_plan_has_no_place_is_refused() -> None:
    torch.manual_seed(0)
    model, ids = Tied().double().eval(), torch.tensor([[1, 5, 2]])
    lora = fxlora.adapt(model, ids, rules=LoraConfig(r=2, target_modules=["head"]))
    rows = torch.tensor([1, 3])  # a call that reads the table by the name of the head
    with pytest.raises(fxlora.MisfitError, match="Or capture the model with all its calls"):
        fxlora.capture_more(lora, model, (ids[0], rows))


class Table(nn.Module):
    """Its positions are read as data in one call, and by an embedding without gradients in one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.table(torch.arange(x.shape[1]))

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).argmax(-1)


@pytest.mark.parametrize("trained_with_both", [True, False])
def test_an_adapter_goes_to_a_capture_of_other_calls(
    trained_with_both: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = Table().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    both, one = fxlora.capture(model, x, methods={"predict": x}), fxlora.capture(model, x)
    first, second = (both, one) if trained_with_both else (one, both)
    lora = fxlora.inject(first, fxlora.match(first, Rule("table", lora=LoraConfig(r=2))))
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path)
    loaded = fxlora.load_adapter(second, tmp_path)
    assert (lora(x) - model(x)).abs().max() > 1e-3
    assert (loaded(x) - lora(x)).abs().max() <= 1e-10
    fxlora.verify(loaded, x)
