"""Silent errors that a review found, each tested against the source with merged weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxlora
from fxlora import InjectError, LoraConfig, Rule, UnsupportedOpError, VerificationError

from .laws import check_laws, randomise
from .models import Reads, Several
from .typed import Function, untyped

Read = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
R = LoraConfig(r=2)
X = torch.randn(4, 6, dtype=torch.float64)


def large(read: Read) -> Reads:
    """Return a model that reads a weight (7, 6) with large entries."""
    model = Reads(read, "oi", 7, 6)
    with torch.no_grad():
        model.w.mul_(8)
    return model


READS: dict[str, Read] = {
    "a wide clamp": lambda x, w: F.linear(x, w.clamp(-9.0, 9.0)),
    "a clamp from below": lambda x, w: F.linear(x, w.clamp(min=-6.0)),
    "a threshold": lambda x, w: F.linear(x, F.threshold(w, -5.0, 0.0)),
    "rows cut off, last": lambda x, w: F.linear(x, torch.cat([w[:2], w[2:].detach()])),
    "rows cut off, first": lambda x, w: F.linear(x, torch.cat([w[:2].detach(), w[2:]])),
    "half of it cut off": lambda x, w: F.linear(x, torch.stack([w.clone(), w.detach()]).mean(0)),
    "filled with": lambda x, w: F.linear(x, w) + torch.full_like(x[:, :1], 1.0) * w.mean(),
    "new_full": lambda x, w: F.linear(x, w) * x.new_ones(1) + w.detach().mean().expand(4, 7),
    "rows from the fifth on": lambda x, w: F.linear(x, w[5:]),
    "outputs from the sixth on": lambda x, w: F.linear(x, w)[:, 6:],
}


@pytest.mark.parametrize("exported", [True, False])
def test_outputs_and_gradients_are_those_of_the_merged_weight(exported: bool) -> None:
    capture = None if exported else fxlora.capture
    model = Several(map(large, READS.values()))
    check_laws(model, (X,), rules=Rule("parts.*.w", lora=R), capture=capture)


def test_a_weight_that_fills_is_read() -> None:
    def fills(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w)
        return y + torch.full_like(y, untyped(w.detach().mean()))

    gm = fxlora.capture(Reads(fills, "oi", 7, 6).double(), X)
    (entry,) = fxlora.match(gm, Rule("w", lora=R))
    assert entry.form == "weight"


def test_strides_of_the_weights_own() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6).t())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.w.as_strided((6, 6), (6, 1)))

    assert_as_merged(Strided().double(), fxlora.capture)
    assert_as_merged(Strided().double(), lambda model: fxlora.capture(model, X))


def assert_as_merged(model: nn.Module, capture: Callable[[Any], fxlora.CapturedModule]) -> None:
    """Assert that the source with the folded weight in its own memory gives the same outputs.

    In its own memory the weight keeps its strides.
    """
    gm = capture(model)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(r"re:(parts\.\d+\.)?w", lora=R))).eval()
    randomise(lora)
    with torch.no_grad():
        found, base, folded = lora(X), model(X), fxlora.fold(lora)  # lora shares model's memory
        for name, weight in model.named_parameters():
            weight.copy_(folded.get_parameter(name))
        every = (pytree.tree_leaves(given) for given in (found, base, model(X)))
        for ours, before, theirs in zip(*every, strict=True):
            assert float((ours - before).abs().max()) > 0
            assert torch.allclose(ours, theirs, rtol=1e-10)


class Product(nn.Module):
    """The product of u and v, both transposed or cut into pieces, in a nested graph or not."""

    def __init__(self, region: str) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(3, 5))
        self.region = region
        # Neither is multiplied with x alone: which of its dimensions A takes is a convention.
        pieces = region == "pieces"
        self.subscripts = {"u": "oi", "v": "io"} if pieces else {"u": "io", "v": "oi"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.region == "pieces":
            u, v = (torch.cat([p[:2], p[2:]]) for p in (self.u, self.v))
            return x @ torch.matmul(u.t(), v.t())
        if self.region == "cond":
            return x @ torch.cond(
                x.sum() > 0,
                lambda u, v: torch.matmul(u.t(), v.t()),
                lambda u, v: -torch.matmul(u.t(), v.t()),
                (self.u, self.v),
            )
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return x @ torch.matmul(self.u.t(), self.v.t())


@pytest.mark.parametrize("region", ["pieces", "cond", "autocast"])
def test_a_product_of_two_weights(region: str) -> None:
    check_laws(Product(region), (X,), rules=Rule(["u", "v"], lora=R))


WRITES: dict[str, Any] = {
    "in place": lambda x, w: _written(x, lambda y: y.add_(F.linear(x, w)), w),
    "out": lambda x, w: _written(x, lambda y: torch.add(y, F.linear(x, w), out=y), w),
}


def _written(x: torch.Tensor, write: Callable[[torch.Tensor], Any], w: torch.Tensor) -> Any:
    y = x.new_zeros(4, 7) + F.linear(x, 2 * w)
    z = write(y)
    torch.matmul(z, z.t())  # its result is unused
    return y + F.linear(x, w)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_whose_result_is_dropped_is_no_dead_code(name: str) -> None:
    assert_as_merged(large(WRITES[name]).double(), fxlora.capture)


def test_a_plan_of_another_module_is_held_against_this_one() -> None:
    def made(alpha: float) -> nn.Module:
        return large(lambda x, w: torch.addmm(x[:, :1], x[:, :7], w, alpha=alpha))

    x = torch.randn(4, 7)
    one, two = (fxlora.capture(made(alpha), x) for alpha in (1.0, 2.0))
    plan = fxlora.match(one, Rule("w", lora=R))
    assert plan.entries[0].form == "branch"
    with pytest.raises(InjectError, match=r"does not allow .*alpha"):
        fxlora.inject(two, plan)
    fxlora.inject(two, fxlora.match(two, Rule("w", lora=R)))  # as the error advises


def test_a_padding_row_of_a_part_of_the_table_is_refused() -> None:
    model = Reads(lambda ids, w: F.embedding(ids, w[2:], padding_idx=0), "io", 9, 5)
    gm = fxlora.capture(model, torch.tensor([[0, 1, 4]]))
    with pytest.raises(UnsupportedOpError, match="padding_idx"):
        fxlora.match(gm, Rule("w", lora=R))


@pytest.mark.parametrize("exported", [True, False])
def test_memory_that_a_buffer_shares_is_refused_on_either_road(exported: bool) -> None:
    class Shares(nn.Module):
        kept: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 7)
            self.register_buffer("kept", self.lin.weight.data)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x) + F.linear(x, self.kept)

    gm = fxlora.capture(Shares(), X.float() if exported else None)
    with pytest.raises(UnsupportedOpError, match="shares memory with 'kept'"):
        fxlora.match(gm, Rule("lin", lora=R))


def test_training_in_full_what_no_gradient_reaches_is_refused() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(6, 7), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.frozen(x)
            return self.head(x)

    gm = fxlora.capture(Frozen(), X.float())
    with pytest.raises(UnsupportedOpError, match="'frozen' is to train in full"):
        fxlora.match(gm, [Rule("head", lora=R), Rule("frozen", train=True)])
    with pytest.raises(UnsupportedOpError, match="'frozen' is to train in full"):
        fxlora.match(gm, LoraConfig(r=2, target_modules=["head"], modules_to_save=["frozen"]))


class Overlap(nn.Module):
    """Two Parameters over one memory, in the weights and in the biases."""

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        if not apart:
            self.b.weight = nn.Parameter(self.a.weight.data[:4])
            self.b.bias = nn.Parameter(self.a.bias.data[:4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


@functools.cache
def overlap(apart: bool = False) -> fxlora.CapturedModule:
    return fxlora.capture(Overlap(apart), X.float())


@functools.cache
def one_layer() -> fxlora.CapturedModule:
    return fxlora.capture(nn.Sequential(nn.Linear(6, 7)), X.float())


@pytest.mark.parametrize(
    ("rules", "first"),
    [
        ([Rule("a", train=True), Rule("c", lora=R)], "a.bias"),
        ([Rule("b.bias", train=True), Rule("c", lora=R)], "b.bias"),
        (LoraConfig(r=2, target_modules=["c"], modules_to_save=["b"]), "b.bias"),
        (Rule("c", lora=LoraConfig(r=2, bias="all")), "a.bias"),
    ],
)
def test_training_in_full_what_shares_memory_is_refused(rules: Any, first: str) -> None:
    gm = overlap()
    with pytest.raises(UnsupportedOpError, match=f"'{first}' is to train in full, and shares"):
        fxlora.match(gm, rules)
    plan = fxlora.match(overlap(apart=True), rules)
    with pytest.raises(UnsupportedOpError, match="shares memory"):
        fxlora.inject(gm, plan)


def test_a_plan_of_a_module_without_shared_memory_is_refused() -> None:
    plan = fxlora.match(overlap(apart=True), Rule("a", lora=R))
    with pytest.raises(UnsupportedOpError, match=r"'a' shares memory with 'b\.weight'"):
        fxlora.inject(overlap(), plan)


def adapted() -> fxlora.CapturedModule:
    """Return a copy of one adapted module for each test, which may write to it."""
    return copy.deepcopy(_adapted())


@functools.cache
def _adapted() -> fxlora.CapturedModule:
    model = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    lora = fxlora.adapt(model, X.float(), rules=Rule("0", lora=R))
    randomise(lora)
    return lora


def test_loading_adapters_does_not_excuse_a_write_to_the_base() -> None:
    lora = adapted()
    with torch.no_grad():
        lora.get_parameter("2.weight").add_(1)
    lora.load_state_dict(
        {n: lora.get_parameter(n) for n in lora.adapter_parameters()}, strict=False
    )
    with pytest.raises(VerificationError, match="was written to"):
        fxlora.verify(lora, X.float())


def test_remove_after_loading_another_base_is_that_base() -> None:
    lora = adapted()
    state = {n: t + 1 if t.is_floating_point() else t for n, t in lora.state_dict().items()}
    lora.load_state_dict(state)
    removed = fxlora.remove(lora)
    for name, tensor in removed.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_a_fold_that_overflows_is_refused() -> None:
    lora = adapted()
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.fill_(1e25)
    with pytest.raises(InjectError, match=r"'0': .* is not finite"):
        fxlora.fold(lora)


def test_warnings_name_the_users_line() -> None:
    gm = one_layer()
    with pytest.warns(fxlora.FxLoraWarning, match="more parameters") as caught:
        fxlora.match(gm, LoraConfig(r=6, target_modules=["0"]))
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("name", "start", "match"),
    [
        ("0.lora_A.defualt.weight", torch.zeros(2, 6), "'0.lora_A.defualt.weight', which"),
        ("0.lora_B", torch.zeros(7, 2), "'0.lora_B', which the plan does not add"),
        ("0.lora_B.default.weight", torch.zeros(1, 2), r"\(1, 2\); the plan has \(7, 2\)"),
        ("0.lora_A.default.weight", torch.zeros(6), r"\(6,\); the plan has \(2, 6\)"),
        ("0.lora_A.default.weight", torch.zeros(2, 6).long(), "int64"),
    ],
)
def test_initial_values_that_do_not_fit_are_refused(
    name: str, start: torch.Tensor, match: str
) -> None:
    gm = one_layer()
    plan = fxlora.match(gm, Rule("0", lora=R))
    with pytest.raises(InjectError, match=match):
        fxlora.inject(gm, plan, starts={name: start})


# ---- writes and casts that are not where one looks for them -------------------------------------


class Foreach(nn.Module):
    """Writes to its weight by an op that takes a list of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_mul_([self.lin.weight], 0.5)
        return self.lin(x)


def test_a_write_by_an_op_on_a_list_of_tensors_is_seen() -> None:
    gm = fxlora.capture(Foreach(), X.float())
    with pytest.raises(UnsupportedOpError, match="written to in every call"):
        fxlora.match(gm, Rule("lin", lora=R))


def test_a_function_that_writes_to_a_list_of_its_arguments_is_left_to_python() -> None:
    class Halved(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            torch._foreach_mul_([x], 0.5)
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Halved.apply(self.lin(x))

    with pytest.warns(fxlora.FxLoraWarning, match="writes to its arguments"):
        gm = fxlora.capture(Model(), X.float())
    assert gm.regions == ("lin",)  # Python runs the Function


def test_memory_shared_with_a_parameter_further_on_is_seen() -> None:
    class Spans(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.randn(60)
            self.long = nn.Parameter(memory.view(10, 6))
            self.first = nn.Parameter(memory[6:18].view(2, 6))
            self.second = nn.Parameter(memory[30:48].view(3, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.linear(x, w) for w in (self.long, self.first, self.second)], -1)

    gm = fxlora.capture(Spans(), X.float())
    with pytest.raises(UnsupportedOpError, match="long"):
        fxlora.match(gm, Rule("second", lora=R))


@pytest.mark.parametrize(
    "cast", [lambda w: w.double().T, lambda w: w.T.double(), lambda w: w.T.type_as(w.double())]
)
def test_a_cast_that_names_no_dtype_is_a_cast(cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A branch would mix A of the weight's dtype with inputs of the cast one."""
    model = Reads(lambda x, w: x @ cast(w), "io", 7, 6)
    gm = fxlora.capture(model)
    plan = fxlora.match(gm, Rule("w", lora=R))
    assert [entry.form for entry in plan] == ["weight"]
    lora = fxlora.inject(gm, plan).eval()
    randomise(lora)
    found = lora(X)
    assert not torch.equal(found, model(X))
    assert torch.allclose(fxlora.fold(lora).eval()(X), found, atol=1e-5)


def test_a_write_in_one_mode_is_not_forgotten_by_regions() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if float(x.sum()) > 1e9:  # no whole graph
                return x
            if self.training:
                with torch.no_grad():
                    self.lin.weight.mul_(0.5)
            return self.lin(x)

    model = Writes()
    before = model.lin.weight.detach().clone()
    with pytest.raises(fxlora.CaptureError, match=r"writes in place to\s+'lin\.weight'"):
        fxlora.capture(model, X.float())
    assert torch.equal(model.lin.weight, before)


def test_complex_outputs_are_compared() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(self.lin(x))

    lora = fxlora.adapt(Spectrum(), X.float(), rules=Rule("lin", lora=R))
    randomise(lora)
    assert fxlora.verify(lora, X.float()).sites[0].effect > 0


# ---- modes whose graphs differ by a literal -----------------------------------------------------


class Scaled(torch.autograd.Function):
    """Scales by 1 for an integer, and by 7 for any other number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, by: float) -> torch.Tensor:
        return x * (1 if type(by) is int else 7)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore
        return grad, None


LITERALS: dict[str, tuple[Callable[[torch.Tensor, Any], Any], Any, Any]] = {
    "an int or a float": (lambda y, k: (y.detach() * 9).long() * k, 3, 3.0),
    "an int or a bool": (lambda y, k: torch.full((3,), k), 1, True),
    "a sign of zero": (lambda y, k: 1 / y.new_full((4, 7), k) + 0 * y, 0.0, -0.0),
    "an argument of a Function": (Scaled.apply, 1, 1.0),
    "an output": (lambda y, k: (y, k), 1, True),
    "the structure of the outputs": (lambda y, k: k(y), lambda y: {"y": y}, lambda y: [y]),
}


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("name", LITERALS)
def test_modes_that_differ_by_a_literal_only(name: str, exported: bool) -> None:
    read, train, evaluation = LITERALS[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor) -> Any:
            return read(self.lin(x), train if self.training else evaluation)

    model = Model().double()
    gm = fxlora.capture(model, X if exported else None)
    found: list[str] = []
    for mode in (True, False):
        expected, got = (repr(module.train(mode)(X)) for module in (model, gm))
        assert got.partition(" grad_fn")[0] == expected.partition(" grad_fn")[0]
        found.append(expected)
    assert found[0] != found[1]


def test_a_constant_of_another_sign_is_refused() -> None:
    class Divided(nn.Module):
        def forward(self, x: torch.Tensor, by: float) -> torch.Tensor:
            return x / by

    gm = fxlora.capture(Divided(), (X, 0.0))
    assert torch.equal(gm(X, 0.0), X / 0.0)
    with pytest.raises(fxlora.InputError, match=r"-0\.0"):
        gm(X, -0.0)


# ---- tensors that a call writes to --------------------------------------------------------------


class Counts(nn.Module):
    """Writes to a frozen parameter in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 7)
        self.n = nn.Parameter(torch.ones(7), requires_grad=False)
        self.alias = self.n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.alias.mul_(0.5)
        return self.lin(x) * self.n


@pytest.mark.parametrize("exported", [True, False])
def test_a_parameter_that_calls_write_to_is_each_modules_own(exported: bool) -> None:
    model = Counts()
    gm = fxlora.capture(model, X.float() if exported else None)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("lin", lora=R)))
    randomise(lora)
    modules = (model, gm, lora, fxlora.fold(lora), copy.deepcopy(lora), fxlora.remove(lora))
    for number, module in enumerate(modules):
        module(X.float())
        written = [float(m.get_parameter("n")[0]) for m in modules]
        assert written == [0.5] * (number + 1) + [1.0] * (len(modules) - number - 1)


def test_verify_leaves_a_parameter_that_calls_write_to() -> None:
    lora = fxlora.adapt(Counts(), X.float(), rules=Rule("lin", lora=R))
    randomise(lora)
    lora(X.float())  # not a write to the base
    before = lora.get_parameter("n").detach().clone()
    fxlora.verify(lora, X.float())
    assert torch.equal(lora.get_parameter("n"), before)
    assert torch.equal(fxlora.remove(lora).get_parameter("n"), torch.ones(7))
    state = {"n": torch.full((7,), 3.0)}
    lora.load_state_dict(state, strict=False)
    assert torch.equal(fxlora.remove(lora).get_parameter("n"), state["n"])


class SharedState(nn.Module):
    """Tensors over one memory, of which one is written to in every call, and another one read."""

    def __init__(self, written: str, read: str) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 7)
        memory = torch.ones(8, 7)
        self.register_buffer("whole", memory)
        self.register_buffer("last", memory[5:])
        self.whole_parameter = nn.Parameter(memory, requires_grad=False)
        self.first = nn.Parameter(memory[:4], requires_grad=False)
        if read == "plain":
            self.plain = memory[2:6]
        self.written, self.read = written, read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        getattr(self, self.written).mul_(0.5)
        return self.lin(x)[:1] + getattr(self, self.read)


@pytest.mark.parametrize("exported", [True, False])
@pytest.mark.parametrize("read", ["whole", "last", "whole_parameter", "first", "plain"])
@pytest.mark.parametrize("written", ["whole", "whole_parameter"])
def test_tensors_that_share_memory_with_what_is_written_still_do(
    written: str, read: str, exported: bool
) -> None:
    model = SharedState(written, read)
    if not exported and (written == "whole" or read == "plain"):
        with pytest.raises(fxlora.CaptureError, match=r"example\s+inputs"):
            fxlora.capture(model)
        return
    gm = fxlora.capture(model, X.float() if exported else None)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("lin", lora=R)))
    for module in (copy.deepcopy(gm), fxlora.fold(lora), gm):
        source = SharedState(written, read)
        source.lin = model.lin
        for _ in range(3):
            assert torch.equal(module(X.float()), source(X.float()))
        assert torch.equal(model.state_dict()["whole"], torch.ones(8, 7))


ALIASES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "type_as": lambda t, x: t.type_as(x).add_(1),
    "dropout": lambda t, x: F.dropout(t, 0.1, False).add_(1),
    "broadcast": lambda t, x: torch.broadcast_tensors(t, t)[1].add_(1),
    "einsum": lambda t, x: torch.einsum("ij->ji", t).add_(1),
    "swapaxes": lambda t, x: torch.swapaxes(t, 0, 1).add_(1),
    "relu_": lambda t, x: torch.relu_(t),
    "inplace": lambda t, x: F.relu(t, inplace=True),
    "init": lambda t, x: nn.init.constant_(t, 0.5),
    "foreach": lambda t, x: torch._foreach_add_([t], 1.0),
    "an operator": lambda t, x: t.__imul__(2),
    "threshold": lambda t, x: torch.threshold_(t, 0.1, 0.0),
}


class Writes(nn.Module):
    def __init__(self, write: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 6), requires_grad=False)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self.w, x)
        return F.linear(x, self.w)


@pytest.mark.parametrize("exported", [True, False])
def test_a_write_that_no_schema_declares_is_seen(exported: bool) -> None:
    model = Several(map(Writes, ALIASES.values())).double().eval()
    before = [weight.detach().clone() for weight in model.parameters()]
    gm = fxlora.capture(model, X if exported else None)
    found = gm(X)
    assert all(map(torch.equal, model.parameters(), before))
    cases = zip(ALIASES, found, model(X), model.parameters(), before, strict=True)
    for number, (name, ours, theirs, weight, was) in enumerate(cases):
        assert torch.equal(ours, theirs), name
        assert not torch.equal(weight, was), name
        with pytest.raises(
            UnsupportedOpError, match=r"written to in every call|does not tell whether"
        ):
            fxlora.match(gm, Rule(f"parts.{number}.w", lora=R))


STORES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "foreach": lambda z, y: torch._foreach_add_([z], [y]),
    "index_put_": lambda z, y: torch.index_put_(z, (torch.tensor([0, 2]),), y[:2]),
    "swapaxes": lambda z, y: torch.swapaxes(z, 0, 1).add_(y.t()),
    "broadcast": lambda z, y: torch.broadcast_tensors(z, z)[0].add_(y),
    "dropout": lambda z, y: F.dropout(z, 0.1, False).add_(y),
    "type_as": lambda z, y: z.type_as(y).add_(y),
}


@pytest.mark.parametrize("exported", [True, False])
def test_a_read_that_a_function_stores_is_no_dead_code(exported: bool) -> None:
    def reads(store: Callable[[torch.Tensor, torch.Tensor], Any]) -> Reads:
        def read(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            y = F.linear(x, w)
            z = y * 0.0
            store(z, F.linear(x * 2, w))
            return y + z

        return Reads(read, "oi", 7, 6)

    model = Several(map(reads, STORES.values()))
    assert_as_merged(model.double(), lambda model: fxlora.capture(model, X if exported else None))


def test_functions_that_only_read_a_weight_can_be_adapted() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(6, 7))
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.layer_norm(x, (6,), self.scale)
            y = F.linear(x, F.normalize(self.w)).add_(1)
            return F.relu(y, inplace=True) + torch.einsum(
                "bi,io,po->bp", x, self.u, self.u.t() @ self.u
            )

    gm = fxlora.capture(Functions())
    assert gm.known.written == frozenset()
    assert len(fxlora.match(gm, Rule(["w", "u"], lora=R))) == 2


NAMED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a cast": lambda y: y.float().softmax(-1),
    "softmax": lambda y: F.softmax(y, -1, dtype=torch.float32),
    "sum": lambda y: y.sum(-1, dtype=torch.float32),
    "arange": lambda y: torch.sin(torch.arange(1000, 1007, dtype=torch.float32)) * y,
    "full": lambda y: y * torch.full((7,), 1.001, dtype=torch.float32),
    "cumsum": lambda y: y.cumsum(-1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_dtype_that_a_call_names_is_not_narrowed(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return NAMED[name](self.lin(x))

    model, x = Named().eval(), X.float()
    gm = fxlora.capture(model, x).eval()
    with pytest.raises(fxlora.CaptureError, match=r"computes in torch\.float32 at node"):
        gm.bfloat16()
    assert torch.equal(gm(x), model(x))


def test_a_module_that_names_no_dtype_can_be_narrowed() -> None:
    model, x = nn.Sequential(nn.Linear(6, 7), nn.Softmax(-1)), X.bfloat16()
    gm = fxlora.capture(model, X.float()).bfloat16()
    assert torch.equal(gm(x), model.bfloat16()(x))


def test_the_levels_of_a_vmap_are_not_entered() -> None:
    def read(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.vmap(lambda row: row, out_dims=1)(w).t())

    gm = fxlora.capture(Reads(read, "oi", 7, 6).double(), X)
    assert len(fxlora.match(gm, Rule("w", lora=R))) == 1
    assert not torch._C._are_functorch_transforms_active()
