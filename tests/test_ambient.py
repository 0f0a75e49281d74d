"""The result of a verb does not depend on the torch modes that are active around the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.module.ambient import no_ambient_modes

from .laws import randomise
from .typed import untyped


class Intercepting(TorchFunctionMode):
    """Raises at every torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"the caller's mode sees {func}")


class Dispatching(TorchDispatchMode):
    """Raises at every dispatched op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"the caller's mode sees {func}")


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Generator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def half_sums() -> Generator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = not before
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


Mode = Callable[[], AbstractContextManager[Any]]
MODES: dict[str, Mode] = {
    "autocast on the CPU": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "default dtype": partial(
        setting, torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "default device": lambda: torch.device("meta"),
    "deterministic": partial(
        setting, torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 2
    ),
    "medium precision": partial(
        setting,
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        "medium",
    ),
    "half sums": half_sums,
    "function mode": Intercepting,
    "dispatch mode": Dispatching,
}


def state() -> tuple[object, ...]:
    """Return the current value of every setting that the modes change."""
    matmul, mkldnn = torch.backends.cuda.matmul, untyped(torch.backends.mkldnn)
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_anomaly_check_nan_enabled(),
        torch.get_default_dtype(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        mkldnn.matmul.fp32_precision,
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.overrides._get_current_function_mode_stack(),
        _python_dispatch._get_current_dispatch_mode_stack(),
    )


# ---- the guard ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODES)
def test_the_guard_turns_a_mode_off_and_on_again(name: str) -> None:
    with no_ambient_modes():
        neutral = state()
    with MODES[name]():
        before = state()
        with no_ambient_modes():
            assert state() == neutral
            torch.matmul(torch.ones(2), torch.ones(2))
        assert state() == before
        with pytest.raises(KeyError), no_ambient_modes():
            raise KeyError
        assert state() == before


def test_what_runs_a_graph_keeps_the_defaults() -> None:
    process = (MODES["default dtype"](), MODES["default device"](), Intercepting())
    with process[0], process[1], process[2], no_ambient_modes(defaults=False):
        made = torch.ones(2)
    assert made.is_meta and made.dtype == torch.float64


# ---- the verbs ----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 5)
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 3)
        self.norm = nn.BatchNorm1d(7)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.norm(self.up(self.emb(index)))))


INDEX = torch.tensor([1, 4, 2, 9])
RULES = [
    Rule("emb", lora=LoraConfig(r=2)),
    Rule("up", lora=LoraConfig(r=2, init_lora_weights="pissa")),
    Rule("down", lora=LoraConfig(r=2, variant="dora")),
]


class Given:
    """Arguments for the verbs, made outside of all modes."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.gm = fxlora.capture(Model(), INDEX)
        self.plan = fxlora.match(self.gm, RULES)
        self.lora = fxlora.inject(self.gm, self.plan).eval()
        self.fresh = fxlora.inject(self.gm, fxlora.match(self.gm, RULES[::2])).eval()
        randomise(self.lora, std=0.3)
        self.folded = fxlora.fold(self.lora)
        self.folder = folder
        fxlora.save_adapter(self.lora, folder / "given")


def saved(given: Given) -> list[bytes]:
    folder = given.folder / "saved"
    fxlora.save_adapter(given.lora, folder)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def exported(given: Given) -> Any:
    fxlora.export(given.folded, given.folder / "model.pt2", INDEX)
    return given.folder / "model.pt2"


def initialized(given: Given) -> Any:
    return str(fxlora.initialize_from(given.fresh, [INDEX])), given.fresh


VERBS: dict[str, Callable[[Given], Any]] = {
    "match": lambda g: str(fxlora.match(g.gm, RULES)),
    "match, budget": lambda g: str(fxlora.match(g.gm, RULES[0], budget=200)),
    "inject": lambda g: fxlora.inject(g.gm, g.plan),
    "fold": lambda g: fxlora.fold(g.lora),
    "remove": lambda g: fxlora.remove(g.lora),
    "report": lambda g: fxlora.report(g.lora),
    "save_adapter": saved,
    "load_adapter": lambda g: fxlora.load_adapter(g.gm, g.folder / "given"),
    "verify": lambda g: str(fxlora.verify(g.lora, INDEX)),
    "initialize_from": initialized,
    "export": exported,
}


def plain(value: Any) -> Any:
    """Convert a verb's result to data that compares with ==; called outside of the mode."""
    if isinstance(value, Path):
        program = torch.export.load(value)
        return program.graph_module.code, plain(dict(program.state_dict))
    if isinstance(value, torch.Tensor):
        bits = value.detach().flatten().view(torch.uint8).tolist()
        return value.dtype, value.device, value.requires_grad, value.is_inference(), bits
    if isinstance(value, fxlora.CapturedModule):
        return plain({**dict(value.named_parameters()), **dict(value.named_buffers())})
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return tuple(map(plain, value)) if isinstance(value, tuple | list) else value


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("ambient"))


@pytest.fixture(scope="module")
def expected(given: Given) -> dict[str, Any]:
    return {verb: done(verb, given) for verb in VERBS}


def done(verb: str, given: Given, mode: Mode = torch.enable_grad) -> Any:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        with mode():
            before = state()
            found = VERBS[verb](given)
            assert state() == before
    return plain(found)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("mode", MODES)
def test_every_verb_in_every_mode(
    verb: str, mode: str, given: Given, expected: dict[str, Any]
) -> None:
    assert done(verb, given, MODES[mode]) == expected[verb]


def test_the_modes_would_change_the_results(given: Given) -> None:
    """Without the guard, autocast would change a fold, so that these tests can fail."""
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    with MODES["autocast on the CPU"]():
        assert (b @ a).dtype == torch.bfloat16
    before, after = (m.get_parameter("up.weight") for m in (given.lora, given.folded))
    assert not torch.equal(before, after)


# ---- values that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_a_fold_of_what_is_not_finite_is_refused(value: float, kind: str) -> None:
    lora = fxlora.adapt(nn.Linear(5, 7), rules=Rule("weight", lora=LoraConfig(r=2)))
    randomise(lora)
    name = next(n for n in lora.adapter_parameters() if kind in n)
    with torch.no_grad():
        lora.get_parameter(name)[1, 1] = value
    with pytest.raises(fxlora.InjectError, match=rf"'{name}' holds values that are not finite"):
        fxlora.fold(lora)
    assert fxlora.remove(lora).plan is None


# ---- fast paths of torch.nn ---------------------------------------------------------------------


@pytest.fixture
def with_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enable what the other tests disable, because it rounds differently."""
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: True)


def _encoder(nested: bool = True) -> tuple[nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 11, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double().eval()
    padded = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]).bool()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    return model, (x,), {"src_key_padding_mask": padded}


@pytest.mark.usefixtures("with_fast_paths")
def test_a_fast_path_with_other_numbers_is_refused_and_the_advice_works() -> None:
    model, args, kwargs = _encoder()
    with torch.no_grad():
        expected = model(*args, **kwargs)
    assert (expected - model(*args, **kwargs)).abs().max() > 0.1  # zeros in padded rows
    gm = fxlora.capture(model, args, kwargs)
    assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))
    with torch.no_grad(), pytest.raises(fxlora.InputError, match="enable_nested_tensor = False"):
        gm(*args, **kwargs)
    model, args, kwargs = _encoder(nested=False)
    gm = fxlora.capture(model, args, kwargs)
    with torch.no_grad():
        torch.testing.assert_close(gm(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.usefixtures("with_fast_paths")
def test_a_fast_path_with_the_same_numbers_is_not_refused() -> None:
    model, args, _ = _encoder()
    gm = fxlora.capture(model, args)
    with torch.no_grad():
        torch.testing.assert_close(gm(*args), model(*args))


@pytest.mark.usefixtures("with_fast_paths")
@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
def test_a_frozen_source_takes_the_fast_path_with_gradients_enabled() -> None:
    model, args, kwargs = _encoder()
    gm = fxlora.capture(model.requires_grad_(False), args, kwargs)
    with pytest.raises(fxlora.InputError):
        gm(*args, **kwargs)


class Attends(nn.Module):
    def __init__(self, dropout: bool = False) -> None:
        super().__init__()
        self.attention, self.dropout = nn.MultiheadAttention(8, 2, batch_first=True), dropout

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.attention(x, x, x, key_padding_mask=mask)[0]
        return nn.functional.dropout(y, 0.5, True) if self.dropout else y


@pytest.mark.usefixtures("with_fast_paths")
@pytest.mark.parametrize("kind", ["a masked row", "an example with a gradient", "random", "meta"])
def test_attention_with_a_fast_path_is_captured(kind: str) -> None:
    x, masked = torch.randn(2, 5, 8), torch.zeros(2, 5).bool()
    masked[0] = kind == "a masked row"  # all of it: NaN
    with torch.device("meta" if kind == "meta" else "cpu"):
        model = Attends(dropout=kind == "random").eval()
        gm = fxlora.capture(model, (nn.Linear(8, 8)(x.to(model.attention.in_proj_weight.device)),))
    args = (x, masked) if kind == "a masked row" else (x,)
    if kind != "meta":
        gm = fxlora.capture(model, args)
        with torch.no_grad():
            found = gm(*args)
            if kind != "random":
                torch.testing.assert_close(found, model(*args), equal_nan=True)
