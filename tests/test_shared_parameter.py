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
from fxlora import LoraConfig, SubmoduleError

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
    "entry": lambda p: p[0].__setitem__(1, 2.0),
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


def test_views_follow_the_memory_of_their_parameter() -> None:
    model, gm = captured()
    before = snapshot(model)
    p = weight_of(gm)
    rows, first, column, entries = p.detach(), p[0], p.data.T[1], p.view(-1)
    with torch.no_grad():
        first += 3
        column.zero_()
        entries[2] = 7
    assert torch.equal(rows.clone(), p) and p[0, 1] == 0 and p[0, 2] == 7 and p[0, 0] != 7
    assert_untouched(model, before)


@pytest.mark.parametrize("array", [lambda p: p.numpy(), lambda p: p.detach().numpy()])
def test_an_array_of_it_cannot_be_written_to(array: Any) -> None:
    _, gm = captured()
    with pytest.raises(ValueError, match="read-only"):
        array(weight_of(gm)).fill(1)


def test_a_write_that_no_name_tells_raises_afterwards() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 5).double().requires_grad_(False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids).sin()

    gm = fxlora.capture(Embeds(), ids := torch.arange(6).view(2, 3))
    view: Any = gm.get_parameter("table.weight").detach()
    with pytest.raises(SubmoduleError, match="which has changed, too"):
        F.embedding(ids, view, max_norm=0.1)


def test_its_views_are_read_as_plain_tensors() -> None:
    model, gm = captured()
    p, q = weight_of(gm), weight_of(model)
    place = p.data_ptr()
    for one, other in (
        (p.detach().abs().sum(), q.abs().sum()),
        (X @ p.T, X @ q.T),
        (p.data[1:].norm(), q[1:].norm()),
        (torch.stack([p.view(-1), p.view(-1)]), torch.stack([q.view(-1), q.view(-1)])),
        (p.detach().clone().zero_(), torch.zeros(3, 5)),
    ):
        assert torch.equal(one, other.to(one.dtype)) and type(one) is torch.Tensor
    leaf = p.detach().requires_grad_()
    (leaf * 2).sum().backward()
    assert torch.equal(leaf.grad, 2 * ones())
    assert p.numpy().tolist() == q.tolist()
    assert weight_of(gm).data_ptr() == place == q.data_ptr()  # nothing was copied


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
