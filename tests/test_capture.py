from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import CaptureError, FxLoraWarning, InputError

from .laws import assert_untouched, run, snapshot
from .models import Mlp, Normed, Several, Tied
from .typed import doubled, grad_of, untyped


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Any, mask: Any = None, *, scale: float = 1.0, extra: Any = None) -> Any:
        y = self.fc(x) * scale
        if mask is not None:
            y = y * mask
        return y if extra is None else y + extra["bias"]


def test_parameters_share_storage_and_buffers_are_copies() -> None:
    model = Normed()
    gm = fxlora.capture(model, torch.randn(2, 3, 9, 7))
    for name, parameter in model.named_parameters():
        mine = gm.get_parameter(name)
        assert mine.data_ptr() == parameter.data_ptr()
        assert mine is not parameter
    for name, buffer in model.named_buffers():
        assert gm.get_buffer(name).data_ptr() != buffer.data_ptr()
    gm.train()(torch.randn(2, 3, 9, 7))
    assert int(model.get_buffer("bn.num_batches_tracked")) == 0
    assert int(gm.get_buffer("bn.num_batches_tracked")) == 1


def test_it_is_a_true_graph_module() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    assert isinstance(gm, fx.GraphModule)
    assert type(gm).__name__ == "Mlp"
    gm.graph.lint()
    assert "torch.ops.aten.linear.default" in gm.code
    assert gm.train().code != gm.eval().code
    copied = copy.deepcopy(gm)
    copied.get_parameter("up.weight").data.zero_()
    assert gm.get_parameter("up.weight").abs().sum() > 0
    assert copied.train().code == gm.train().code
    assert copied.eval().code == gm.eval().code


def test_one_graph_where_the_modes_are_alike() -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), torch.randn(2, 5))
    assert gm.graphs["train"] is gm.graphs["eval"]
    assert len(fxlora.capture(Mlp(), torch.randn(2, 5)).distinct_graphs()) == 2


def test_the_mode_of_the_source_is_kept() -> None:
    model = Mlp().eval()
    model.up.train()
    before = snapshot(model)
    assert not fxlora.capture(model, torch.randn(2, 5)).training
    assert_untouched(model, before)


def test_tied_weights_stay_one_tensor() -> None:
    gm = fxlora.capture(Tied(), torch.tensor([[1, 2]]))
    assert gm.get_parameter("emb.weight") is gm.get_parameter("head.weight")
    copied = copy.deepcopy(gm)
    assert copied.get_parameter("emb.weight") is copied.get_parameter("head.weight")


def test_loading_a_state_dict_leaves_the_source_alone() -> None:
    model = Mlp()
    before = snapshot(model)
    gm = fxlora.capture(model, torch.randn(2, 5))
    gm.load_state_dict({k: v + 1 for k, v in gm.state_dict().items()})
    assert torch.equal(gm.get_parameter("up.weight"), model.up.weight + 1)
    assert_untouched(model, before)


def test_a_weight_that_the_forward_writes_to_is_copied() -> None:
    model = nn.Embedding(7, 3, max_norm=0.5)
    before = model.weight.detach().clone()
    for gm in (fxlora.capture(model, torch.tensor([[1, 2]])), fxlora.capture(model)):
        gm.eval()(torch.tensor([[1, 4]]))
        assert not torch.equal(gm.get_parameter("weight"), before)
        assert torch.equal(model.weight, before)


# ---- devices and dtypes -------------------------------------------------------------------------


class NamesDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        steps = torch.arange(3, device=y.device, dtype=y.dtype)
        return y + steps + torch.tensor([1.0, 2.0, 3.0], device=y.device, dtype=y.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype(dtype: torch.dtype) -> None:
    model = NamesDevices()
    gm = fxlora.capture(model, torch.randn(2, 5))
    if dtype == torch.bfloat16:  # the source might have named float32
        with pytest.raises(CaptureError, match="Cast the source"):
            gm.to(dtype)
        return
    gm = gm.to(dtype)
    x = torch.randn(4, 5, dtype=dtype)
    assert model.fc.weight.dtype == torch.float32
    found, expected = gm(x), copy.deepcopy(model).to(dtype)(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_to_device_moves_the_devices_that_the_graph_names() -> None:
    gm = fxlora.capture(NamesDevices(), torch.randn(2, 5)).to("meta")
    assert gm(torch.randn(3, 5, device="meta")).device.type == "meta"


def test_a_cast_whose_meaning_is_lost_is_refused() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).to(torch.float32).softmax(-1).to(x.dtype)

    gm = fxlora.capture(Casts(), torch.randn(2, 5))
    with pytest.raises(CaptureError, match="Cast the source"):
        gm.to(torch.bfloat16)
    assert gm.get_parameter("fc.weight").dtype == torch.float32
    assert gm.double()(torch.randn(2, 5).double()).dtype == torch.float64


@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_torch_compile(adapted: bool) -> None:
    gm = fxlora.capture(Normed(), torch.randn(2, 3, 9, 7))
    if adapted:
        gm = fxlora.inject(
            gm, fxlora.match(gm, fxlora.Rule(op="linear", lora=fxlora.LoraConfig(r=2)))
        )
    gm.eval()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 9, 7)
    assert torch.allclose(compiled(x)["logits"], gm(x)["logits"], atol=1e-6)
    gm.train()
    before = gm.get_buffer("bn.num_batches_tracked").clone()
    compiled(x)
    assert gm.get_buffer("bn.num_batches_tracked") == before + 1
    from torch._dynamo.exc import Unsupported

    with pytest.raises(Unsupported, match="dimension 2: captured as 9"):
        compiled(torch.randn(4, 3, 1, 7))


# ---- inputs -------------------------------------------------------------------------------------


def test_the_batch_is_dynamic_from_an_example_of_one() -> None:
    model = Normed().eval()
    gm = fxlora.capture(model, torch.randn(1, 3, 9, 7))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 9, 7)
        assert torch.equal(run(gm, (x,), {})[0], run(model, (x,), {})[0])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.randn(2, 4),), {"scale": 2.0}, "x, dimension 1: captured as 5, called with 4"),
        ((torch.randn(2, 1),), {"scale": 2.0}, "x, dimension 1: captured as 5, called with 1"),
        ((torch.randn(2, 5),), {"scale": 3.0}, "scale: captured as the constant 2.0"),
        ((torch.randn(2, 5),), {}, "scale: missing"),
        ((torch.randn(2, 5),), {"scale": 2.0, "mask": torch.ones(2, 5)}, "mask: not among"),
        ((torch.randn(5),), {"scale": 2.0}, "x: captured with 2 dimensions"),
        (
            (torch.zeros(2, 5).long(),),
            {"scale": 2.0},
            "x: captured as torch.float32, called with torch.int64",
        ),
        ((None,), {"scale": 2.0}, "x: captured as a tensor, called with NoneType"),
        ((torch.randn(2, 5), 2.0, 3), {}, "called with 3 positional"),
    ],
)
def test_calls_outside_the_capture_raise(
    args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    gm = fxlora.capture(TwoInputs(), (torch.randn(4, 5),), {"scale": 2.0})
    with pytest.raises(InputError) as error:
        gm(*args, **kwargs)
    assert str(error.value).startswith(message)


def test_dimensions_captured_as_the_same_must_be_the_same() -> None:
    gm = fxlora.capture(TwoInputs(), (torch.randn(4, 5), torch.ones(4, 3)))
    x = torch.randn(2, 5)
    gm(x, torch.ones(2, 3))
    gm(mask=torch.ones(2, 3), x=x)
    with pytest.raises(InputError, match="mask, dimension 0"):
        gm(x, torch.ones(1, 3))  # the source would broadcast it


def test_nested_inputs_are_named() -> None:
    gm = fxlora.capture(TwoInputs(), (torch.randn(4, 5),), {"extra": {"bias": torch.ones(4, 3)}})
    with pytest.raises(InputError, match=r"extra\['bias'\], dimension 1"):
        gm(torch.randn(4, 5), extra={"bias": torch.ones(4, 1)})
    with pytest.raises(InputError, match="structure"):
        gm(torch.randn(4, 5), extra={"other": torch.ones(4, 3)})


def test_dynamic_shapes_are_the_users() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3))

    model = Pool()
    height = torch.export.Dim("height", min=8, max=64)
    gm = fxlora.capture(model, torch.randn(2, 3, 9, 11), dynamic_shapes={"x": {2: height}})
    x = torch.randn(2, 3, 16, 11)
    assert torch.equal(run(gm, (x,), {})[0], run(model, (x,), {})[0])
    for bad in (torch.randn(2, 3, 65, 11), torch.randn(2, 3, 7, 11), torch.randn(3, 3, 16, 11)):
        with pytest.raises(InputError):
            gm(bad)


# ---- models that cannot be captured -------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if y.sum() > 0:
            return y
        return -y


@pytest.mark.parametrize("args", [(torch.randn(2, 5),), None])
def test_the_users_line_is_named(args: tuple[Any, ...] | None) -> None:
    model = Branches()
    before = snapshot(model)
    line = Branches.forward.__code__.co_firstlineno + 2
    where = rf"Branches .*{__file__}:{line}"
    if args is None:
        with pytest.raises(CaptureError, match=where):
            fxlora.capture(model)
    else:  # its layers are captured, and the warning says why the whole model is not
        with pytest.warns(FxLoraWarning, match=where):
            fxlora.capture(model, args)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["graph", "plan", "inputs", "mode", "aliases"])
def test_names_that_a_captured_module_has_another_use_for(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, nn.Linear(5, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return getattr(self, name)(x)

    model, x = Named(), torch.randn(2, 5)
    with pytest.raises(CaptureError, match=rf"named '{name}'.*nn\.Sequential"):
        fxlora.capture(model, x)
    assert torch.equal(fxlora.capture(nn.Sequential(model), x)(x), model(x))
    assert torch.equal(fxlora.capture(Wrapper(model), x)(x), model(x))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_lazy_modules_need_a_first_call() -> None:
    with pytest.raises(CaptureError):
        fxlora.capture(nn.LazyLinear(3))


@pytest.mark.parametrize("bad", ["model", torch.nn.functional.relu])
def test_only_modules_are_captured(bad: Any) -> None:
    with pytest.raises(CaptureError, match=r"nn\.Module"):
        fxlora.capture(bad)


def test_the_tracer_sees_functions_and_methods() -> None:
    class Spellings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(5, 4))
            self.b = nn.Parameter(torch.randn(4, 3))
            self.c = nn.Parameter(torch.randn(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.matmul(x @ self.a, other=self.b)
            return F.linear(weight=self.c, input=y).matmul(self.c)

    model = Spellings()
    gm = fxlora.capture(model)
    targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == ["aten.matmul.default"] * 2 + ["aten.linear.default", "aten.matmul.default"]
    x = torch.randn(2, 5)
    assert torch.equal(gm(x), model(x))


def test_a_module_that_the_tracer_keeps_whole_is_not_adapted_silently() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 12))
    gm = fxlora.capture(model)
    with pytest.raises(fxlora.UnsupportedOpError, match="capture with example inputs"):
        fxlora.match(gm, fxlora.Rule("out_proj"))
    exported = fxlora.capture(model, torch.randn(2, 3, 8), dynamic_shapes=(None,))
    assert len(fxlora.match(exported, fxlora.Rule("out_proj"))) == 1


class BranchesAndDraws(nn.Module):
    """A model that is captured by regions: capture runs it, and it draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(5, 3), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        self.drawn = torch.rand(2).tolist()
        return self.drop(y if y.sum() > 0 else -y)


def test_capture_needs_no_seed() -> None:
    drawn: list[str] = []

    class Sees(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if torch.Tag.nondeterministic_seeded in func.tags:
                drawn.append(str(func))
            return func(*args, **(kwargs or {}))

    for model in (Mlp(), BranchesAndDraws().train()):
        torch.manual_seed(5)
        state = torch.random.get_rng_state()
        with warnings.catch_warnings(), Sees():
            warnings.simplefilter("ignore", FxLoraWarning)
            fxlora.capture(model, torch.ones(2, 5))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert drawn  # the captures drew, but the user's generator is unchanged


@pytest.mark.gpu
def test_to_cuda() -> None:
    model = NamesDevices()
    gm = fxlora.capture(model, torch.randn(2, 5)).to("cuda")
    x = torch.randn(4, 5, device="cuda")
    assert torch.allclose(gm(x), copy.deepcopy(model).cuda()(x))
    lora = fxlora.inject(gm, fxlora.match(gm, fxlora.Rule("fc")))
    assert lora.get_parameter("fc.lora_A.default.weight").is_cuda
    assert fxlora.fold(lora)(x).is_cuda


# ---- assumptions of a graph ---------------------------------------------------------------------


class Sized(nn.Module):
    """A model whose Python code branches on the batch size."""

    def __init__(self, takes_first: Callable[[int], bool]) -> None:
        super().__init__()
        self.takes_first = takes_first
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y if self.takes_first(x.shape[0]) else -y


@pytest.mark.parametrize(
    ("takes_first", "example", "good", "bad", "assumed"),
    [
        (lambda n: n % 2 == 0, 4, 6, 3, "% 2 == 0"),
        (lambda n: n != 8, 4, 7, 8, "!= 8"),
        (lambda n: n != 1, 3, 2, 1, "!= 1"),
        (lambda n: n <= 4, 3, 4, 5, "<= 4"),
    ],
)
def test_branches_on_sizes_are_guarded(
    takes_first: Callable[[int], bool],
    example: int,
    good: int,
    bad: int,
    assumed: str,
    tmp_path: Path,
) -> None:
    model = Sized(takes_first)
    gm = fxlora.capture(model, torch.randn(example, 5)).eval()
    x = torch.randn(good, 5)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(InputError):
        gm(torch.randn(bad, 5))
    fxlora.export(gm, tmp_path / "m.pt2", x)
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.equal(program(x), model(x))
    with pytest.raises(AssertionError, match=re.escape(f"x.size()[0] {assumed}")):
        program(torch.randn(bad, 5))


def test_a_batch_of_one_where_the_source_refuses_it() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    gm = fxlora.capture(model, torch.randn(4, 5))
    with pytest.raises(InputError):
        gm.train()(torch.randn(1, 5))
    assert torch.equal(gm.eval()(torch.ones(1, 5)), model.eval()(torch.ones(1, 5)))


def test_a_batch_of_one_that_cannot_be_widened() -> None:
    model = nn.LSTM(4, 6)
    x, state = torch.randn(1, 1, 4), (torch.zeros(1, 1, 6), torch.zeros(1, 1, 6))
    gm = fxlora.capture(model, (x, state))
    assert torch.equal(gm(x, state)[0], model(x, state)[0])


def test_the_dtype_is_part_of_the_capture() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    with pytest.raises(InputError, match=r"captured as torch\.float32, called with torch\.float64"):
        gm(torch.randn(2, 5).double())
    assert gm.double()(torch.randn(2, 5).double()).dtype == torch.float64


def test_every_integer_dtype_is_its_own() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(9, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            y = self.emb(ids)
            return y + 1 if ids.dtype == torch.int32 else y

    model, long = Decides().eval(), torch.tensor([[1, 7, 3]])
    for example, other in ((long, long.int()), (long.int(), long)):
        gm = fxlora.capture(model, example).eval()
        assert not torch.equal(model(example), model(other))
        with pytest.raises(InputError) as error:
            gm(other)
        assert str(error.value).startswith(
            f"ids: captured as {example.dtype}, called with {other.dtype}. "
            f"Convert it with .to({example.dtype}), or capture again"
        )
        assert torch.equal(gm(other.to(example.dtype)), model(example))  # the advice
        assert torch.equal(fxlora.capture(model, other).eval()(other), model(other))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_graphs_take_other_batches(dynamic: bool | None) -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5)).eval()
    compiled = torch.compile(gm, fullgraph=True, backend="eager", dynamic=dynamic)
    for batch in (4, 3, 2, 7):
        x = torch.randn(batch, 5)
        assert torch.equal(compiled(x), gm(x))


def test_switching_modes_does_not_compile_again() -> None:
    torch.compiler.reset()  # compilations of other tests count against torch's limits
    compiled_graphs = []

    def backend(graph: fx.GraphModule, _: list[Any]) -> object:
        compiled_graphs.append(graph)
        return graph.forward

    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    compiled = torch.compile(gm, backend=backend)
    for _ in range(4):
        for training in (True, False):
            gm.train(training)
            compiled(torch.randn(2, 5))
    assert len(compiled_graphs) == 2


def test_frozen_batch_norms_stay_frozen() -> None:
    model = Normed().train()
    model.bn.eval()
    gm = fxlora.capture(model, torch.randn(2, 3, 9, 7))
    x = torch.randn(4, 3, 9, 7)
    assert torch.equal(gm(x)["logits"], model(x)["logits"])
    assert int(gm.get_buffer("bn.num_batches_tracked")) == 0


def test_what_is_captured_is_not_captured_again() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    with pytest.raises(CaptureError, match="captured already"):
        fxlora.capture(gm, torch.randn(2, 5))
    around = nn.Sequential(gm, nn.Linear(3, 2))
    fxlora.capture(around, torch.randn(2, 5))
    assert gm.training
    assert gm.graph is gm.graphs["train"]


def test_writes_in_nested_graphs_stay_off_the_source() -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.w.clamp_(-0.1, 0.1)
            return F.linear(x, self.w)

    model = Clamps()
    before = model.w.detach().clone()
    gm = fxlora.capture(model, torch.randn(2, 5))
    gm(torch.randn(2, 5))
    assert torch.equal(model.w, before)
    assert gm.get_parameter("w").abs().max() <= 0.1
    with pytest.raises(fxlora.UnsupportedOpError, match="its weight is written to"):
        fxlora.match(gm, fxlora.Rule("w", lora=fxlora.LoraConfig(r=2)))


def test_writes_to_what_a_nested_graph_returns_stay_off_the_source() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = (nn.Parameter(torch.randn(4, 5)) for _ in "wv")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                flat = self.w.view(-1)
            y = F.linear(x, self.w)
            with torch.no_grad():
                flat.add_(1)
                self.v.chunk(2)[0].mul_(2)
            return F.linear(x, self.w) + y + F.linear(x, self.v)

    model = Writes()
    before = copy.deepcopy(model.state_dict())
    gm = fxlora.capture(model, torch.randn(2, 5))
    gm(torch.randn(2, 5))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(gm.get_parameter(name), before[name])


def test_dtypes_in_nested_graphs_move() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                offset = torch.zeros(3, dtype=x.dtype) + x.new_ones(3)
            return self.fc(x) + offset

    gm = fxlora.capture(Nested(), torch.randn(2, 5)).double()
    assert gm(torch.randn(2, 5).double()).dtype == torch.float64


# ---- state that the tracer must not bake in -----------------------------------------------------


class Counts(nn.Module):
    n: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n.add_(1)
        return self.fc(x)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dict(self.named_parameters())["fc.weight"] * 2)


class DrawsRandomNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + torch.rand(1)


@pytest.mark.parametrize("kind", [Counts, Constant, DrawsRandomNumbers])
def test_the_tracer_bakes_nothing_in(kind: type[nn.Module]) -> None:
    model = kind()
    before = snapshot(model)
    with pytest.raises(CaptureError, match="Give example inputs"):
        fxlora.capture(model)
    assert_untouched(model, before)
    fxlora.capture(model, torch.randn(2, 5))


def test_the_tracer_leaves_nothing_in_the_model() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls, self.last = nn.Linear(5, 3), 0, None

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            self.calls += 1
            self.last = self.fc(x)
            return self.last * 2 if mask is not None else self.last

    model = Keeps()
    gm = fxlora.capture(model)
    assert (model.calls, model.last) == (0, None)
    x = torch.randn(2, 5)
    assert torch.equal(gm(x), model(x))
    with pytest.raises(AssertionError, match="mask has been specialized to have value None"):
        gm(x, torch.ones(2, 3))


def test_hooks_of_the_model_itself_need_inputs_and_inner_ones_do_not() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    model.register_forward_hook(doubled)
    with pytest.raises(CaptureError, match="forward hooks on the root module"):
        fxlora.capture(model)
    around, x = nn.Sequential(model), torch.randn(2, 5)
    for gm in (fxlora.capture(around), fxlora.capture(around, x), fxlora.capture(model, x)):
        assert torch.equal(gm(x), model(x))


def test_one_tensor_given_for_two_inputs_stays_two_inputs() -> None:
    model, x = TwoInputs(), torch.randn(4, 3)
    model.fc = nn.Linear(3, 3)
    gm = fxlora.capture(model, (x,), {"mask": x})
    other = torch.randn(4, 3)
    assert torch.equal(gm(other, mask=x), model(other, mask=x))


def test_a_guard_on_strides_does_not_exclude_a_batch_of_one() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(6, 18)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 3).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model = Attends()
    for example in (1, 2):
        gm = fxlora.capture(model, torch.randn(example, 5, 6))
        for batch in (1, 3):
            x = torch.randn(batch, 5, 6)
            assert torch.equal(gm(x), model(x))


class EvenOrOdd(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (2 if a.shape[0] % 2 == 0 else 3) * a.sum() + b.sum()


def test_guards_know_keywords_in_any_order() -> None:
    shapes = {"b": {0: Dim.AUTO}, "a": {0: Dim.AUTO}}
    example = {"b": torch.ones(7), "a": torch.ones(4)}
    gm = fxlora.capture(EvenOrOdd(), (), example, dynamic_shapes=shapes)
    assert float(gm(b=torch.ones(3), a=torch.ones(6))) == 15
    with pytest.raises(InputError, match=r"a\.shape"):
        gm(b=torch.ones(4), a=torch.ones(5))


class Checkpointed(Mlp):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> Any:
        inner = super().forward
        return checkpoint(inner, x, use_reentrant=self.reentrant) if self.training else inner(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_keep_their_gradients(reentrant: bool) -> None:
    model, x = Checkpointed(reentrant).double(), torch.randn(4, 5, dtype=torch.double)
    gm = fxlora.capture(model, x)
    plain = Mlp().double()
    plain.load_state_dict(model.state_dict())
    for module in (gm, plain):
        torch.manual_seed(1)
        module.train()(x).square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None and parameter.grad.any()
        assert torch.equal(grad_of(gm.get_parameter(name)), parameter.grad)


def test_inputs_that_are_no_tuple() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(CaptureError, match=r"capture\(model, \(a, b\)\)"):
        fxlora.capture(Mlp(), x, untyped(x))


# ---- functional convolutions in the tracer ------------------------------------------------------


class Convolves(nn.Module):
    def __init__(self, function: Any, weight: torch.Tensor, options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options, self.weight = function, options, nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, **self.options)


_ONE = [2, (2,), [2], torch.Size([2])]


CONVOLUTIONS: list[tuple[bool, dict[str, Any]]] = [
    *[(False, {name: v}) for name in ("stride", "padding", "dilation") for v in _ONE],
    *[(True, {name: v}) for name in ("stride", "padding", "dilation") for v in _ONE],
    *[(True, {"stride": 3, "output_padding": value}) for value in _ONE],
    (False, {"padding": "same"}),
    (False, {"bias": None, "stride": 2, "padding": 1, "groups": 1}),
]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_functional_convolutions_of_the_tracer(dims: int) -> None:
    models: list[Convolves] = []
    for transposed, options in CONVOLUTIONS:
        function = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
        channels = (4, 6) if transposed else (6, 4)
        weight = torch.randn(*channels, *(3, 2, 3)[:dims], dtype=torch.float64)
        models.append(Convolves(function, weight, options))
    x = torch.randn(3, 4, *(9, 8, 7)[:dims], dtype=torch.float64)
    base = [model(x) for model in models]
    gm = fxlora.capture(Several(models))
    for mode in (True, False):
        assert all(map(torch.equal, gm.train(mode)(x), base))
    rule = fxlora.Rule("parts.*.weight", lora=fxlora.LoraConfig(r=2))
    lora = fxlora.inject(gm, fxlora.match(gm, rule))
    with torch.no_grad():
        for name in lora.adapter_parameters():
            lora.get_parameter(name).normal_()
    folded = fxlora.fold(lora)
    for number, (model, y, before) in enumerate(zip(models, lora(x), base, strict=True)):
        merged = folded.get_parameter(f"parts.{number}.weight").detach()
        assert (y - before).abs().max() > 1e-2, model.options
        expected = model.function(x, merged, **model.options)
        assert torch.allclose(y, expected, 1e-10, 1e-10), model.options


# ---- models and inputs that no graph supports ---------------------------------------------------


def _quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(5, 3)), {nn.Linear})


_X = torch.arange(10.0).reshape(2, 5)


class Yields(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3))

    def forward(self, x: torch.Tensor) -> Any:
        return (row @ self.weight for row in x)


@pytest.mark.parametrize(
    ("model", "args", "said"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), (_X,), "'0.weight' has no shape yet"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), None, "'0.weight' has no shape yet"),
        (lambda: nn.Linear(5, 3), (torch.nested.nested_tensor([_X, _X[:1]]),), "nested ones"),
        (lambda: nn.Linear(5, 3), (_X.to_sparse(),), "sparse_coo ones. Convert"),
        (lambda: nn.Linear(5, 3), (_X.to_mkldnn(),), "_mkldnn ones. Convert"),
        (_quantized, (_X,), "'0._packed_params' packs its weights"),
        (lambda: torch.jit.script(nn.Linear(5, 3)), (_X,), "compiled by TorchScript"),
        (lambda: torch.jit.trace(nn.Linear(5, 3), _X), None, "compiled by TorchScript"),
        (lambda: Yields(), (_X,), "not generator: register the class"),
        (lambda: nn.Linear(5, 3), (_X, _X), "takes 2 positional arguments"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_no_graph_takes_is_a_capture_error(model: Any, args: Any, said: str) -> None:
    with pytest.raises(CaptureError, match=re.escape(said)):
        fxlora.capture(model(), args)


def test_nested_tensors_are_refused_with_advice_that_works() -> None:
    model = nn.Linear(5, 3).eval()
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([_X, _X[:1]], layout=layout)
        with pytest.raises(CaptureError, match=r"torch\.nested\.to_padded_tensor"):
            fxlora.capture(model, nested)
        padded = torch.nested.to_padded_tensor(nested, 0.0)
        gm = fxlora.capture(model, padded)
        assert torch.equal(gm(padded), model(padded))
        with pytest.raises(InputError, match=r"nested one\. Pad it: torch\.nested\.to_padded"):
            gm(nested)


def test_offloaded_weights_are_refused_with_advice_that_works() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is optional")
    source = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).eval()
    model = accelerate.cpu_offload(copy.deepcopy(source), torch.device("cpu"))
    with pytest.raises(CaptureError, match=r"'0\.weight' is on the meta device") as refused:
        fxlora.capture(model, _X)
    advice = str(refused.value).rpartition("first: ")[2].rstrip(".")
    exec(advice, {"accelerate": accelerate, "model": model})
    assert torch.equal(fxlora.capture(model, _X)(_X), source(_X))


def test_a_lazy_model_is_untouched() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(CaptureError, match="no shape yet"):
        fxlora.capture(model, _X)
    assert isinstance(model[0].weight, nn.UninitializedParameter)
    assert model(_X).shape == (2, 3)


def test_inputs_made_in_inference_mode() -> None:
    model = nn.Linear(5, 3)
    with torch.inference_mode():
        x = _X + 1
    assert torch.equal(fxlora.capture(model, x)(_X), model(_X))


def test_what_breaks_inside_is_a_capture_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: Any) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(fxlora.frontends, "build_tree", breaks)
    with pytest.raises(CaptureError, match=r"KeyError: 'inside'.*please report it"):
        fxlora.capture(nn.Linear(5, 3), _X)


def test_a_start_from_a_weight_with_a_nan() -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(5, 3)), _X)
    config = fxlora.LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    plan = fxlora.match(gm, config)
    with torch.no_grad():
        gm.get_parameter("0.weight").fill_(float("nan"))
    with pytest.raises(fxlora.InjectError, match=r"'0' .*finite"):
        fxlora.inject(gm, plan)


def test_a_guard_says_what_it_assumes_of_which_input() -> None:
    class Compares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, sizes: dict[str, torch.Tensor]) -> torch.Tensor:
            even = (x.shape[0] + sizes["y"].shape[1]) % 2 == 0
            return self.fc(x) if even else -self.fc(x)

    model, auto = Compares(), Dim.AUTO
    gm = fxlora.capture(
        model,
        (torch.randn(4, 5), {"y": torch.randn(3, 6)}),
        dynamic_shapes={"x": {0: auto}, "sizes": {"y": {1: auto}}},
    ).eval()
    x, y = torch.randn(3, 5), torch.randn(3, 7)
    assert torch.equal(gm(x, {"y": y}), model(x, {"y": y}))
    with pytest.raises(InputError, match=r"holds only where .*x\.shape\[0\].*% 2"):
        gm(x, {"y": y[:, :4]})
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, {"y": y}), model(x, {"y": y}))
