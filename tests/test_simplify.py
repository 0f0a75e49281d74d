"""simplify: smaller graphs for inference, proved equal."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import CapturedModule, LoraConfig
from fxlora.passes import Pass
from fxlora.passes.simplify import PASSES

from .typed import untyped


class Net(nn.Module):
    """Batch norms behind each kind of layer, scales, dropout, and constants of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 12, 3, groups=2), nn.BatchNorm2d(12)
        self.t, self.b3 = nn.ConvTranspose2d(12, 6, 2, groups=3), nn.BatchNorm2d(6)
        self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(6 * 9, 7))
        self.b4, self.drop = nn.BatchNorm1d(7), nn.Dropout(0.3)
        self.places = nn.Embedding(9, 7)
        self.gain = nn.Parameter(torch.rand(7) + 0.5)
        self.head = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.b1(self.c1(x)))
        x = self.drop(self.b2(self.c2(x)).relu())
        x = self.b4(self.lin(self.b3(self.t(x)).flatten(1)))
        x = torch.tanh(x) + self.places(torch.arange(7, device=x.device)).mean(0)
        return self.head(torch.sin(x) * self.gain * 0.5 * 3.0) * 0.5 + 1


def with_statistics(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, std=0.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@functools.cache
def nets() -> tuple[nn.Module, CapturedModule, CapturedModule]:
    """A model in float64, its fold, and the simplified fold."""
    torch.manual_seed(0)
    model = with_statistics(Net().double())
    config = LoraConfig(r=2, target_modules=["c1", "c2", "head"], init_lora_weights=False)
    folded = fxlora.fold(fxlora.adapt(model, X, rules=config).eval())
    return model, folded, fxlora.simplify(folded, X)


def kinds(module: CapturedModule) -> list[str]:
    return [str(n.target).split(".")[1] for n in module.graph.nodes if n.op == "call_function"]


def test_everything_is_folded_and_equal() -> None:
    model, folded, small = nets()
    expected = folded(X)
    assert float((expected - model(X)).detach().abs().max()) > 1e-2  # the adapters have an effect
    assert float(expected.detach().std()) > 1e-2
    error = (small(X) - expected).abs().max() / expected.abs().max()
    assert float(error.detach()) < 1e-10
    assert kinds(small) == [
        *("conv2d", "relu_", "conv2d", "relu", "conv_transpose2d", "flatten", "linear"),
        *("tanh", "add", "sin", "mul", "linear"),
    ]
    assert not any("running" in name or "places" in name for name in small.state_dict())


def test_the_given_module_stays_as_it_was() -> None:
    model, folded, small = nets()
    assert "batch_norm" in kinds(folded) and folded.simplified is None
    ours = {id(p) for p in folded.parameters()}
    assert not ours & {id(p) for p in small.parameters()}
    plain = fxlora.merged(model, folded)
    assert torch.equal(plain(X), folded(X))


def test_the_report_says_what_each_pass_brought() -> None:
    _, folded, small = nets()
    assert small.simplified is not None
    steps = {step.name: step for step in small.simplified.steps}
    assert list(steps) == list(PASSES) and all(step.kept for step in steps.values())
    assert all(step.error <= 1e-10 for step in steps.values())
    removed = {name: step.ops for name, step in steps.items() if step.ops}
    assert removed == {"dropout": 1, "constants": 4, "affine": 8}
    assert sum(removed.values()) == len(kinds(folded)) - len(kinds(small))
    size = sum(t.numel() * t.element_size() for t in (*folded.parameters(), *folded.buffers()))
    left = sum(t.numel() * t.element_size() for t in (*small.parameters(), *small.buffers()))
    assert sum(step.size for step in steps.values()) == size - left
    assert "affine" in str(small.simplified) and "left out" not in str(small.simplified)


def test_in_float32_it_is_equal_to_rounding() -> None:
    single, x = copy.deepcopy(nets()[1]).to(torch.float32), X.float()
    small = fxlora.simplify(single, x)
    error = (small(x) - single(x)).abs().max() / single(x).abs().max()
    assert 0 < float(error.detach()) < 1e-5
    assert "batch_norm" not in kinds(small)


def test_it_is_for_inference() -> None:
    _, _, small = nets()
    assert not small.training and small.eval() is small
    for train in (lambda: small.train(), lambda: setattr(small, "training", True)):
        with pytest.raises(fxlora.InjectError, match="has no train mode"):
            train()
    assert not small.training
    for refused in (fxlora.fold, fxlora.remove, fxlora.optimize):
        with pytest.raises(fxlora.InjectError, match="does not take a simplified module"):
            refused(small)
    with pytest.raises(fxlora.InjectError, match="match does not take a simplified module"):
        fxlora.match(copy.deepcopy(small), LoraConfig(r=2, target_modules=["head"]))


def test_copies_state_dicts_and_files(tmp_path: Path) -> None:
    _, folded, small = nets()
    assert torch.equal(copy.deepcopy(small)(X), small(X))
    small.load_state_dict(small.state_dict())
    path = fxlora.export(small, tmp_path / "model.pt2", X)
    found = torch.export.load(path).module()(X[:3])
    torch.testing.assert_close(found, folded(X[:3]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small(X[:3]), folded(X[:3]), rtol=1e-9, atol=1e-9)


class Odd(nn.Module):
    """Batch norms and constants that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.twice, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls = self.get_buffer("calls")
        calls.add_(1)
        x = self.conv(self.first(x))  # its padding is not scaled
        read = self.twice(x)
        shared = self.norm(self.twice(x.tanh()))  # one weight behind two norms
        noise = torch.rand(4, 1, 1) * 0
        return self.norm(read) + read + self.other(shared).sin() + calls * 0 + noise


def test_what_would_not_be_equal_stays() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Odd()), torch.randn(2, 3, 5, 5)
    captured = fxlora.capture(model, x)
    small = fxlora.simplify(captured, x)
    torch.testing.assert_close(small(x), captured(x), rtol=1e-5, atol=1e-5)
    assert kinds(small).count("batch_norm") == 2  # the first, and that of a result read twice
    assert "rand" in kinds(small) and "add_" in kinds(small)
    assert float(small.get_buffer("calls")) == 1  # the proof's runs left it alone
    weight, _ = (small.get_parameter("twice.weight"), captured.get_parameter("twice.weight"))
    assert torch.equal(weight, model.get_parameter("twice.weight"))


def test_a_pass_that_is_not_equal_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Pass):
        def rewrite(self, module: CapturedModule) -> Any:
            module.set_parameter("head.bias", nn.Parameter(module.get_parameter("head.bias") + 1))
            return module.known

    monkeypatch.setitem(PASSES, "dropout", untyped(Wrong()))
    _, folded, _ = nets()
    small = fxlora.simplify(folded, X)
    assert small.simplified is not None
    assert [s.name for s in small.simplified.steps if not s.kept] == ["dropout"]
    assert "left out" in str(small.simplified)
    torch.testing.assert_close(small(X), folded(X), rtol=1e-9, atol=1e-9)


class NotAffine(nn.Module):
    """Calls that are affine on small numbers, or at the sizes of an example, only."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 5).double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            self.lin(x).clamp(-10, 10),
            nn.functional.threshold(self.lin(x), -30.0, 0.0),
            self.lin(x).nan_to_num(),
            self.lin(x)[..., :5].tril(9),
            x.cumsum(0) * 2.0 * 3.0,
            x.sum(0, keepdim=True) * 2.0,
            (x * 0.5).clamp(-20, 20) * 3.0,
            torch.rrelu(x.sum(), training=False),
            3.0 / (self.lin(x) * 2.0),
        )


def test_only_what_is_affine_by_definition_is_folded() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 4, dtype=torch.float64)  # its sum is positive, as rrelu's input
    captured = fxlora.capture(NotAffine().eval(), x)
    small = fxlora.simplify(captured, x)
    assert small.simplified is not None and all(step.kept for step in small.simplified.steps)
    kept = {"clamp", "threshold", "nan_to_num", "tril", "cumsum", "sum", "rrelu"}
    assert kept <= set(kinds(small))
    # cumsum's two products are one, and the one behind a layer is folded.
    assert kinds(captured).count("mul") - kinds(small).count("mul") == 2
    for other in (100 * torch.randn(13, 4, dtype=torch.float64), -x, x * torch.inf):
        for one, two in zip(small(other), captured(other), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, equal_nan=True)


class Sums(nn.Module):
    """Each form of a sum or product with constants behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lins = nn.ModuleList(nn.Linear(3, 4, bias=n % 2 == 0).double() for n in range(9))
        self.c = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, c = [lin(x) for lin in self.lins], self.c
        return (
            *(torch.add(y[0], c, alpha=3), torch.add(c, y[1], alpha=3), c - y[2] + 2.0),
            *(torch.sub(y[3], c, alpha=-2), torch.rsub(y[4], 5, alpha=3), -y[5] / c),
            *(y[6].true_divide(4), torch.sub(c, y[7], alpha=0.3), c * y[8]),
        )


def test_each_form_of_sum_and_product_is_folded() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64)
    captured = fxlora.capture(Sums().eval(), x)
    small = fxlora.simplify(captured, x)
    assert set(kinds(small)) == {"linear"}
    for one, two in zip(small(x), captured(x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


class Effects(nn.Module):
    """Writes to a buffer in a nested graph, and returns a constant, logits and a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.w = nn.Linear(4, 6), nn.Parameter(torch.ones(6))
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.lin(x.cumsum(0))
        with torch.no_grad():
            self.get_buffer("n").add_(y.mean())
        masked = y.masked_fill(torch.arange(6) > 4, torch.finfo(y.dtype).min)
        return masked, y.argmax(-1), self.w * 2


@functools.cache
def effects() -> tuple[CapturedModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(1, 4)
    return fxlora.capture(Effects().eval(), x), x


def test_writes_in_nested_graphs_stay() -> None:
    captured, x = effects()
    small, source = fxlora.simplify(captured, x), copy.deepcopy(captured)
    for n in range(1, 3):
        for module in (small, source):
            module(x * n)
        assert float(source.get_buffer("n")) != 0
        assert torch.equal(small.get_buffer("n"), source.get_buffer("n"))


def test_a_constant_that_is_returned_is_new_at_each_call() -> None:
    captured, x = effects()
    small = fxlora.simplify(captured, x)
    with torch.no_grad():
        small(x)[2].add_(1)
    assert torch.equal(small(x)[2], captured(x)[2])


class Statistics(nn.Module):
    """Norms with the statistics of the batch, in eval too, which write to running ones."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.other = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        self._normed(y, self.norm)  # for its effect
        with torch.no_grad():
            y = y + self._normed(y, self.other)
        mean, variance = self.norm.get_buffer("running_mean"), self.other.get_buffer("running_var")
        return y * (mean * 2) + variance.sqrt()

    def _normed(self, y: torch.Tensor, norm: nn.BatchNorm1d) -> torch.Tensor:
        return nn.functional.batch_norm(y, norm.running_mean, norm.running_var, training=True)


def test_statistics_that_a_norm_writes_are_no_constants() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4).double()
    captured = fxlora.capture(Statistics().double(), x).eval()
    small = fxlora.simplify(captured, x)
    assert small.simplified is not None and all(step.kept for step in small.simplified.steps)
    for n in range(1, 4):
        assert torch.equal(small(x * n), captured(x * n))
    for name in ("norm.running_mean", "other.running_var"):
        assert torch.equal(small.get_buffer(name), captured.get_buffer(name))
        assert not torch.allclose(small.get_buffer(name), torch.zeros(6).double(), atol=1e-3)


class Scales(nn.Module):
    """Products in a row, and behind a layer, in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 5, bias=False).half()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x.relu()
        return (
            y * 0.5 * 0.25,
            y * 2.0 * 3.0,
            y.tanh() * 3.0 * 0.5,  # it cannot overflow
            y * 1e3 * 1e-3,
            y * 1e-4 * 1e4,
            y * 300.0 * 300.0,
            (y.neg() + 0.0) * 2.0,
            self.lin(x) * 1e-6,
        )


def test_scales_become_one_only_if_no_number_tells() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4).half()
    captured = fxlora.capture(Scales().eval(), x)
    small = fxlora.simplify(captured, x)
    assert small.simplified is not None and all(step.kept for step in small.simplified.steps)
    assert kinds(captured).count("mul") - kinds(small).count("mul") == 3
    for other in (x, 300 * x, 0 * x, 1e-3 * x, torch.full_like(x, torch.inf), x * torch.nan):
        for one, two in zip(small(other)[:7], captured(other)[:7], strict=True):
            torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-6, equal_nan=True)
            assert torch.equal(one.signbit(), two.signbit())
    assert bool((captured(x)[7] != 0).any()) and torch.equal(small(x)[7], captured(x)[7])


class Twice(nn.Module):
    """A convolution and its norm that run twice, and the convolution behind another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.norm(self.conv(x)) - self.norm(self.conv(x.cos()))
        return both + self.other(self.conv(x.tanh())) * self.norm.get_buffer("running_var").sum()


def test_readers_of_equal_values_share_a_copy() -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Twice().double()), X[:2]
    model.to(memory_format=torch.channels_last)
    small = fxlora.simplify(fxlora.capture(model, x), x)
    assert "batch_norm" not in kinds(small)
    weights = [p for n, p in small.named_parameters() if n.startswith("conv.weight")]
    assert len(weights) == 2 and not torch.equal(*weights)
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(fxlora.capture(model, x).eval()(x), model(x))  # which stayed as it was


class Edit(Pass):
    """A wrong pass: it edits the only graph, or a parameter."""

    def __init__(self, edit: Any) -> None:
        self.edit = edit

    def rewrite(self, module: CapturedModule) -> Any:
        self.edit(module)
        return module.known


def drop(kind: str) -> Any:
    def edit(module: CapturedModule) -> None:
        graph = module.distinct_graphs()[0]
        node = next(n for n in graph.nodes if f".{kind}." in str(n.target))
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)

    return edit


def drop_nested(module: CapturedModule) -> None:
    graph = module.distinct_graphs()[0]
    node = next(n for n in graph.nodes if "grad_enabled" in str(n.target))
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)


def scale_bias(module: CapturedModule) -> None:
    bias = module.get_parameter("lin.bias")
    module.set_parameter("lin.bias", nn.Parameter(bias + 1e-3))


@pytest.mark.parametrize("edit", [drop("cumsum"), drop_nested, scale_bias])
def test_the_proof_sees_other_sizes_writes_and_numbers_beside_a_mask(
    monkeypatch: pytest.MonkeyPatch, edit: Any
) -> None:
    captured, x = effects()
    monkeypatch.setitem(PASSES, "dropout", untyped(Edit(edit)))
    small = fxlora.simplify(captured, x, passes=["dropout"])
    assert small.simplified is not None and not small.simplified.steps[0].kept
    assert len(small.graph.nodes) == len(captured.graph.nodes)


class Deep(nn.Module):
    """Adds up the rounding of half precision; its norm becomes part of one copy of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = x + self.norm(self.lin(x)).tanh()
        return self.lin(x)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_proof_in_half_precision(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    torch.manual_seed(0)
    model, x = with_statistics(Deep()).bfloat16(), torch.randn(16, 24).bfloat16()
    captured = fxlora.capture(model, x).eval()

    class Off(Pass):
        def rewrite(self, module: CapturedModule) -> Any:
            weight = module.get_parameter("lin.weight") * 1.1
            module.set_parameter("lin.weight", nn.Parameter(weight, requires_grad=False))
            return module.known

    if wrong:
        monkeypatch.setitem(PASSES, "affine", untyped(Off()))
    small = fxlora.simplify(captured, x, passes=["affine"])
    assert small.simplified is not None
    (step,) = small.simplified.steps
    assert step.error > 1e-2 and step.kept is not wrong
    assert ("batch_norm" in kinds(small)) is wrong


def test_the_proof_compares_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.neg().argmax(-1)

    x = torch.randn(5, 7)
    monkeypatch.setitem(PASSES, "dropout", untyped(Edit(drop("neg"))))
    small = fxlora.simplify(fxlora.capture(Choice(), x), x, passes=["dropout"])
    assert small.simplified is not None and not small.simplified.steps[0].kept


def test_arguments_are_checked() -> None:
    _, folded, _ = nets()
    with pytest.raises(fxlora.ConfigError, match="passes must be a list of dropout, constants"):
        fxlora.simplify(folded, X, passes=["batch norm"])
    with pytest.raises(fxlora.InputError, match="by a run"):
        fxlora.simplify(folded)
    again = LoraConfig(r=2, target_modules=["head"])
    lora = fxlora.inject(folded, fxlora.match(folded, again))
    with pytest.raises(fxlora.InjectError, match="fold"):
        fxlora.simplify(lora, X)
    two = fxlora.capture(nn.Linear(3, 2), calls=[((X[0, 0, 0, :3],), {}), ((X[0, :, :, :3],), {})])
    with pytest.raises(fxlora.InjectError, match="one whole graph"):
        fxlora.simplify(two, X[0, 0, 0, :3])
    only = fxlora.simplify(folded, X, passes=["dropout", "dead"])
    assert "batch_norm" in kinds(only) and "dropout" not in kinds(only)


class WritesBetweenScales(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own, self.lin = own, nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.lin(x) if self.own else x
        y = h * 0.5
        h.clamp_(-5, 5)
        return y * 0.25, h


@pytest.mark.parametrize("own", [True, False])
def test_scales_are_read_before_a_write_between_them(own: bool) -> None:
    model = WritesBetweenScales(own).double().eval()
    gm = fxlora.capture(model, torch.randn(3, 5, dtype=torch.float64)).eval()
    fast = fxlora.simplify(gm, torch.randn(3, 5, dtype=torch.float64))
    x = 100 * torch.randn(3, 5, dtype=torch.float64)
    expected, found = model(x.clone()), fast(x.clone())
    assert float((x.abs() > 5).sum()) > 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
