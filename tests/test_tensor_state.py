"""A forward that reads the state of a tensor: its graph has that of the example."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import _prims_common, is_grad_enabled, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

import fxlora

from .laws import assert_same


class Frames(nn.Module):
    """Overlapping frames of a signal, made in a way that depends on the signal's strides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.project = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(getattr(self, self.how)(x))

    def strided(self, x: torch.Tensor) -> torch.Tensor:
        return x.as_strided((x.shape[0], 5, 8), (x.stride(0), 4, x.stride(1)))

    def strides_of_an_inner_tensor(self, x: torch.Tensor) -> torch.Tensor:
        return self.strided(x.sin())

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return x.unfold(1, 8, 4) * (1 if x.is_contiguous() else 2)

    def branch_by_a_helper_of_torch(self, x: torch.Tensor) -> torch.Tensor:
        return x.unfold(1, 8, 4) * (1 if _prims_common.is_contiguous(x) else 2)

    def strides_by_an_op(self, x: torch.Tensor) -> torch.Tensor:
        return x.unfold(1, 8, 4) * torch.ops.aten.sym_stride.int(x, 1)

    def order(self, x: torch.Tensor) -> torch.Tensor:
        return x.unfold(1, 8, 4) * (1 if x.dim_order() == (0, 1) else 2)

    def offset(self, x: torch.Tensor) -> torch.Tensor:
        return x.unfold(1, 8, 4) + x.storage_offset()

    def memory_format(self, x: torch.Tensor) -> torch.Tensor:
        images = x.unflatten(1, (4, 3, 2))
        last = images.is_contiguous(memory_format=torch.channels_last)
        return images.flatten(1).unfold(1, 8, 4) * (2 if last else 1)

    # Independent of strides:

    def first_contiguous(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().unfold(1, 8, 4)

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        sizes = (
            x.size(0),
            x.shape[1] // 4 - 1,
            8 if x.ndim == 2 and x.dtype.is_floating_point else 1,
        )
        return x.reshape(x.shape[0], -1).unfold(1, 8, 4).reshape(sizes)

    def contiguous(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(x.shape[0], 3, 8)


WAVES = torch.randn(5, 48, dtype=torch.double)
X = WAVES[:3, :24].clone()
OTHERS = {
    "a slice": WAVES[:3, :24],
    "every second": WAVES[:3, ::2],
    "transposed": X.t().contiguous().t(),
    "in the middle": WAVES.flatten()[7:79].view(3, 24),
    "channels last": X.view(3, 4, 3, 2).to(memory_format=torch.channels_last).flatten(1),
    "a larger batch": WAVES[:, :24].clone(),
}
DEPENDENT = [
    "strided",
    "strides_of_an_inner_tensor",
    "branch",
    "branch_by_a_helper_of_torch",
    "strides_by_an_op",
    "order",
    "offset",
    "memory_format",
]


@pytest.mark.parametrize("how", [*DEPENDENT, "shaped", "contiguous"])
def test_right_or_refused_for_every_order_in_memory(how: str) -> None:
    torch.manual_seed(0)
    model = Frames(how).double().eval()
    gm = fxlora.capture(model, X)
    assert_same([gm(X)], [model(X)])
    refused = 0
    for x in OTHERS.values():
        try:
            found = gm(x)
        except fxlora.InputError:
            with pytest.raises(fxlora.InputError, match="reads how its tensors lie in memory"):
                gm(x)
            refused += 1
            x = x.clone(memory_format=torch.contiguous_format)
            found = gm(x)
        assert_same([found], [model(x)])
    assert bool(refused) is (how in DEPENDENT)


class CopiesInOrder(nn.Module):
    """Writes to a contiguous copy, which is the tensor itself if that is contiguous."""

    def __init__(self, contiguous: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.contiguous = nn.Linear(24, 5), contiguous

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x.sin()
        y = self.contiguous(z)
        y.mul_(2)
        return self.fc(y) + self.fc(z)


@pytest.mark.parametrize(
    "contiguous",
    [torch.Tensor.contiguous, torch.ops.aten.contiguous, torch.ops.aten.contiguous.default],
)
def test_what_is_written_to_a_contiguous_tensor_is_written_to_it(contiguous: Any) -> None:
    torch.manual_seed(0)
    model = CopiesInOrder(contiguous).double()
    for example in (X, OTHERS["transposed"]):
        gm = fxlora.capture(model, example)
        for x in (X, OTHERS["transposed"]):
            assert_same([gm(x)], [model(x)])


class DoublesOneInPlace(nn.Linear):
    """For a batch of 1, writes by an op that returns nothing."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = super().forward(input)
        if input.shape[0] == 1:
            torch._foreach_mul_([y], 2.0)
        return y


def test_a_write_by_an_op_without_results_is_no_size() -> None:
    model = DoublesOneInPlace(24, 5).double()
    gm = fxlora.capture(model, X)
    assert_same([gm(X)], [model(X)])
    with pytest.raises(fxlora.InputError, match=r"holds only where .* != 1"):
        gm(X[:1])
    assert_same([fxlora.capture(model, X[:1])(X[:1])], [model(X[:1])])


def test_a_block_whose_input_is_read_besides() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Frames("first_contiguous")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            return self.part(x) + x[:, None, :5]

    model = Residual().double()
    assert_same([fxlora.capture(model, X, modules="part")(X)], [model(X)])


def test_vmap_reads_no_state() -> None:
    model = nn.Sequential(nn.Linear(24, 5), Vmapped()).double()
    gm = fxlora.capture(model, X)
    assert_same([gm(x) for x in OTHERS.values()], [model(x) for x in OTHERS.values()])


class Vmapped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: row * row.sum())(x)


def test_a_file_does_not_check_the_order(tmp_path: Path) -> None:
    gm = fxlora.capture(Frames("branch").double(), X)
    with pytest.warns(fxlora.FxLoraWarning, match="holds for x like the example's only"):
        fxlora.export(gm, tmp_path / "m.pt2", X)


def test_calls_whose_difference_is_not_noted_are_proved() -> None:
    """Reads inside a function that handles `__torch_function__` are not seen."""

    class Hidden(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(doubled_if_contiguous(input))

    calls: list[Any] = [((X,), {}), ((OTHERS["transposed"],), {})]
    with pytest.warns(fxlora.FxLoraWarning, match="differ in nothing that a call is told by"):
        fxlora.capture(nn.Sequential(Hidden(24, 5).double(), nn.Linear(5, 3).double()), calls=calls)


def doubled_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(doubled_if_contiguous, (x,), x)
    return x * 2 if x.is_contiguous() else x


def test_the_order_of_the_example_holds() -> None:
    torch.manual_seed(0)
    model, x = Frames("strided").double().eval(), OTHERS["a slice"]
    gm = fxlora.capture(model, x)
    assert_same([gm(x), gm(WAVES[2:, 24:])], [model(x), model(WAVES[2:, 24:])])
    with pytest.raises(fxlora.InputError, match=r"strides \(24, 1\) instead of \(48, 1\)"):
        gm(X)
    both = fxlora.capture(model, calls=[((X,), {}), ((x,), {})])
    assert_same([both(X), both(x)], [model(X), model(x)])


def test_a_part_that_reads_strides() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), Frames("branch")).double().eval()
    gm: Any = fxlora.capture(model, X, modules="1")
    assert_same([gm(X), gm.get_submodule("1")(X)], [model(X), model[1](X)])
    with pytest.raises(fxlora.InputError, match=r"'1'.*lie in memory"):
        gm.get_submodule("1")(OTHERS["transposed"])


def is_given_by_itself(x: torch.Tensor) -> bool:
    return x._base is None


UNANSWERED: dict[str, Callable[[torch.Tensor], bool]] = {
    "_base": is_given_by_itself,
    "_is_view": lambda x: x._is_view(),
    "untyped_storage": lambda x: x.untyped_storage().nbytes() > 8 * x.numel(),
    "_version": lambda x: x._version > 0,
    "grad": lambda x: x.grad is None,
    "is_shared": lambda x: x.is_shared(),
}


class Reads(nn.Module):
    def __init__(self, read: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()
        self.fc, self.read = nn.Linear(24, 5), read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x * (2 if self.read(x) else 1))


@pytest.mark.parametrize("name", UNANSWERED)
def test_what_no_call_can_be_asked_for_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = Reads(UNANSWERED[name]).double()
    with pytest.raises(fxlora.CaptureError, match=rf"'{name}' of a tensor, at .*{__name__[6:]}.py"):
        fxlora.capture(model, X, modules="fc")
    with pytest.warns(fxlora.FxLoraWarning, match="Its submodules are captured instead"):
        gm = fxlora.capture(model, X)
    written = X.clone().add_(1)
    shared = X.clone().share_memory_()
    held = X.clone().requires_grad_()
    held.grad = torch.ones_like(X)
    for x in (X, written, shared, held, WAVES[:3, :24], X.view(-1).view(3, 24)):
        assert_same([gm(x)], [model(x)])


def test_what_changes_of_a_parameter_is_refused() -> None:
    model = Reads(lambda _: model.fc.weight.grad is None).double()
    with pytest.raises(fxlora.CaptureError, match="'grad' of a tensor"):
        fxlora.capture(model, X, modules="fc")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: torch.is_signed(x) and torch.is_same_size(x, x) and torch.get_device(x) < 0,
        lambda x: not x.is_distributed() and not torch.is_distributed(x),
        lambda x: x.T.mT.real.data is not None and x.__eq__(None) is NotImplemented,
        lambda x: torch.ops.aten.sym_size.int(x, 0) > 0 and torch.ops.aten.sym_size(x, 1) > 0,
    ],
)
def test_what_is_independent_of_state(read: Any) -> None:
    model = Reads(read).double()
    gm = fxlora.capture(model, X)
    calls = [x for name, x in OTHERS.items() if name != "a larger batch"]
    assert_same([gm(x) for x in calls], [model(x) for x in calls])


# ---- gradients -----------------------------------------------------------------------------------


class Asks(nn.Module):
    """Doubles its result if something about gradients is so."""

    def __init__(self, asked: Callable[[torch.Tensor, torch.Tensor], bool]) -> None:
        super().__init__()
        self.fc, self.asked = nn.Linear(24, 5), asked

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y * (2 if self.asked(x, y) else 1)


CALLS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "plain": lambda module: module(X),
    "no_grad": torch.no_grad()(lambda module: module(X)),
    "inference": torch.inference_mode()(lambda module: module(X)),
    "enabled inference": torch.inference_mode()(torch.enable_grad()(lambda module: module(X))),
    "inference tensor": torch.inference_mode()(lambda module: module(X.clone())),
    "leaf": lambda module: module(X.clone().requires_grad_()),
    "inner": lambda module: module(X.clone().requires_grad_() * 1),
}


def is_in_no_grad_only(x: torch.Tensor, y: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def is_with_gradients_in_inference(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and torch.is_inference_mode_enabled()


# A module that defines no class of a model, and has a function of torch under another name.
HELPER: Any = types.ModuleType("helper_of_test_tensor_state")
exec("from torch import is_grad_enabled as on\ndef asks(): return on()", vars(HELPER))
sys.modules[HELPER.__name__] = HELPER


def test_verify_runs_without_gradients() -> None:
    model = Asks(lambda x, y: torch.is_grad_enabled()).double()
    lora = fxlora.adapt(model, X, rules=fxlora.LoraConfig(r=2, target_modules=["fc"]))
    assert fxlora.verify(lora, X).tolerance < 1e-9


def test_asking_for_the_mode_alone_says_nothing_about_inputs() -> None:
    asked = Asks(lambda x, y: torch.is_grad_enabled() or not torch.is_grad_enabled()).double()
    gm: Any = fxlora.capture(asked, X)
    assert torch.equal(CALLS["leaf"](gm), CALLS["leaf"](asked))
    reads = Asks(lambda x, y: x.requires_grad).double()
    compiled: Any = torch.compile(fxlora.capture(reads, X), backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), reads(X))


def test_a_module_imported_by_the_forward_keeps_torchs_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_of_tensor_state.py").write_text("from torch import is_grad_enabled")

    def asks(x: torch.Tensor, y: torch.Tensor) -> bool:
        late: Any = importlib.import_module("late_of_tensor_state")
        return late.is_grad_enabled()

    for _ in range(2):
        gm = fxlora.capture(Asks(asked=asks).double(), X)
        for mode in (True, False):
            with torch.no_grad(), pytest.raises(fxlora.InputError, match="no_grad"):
                gm.train(mode)(X)
    late: Any = importlib.import_module("late_of_tensor_state")
    assert late.is_grad_enabled is torch.is_grad_enabled
    assert HELPER.on is torch._C.is_grad_enabled is torch.is_grad_enabled


AFTER_A_COND = """
import torch, fxlora
class Cond(torch.nn.Linear):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda h: h * 2, lambda h: h * 3, (super().forward(x),))
fxlora.capture(Cond(3, 2), torch.ones(4, 3))
double = torch.compile(lambda x: x * (2 if torch.is_grad_enabled() else 1), backend="eager",
                       fullgraph=True)
assert double(torch.ones(1)) == 2
"""


def test_torch_compile_knows_torchs_functions_after_a_capture() -> None:
    """In a process of its own: dynamo looks for them once, here in the capture of the cond."""
    subprocess.run([sys.executable, "-c", AFTER_A_COND], check=True)


UNTRIED = {"enabled inference"}
INFERENCE = {"inference", "inference tensor", *UNTRIED}
WITHOUT = {"no_grad", *INFERENCE}
OTHERS_STATE = {"inference tensor", "leaf", "inner", *UNTRIED}


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        (lambda x, y: torch.is_grad_enabled(), WITHOUT),
        (lambda x, y: is_grad_enabled(), WITHOUT),
        (lambda x, y: torch.is_inference_mode_enabled(), INFERENCE),
        (lambda x, y: x.requires_grad, OTHERS_STATE),
        (lambda x, y: y.requires_grad, WITHOUT | OTHERS_STATE),
        (lambda x, y: y.grad_fn is not None, WITHOUT | OTHERS_STATE),
        (lambda x, y: x.is_leaf, OTHERS_STATE),
        (lambda x, y: x.is_inference(), OTHERS_STATE),
        (lambda x, y: y.is_inference(), INFERENCE | OTHERS_STATE),
        (lambda x, y: torch.is_inference(y), INFERENCE | OTHERS_STATE),
        (is_in_no_grad_only, {"no_grad", *UNTRIED}),
        (is_with_gradients_in_inference, UNTRIED),
        (lambda x, y: torch._C.is_grad_enabled(), WITHOUT),
        (lambda x, y: HELPER.asks(), WITHOUT),
        (lambda x, y: torch.is_grad_enabled() or not torch.is_grad_enabled(), UNTRIED),
    ],
)
def test_right_or_refused_with_and_without_gradients(asked: Any, refused: set[str]) -> None:
    model = Asks(asked).double()
    gm = fxlora.capture(model, X)
    for name, call in CALLS.items():
        if name in refused:
            with pytest.raises(fxlora.InputError, match=r"gradients|no_grad"):
                call(gm)
        else:
            assert torch.equal(call(gm), call(model)), name
    assert torch.equal(CALLS["plain"](gm), CALLS["plain"](model))
    with torch.no_grad(), torch.enable_grad():
        assert torch.equal(gm(X), model(X))
