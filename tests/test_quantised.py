"""Quantised bases: torchao's tensor subclasses, captured, trained over and folded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import CapturedModule, InjectError, LoraConfig, QuantisedError
from fxlora.module.quantised import dequantised, is_quantised, stored, stored_bytes
from fxlora.module.quantiser import quantiser_of
from fxlora.passes.fold_quantised import QuantisedFold, check_products

from .typed import plan_of, untyped

pytest.importorskip("torchao", reason="the torchao extra is not installed")

from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
CONFIG = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """NF4 in blocks of 32 with scales in blocks of 2: their defaults need large weights."""
    return to_nf4(weight, 32, 2)


def in_nf4(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(nf4(layer.weight.detach()), requires_grad=False)


INT4: Any = IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerGroup(32))
KINDS: dict[str, Callable[[nn.Module], None]] = {
    "int8": lambda model: quantize_(model, Int8WeightOnlyConfig()),
    "int4": lambda model: quantize_(model, INT4),
    "nf4": in_nf4,
    "int8 x int8": lambda model: quantize_(model, Int8DynamicActivationInt8WeightConfig()),
}
QUICK = ("int8", "nf4")
EVERY = [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in KINDS]
PRODUCTS = [kind for kind in EVERY if "int8 x int8" not in kind.values]


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if is_quantised(parameter)]


def same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    held = [[part for weight in given for part in stored(weight)] for given in (ours, theirs)]
    return bool(ours) and all(torch.equal(a, b) for a, b in zip(*held, strict=True))


class Case:
    """One capture of a quantised model, and an injection of random adapters."""

    def __init__(self, kind: str) -> None:
        self.model: Any = plain_model()
        KINDS[kind](self.model)
        self.before = [part.clone() for w in weights(self.model) for part in stored(w)]
        self.captured = fxlora.capture(self.model, X)
        plan = fxlora.match(self.captured, CONFIG)
        torch.manual_seed(2)
        self.lora = fxlora.inject(self.captured, plan).eval()


_CASES: dict[str, Case] = {}


@pytest.fixture(params=EVERY)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def case_of(kind: str) -> Case:
    if kind not in _CASES:
        _CASES[kind] = Case(kind)
    return _CASES[kind]


def formula(case: Case, module: CapturedModule) -> torch.Tensor:
    """The outputs by hand: torchao's own layers, and a branch on each activation."""
    first, _, second = case.model

    def layer(x: torch.Tensor, source: Any, name: str) -> torch.Tensor:
        a, b = (module.get_parameter(f"{name}.lora_{k}.default.weight") for k in "AB")
        return F.linear(x, source.weight, source.bias) + 2 * (x @ a.T) @ b.T

    return layer(torch.tanh(layer(X, first, "0")), second, "2")


# ---- capture, training, files -------------------------------------------------------------------


def test_a_capture_has_the_bits_of_the_source(case: Case) -> None:
    assert torch.equal(case.captured(X), case.model(X))
    assert torch.equal(case.captured.train()(X[:2]), case.model(X[:2]))
    case.captured.eval()
    assert [type(w) for w in weights(case.captured)] == [type(w) for w in weights(case.model)]


def test_the_branch_is_on_the_activation(case: Case) -> None:
    assert case.lora.plan is not None
    assert [(e.site, e.op, e.form) for e in case.lora.plan] == [
        ("0", "linear", "branch"),
        ("2", "linear", "branch"),
    ]
    expected = formula(case, case.lora)
    assert float((expected - case.model(X)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(case.lora(X), expected, rtol=1e-5, atol=1e-5)


def test_qlora_trains_only_a_and_b_and_leaves_the_source_alone(case: Case) -> None:
    lora = copy.deepcopy(case.lora).train()
    wanted = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(fxlora.lora_parameters(lora), lr=1e-2)
    losses: list[float] = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.mse_loss(lora(X), wanted)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in fxlora.lora_parameters(lora))
    now = [part for w in weights(case.model) for part in stored(w)]
    assert all(torch.equal(a, b) for a, b in zip(case.before, now, strict=True))
    assert same_bits(weights(lora), weights(case.model))


def test_the_gradients_are_those_of_the_formula(case: Case) -> None:
    parameters = fxlora.lora_parameters(case.lora)
    ours = torch.autograd.grad(case.lora(X).square().sum(), parameters)
    theirs = torch.autograd.grad(formula(case, case.lora).square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_files_copies_state_dicts_and_remove(case: Case, tmp_path: Path) -> None:
    fxlora.save_adapter(case.lora, tmp_path / "adapter")
    loaded = fxlora.load_adapter(case.captured, tmp_path / "adapter").eval()
    copied = copy.deepcopy(case.lora)
    again = fxlora.inject(case.captured, fxlora.match(case.captured, CONFIG)).eval()
    again.load_state_dict(case.lora.state_dict())
    for module in (loaded, copied, again):
        assert torch.equal(module(X), case.lora(X))
        assert same_bits(weights(module), weights(case.model))
    assert torch.equal(fxlora.remove(case.lora)(X), case.model(X))
    with torch.no_grad():  # a copy has memory of its own
        next(stored(weights(copied)[0])).zero_()
    assert same_bits(weights(case.lora), weights(case.model))


def test_the_report_has_the_bytes_of_the_base_as_stored(case: Case) -> None:
    data = json.loads(fxlora.report(case.lora, "json"))["quantised_weights"]
    assert data["bytes_in_dtype"] == 4 * (64 * 96 + 96 * 32)
    held = [part for w in weights(case.model) for part in stored(w)]
    assert data["stored_bytes"] == sum(t.numel() * t.element_size() for t in held)
    assert data["stored_bytes"] == sum(map(stored_bytes, weights(case.model)))
    assert "Quantised weights: " in fxlora.report(case.lora)


def test_an_exported_file_needs_no_fxlora(tmp_path: Path) -> None:
    case = case_of("int8")
    path = fxlora.export(case.lora, tmp_path / "model.pt2", X)
    program = torch.export.load(path)
    assert torch.equal(program.module()(X), case.lora(X))
    assert all("fxlora" not in str(node.target) for node in program.graph.nodes)


def test_a_file_takes_a_batch_of_one(case: Case, tmp_path: Path) -> None:
    """Also where the decomposition of a quantised product checks strides, and so the batch."""
    lora = fxlora.adapt(case.model, X, rules=CONFIG).eval()
    program = torch.export.load(fxlora.export(lora, tmp_path / "m.pt2", X)).module()
    for batch in (X, X[:1], X[:3]):
        torch.testing.assert_close(program(batch), lora(batch), rtol=1e-5, atol=1e-5)


def test_a_quantised_weight_needs_the_branch() -> None:
    case = case_of("int8")
    with pytest.raises(fxlora.UnsupportedOpError, match=r"'0' is quantised.*dora reads the weight"):
        fxlora.match(case.captured, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    pissa = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    lora = fxlora.inject(case.captured, fxlora.match(case.captured, pissa)).eval()
    torch.testing.assert_close(lora(X), case.model(X))


class DirectNF4(nn.Module):
    """A bare weight that an autograd.Function reads, as torchtune's QLoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.coded = nn.Parameter(nf4(torch.randn(96, 64)), requires_grad=False)
        self.out = nn.Linear(96, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(linear_nf4(x, untyped(self.coded)))


def test_a_function_that_computes_the_product_takes_the_branch() -> None:
    torch.manual_seed(0)
    model = DirectNF4()
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    rule = fxlora.Rule("coded", lora=config)
    lora = fxlora.adapt(model, X, rules=rule).eval()
    assert [(e.op, e.form) for e in plan_of(lora)] == [("linear", "branch")]
    a, b = (lora.get_parameter(f"coded_adapter.lora_{k}.default.weight") for k in "AB")
    branch = 2 * (X @ a.T) @ b.T
    expected = model.out(linear_nf4(X, untyped(model.coded)) + branch)
    assert float((expected - model(X)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(lora(X), expected)
    assert fxlora.verify(lora, X).sites
    plain = fxlora.fold(lora, quantised="dequantise")
    torch.testing.assert_close(plain(X), expected, rtol=1e-4, atol=1e-4)


class Scaled(torch.autograd.Function):
    """A product that passes another gradient on: no branch has it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return 3 * grads[0] @ weight.to(grads[0].dtype), None


def test_a_function_with_a_gradient_of_its_own_is_refused() -> None:
    class Model(DirectNF4):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(untyped(Scaled.apply)(x, self.coded))

    captured = fxlora.capture(Model(), X)
    with pytest.raises(fxlora.UnsupportedOpError, match=r"is quantised.*read by Scaled"):
        fxlora.match(captured, fxlora.Rule("coded", lora=LoraConfig(r=2)))


def test_quantised_embeddings() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lin = nn.Embedding(50, 64, padding_idx=0), nn.Linear(64, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.lin(self.table(ids)).mean(1)

    model, ids = Model().eval(), torch.randint(0, 50, (3, 5))
    rows: Any = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, rows, lambda module, _: isinstance(module, nn.Embedding | nn.Linear))
    config = LoraConfig(r=2, target_modules=["table", "lin"], init_lora_weights=False)
    lora = fxlora.adapt(model, ids, rules=config).eval()
    assert [(e.op, e.form) for e in plan_of(lora)] == [
        ("embedding", "branch"),
        ("linear", "branch"),
    ]
    assert len(weights(lora)) == 2
    assert not torch.allclose(lora(ids), model(ids), atol=1e-2)
    plain = fxlora.fold(lora, quantised="dequantise")
    torch.testing.assert_close(plain(ids), lora(ids), rtol=1e-4, atol=1e-5)
    aware = fxlora.merge_aware(lora)
    assert torch.equal(aware(ids), fxlora.fold(aware, quantised="requantise")(ids))


def test_the_tracer_asks_for_example_inputs() -> None:
    with pytest.raises(fxlora.CaptureError, match="Give example inputs"):
        fxlora.capture(case_of("int8").model)
    assert fxlora.capture(case_of("int8").model, X).exported  # the advice


def test_other_weights_of_the_same_form_are_other_weights() -> None:
    case = case_of("int8")
    other = plain_model()
    nn.init.normal_(other.get_parameter("0.weight"))
    KINDS["int8"](other)
    with pytest.raises(fxlora.InputError, match=r"0\.weight"):
        fxlora.capture_more(case.captured, other, X[:, None])


def test_a_quantised_weight_cannot_train_in_full() -> None:
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    with pytest.raises(fxlora.UnsupportedOpError, match=r"'2\.weight' is to train .* quantised"):
        fxlora.match(case_of("int8").captured, config)


def test_adapters_of_a_quantised_base_are_routed() -> None:
    case = case_of("int8")
    both = [case.lora, fxlora.scale_adapter(case.lora, 0.5)]
    routed = fxlora.route(both).eval()
    found = routed(X, adapter_ids=torch.tensor([0, 1, 1, 0, -1]))
    expected = [both[0](X), both[1](X), both[1](X), both[0](X), case.model(X)]
    for row, other in enumerate(expected):
        torch.testing.assert_close(found[row], other[row], rtol=1e-4, atol=1e-5)


def test_two_adapters_of_a_quantised_base() -> None:
    """Their branches are summed, and a fold that keeps branches keeps both."""
    case = case_of("int8")
    plan = fxlora.match(case.captured, CONFIG, adapter_name="other")
    both = fxlora.inject(case.lora, plan)
    with torch.no_grad():
        for name in fxlora.activate(both, "other").adapter_parameters():
            nn.init.normal_(both.get_parameter(name))
    other = fxlora.activate(both, "other")
    assert not torch.allclose(other(X), case.model(X), atol=1e-3)
    kept = fxlora.fold(both.eval(), quantised="keep")
    torch.testing.assert_close(kept.eval()(X), both(X), rtol=1e-4, atol=1e-5)


# ---- fold ---------------------------------------------------------------------------------------


def test_a_fold_of_quantised_weights_has_to_be_told_how(case: Case) -> None:
    with pytest.raises(QuantisedError, match=r'quantised.*"keep".*"dequantise".*"requantise"'):
        fxlora.fold(case.lora)
    for refused in (copy.deepcopy(case.lora), case.lora.train().eval()):
        with pytest.raises(QuantisedError):
            fxlora.fold(refused)
    with pytest.raises(fxlora.ConfigError, match="quantised must be one of"):
        fxlora.fold(case.lora, quantised="round")
    with pytest.raises(fxlora.ConfigError, match="quantiser needs"):
        fxlora.fold(case.lora, quantised="keep", quantiser=nf4)


def test_keep_keeps_the_branches_and_folds_the_rest() -> None:
    model = plain_model()
    quantize_(model[0], Int8WeightOnlyConfig())  # pyright: ignore[reportIndexIssue]
    torch.manual_seed(2)
    lora = fxlora.adapt(model, X, rules=CONFIG).eval()
    kept = fxlora.fold(lora, quantised="keep")
    assert kept.plan is not None and [entry.site for entry in kept.plan] == ["0"]
    assert [entry.site for plan in kept.folded for entry in plan] == ["2"]
    torch.testing.assert_close(kept(X), lora(X))
    again = fxlora.fold(kept, quantised="keep")
    assert torch.equal(again(X), kept(X))
    with pytest.raises(fxlora.InputError, match=r"still has the branches of 0.*without folded="):
        fxlora.verify(lora, X, folded=kept)
    found = [fxlora.verify(module, X).sites for module in (kept, lora)]  # the advice
    assert [[site.site for site in sites] for sites in found] == [["0"], ["0", "2"]]


def test_dequantise_gives_plain_weights(product: Case) -> None:
    folded = fxlora.fold(product.lora, quantised="dequantise")
    assert not weights(folded) and folded.plan is None
    for name, source in (("0", product.model[0]), ("2", product.model[2])):
        a, b = (
            product.lora.get_parameter(f"{name}.lora_{k}.default.weight").double() for k in "AB"
        )
        exact = dequantised(source.weight).double() + 2 * b @ a
        assert torch.equal(folded.get_parameter(f"{name}.weight"), exact.float())
    torch.testing.assert_close(folded(X), product.lora(X), rtol=1e-4, atol=1e-5)
    assert fxlora.verify(product.lora, X, folded=folded).sites
    plain = fxlora.merged(product.model, folded)
    assert torch.equal(plain.eval()(X), folded(X))


def test_dequantise_refuses_a_layer_that_quantises_its_inputs_in_bfloat16() -> None:
    x = X.bfloat16()
    for config, refused in (
        (Int8DynamicActivationInt8WeightConfig(), True),
        (Int8WeightOnlyConfig(), False),
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32)).bfloat16()
        quantize_(model, config)
        lora = fxlora.adapt(model, x, rules=LoraConfig(r=2, target_modules="all-linear"))
        if refused:
            with pytest.raises(QuantisedError, match="computes more than the product"):
                fxlora.fold(lora, quantised="dequantise")
        else:
            assert not weights(fxlora.fold(lora, quantised="dequantise"))


def test_layers_that_quantise_their_inputs_stop_gradients() -> None:
    """torchao's own backward gives such a layer's input none: unlike a weight-only layer's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    gm = fxlora.capture(model, X)
    with pytest.raises(fxlora.UnsupportedOpError, match=r"'0' would never train.* pass none on: 2"):
        fxlora.match(gm, LoraConfig(r=2, target_modules=["0"]))
    with pytest.warns(fxlora.FxLoraWarning, match="pass no gradient on: 2. Adapters in front"):
        lora = fxlora.adapt(model, X, rules=CONFIG)  # by the branch of 2
    lora(X).square().sum().backward()
    assert all(bool(p.grad.any()) for p in fxlora.lora_parameters(lora) if p.grad is not None)
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules=["2"]))  # nothing in front trains
    assert [entry.site for entry in plan] == ["2"]


def test_verify_says_what_to_do_over_layers_that_quantise_their_inputs() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 96))
    model = copy.deepcopy(plain)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    lora = fxlora.adapt(model, X, rules=CONFIG)
    with pytest.raises(QuantisedError, match=r"'0': .* before it was quantised\.$"):
        fxlora.verify(lora, X)
    gm = fxlora.capture(plain, X)  # the advice
    other = fxlora.inject(gm, plan_of(lora))
    other.load_state_dict({**lora.state_dict(), **gm.state_dict()})
    fxlora.verify(other, X)


def test_dequantise_refuses_a_read_whose_inputs_are_unknown() -> None:
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    read = graph.call_function(F.linear, (x, weight))
    with pytest.raises(QuantisedError, match="not known what shapes x have"):
        check_products("site", case_of("int8").model[0].weight, [(read, weight)])


def test_retention_far_above_one_is_refused_as_noise() -> None:
    fold = QuantisedFold("requantise", min_retention=0.9)
    fold.check({"a": 0.9, "b": 1.1})
    for kept in (0.89, 1.11, float("nan")):
        with pytest.raises(QuantisedError, match=r"less than min_retention=0.9 or more than 1.1"):
            fold.check({"a": kept})


def larger(times: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A quantiser of another scale than the one that made the base."""

    def quantise(given: torch.Tensor) -> torch.Tensor:
        layer = nn.Linear(64, 96, bias=False)
        layer.weight = nn.Parameter(given * times, requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        return layer.weight.detach()

    return quantise


def test_retention_counts_from_what_the_quantiser_makes_of_the_base() -> None:
    weight = case_of("int8").model[0].weight
    values = dequantised(weight)
    # A change of the weights' own direction: 3 % more of W is no part of it.
    fold, retention = QuantisedFold("requantise", quantiser=larger(1.03)), dict[str, float]()
    fold.stored("a", "a.weight", weight, values * 1.1, retention)
    assert 1 < retention["a"] < 1.06
    # But not where that is more than the change itself.
    with pytest.raises(QuantisedError, match=r"'a': the quantiser .* by 3 times as much as s·BA"):
        fold.stored("a", "a.weight", weight, values * 1.01, retention)
    again = fold.stored("a", "a.weight", weight, values, retention)
    assert again is weight and retention["a"] == 1  # nothing is to be added


def changes() -> dict[str, torch.Tensor]:
    """Changes far below the grid, but for an entry, a third, rows or columns that are not."""
    generator = torch.Generator().manual_seed(4)
    fine = torch.randn(96, 64, generator=generator) * 1e-5
    made = {name: fine.clone() for name in ("entry", "third", "rows", "columns")}
    made["third"][torch.rand(96, 64, generator=generator) < 1 / 3] *= 1e4
    made["entry"][3, 5] = 0.1
    made["rows"][:20] *= 1e4
    made["columns"][:, :15] *= 1e4
    return made


@pytest.mark.parametrize("where", list(changes()))
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_large_entries_hide_nothing(kind: str, where: str) -> None:
    """NF4 keeps the others where they were; int8 moves them at random, by more than the change."""
    weight, change = case_of(kind).model[0].weight, changes()[where]
    values, quantise = dequantised(weight), quantiser_of(weight)
    kept = dequantised(quantise(values + change)).double() - dequantised(quantise(values)).double()
    whole = float((kept * change).sum() / change.square().sum())
    assert abs(whole - 1) < 0.1  # the usual measure sees nothing
    fold = QuantisedFold("requantise")

    def folded() -> None:
        retention: dict[str, float] = {}
        fold.stored("a", "a.weight", weight, values + change, retention)
        fold.check(retention)

    with pytest.raises(
        QuantisedError, match=r"'a'.* its smaller entries|of its smaller entries, 'a'"
    ):
        folded()


def four_ways(kept: torch.Tensor, change: torch.Tensor) -> list[float]:
    """Retention as the docs have it, row by row and column by column."""
    found = [(kept * change).sum() / change.square().sum()]
    parts = 1 / (change.square() + change.square().median())
    found.append((parts * kept * change).sum() / (parts * change.square()).sum())
    for one, other in ((kept, change), (kept.T, change.T)):
        norms = torch.stack([row.square().sum() for row in other])
        rows = [norms.median() + norm for norm in norms]
        shares = [(k * c).sum() / n for k, c, n in zip(one, other, rows, strict=True)]
        wholes = [norm / n for norm, n in zip(norms, rows, strict=True)]
        found.append(torch.stack(shares).sum() / torch.stack(wholes).sum())
    return [float(ratio) for ratio in found]


def test_requantise_stores_the_sum_as_the_base_is_stored(case: Case) -> None:
    folded = fxlora.fold(case.lora, quantised="requantise", min_retention=-9)
    assert [type(w) for w in weights(folded)] == [type(w) for w in weights(case.model)]
    assert folded.retention.keys() == {"0", "2"}
    for name, source in (("0", case.model[0]), ("2", case.model[2])):
        a, b = (case.lora.get_parameter(f"{name}.lora_{k}.default.weight").double() for k in "AB")
        change = 2 * b @ a
        after = dequantised(folded.get_parameter(f"{name}.weight")).double()
        moved = (
            after - dequantised(quantiser_of(source.weight)(dequantised(source.weight))).double()
        )
        expected = max(four_ways(moved.detach(), change.detach()), key=lambda one: abs(one - 1))
        assert abs(folded.retention[name] - expected) < 1e-5
    merged = fxlora.merged(case.model, folded).eval()
    assert torch.equal(merged(X), folded(X))
    assert same_bits(weights(merged), weights(folded))
    assert "Retention of s·BA" in fxlora.report(folded)


def test_requantise_is_what_torchao_makes_of_the_folded_weights() -> None:
    case = case_of("int8")
    folded = fxlora.fold(case.lora, quantised="requantise", min_retention=0.5)
    plain = fxlora.merged(case.model, fxlora.fold(case.lora, quantised="dequantise"))
    quantize_(plain, Int8WeightOnlyConfig())
    assert same_bits(weights(folded), weights(plain))
    given = Int8WeightOnlyConfig()
    by_config = fxlora.fold(case.lora, quantised="requantise", quantiser=given, min_retention=0.5)
    assert same_bits(weights(by_config), weights(plain))


def test_requantise_refuses_to_lose_what_was_trained() -> None:
    case = case_of("nf4")
    small = fxlora.scale_adapter(case.lora, 0.01)
    with pytest.raises(QuantisedError, match=r"'0' -?0\.\d+.*less than min_retention=0.9"):
        fxlora.fold(small, quantised="requantise")
    folded = fxlora.fold(small, quantised="requantise", min_retention=-9)
    assert max(folded.retention.values()) < 0.9
    assert fxlora.fold(small, quantised="dequantise").plan is None  # the advice


def test_a_quantiser_has_to_give_the_form_of_the_base() -> None:
    case = case_of("nf4")
    with pytest.raises(QuantisedError, match="gives another form"):
        fxlora.fold(case.lora, quantised="requantise", quantiser=lambda w: to_nf4(w, 64, 1))
    with pytest.raises(fxlora.ConfigError, match="quantiser must be"):
        fxlora.fold(case.lora, quantised="requantise", quantiser=4)
    given = fxlora.fold(case.lora, quantised="requantise", quantiser=nf4, min_retention=-9)
    found = fxlora.fold(case.lora, quantised="requantise", min_retention=-9)
    assert same_bits(weights(given), weights(found))


def test_fold_into_takes_plain_targets_of_a_quantised_base() -> None:
    case = case_of("int8")
    target = plain_model()
    changed = fxlora.fold_into(case.lora, target.state_dict())
    assert changed == ("0.weight", "2.weight")
    torch.testing.assert_close(target(X), case.lora(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(fxlora.ConfigError, match=r"'0\.weight' is quantised"):
        fxlora.fold_into(case.lora, copy.deepcopy(case.model).state_dict())


# ---- merge-aware training -----------------------------------------------------------------------


def test_merge_aware_has_the_bits_that_the_fold_ships(case: Case) -> None:
    aware = fxlora.merge_aware(case.lora)
    shipped = fxlora.fold(aware, quantised="requantise")
    assert not torch.equal(aware(X), case.lora(X))
    assert torch.equal(aware(X), shipped(X))
    for same in (copy.deepcopy(aware), aware.train().eval()):
        assert torch.equal(same(X), shipped(X))
    assert torch.equal(fxlora.explicit(aware)(X), case.lora(X))
    assert aware.state_dict().keys() == case.lora.state_dict().keys()


def test_merge_aware_beside_a_plain_layer_is_equal_up_to_rounding() -> None:
    """That layer computes its branch, and ships W + s·BA."""
    model = plain_model()
    quantize_(model[0], Int8WeightOnlyConfig())  # pyright: ignore[reportIndexIssue]
    torch.manual_seed(2)
    aware = fxlora.merge_aware(fxlora.adapt(model, X, rules=CONFIG).eval())
    shipped = fxlora.fold(aware, quantised="requantise")
    assert is_quantised(shipped.get_parameter("0.weight")) and shipped.plan is None
    torch.testing.assert_close(aware(X), shipped(X), rtol=1e-4, atol=1e-5)


def test_merge_aware_gradients_pass_straight_through(product: Case) -> None:
    aware = fxlora.merge_aware(product.lora)
    parameters = fxlora.lora_parameters(aware)
    ours = torch.autograd.grad(aware(X).square().sum(), parameters)

    leaves = {name: aware.get_parameter(name) for name in aware.adapter_parameters()}
    shipped = fxlora.fold(aware, quantised="requantise")

    def layer(x: torch.Tensor, name: str, bias: Any) -> torch.Tensor:
        a, b = (leaves[f"{name}.lora_{k}.default.weight"] for k in "AB")
        change = 2 * b @ a
        rounded = dequantised(shipped.get_parameter(f"{name}.weight"))
        return F.linear(x, change + (rounded - change).detach(), bias)

    hidden = torch.tanh(layer(X, "0", product.model[0].bias))
    theirs = torch.autograd.grad(layer(hidden, "2", None).square().sum(), list(leaves.values()))
    by_name = dict(zip(leaves, theirs, strict=True))
    for parameter, one in zip(parameters, ours, strict=True):
        name = next(n for n in leaves if leaves[n] is parameter)
        torch.testing.assert_close(one, by_name[name], rtol=1e-3, atol=1e-3)


def test_merge_aware_refuses_what_it_cannot_train() -> None:
    case = case_of("int8")
    with pytest.raises(QuantisedError, match="no adapted weight is quantised"):
        fxlora.merge_aware(fxlora.adapt(plain_model(), X, rules=CONFIG))
    dropped = LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1)
    with pytest.raises(fxlora.ConfigError, match="lora_dropout on 0"):
        fxlora.merge_aware(fxlora.inject(case.captured, fxlora.match(case.captured, dropped)))
    with pytest.raises(fxlora.InjectError, match=r"fxlora\.explicit"):
        fxlora.merge_aware(fxlora.optimize(case.lora))
    fxlora.merge_aware(fxlora.explicit(fxlora.optimize(case.lora)))  # the advice
    aware = fxlora.merge_aware(case.lora)
    with pytest.raises(InjectError, match=r"fxlora\.explicit\(module\)"):
        fxlora.activate(aware, [])
    name = next(iter(case.lora.known.adapters))
    fxlora.merge_aware(fxlora.activate(fxlora.explicit(aware), name))  # the advice


# ---- the other way round ------------------------------------------------------------------------


def test_a_folded_model_is_quantised_as_its_source_is() -> None:
    model = plain_model()
    torch.manual_seed(2)
    folded = fxlora.fold(fxlora.adapt(model, X, rules=CONFIG).eval())
    source = copy.deepcopy(model).eval()
    source.load_state_dict(folded.state_dict())
    quantize_(source, Int8WeightOnlyConfig())
    ours = fxlora.merged(model, folded)
    quantize_(ours, Int8WeightOnlyConfig())
    assert torch.equal(ours(X), source(X))
    hosted = fxlora.capture(source, X).eval()
    assert torch.equal(hosted(X), source(X))


def test_a_graph_is_not_quantised_below() -> None:
    """Its ops are those of plain weights; what it computes stays as it is."""
    model = plain_model()
    lora = fxlora.adapt(model, X, rules=CONFIG).eval()
    folded = fxlora.fold(lora)
    for module in (lora, folded, fxlora.hosted(model, folded)):
        expected = module(X)
        with pytest.raises(fxlora.SubmoduleError, match=r"fxlora\.merged\(model"):
            quantize_(module, Int8WeightOnlyConfig())
        assert torch.equal(module(X), expected)
