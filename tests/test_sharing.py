"""Several captures at once, and captures under torch modes: they leave no state behind."""

from __future__ import annotations

import copy
import importlib.util
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import CaptureError, FxLoraWarning, LoraConfig, Rule

from .laws import assert_untouched, randomise, run, snapshot
from .models import Mlp, Normed
from .typed import plan_of

# ---- errors -------------------------------------------------------------------------------------

SOURCE: str = """
import random

import numpy as np
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.calls, self.seen, self.names = 0, [], {}


class Branch(Base):
    def forward(self, x):
        self.calls, self.last = self.calls + 1, self.fc(x)
        self.seen.append(self.last)
        self.names["last"] = self.last
        if self.last.sum() > 0:  # here
            return x
        return -x


class Loop(Base):
    def forward(self, x):
        while x.norm() < 10:  # here
            x = x * 2
        return self.fc(x)


class Item(Base):
    def forward(self, x):
        return self.fc(x)[:, : int(x.sum().item())]  # here


class Numpy(Base):
    def forward(self, x):
        y = self.fc(x).detach()
        y = y.numpy()  # here
        return torch.from_numpy(np.tanh(y))


class Pointer(Base):
    def forward(self, x):
        return self.fc(x) + x.data_ptr()  # here


class Raises(Base):
    def forward(self, x):
        raise ValueError("the model's own words")  # here


class Shapes(Base):
    def forward(self, x):
        return self.fc(x) @ torch.ones(7, 2)  # here


class Output(Base):
    def forward(self, x):  # here
        return Holder(self.fc(x))


class Holder:
    def __init__(self, y):
        self.y = y
"""
NAMES = ["Branch", "Loop", "Item", "Numpy", "Pointer", "Raises", "Shapes", "Output"]


def users(tmp_path: Path) -> Any:
    path = tmp_path / "user_models.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("user_models", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_users_line_is_named_and_torch_is_quiet(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = users(tmp_path)
    lines = SOURCE.splitlines()
    start = lines.index(f"class {name}(Base):")
    line = next(i for i in range(start, len(lines)) if lines[i].endswith("# here")) + 1
    model = getattr(module, name)()
    before, held = snapshot(model), copy.copy(model.__dict__)
    if name in ("Raises", "Shapes"):
        with pytest.raises(CaptureError) as said:
            fxlora.capture(model, torch.randn(2, 5))
    else:  # the code around its layer stays in Python
        with pytest.warns(FxLoraWarning) as warned:
            gm = fxlora.capture(model, torch.randn(2, 5))
        assert gm.regions == ("fc",)
        said = next(w.message for w in warned if w.category is FxLoraWarning)
    text = str(said.value if isinstance(said, pytest.ExceptionInfo) else said)
    assert f"{module.__file__}:{line}" in text
    assert "".join(capfd.readouterr()) == ""
    assert_untouched(model, before)
    assert model.__dict__ == held and model.seen == [] and model.names == {}


def test_what_a_forward_prints_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("here", x.sum())
            return super().forward(x)

    fxlora.capture(Prints(), torch.randn(2, 5))
    assert "here" in capsys.readouterr().out


def test_what_a_forward_sets_is_set_back() -> None:
    class Remembers(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Size] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            self.last = y.shape
            self.seen.append(y.shape)
            return y

    model = Remembers()
    gm = fxlora.capture(model, torch.randn(2, 5)).eval()
    assert model.seen == [] and not hasattr(model, "last")
    x = torch.randn(2, 5)
    assert torch.equal(gm(x), model.eval()(x))


# ---- random state -------------------------------------------------------------------------------


def numpys() -> list[int]:
    """Return numpy's state, which it gives in one of two forms."""
    state: Any = np.random.get_state()
    return state[1].tolist()


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
@pytest.mark.parametrize("args", [(torch.randn(2, 5),), None])
def test_random_numbers_of_python_are_no_constants(draw: Any, args: Any) -> None:
    class Draws(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * float(draw())

    states = random.getstate(), numpys()
    said = r"draws numbers from .*random in its forward"
    if args is None:
        with pytest.raises(CaptureError, match=said):
            fxlora.capture(Draws(), args)
    else:  # Python draws them at every call
        with pytest.warns(FxLoraWarning, match=said):
            gm = fxlora.capture(Draws().eval(), args)
        assert not torch.equal(gm(*args), gm(*args))
        random.setstate(states[0])
        np.random.seed(0)
        states = random.getstate(), numpys()
    assert (random.getstate(), numpys()) == states


def test_generators_are_as_they_were() -> None:
    states = random.getstate(), numpys(), torch.get_rng_state().tolist()
    fxlora.capture(Mlp(), torch.zeros(2, 5))
    assert torch.get_rng_state().tolist() != states[2]  # building the model draws
    states = (*states[:2], torch.get_rng_state().tolist())
    model = Mlp()
    states = (*states[:2], torch.get_rng_state().tolist())
    fxlora.capture(model, torch.zeros(2, 5))
    assert (random.getstate(), numpys()) == states[:2]
    assert torch.get_rng_state().tolist() == states[2]


# ---- two captures of one model ------------------------------------------------------------------


def test_training_one_capture_leaves_the_other_alone() -> None:
    model, x = Normed(), torch.randn(4, 3, 9, 7)
    before = snapshot(model)
    rule = Rule("fc", lora=LoraConfig(r=2, modules_to_save=["first"]))
    plain, other = fxlora.capture(model, x), fxlora.capture(model, x)
    with pytest.warns(fxlora.FxLoraWarning, match="same tensor"):
        loras = [fxlora.inject(gm, fxlora.match(gm, rule)) for gm in (other, other, plain)]
    for lora in loras:
        randomise(lora)
    expected = [run(m.eval(), (x,), {}) for m in (plain, *loras[1:])]
    trained = loras[0].train()
    optimizer = torch.optim.SGD(fxlora.lora_parameters(trained), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        sum((y.square().sum() for y in trained(x).values()), torch.zeros(())).backward()
        optimizer.step()
    for module, outputs in zip((plain, *loras[1:]), expected, strict=True):
        for a, b in zip(run(module.eval(), (x,), {}), outputs, strict=True):
            assert torch.equal(a, b)
    assert int(trained.get_buffer("bn.num_batches_tracked")) == 2
    assert int(other.get_buffer("bn.num_batches_tracked")) == 0
    assert_untouched(model, before)


# ---- active modes -------------------------------------------------------------------------------


class Computes(nn.Module):
    """Has an op for each mode to affect: a product, a new tensor, a buffer."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(self.fc(x), torch.eye(3, device=x.device, dtype=x.dtype))
        return torch.tanh(y) * self.scale


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.autocast
@pytest.mark.parametrize("name", AROUND)
def test_a_capture_does_not_see_what_is_around_it(name: str) -> None:
    model, x = Computes(), torch.randn(4, 5)
    plain = fxlora.capture(model, x)
    with AROUND[name]():
        gm = fxlora.capture(model, x)
        lora = fxlora.inject(gm, fxlora.match(gm, Rule("fc", lora=LoraConfig(r=2))))
    assert gm.code == plain.code
    assert torch.equal(gm(x), model(x))
    randomise(lora)
    assert not torch.equal(lora(x), model(x))
    lora(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in fxlora.lora_parameters(lora))
    with torch.autocast("cpu", torch.bfloat16):  # a mode around a call applies to the graph
        assert torch.equal(gm(x), model(x)) and model.fc(x).dtype == torch.bfloat16


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = Mlp()
    with pytest.raises(CaptureError, match="inference_mode"):
        fxlora.capture(model, torch.randn(2, 5))


def test_the_default_dtype_is_the_callers() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        gm = fxlora.capture(model, torch.randn(4, 5))
        lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["0"])))
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in lora.parameters()} == {torch.float64}


# ---- threads ------------------------------------------------------------------------------------


def in_threads(jobs: list[Any]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)

    def call(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except Exception as error:  # noqa: BLE001 - for the main thread to look at
            results[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_captures_from_several_threads() -> None:
    x = torch.randn(2, 5)
    models = [nn.Sequential(*(nn.Linear(5, 5) for _ in range(n + 1))) for n in range(4)]
    found = in_threads([lambda m=m: fxlora.capture(m, x) for m in models])
    for gm, model in zip(found, models, strict=True):
        assert isinstance(gm, fxlora.CapturedModule), gm
        assert torch.equal(gm(x), model(x))


def test_calls_from_several_threads() -> None:
    model, inputs = Mlp(), [torch.randn(n + 1, 5) for n in range(6)]
    gm = fxlora.capture(model, torch.randn(2, 5))
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["up"]))).eval()
    randomise(lora)
    expected = [lora(x) for x in inputs]
    for a, b in zip(in_threads([lambda x=x: lora(x) for x in inputs]), expected, strict=True):
        assert torch.equal(a, b)


# ---- dtypes -------------------------------------------------------------------------------------


class Both(nn.Module):
    """A grouped convolution, a norm, a linear layer and a scaled weight: sites of both forms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, groups=3)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(torch.relu(self.conv(x)).mean((2, 3)))
        return torch.tanh(self.fc(y)) @ (self.head * 2)


@pytest.mark.autocast
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float64, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.float16, False),  # torch refuses its norm under autocast to bfloat16
    ],
)
def test_a_training_step_in_every_dtype(dtype: torch.dtype, autocast: bool) -> None:
    model, x = Both().to(dtype), torch.randn(4, 3, 9, 7, dtype=dtype)
    before = snapshot(model)
    gm = fxlora.capture(model, x)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=LoraConfig(r=2))))
    assert {entry.form for entry in plan_of(lora)} == {"branch", "weight"}
    parameters = fxlora.lora_parameters(lora)
    assert {p.dtype for p in parameters} == {torch.promote_types(dtype, torch.float32)}
    randomise(lora)
    start = [p.detach().clone() for p in parameters]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(gm(x), model(x))
        loss = lora(x).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in parameters)
    torch.optim.SGD(parameters, 0.05).step()
    assert all(not torch.equal(a, b) for a, b in zip(parameters, start, strict=True))
    folded = fxlora.fold(lora).eval()
    assert {p.dtype for p in folded.parameters()} == {dtype}
    unfolded, base, found = (m.eval()(x).double() for m in (lora, gm, folded))
    effect = float((unfolded - base).abs().max())
    assert effect > 0
    rounding = float(torch.finfo(dtype).eps) * 30 * float(unfolded.abs().max())
    assert float((found - unfolded).abs().max()) <= rounding
    assert_untouched(model, before)


def test_a_model_without_data() -> None:
    with torch.device("meta"):
        model, x = Both(), torch.randn(4, 3, 9, 7)
    gm = fxlora.capture(model, x)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=LoraConfig(r=2))))
    loss = lora(x).square().sum()
    loss.backward()
    assert {p.device.type for p in lora.parameters()} == {"meta"}
    assert all(p.grad is not None for p in fxlora.lora_parameters(lora))
    folded = fxlora.fold(lora)
    assert folded(x).shape == model(x).shape == (4, 4)
