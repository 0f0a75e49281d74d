"""Writes by hand to a frozen weight of a captured module: the source model is never changed."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxlora
from fxlora import LoraConfig

from .laws import assert_untouched, randomise, snapshot

X = torch.randn(4, 5, dtype=torch.float64)


def captured() -> tuple[nn.Module, fxlora.CapturedModule]:
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 5)).double()
    model.requires_grad_(False)
    return model, fxlora.capture(model, X)


def weight_of(module: nn.Module) -> Any:
    return module.get_parameter("0.weight")


def ones() -> torch.Tensor:
    return torch.ones(3, 5, dtype=torch.float64)


# Of every function in torch.nn.init that writes to a matrix, its arguments.
INITS: dict[str, Any] = {
    "constant_": (0.5,),
    "sparse_": (0.5,),
    "dirac_": None,  # of 3 to 5 dimensions
}
INITIALIZERS = [
    name
    for name, value in vars(nn.init).items()
    if inspect.isfunction(value) and name.endswith("_") and not name.startswith("_")
    if INITS.get(name, ()) is not None
]

COPIES: dict[str, Callable[[Any], Any]] = {
    **{n: lambda p, n=n: getattr(nn.init, n)(p, *INITS.get(n, ())) for n in INITIALIZERS},
    "copy_": lambda p: p.copy_(ones()),
    "+=": lambda p: p.__iadd__(1),
    "item": lambda p: p.__setitem__(0, 1.0),
    "set_": lambda p: p.set_(ones()),
    "data =": lambda p: setattr(p, "data", ones()),
    "grad =": lambda p: (setattr(p, "grad", ones()), torch.optim.SGD([p], 0.1).step()),
    "grad =, one by one": lambda p: (
        setattr(p, "grad", ones()),
        torch.optim.AdamW([p], 0.1, foreach=False).step(),
    ),
    "vector": lambda p: nn.utils.vector_to_parameters(torch.ones(15).double(), [p]),
}

VIEWS: dict[str, Callable[[Any], Any]] = {
    "data": lambda p: p.data.copy_(ones()),
    "data, item": lambda p: p.data.__setitem__(0, 1.0),
    "detach": lambda p: p.detach().mul_(2),
    "view": lambda p: p.view(-1).add_(1),
    "view of a view": lambda p: p.view(-1)[2:].unflatten(0, (13, 1)).t().zero_(),
    "row": lambda p: p[0].add_(1),
    "entry of a row": lambda p: p[0].__setitem__(1, 2.0),
    "T": lambda p: p.T.add_(1),
    "split": lambda p: p.split(1)[1].fill_(0),
    "chunk, foreach": lambda p: torch._foreach_add_(p.chunk(3), 1.0),
    "out": lambda p: torch.add(ones(), 1, out=p.data),
    "relu": lambda p: F.relu(p.detach(), inplace=True),
}
COPIES |= VIEWS


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_write_to_a_parameter_copies_it_first(way: str, adapted: bool) -> None:
    model, gm = captured()
    before, shared = snapshot(model), weight_of(gm)
    module = gm
    if adapted:
        module = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["0"])))
    outputs = model(X)
    with torch.no_grad():
        COPIES[way](weight_of(module))
    assert not torch.equal(weight_of(module), weight_of(model))
    assert not torch.equal(module(X), outputs)  # the graph reads what was written
    assert type(weight_of(module)) is nn.Parameter
    assert_untouched(model, before)
    if adapted:
        assert weight_of(gm) is shared and torch.equal(gm(X), outputs)


def test_what_reads_it_copies_nothing() -> None:
    model, gm = captured()
    p, q = weight_of(gm), weight_of(model)
    assert p.abs().sum() == q.abs().sum() and p.shape == (3, 5) and p[0, 0].item() == q[0, 0].item()
    p, gm = weight_of(other := captured()[1]), other
    for read in (p.norm(), p.mean(), p.clone(), p * 2, F.linear(X, p), p.tolist()):
        del read
    p.requires_grad_(False)
    gm.state_dict()
    gm(X)
    assert type(p) is not nn.Parameter  # still shared


def test_views_are_of_the_parameters_own_memory() -> None:
    model, gm = captured()
    p, before = weight_of(gm), snapshot(model)
    rows = p.detach()
    with torch.no_grad():
        for row in p:
            row /= row.norm()
        p[0, 0] += 3
    assert rows.data_ptr() == p.data_ptr() and torch.equal(rows, p)
    backup = p.data
    p.data = torch.zeros_like(backup)
    assert backup.abs().sum() > 0 and p.abs().sum() == 0
    p.data = backup
    nn.init.zeros_(p)
    assert torch.equal(backup, torch.zeros_like(backup))
    assert_untouched(model, before)


def test_parameters_made_of_it_are_the_users_own() -> None:
    model, gm = captured()
    before = snapshot(model)
    made = nn.Parameter(weight_of(gm))
    tables = nn.Embedding.from_pretrained(gm.get_parameter("2.weight"), freeze=False)
    other: Any = type(gm.get_parameter("2.bias"))(torch.ones(5), requires_grad=False)
    with torch.no_grad():
        for parameter in (made, tables.weight, other):
            assert type(parameter) is nn.Parameter
            parameter.zero_()
    for name in ("0.bias", "2.weight"):
        torch.utils.swap_tensors(gm.get_parameter(name), nn.Parameter(torch.ones(2, 2).double()))
    assert_untouched(model, before)


def test_copies_and_files_hold_plain_tensors() -> None:
    model, gm = captured()
    assert type(weight_of(copy.deepcopy(gm))) is nn.Parameter
    assert type(copy.deepcopy(weight_of(gm))) is nn.Parameter
    assert type(pickle.loads(pickle.dumps(weight_of(gm)))) is nn.Parameter
    file = io.BytesIO()
    torch.save([weight_of(gm).detach(), weight_of(gm), gm.state_dict()], file)
    file.seek(0)
    view, parameter, state = torch.load(file, weights_only=True)
    assert type(view) is torch.Tensor and type(parameter) is nn.Parameter
    for one in (view, parameter, state["0.weight"]):
        assert torch.equal(one, weight_of(model))


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
            self.b.weight = self.a.weight
            self.row = nn.Parameter(self.a.weight.detach()[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.b(torch.tanh(self.a(x)))) * self.row

    model = Tied()
    before = snapshot(model)
    gm = fxlora.capture(model, X)
    with torch.no_grad():
        nn.init.eye_(gm.get_parameter("a.weight"))
    assert gm.get_parameter("a.weight") is gm.get_parameter("b.weight")
    assert torch.equal(gm.get_parameter("row"), torch.eye(5).double()[1])  # of the same memory
    assert_untouched(model, before)


def test_optimizers_compile_and_func_take_it_as_a_parameter() -> None:
    model, gm = captured()
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["0"])))
    randomise(lora)

    def loss(x: torch.Tensor) -> torch.Tensor:
        weight: Any = gm.get_parameter("2.weight")
        return (lora(x) @ weight.detach() * weight.data.norm() + weight.T.sum()).sum()

    expected = loss(X)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    params = {name: p.detach() for name, p in lora.named_parameters()}

    def called(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(lora, params, (x,)).sum()

    grads = torch.func.grad(called)(params, X)
    each = torch.func.vmap(torch.func.grad(called), (None, 0))(params, X[:, None])
    for name, grad in grads.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(each[name].sum(0), grad)
    assert_untouched(model, snapshot(model))


UNNOTICED: dict[str, Callable[[Any], Any]] = {  # docs/limits.md
    "out": lambda p: torch.add(p, 1, out=p),
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "a function's view": lambda p: torch.transpose(p, 0, 1).add_(1),
}


@pytest.mark.parametrize("way", UNNOTICED)
def test_memory_of_its_own_is_safe_from_every_write(way: str) -> None:
    model, gm = captured()
    before = snapshot(model)
    gm.get_submodule("0").requires_grad_(True).requires_grad_(False)
    with torch.no_grad():
        UNNOTICED[way](weight_of(gm))
    assert not torch.equal(weight_of(gm), weight_of(model))
    assert_untouched(model, before)
