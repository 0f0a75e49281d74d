"""Folding: in blocks of each layout, and in place."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import InjectError, LoraConfig, Rule
from fxlora.lora.layout import Layout
from fxlora.module import adapted_weight, folded_weight

from .laws import randomise

pytestmark = pytest.mark.usefixtures("small_heap")

F64 = torch.float64


class Experts(nn.Module):
    """A stack of matrices (e, in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight)


class Heads(nn.Module):
    """A projection (in, heads, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,iho->bho", x, self.weight)


class Applied(nn.Module):
    """x @ W, with W as (in, out), as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Packed(Applied):
    """The same, with three parts next to each other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = super().forward(x).chunk(3, -1)
        return q * k + v


X = torch.randn(2, 7)
# kind → the model, an input, and what its rule asks for
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(7, 5), X, {}),
    "x @ W": (Applied, X, {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), torch.randn(2, 4, 5, 5), {}),
    "conv_transpose": (lambda: nn.ConvTranspose2d(4, 6, (3, 2)), torch.randn(2, 4, 5, 5), {}),
    "embedding": (lambda: nn.Embedding(11, 4), torch.tensor([[3, 9]]), {}),
    "stack": (Experts, torch.randn(4, 3, 6), {}),
    "several outputs": (Heads, torch.randn(2, 6), {}),
    "parts": (Packed, X, {"parts": 3, "enable": [True, False, True]}),
    "dora": (lambda: nn.Linear(7, 5), X, {"lora": LoraConfig(r=2, use_dora=True)}),
    "pissa": (lambda: nn.Linear(7, 5), X, {"lora": LoraConfig(r=2, init_lora_weights="pissa")}),
}


def adapted(kind: str, dtype: torch.dtype) -> fxlora.CapturedModule:
    make, x, options = MODELS[kind]
    torch.manual_seed(0)
    x = x.to(dtype) if x.is_floating_point() else x
    rule = Rule("weight", **{"lora": LoraConfig(r=2, lora_alpha=3), **options})
    lora = fxlora.adapt(make().to(dtype), x, rules=rule)
    randomise(lora, std=1.0)
    return lora


def exact(lora: fxlora.CapturedModule) -> torch.Tensor:
    """Return the adapted weight in float64, computed at once as the graph's formula does."""
    value: torch.Tensor = lora.get_parameter("weight").detach().double()
    for entry in lora.plan or ():
        values = {name: lora.get_parameter(name).detach().double() for name in entry.tensors}
        value = adapted_weight.adapted_weight(entry, value, values)
    return value


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("entries", [1, 7, 20, 10_000])
@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_folded_block_by_block(
    kind: str, entries: int, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded_weight, "_CPU_BLOCK", entries)
    for dtype in (F64, torch.float32):
        lora = adapted(kind, dtype)
        before, expected = lora.get_parameter("weight").detach().clone(), exact(lora)
        assert float((expected - before).abs().max()) > 0.1
        found = fxlora.fold(lora, inplace=inplace).get_parameter("weight")
        assert found.dtype == dtype and found.stride() == before.stride()
        if dtype == F64:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        elif kind not in ("dora", "pissa"):  # whose factors are computed in float64 first
            assert torch.equal(found, expected.float())


@pytest.mark.parametrize(
    "roles",
    ["oi", "io", "eoi", "eio", "oikk", "iok", "kkio", "kio", "ioo", "iio", "ooi", "eeoi", "oei"],
)
@pytest.mark.parametrize("limit", [1, 13])
def test_a_block_has_the_products_of_its_parts(roles: str, limit: int) -> None:
    """Blocks that are cut in any of the layout's dimensions cover the weight once."""
    layout, shape = Layout(roles), tuple(range(2, 2 + len(roles)))
    a, b = (torch.randn(size, dtype=F64) for size in layout.factor_shapes(shape, 2))

    def product(a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        zeros = layout.matrix(torch.zeros(shape, dtype=F64), shape)
        return layout.unmatrix(layout.add_pair(zeros, a, b, 3.0, shape), shape)

    whole, found = product(a, b, shape), torch.zeros(shape, dtype=F64)
    for box in folded_weight.Box.whole(shape).split(layout.cut_dims, limit):
        parts = layout.factors_of_block(a, b, box.first, box.shape)
        box.of(found).add_(product(*parts, box.shape))
    assert float(whole.abs().min()) > 0
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, -1])
def test_parts_are_folded_in_any_order(order: int) -> None:
    lora = adapted("parts", F64)
    entries = list(lora.plan or ())[::order]
    values = {n: lora.get_parameter(n).detach() for e in entries for n in e.tensors}
    weight = lora.get_parameter("weight").detach()
    found = folded_weight.folded_weight(entries, weight, values)
    torch.testing.assert_close(found, exact(lora), rtol=0, atol=1e-12)
    rows = folded_weight.folded_weight(entries, weight[4:, 4:], values, first=(4, 4))
    torch.testing.assert_close(rows, found[4:, 4:], rtol=0, atol=1e-12)


# ---- in place -----------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def two_layers(modules: str | None = None) -> tuple[nn.Module, fxlora.CapturedModule]:
    model = nn.Sequential(Layer(), Layer(), nn.Linear(7, 5)).double()
    config = LoraConfig(r=2, target_modules="all-linear")
    lora = fxlora.adapt(model, X.double(), rules=config, modules=modules)
    randomise(lora, std=1.0)
    return model, lora


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


def is_folded(lora: fxlora.CapturedModule, expected: torch.Tensor) -> bool:
    assert lora.plan is None and not any(p.requires_grad for p in lora.parameters())
    torch.testing.assert_close(lora(X.double()), expected, rtol=0, atol=1e-10)
    return True


@pytest.mark.parametrize("modules", [None, "0"])
def test_weights_that_nothing_else_holds_are_overwritten(modules: str | None) -> None:
    model, lora = two_layers(modules)
    expected = lora(X.double()).detach()
    assert float((model(X.double()) - expected).abs().max()) > 0.1
    before = {n: p for n, p in addresses(lora).items() if "lora_" not in n}
    del model  # which refers to nothing; the captured module is garbage that refers to itself
    assert fxlora.fold(lora, inplace=True) is lora
    assert addresses(lora) == before
    assert is_folded(lora, expected)
    compiled: Any = torch.compile(lora, backend="eager")
    assert torch.equal(compiled(X.double()), lora(X.double()))
    assert fxlora.fold(lora, inplace=True) is lora  # again changes nothing
    assert is_folded(lora, expected)


HOLDERS: dict[str, Callable[[nn.Module, fxlora.CapturedModule], Any]] = {
    "the source": lambda model, lora: model,
    "a tensor of the source": lambda model, lora: model.get_parameter("0.up.weight"),
    "a view": lambda model, lora: model.get_parameter("0.up.weight").detach()[1:, 2],
    "an array": lambda model, lora: model.get_parameter("0.up.weight").detach().numpy(),
    "an adapted copy": lambda model, lora: fxlora.remove(lora),
    "a shallow copy": lambda model, lora: copy.copy(lora),
    "another module": lambda model, lora: holding(lora.get_parameter("0.up.weight")),
    "an optimizer": lambda model, lora: torch.optim.SGD([lora.get_parameter("0.up.weight")]),
    "a state_dict": lambda model, lora: lora.state_dict(keep_vars=True),
    "a storage": lambda model, lora: lora.get_parameter("0.up.weight").untyped_storage(),
}


def holding(parameter: nn.Parameter) -> nn.Module:
    module = nn.Module()
    module.register_parameter("held", parameter)
    return module


@pytest.mark.parametrize("kind", HOLDERS)
def test_weights_that_something_else_holds_are_kept(kind: str) -> None:
    model, lora = two_layers()
    expected = lora(X.double()).detach()
    before = addresses(lora)
    holder = HOLDERS[kind](model, lora)
    only = weakref.ref(model)
    del model
    gc.collect()
    fxlora.fold(lora, inplace=True)
    assert is_folded(lora, expected) and holder is not None
    assert lora.get_parameter("0.up.weight").data_ptr() != before["0.up.weight"]
    overwritten = lora.get_parameter("1.up.weight").data_ptr() == before["1.up.weight"]
    assert overwritten is (only() is None and kind not in WHOLE)


WHOLE = ("an adapted copy", "a shallow copy", "a state_dict")  # hold every weight


class Head(nn.Module):
    """An embedding whose weight is also the output layer's, which the rule names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.emb(ids)))


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
def test_a_tie_that_the_fold_splits_is_not_overwritten() -> None:
    ids = torch.tensor([[3, 5]])
    lora = fxlora.adapt(Head().double(), ids, rules=Rule(["head", "mid"], lora=LoraConfig(r=2)))
    randomise(lora, std=1.0)
    expected = lora(ids).detach()
    assert fxlora.fold(lora, inplace=True).get_parameter("emb.weight") is not None
    torch.testing.assert_close(lora(ids), expected, rtol=0, atol=1e-10)
    assert not torch.equal(lora.get_parameter("emb.weight"), lora.get_parameter("head.weight"))


def test_memory_of_a_file_or_an_array_is_not_overwritten() -> None:
    array = torch.randn(5, 7).numpy()
    layer = nn.Linear(7, 5)
    layer.weight = nn.Parameter(torch.from_numpy(array))
    before = array.copy()
    lora = fxlora.adapt(layer, X, rules=Rule("weight", lora=LoraConfig(r=2)))
    randomise(lora, std=1.0)
    expected = lora(X).detach()
    del layer
    fxlora.fold(lora, inplace=True)
    torch.testing.assert_close(lora(X), expected)
    assert (array == before).all()


def test_tied_weights_stay_tied() -> None:
    layer = nn.Linear(7, 7, bias=False)
    lora = fxlora.adapt(
        nn.Sequential(layer, nn.ReLU(), layer).double(),
        X.double(),
        rules=Rule("*.weight", lora=LoraConfig(r=2)),
    )
    randomise(lora, std=1.0)
    expected = lora(X.double()).detach()
    del layer
    before = lora.get_parameter("0.weight").data_ptr()
    fxlora.fold(lora, inplace=True)
    assert lora.get_parameter("0.weight").data_ptr() == before
    assert is_folded(lora, expected)


def test_a_sum_that_overflows_leaves_every_weight_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4)).to(torch.float16)
    config = LoraConfig(r=2, target_modules="all-linear")
    lora = fxlora.adapt(model, X.half(), rules=config)
    randomise(lora, std=1.0)
    with torch.no_grad():
        lora.get_parameter("1.lora_B.default.weight").fill_(1e4)
        lora.get_parameter("1.lora_A.default.weight").fill_(1e4)
    del model
    before, graph = copy.deepcopy(lora.state_dict()), str(lora.graph)
    with pytest.raises(InjectError, match=r"'1'.*not finite in torch\.float16"):
        fxlora.fold(lora, inplace=True)
    assert lora.plan is not None and str(lora.graph) == graph
    assert all(torch.equal(before[name], value) for name, value in lora.state_dict().items())


def test_blocks_keep_their_hooks_and_identity() -> None:
    model, lora = two_layers("0")
    expected, block = lora(X.double()).detach(), lora.get_submodule("0")
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    fxlora.fold(lora, inplace=True)
    assert is_folded(lora, expected)
    assert lora.get_submodule("0") is block and calls == [1]
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
