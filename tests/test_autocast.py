"""Under the caller's autocast, a graph computes the same as its source, or refuses the call."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxlora
from fxlora import FxLoraWarning, InputError, LoraConfig
from fxlora.fx.autocast import by_autocast
from fxlora.passes import ToWeightForm

from .laws import distance, merged_weights, randomise
from .models import Several

pytestmark = pytest.mark.autocast

HALF = (torch.bfloat16, torch.float16)
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def run(
    module: Callable[..., Any],
    args: Any,
    kwargs: Any,
    dtype: torch.dtype | None,
    device: str = "cpu",
) -> list[torch.Tensor]:
    args, kwargs = copy.deepcopy((args, kwargs))
    torch.manual_seed(3)
    on = dtype is not None
    with torch.no_grad(), torch.autocast(device, dtype or torch.bfloat16, enabled=on):
        outputs = module(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def assert_follows(
    model: nn.Module, *args: Any, refused: tuple[Any, ...] = (), device: str = "cpu", **kwargs: Any
) -> fxlora.CapturedModule:
    """Assert bits and dtypes of the source in both modes under each autocast; or InputError."""
    gm = fxlora.capture(model, args, kwargs)
    changed = len(refused) == len(HALF)
    for training in (False, True):
        source = copy.deepcopy(model).train(training)
        gm.train(training)
        plain = run(source, args, kwargs, None)
        for dtype in (None, *HALF):
            expected = run(source, args, kwargs, dtype, device)
            if dtype in refused:
                with pytest.raises(InputError, match=r"called under torch\.autocast"):
                    run(gm, args, kwargs, dtype, device)
                continue
            found = run(gm, args, kwargs, dtype, device)
            assert [t.dtype for t in found] == [t.dtype for t in expected]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            if dtype is not None:
                changed |= any(
                    a.dtype != b.dtype or not torch.equal(a, b)
                    for a, b in zip(expected, plain, strict=True)
                )
    assert changed  # else autocast does nothing here
    return gm


# ---- dtypes that the source reads under autocast ------------------------------------------------


def cast_to_read_dtype(h: torch.Tensor) -> torch.Tensor:
    return torch.softmax(h, -1, dtype=torch.float32).to(h.dtype) + 1e-3


def made_with_read_dtype(h: torch.Tensor) -> torch.Tensor:
    return h * torch.full((7,), 1 / 3, dtype=h.dtype)


def constant_of_read_dtype(h: torch.Tensor) -> torch.Tensor:
    return h * torch.tensor([1 / 3] * 7, dtype=h.dtype)


def masked_with_its_minimum(h: torch.Tensor) -> torch.Tensor:
    return h.masked_fill(h < 0, torch.finfo(h.dtype).min)


def in_float(h: torch.Tensor) -> torch.Tensor:
    return h.float() * 3 + h.type_as(h.float())


def random_of_its_dtype(h: torch.Tensor) -> torch.Tensor:
    return h + torch.rand(h.shape, dtype=h.dtype) * torch.rand_like(h)


def reads_input_after_cast(h: torch.Tensor) -> torch.Tensor:
    kept = h.float()
    return (h * 3) + kept.sum() + (kept / 7).to(h.dtype) * h


def casts_only_if_needed(h: torch.Tensor) -> torch.Tensor:
    if h.dtype != torch.float32:
        h = h.to(torch.float32)
    return h / 3


def casts_unless_needed(h: torch.Tensor) -> torch.Tensor:
    if h.dtype == torch.float32:
        h = h.to(torch.float32)
    return h / 3


def asks_for_its_dtype(h: torch.Tensor) -> torch.Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    return (h.float() / 3).to(dtype)


def byte_size(h: torch.Tensor) -> torch.Tensor:
    return h * (h.element_size() / 3)


def _cast(h: torch.Tensor) -> torch.Tensor:
    return (h.float() / 3).to(h.dtype)


def in_torchscript(h: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but still in use
        return torch.jit.script(_cast)(h)


def clamped_in_half(h: torch.Tensor) -> torch.Tensor:
    return h.clamp(-0.1, 0.1) if h.dtype == torch.float16 else h


def asks_for_autocast(h: torch.Tensor) -> torch.Tensor:
    return h.tanh() if torch.is_autocast_enabled("cpu") else h.sin()


class Reads(nn.Module):
    """A linear layer, something that may read its dtype, and another linear layer."""

    def __init__(self, step: Callable[[torch.Tensor], torch.Tensor], where: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop = nn.Linear(5, 7), nn.Dropout(0.4)
        self.norm, self.last = nn.LayerNorm(7), nn.Linear(7, 4)
        self.step, self.where = step, where

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x)
        if self.where == "no_grad":
            with torch.no_grad():
                h = h + self.step(h)
        else:
            h = self.step(h)
        return self.last(self.norm(self.drop(h))), h


FOLLOWED = [
    *(cast_to_read_dtype, made_with_read_dtype, constant_of_read_dtype, masked_with_its_minimum),
    *(in_float, random_of_its_dtype, reads_input_after_cast, casts_only_if_needed),
    *(casts_unless_needed, asks_for_its_dtype, byte_size, in_torchscript),
]


@pytest.mark.parametrize("first", range(0, len(FOLLOWED), 4))
def test_what_the_source_reads_follows(first: int) -> None:
    """With several steps in one graph, each with outputs of its own."""
    assert_follows(Several(Reads(step) for step in FOLLOWED[first : first + 4]), X)


@pytest.mark.slow
@pytest.mark.parametrize("step", FOLLOWED, ids=lambda step: step.__name__)
def test_what_the_source_reads_follows_alone(step: Any) -> None:
    assert_follows(Reads(step), X)


@functools.cache
def casting() -> tuple[Reads, fxlora.CapturedModule]:
    """Return a model and its capture, which serve several tests: no verb changes them."""
    model = Reads(cast_to_read_dtype).eval()
    return model, fxlora.capture(model, X)


def test_in_a_region() -> None:
    assert_follows(Reads(cast_to_read_dtype, "no_grad"), X)


def test_a_source_that_keeps_what_it_computed() -> None:
    class Keeps(Reads):
        kept: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> Any:
            if self.kept is None or self.kept.dtype != x.dtype:
                self.kept = torch.arange(5, dtype=x.dtype)
            return super().forward(x + self.kept)

    assert_follows(Keeps(cast_to_read_dtype), X)


def test_other_ops_under_autocast_are_refused() -> None:
    assert_follows(Reads(clamped_in_half), X, refused=(torch.float16,))
    gm = assert_follows(Reads(asks_for_autocast), X, refused=HALF)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(
            InputError, match=r"test_autocast\.py:\d+, the source's aten\.tanh\.default differs"
        ),
    ):
        gm(X)


def test_the_advice_works() -> None:
    model = Reads(asks_for_autocast)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(FxLoraWarning, match="does not follow"),
    ):
        gm = fxlora.capture(model, X)
    for training in (False, True):
        found = run(gm.train(training), (X,), {}, torch.bfloat16)
        expected = run(model.train(training), (X,), {}, torch.bfloat16)
        assert all(map(torch.equal, found, expected))
    with pytest.raises(InputError, match="captured for another autocast"):
        run(gm, (X,), {}, torch.float16)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["first", "last"])))
    assert fxlora.verify(lora, X)


def test_a_capture_under_autocast_follows_the_caller() -> None:
    model = Reads(cast_to_read_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        gm = fxlora.capture(model, X)
    for dtype in (None, *HALF):
        assert all(map(torch.equal, run(gm, (X,), {}, dtype), run(model, (X,), {}, dtype)))


def test_a_choice_is_one_node() -> None:
    gm = casting()[1]
    chosen = [node for node in gm.graph.nodes if node.target is by_autocast]
    assert [node.args for node in chosen] == [
        (torch.float32, *(("cpu", half, half) for half in HALF))
    ]
    assert not [n for n in gm.graph.nodes if "_assert_tensor_metadata" in str(n.target)]


# ---- autocasts that are not proved --------------------------------------------------------------


def test_inputs_of_another_dtype_are_refused() -> None:
    gm = casting()[1]
    for on in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=on),
            pytest.raises(InputError, match=r"captured as torch\.float32"),
        ):
            gm(X.bfloat16())


def test_moved_weights_are_refused() -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(5, 4), nn.GELU()), X)
    for module in (gm, copy.deepcopy(gm)):
        run(module, (X,), {}, torch.bfloat16)
        moved = module.to(torch.bfloat16)
        with pytest.raises(InputError, match=r"weights were moved to torch\.bfloat16"):
            run(moved, (X.bfloat16(),), {}, torch.bfloat16)


def on_an_accelerator(model: nn.Module, *args: Any) -> dict[str, Any]:
    """Return the autocasts that a capture on the CPU found for a GPU, which need not be there."""
    before = [(name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()]
    gm = fxlora.capture(model, args)
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == key and torch.equal(after[n], value) for n, key, value in before)
    names = [str(node.kwargs.get("device", "cpu")) for node in gm.graph.nodes]
    assert set(names) == {"cpu"}
    for known in gm.programs[0].autocasts.values():
        moved = known.moved({torch.device("cpu"): torch.device("cuda", 1)})
        assert moved.moved({torch.device("cuda", 1): torch.device("cpu")}) == known
        assert not known.moved({torch.device("cpu"): torch.device("meta")}).proved
        assert not moved.moved({torch.float32: torch.bfloat16}).by_device
    return {
        mode: known.moved({torch.device("cpu"): torch.device("cuda", 0)})
        for mode, known in gm.programs[0].autocasts.items()
    }


GPU = [(("cuda", half),) for half in HALF]


@pytest.fixture
def _accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in ("mode_proof", "traced"):
        monkeypatch.setattr(f"fxlora.frontends.{user}.accelerator", lambda: torch.device("cuda", 0))


def on_its_device(h: torch.Tensor) -> torch.Tensor:
    return h * torch.arange(7, dtype=h.dtype, device=h.device) + torch.rand_like(h)


@pytest.mark.usefixtures("_accelerator")
@pytest.mark.parametrize(
    "step", [cast_to_read_dtype, masked_with_its_minimum, casts_only_if_needed, on_its_device]
)
def test_a_capture_on_the_cpu_is_proved_for_the_accelerator(step: Any) -> None:
    for known in on_an_accelerator(Reads(step), X).values():
        assert list(known.proved) == GPU and not known.differs


@pytest.mark.usefixtures("_accelerator")
def test_what_differs_on_the_accelerator_is_refused_there() -> None:
    def norm(h: torch.Tensor) -> torch.Tensor:  # in float32 by CUDA's autocast, not by the CPU's
        return (h + h.pow(2)).to(h.pow(2).dtype)

    def on_the_cpu(h: torch.Tensor) -> torch.Tensor:
        return h * torch.arange(7, dtype=h.dtype)

    for step, why in ((norm, "differs|return"), (on_the_cpu, "at least two devices")):
        for known in on_an_accelerator(Reads(step), X).values():
            assert not known.proved and [context for context, _ in known.differs] == GPU
            assert all(re.search(why, told) for _, told in known.differs)


@pytest.mark.usefixtures("_accelerator")
def test_views_are_other_tensors_on_the_accelerator() -> None:
    """Two views of one storage with equal forms are two values."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(14, 5)
            self.a, self.b = nn.Parameter(both[:7]), nn.Parameter(both[7:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            on = torch.is_autocast_enabled("cuda")
            return F.linear(x, self.b if on else self.a)

    for known in on_an_accelerator(Halves(), X).values():
        assert not known.proved


def test_cond_is_refused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.lin(x)
            return torch.cond(h.sum() > 0, lambda h: h.sin(), lambda h: h.cos(), (h,))

    gm = fxlora.capture(Branches(), X)
    with pytest.raises(InputError, match="cannot be compared"):
        run(gm, (X,), {}, torch.bfloat16)


def test_traced_graphs_follow() -> None:
    class Traced(nn.Module):
        def __init__(self, asks: bool) -> None:
            super().__init__()
            self.lin, self.asks = nn.Linear(5, 7), asks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.lin(x)
            h = torch.softmax(h, -1, dtype=torch.float32).to(h.dtype)
            return h.tanh() if self.asks and torch.is_autocast_enabled("cpu") else h

    for asks in (False, True):
        model = Traced(asks)
        gm = fxlora.capture(model)
        for dtype in HALF:
            if asks:
                with pytest.raises(InputError, match="asks which autocast"):
                    run(gm, (X,), {}, dtype)
            else:
                assert all(map(torch.equal, run(gm, (X,), {}, dtype), run(model, (X,), {}, dtype)))


@pytest.mark.usefixtures("_accelerator")
def test_a_trace_on_the_cpu_tells_nothing_of_the_accelerator() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            on_gpu = next(self.parameters()).is_cuda
            half = on_gpu and torch.is_autocast_enabled("cuda")
            return self.lin(x).tanh() if half else self.lin(x)

    for known in fxlora.capture(Asks()).programs[0].autocasts.values():
        assert ("cpu", torch.bfloat16) in [context for (context,) in known.proved]
        assert not known.moved({torch.device("cpu"): torch.device("cuda", 0)}).proved


# ---- other users of a graph ---------------------------------------------------------------------


def test_compiled_and_exported() -> None:
    model = Reads(cast_to_read_dtype).eval()
    gm = fxlora.capture(model, X)
    compiled = torch.compile(gm, fullgraph=True, backend="eager")
    for dtype in (None, *HALF):
        for a, b in zip(run(compiled, (X,), {}, dtype), run(model, (X,), {}, dtype), strict=True):
            assert torch.equal(a, b)
    refused = torch.compile(
        fxlora.capture(Reads(asks_for_autocast).eval(), X), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"called under|InputError"):
        run(refused, (X,), {}, torch.bfloat16)
    program = torch.export.export(gm, (X,), strict=False)
    assert torch.equal(program.module()(X)[0], gm(X)[0])


def reference_gradients(
    model: nn.Module, lora: fxlora.CapturedModule, dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the loss and gradients of the source with merged weights, under the same autocast."""
    factors = {n: lora.get_parameter(n).detach().clone() for n in sorted(lora.adapter_parameters())}
    for value in factors.values():
        value.requires_grad_()
    weights = merged_weights(model, lora, factors)
    with torch.autocast("cpu", dtype):
        loss = torch.func.functional_call(model, weights, (X,))[0].float().pow(2).sum()
    return loss, list(torch.autograd.grad(loss, list(factors.values())))


@functools.cache
def convolving() -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    model = nn.Sequential(*convolutions(), nn.Linear(4, 6), nn.Linear(6, 5)).eval()
    x = torch.randn(2, 3, 5, 5)
    return model, x, fxlora.capture(model, x)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_adapters_keep_dtypes(options: dict[str, Any]) -> None:
    model, x, gm = convolving()
    config = LoraConfig(r=2, target_modules=["0", "4", "5", "6"], **options)
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    for dtype in HALF:
        found, expected = run(lora, (x,), {}, dtype), run(model, (x,), {}, dtype)
        assert found[0].dtype == expected[0].dtype == dtype
        assert distance(found, expected) < 0.02


@pytest.mark.parametrize("form", ["branch", "weight"])
@pytest.mark.parametrize("dtype", HALF)
def test_training(dtype: torch.dtype, form: str) -> None:
    model, gm = casting()
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules=["first", "last"]))
    lora = fxlora.inject(gm, plan)
    assert all(map(torch.equal, run(lora, (X,), {}, dtype), run(gm, (X,), {}, dtype)))
    if form == "weight":
        lora = ToWeightForm()(lora)
    randomise(lora)
    outputs = run(lora, (X,), {}, dtype)
    assert [t.dtype for t in outputs] == [t.dtype for t in run(model, (X,), {}, dtype)]
    assert distance(outputs, run(model, (X,), {}, dtype)) > 0.05
    with torch.autocast("cpu", dtype):
        loss = lora(X)[0].float().pow(2).sum()
    names = sorted(lora.adapter_parameters())
    gradients = torch.autograd.grad(loss, [lora.get_parameter(name) for name in names])
    expected_loss, expected = reference_gradients(model, lora, dtype)
    assert distance([loss], [expected_loss]) < 0.05
    for found, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 0
        assert distance([found], [wanted]) < 0.1
    folded = fxlora.fold(lora)
    assert distance(run(folded, (X,), {}, dtype), outputs) < 0.05
    with torch.autocast("cpu", dtype):
        assert folded(X)[0].dtype == dtype


# ---- models of others ---------------------------------------------------------------------------


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )


def test_convolutions() -> None:
    model = convolutions()
    tensors = (*model.parameters(), *model.buffers())
    versions = [tensor._version for tensor in tensors]
    assert_follows(model, torch.randn(2, 3, 5, 5))
    assert [tensor._version for tensor in tensors] == versions  # batch norm writes to its buffers


class DropsPaths(nn.Module):
    """Drops samples at random, as ConvNeXt does; torch gives strides of its own to the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(self.conv(x).permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2)
        if self.training:
            h = h * torch.empty(len(h), 1, 1, 1, dtype=h.dtype).bernoulli_(0.7)
        h = F.adaptive_avg_pool2d(h, 1)
        return self.head(self.norm(h.permute(0, 2, 3, 1)).flatten(1))


class BranchesOnValues(nn.Module):
    """Has no whole graph; its second layer gets what autocast makes of the first's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(-h if h.sum() > 1e6 else h)


@pytest.mark.filterwarnings("ignore:BranchesOnValues could not be captured:fxlora.FxLoraWarning")
def test_regions_get_tensors_that_autocast_cast() -> None:
    gm = assert_follows(BranchesOnValues(), torch.randn(3, 4))
    assert gm.regions == ("first", "second")


class ReadsBetweenRegions(BranchesOnValues):
    """Makes a tensor of the dtype that autocast gives a region's input."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Reads(made_with_read_dtype)


@pytest.mark.filterwarnings("ignore:ReadsBetweenR.* could not be captured:fxlora.FxLoraWarning")
def test_regions_make_tensors_of_the_dtypes_that_autocast_gives_them() -> None:
    assert_follows(ReadsBetweenRegions(), torch.randn(3, 4))


class ChoosesByDtype(nn.Module):
    """Chooses, by a dtype that autocast decides, between tensors that are equal in the example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.unit = nn.Linear(4, 4), nn.Buffer(torch.ones(3, 4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return h * (mask if h.dtype == torch.float32 else other) * self.unit


def test_tensors_with_equal_numbers_are_not_one_value() -> None:
    x, ones = torch.randn(3, 4), torch.ones(3, 4)
    gm = fxlora.capture(ChoosesByDtype(), (x, ones, ones.clone()))
    for mask in (ones, ones * 0):  # the source takes the other one
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="differ"):
            gm(x, mask, ones)


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.layer(a - b if a.dtype == torch.float32 else b - a)


class DiffersBetweenRegions(BranchesOnValues):
    def __init__(self) -> None:
        super().__init__()
        self.second = TakesTwo()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.second(-h if h.sum() > 1e6 else h, self.first(2 * x))


@pytest.mark.filterwarnings("ignore:DiffersB.* could not be captured:fxlora.FxLoraWarning")
def test_inputs_of_a_region_are_not_one_value() -> None:
    assert_follows(DiffersBetweenRegions(), torch.randn(3, 4), refused=HALF)


class CallsTwice(BranchesOnValues):
    """Calls a region with the float32 input, and with an output of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.first(-h if h.sum() > 1e6 else h)


@pytest.mark.filterwarnings("ignore:CallsTwice could not be captured:fxlora.FxLoraWarning")
def test_a_region_with_other_dtypes_than_were_proved_is_refused_and_the_advice_works() -> None:
    model, x = CallsTwice(), torch.randn(3, 4)
    model.first = nn.Linear(4, 4)
    gm = fxlora.capture(model, x)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"'first'.*outside of autocast, or .*half precision"),
    ):
        gm(x)
    assert torch.equal(gm(x), model(x))
    half = model.to(torch.bfloat16)
    x = x.to(torch.bfloat16)
    assert torch.equal(fxlora.capture(half, x)(x), half(x))


def test_strides_of_dimensions_of_one() -> None:
    assert_follows(DropsPaths(), torch.randn(4, 3, 12, 12))


class Detaches(nn.Module):
    """Passes no gradient on under autocast, by one of four ways, which change no number."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.other, self.down = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        if self.way == "one" and y.dtype != torch.float32:
            y = y.detach() * self.other(x)
        elif self.way == "one":
            y = y * self.other(x)
        if self.way == "dtype" and y.dtype != torch.float32:
            y = y.detach()
        if self.way == "asked" and torch.is_autocast_enabled("cpu"):
            y = y.detach()
        with torch.set_grad_enabled(self.way != "mode" or y.dtype == torch.float32):
            y = y.relu()
        return self.down(y)


@pytest.mark.parametrize("way", ["dtype", "one", "asked", "mode"])
def test_gradients_that_stop_under_autocast_only(way: str) -> None:
    model = Detaches(way)
    with torch.autocast("cpu", torch.bfloat16):
        model(X).float().sum().backward()
    assert model.up.weight.grad is None
    gm = fxlora.capture(model, X)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"under torch\.autoc"),
    ):
        gm(X)
    assert torch.equal(gm(X), model(X))


class NormsInFloat(nn.Module):
    """Computes in float32 what it has under autocast, and reads it again afterwards."""

    def __init__(self, disabled: bool) -> None:
        super().__init__()
        self.up, self.down, self.disabled = nn.Linear(5, 5), nn.Linear(5, 4), disabled

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = self.up(x)
        if self.disabled:
            with torch.autocast("cpu", enabled=False):
                y = u.float() * u.float().square().mean(-1, keepdim=True).rsqrt()
            u = u + y
        with torch.no_grad():
            scale = u.float().abs().mean()
        return self.down(u) / scale, u


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("modules", [None, "*"])
def test_a_tensor_that_a_region_cast_is_read_again(disabled: bool, modules: str | None) -> None:
    model = nn.Sequential(NormsInFloat(disabled))
    assert_follows(model, X)
    rule = LoraConfig(r=2, target_modules=["up", "down"])
    lora = fxlora.adapt(model, X, rules=rule, modules=modules)
    randomise(lora)
    merged = fxlora.merged(model, fxlora.fold(lora))
    assert (merged(X)[0] - model(X)[0]).abs().max() > 0.1
    for found, expected in zip(lora(X), merged(X), strict=True):
        torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):
        lora(X)[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fxlora.lora_parameters(lora))


def test_attention_and_recurrence() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.first = nn.Linear(5, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            h = h + self.attention(h, h, h)[0]
            return F.layer_norm(h, (8,))

    assert_follows(Both(), torch.randn(2, 3, 5))


class TurnsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.head(x + self.rnn(x)[0])
        return turned.transpose_(0, 1).flatten(1).unsqueeze_(0)


def test_ops_that_change_the_form_of_their_argument() -> None:
    assert_follows(TurnsInPlace(), torch.randn(3, 4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "t5"])
def test_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    from .test_transformers import OUTPUTS

    model_of, kwargs, _ = OUTPUTS[kind]
    assert_follows(model_of(), **kwargs)


@pytest.mark.slow
def test_a_returned_container_with_a_dtype_is_refused() -> None:
    pytest.importorskip("transformers")
    from .test_transformers import OUTPUTS

    model_of, kwargs, _ = OUTPUTS["mamba"]
    assert_follows(model_of(), refused=HALF, **kwargs)
    assert_follows(model_of(), **(kwargs | {"use_cache": False}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "swin_t", "vit_b_16"])
def test_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    size = 224 if name.startswith("vit") else 64
    assert_follows(getattr(torchvision.models, name)(), torch.randn(2, 3, size, size))


@pytest.mark.gpu
@pytest.mark.parametrize("step", FOLLOWED, ids=lambda step: step.__name__)
def test_on_a_gpu(step: Any) -> None:
    if step is asks_for_its_dtype:
        pytest.skip("asks for the CPU's autocast")
    assert_follows(Reads(step).cuda(), X.cuda(), device="cuda")


@pytest.mark.gpu
def test_moved_to_a_gpu() -> None:
    for step in (cast_to_read_dtype, masked_with_its_minimum, on_its_device):
        model = Reads(step).eval()
        gm = fxlora.capture(model, X).cuda()
        model.cuda()
        for dtype in (None, *HALF):
            found, expected = (run(m, (X.cuda(),), {}, dtype, "cuda") for m in (gm, model))
            assert [t.dtype for t in found] == [t.dtype for t in expected]
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_weight_form_keeps_the_base_weight(base: torch.dtype, dtype: torch.dtype) -> None:
    """W0 + s·BA in one op would be in autocast's dtype, W0 included."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.pos = nn.Linear(5, 7), nn.Parameter(torch.randn(3, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x) * 0 + self.pos

    model = Adds().to(base).eval()
    gm = fxlora.capture(model, X.to(base))
    lora = fxlora.inject(gm, fxlora.match(gm, [fxlora.Rule("pos", lora=LoraConfig(r=2))])).eval()
    (found,), (expected,) = (run(m, (X.to(base),), {}, dtype) for m in (lora, model))
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    randomise(lora)
    (found,) = run(lora, (X.to(base),), {}, dtype)
    assert not torch.equal(found, expected)


class RmsNorms(nn.Module):
    """Two norms as in transformers, which go back to the dtype of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = x.to(torch.float32)
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            x = x + layer(self.scale * y.to(x.dtype))
        return x


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_repair_for_one_autocast_keeps_another(base: torch.dtype) -> None:
    """Under float16, the norms of a base in bfloat16 have another dtype; under bfloat16 not."""
    model, x = RmsNorms().to(base).eval(), X.to(base)
    gm = fxlora.capture(model, x)
    for training in (False, True):
        model.train(training)
        gm.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = model(x), gm(x)
        assert found.dtype is expected.dtype and torch.equal(found, expected)


class DiffersInOneMode(nn.Module):
    """Reads a dtype as a constant in each mode; in train mode also what no capture can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        if self.training and h.dtype == torch.bfloat16:
            raise ValueError("not in half precision")
        return (h.float() * 2).to(h.dtype)


def test_each_mode_has_the_autocasts_of_its_own_source() -> None:
    model = DiffersInOneMode()
    gm = fxlora.capture(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gm.eval()(X), model.eval()(X))
        with pytest.raises(InputError, match="autocast"):
            gm.train()(X)


class AsksForBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.lin(x)
        if not torch.is_grad_enabled() and h.dtype == torch.bfloat16:
            h = h * 2
        return h


def test_an_answer_to_gradients_and_autocast_together_is_refused() -> None:
    model = AsksForBoth().eval()
    gm = fxlora.capture(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gm(X), model(X))
        with torch.no_grad(), pytest.raises(InputError, match="no_grad"):
            gm(X)
