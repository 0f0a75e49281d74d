"""Python attributes of hosts: code may set those that no captured call reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import SubmoduleError

from .laws import assert_close, assert_same, randomise
from .typed import untyped

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OFFSET = torch.linspace(-1, 1, 7, dtype=torch.float64)


class Inner(nn.Module):
    default = None  # of the class: forward may cover it
    _factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.scale = 2.0
        self.delta: Any = None
        self.last: Any = None

    def forward(
        self, x: torch.Tensor, offset: torch.Tensor | None = None, keep: bool = False
    ) -> torch.Tensor:
        """With an offset, read no attribute; without one, delta, and in train mode the scale."""
        y = self.up(x)
        if keep:
            self.last = self.default = y
            return y
        if offset is not None:
            return y + offset
        y = y if self.delta is None else y + self.delta
        return y * self.scale * self._factor


class Steps(nn.Module):
    """Keeps a value on its submodule between the calls of a loop, as generate() may."""

    scale = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.down = Inner(), nn.Linear(7, 5, bias=False)

    def forward(
        self, x: torch.Tensor, offset: torch.Tensor | None = None, keep: bool = False
    ) -> torch.Tensor:
        y = self.down(self.inner(x, offset, keep))
        return y * self.scale if keep else y

    def run(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.delta = OFFSET * x.sum()
        for _ in range(3):
            x = self(x, offset=self.inner.delta)
            self.inner.delta = self.inner.delta / 2
        return x


CALLS: list[Any] = [((X,), {"offset": OFFSET}), ((X,), {}), ((X,), {"keep": True})]


@pytest.fixture(scope="module")
def model() -> Steps:
    torch.manual_seed(0)
    return Steps().double().eval()


@pytest.fixture(scope="module")
def lora(model: Steps) -> fxlora.CapturedModule:
    config = fxlora.LoraConfig(r=2, target_modules=["inner.up", "down"])
    adapted = fxlora.adapt(model, calls=CALLS, rules=config).eval()
    randomise(adapted)
    return adapted


@pytest.fixture
def host(model: Steps, lora: fxlora.CapturedModule) -> Any:
    return fxlora.hosted(model, lora)


def test_what_captured_calls_read_and_change(lora: fxlora.CapturedModule) -> None:
    with_offset, plain, keeping = lora.programs
    own = [{n for n in p.reads or () if n.startswith("inner.")} for p in lora.programs]
    weights = {"inner.up", "inner.up.weight", "inner.up.bias"}
    assert own[0] == own[2] == weights
    assert own[1] == weights | {"inner.delta", "inner.scale", "inner._factor"}
    assert not with_offset.changes and not plain.changes
    assert keeping.changes == {"inner.last", "inner.default"}
    assert lora.reads is not None and "scale" in lora.reads


def test_code_of_a_host_keeps_values_in_attributes(
    model: Steps, lora: fxlora.CapturedModule, host: Any
) -> None:
    """The loop sets and reads an attribute that the calls in it do not read."""
    source = fxlora.merged(model, fxlora.fold(lora))
    expected, bare = source.run(X), copy.deepcopy(model).run(X)
    assert (expected - bare).abs().max() > 1e-3
    for module in (host, fxlora.hosted(model, fxlora.fold(lora))):
        assert_close([module.run(X)], [expected])
        assert torch.equal(module.inner.delta, source.inner.delta)
    assert model.inner.delta is None


def test_a_call_that_reads_what_was_set_raises(host: Any) -> None:
    expected = host(X)
    for part, name, value in (
        (host.inner, "scale", 3.0),
        (host.inner, "delta", OFFSET),
        (host.inner, "_factor", 2.0),
    ):
        before = getattr(part, name)
        setattr(part, name, value)
        host(X, offset=OFFSET)  # does not read it
        with pytest.raises(SubmoduleError, match=rf"'inner\.{name}' of the host was set"):
            host(X)
        with pytest.raises(SubmoduleError, match=f"Set it back .host.inner.{name} = {before}"):
            copy.deepcopy(host)(X)
        setattr(part, name, before)
        assert torch.equal(host(X), expected)


def test_an_attribute_of_the_host_itself(host: Any) -> None:
    host.scale, host.note = 1.0, "of a training loop"
    host(X)
    with pytest.raises(SubmoduleError, match=r"host.scale = 0\.5"):
        host(X, keep=True)
    del host.scale  # the class still has it, but nobody compares
    with pytest.raises(SubmoduleError, match="'scale' of the host"):
        host(X, keep=True)
    host.scale = 0.5
    host(X, keep=True)


def test_a_deleted_attribute(host: Any) -> None:
    host(X)
    del host.inner.scale
    with pytest.raises(SubmoduleError, match=r"'inner\.scale'"):
        host(X)
    for name in ("up", "missing"):
        with pytest.raises((SubmoduleError, AttributeError)):
            delattr(host.inner, name)


@pytest.mark.parametrize("name", ["last", "default"])
def test_what_a_call_would_have_set_cannot_be_read(host: Any, name: str) -> None:
    def reads(inner: Any) -> None:
        for read in (getattr, hasattr, lambda part, name: getattr(part, name, None)):
            with pytest.raises(SubmoduleError, match=rf"'inner\.{name}' is set by the source's"):
                read(inner, name)

    assert getattr(host.inner, name) is None
    host(X)  # sets none
    assert getattr(host.inner, name) is None
    host(X, keep=True)
    reads(host.inner)
    reads(copy.deepcopy(host).inner)
    setattr(host.inner, name, OFFSET)
    assert getattr(host.inner, name) is OFFSET
    host(X, keep=True)
    reads(host.inner)
    assert type(host.inner).default is None


def test_other_changes_of_a_submodule_are_refused_as_before(host: Any) -> None:
    for name, value in (
        ("forward", print), ("up", nn.Linear(5, 7)), ("other", nn.Linear(5, 7)),
        ("weight", nn.Parameter(OFFSET)),
    ):  # fmt: skip
        with pytest.raises(SubmoduleError):
            setattr(host.inner, name, value)


class ReadsItsDict(Inner):
    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.up(x) * vars(self)["scale"]


class KeepsInside(Inner):
    """Writes into containers that its attribute contains."""

    def __init__(self, kept: Any, inner: list[Any]) -> None:
        super().__init__()
        self.kept, self.list = kept, [inner]

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        y = self.up(x)
        self.list[0].append(y)
        return y


@pytest.mark.parametrize("nested", [lambda a: {"seen": a}, lambda a: [[a]], lambda a: ({1: (a,)},)])
def test_what_a_call_would_have_written_inside_a_container(nested: Any) -> None:
    items: list[Any] = []
    host = hosting(KeepsInside(nested(items), items))
    assert host.inner.kept == nested([])
    assert items == []
    host(X)
    with pytest.raises(SubmoduleError, match=r"'inner\.kept' is set by the source's"):
        _ = host.inner.kept


class Branching(Inner):
    """Reads an attribute in a branch of a cond, which capture does not see."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        y = self.up(x)
        return torch.cond(y.sum() > 0, lambda z: z * self.scale, lambda z: z.sin(), (y,))


def hosting(inner: Inner) -> Any:
    model = Steps()
    untyped(model).inner = inner
    return fxlora.hosted(model.double().eval(), fxlora.capture(model, X))


def test_a_forward_that_reads_its_dict_reads_all_attributes() -> None:
    host = hosting(ReadsItsDict())
    host.inner.any_name = 1
    with pytest.raises(SubmoduleError, match=r"'inner\.any_name' of the host was set"):
        host(X)


class ReadsObjects(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.offsets, self.table, self._act = [1.0, 2.0], torch.ones(7), torch.tanh

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self._act(self.up(x)) * self.table + sum(self.offsets)


def add_to_list(part: Any) -> None:
    part.offsets += [3.0]


def add_to_tensor(part: Any) -> None:
    part.table += 1


def replace_function(part: Any) -> None:
    part._act = torch.sin


@pytest.mark.parametrize("change", [add_to_list, add_to_tensor, replace_function])
def test_an_object_that_is_changed_and_set_again_counts_as_set(change: Any) -> None:
    source, host = ReadsObjects().double(), hosting(ReadsObjects())
    before = source(X)
    change(source)
    assert not torch.equal(source(X), before)
    change(host.inner)
    with pytest.raises(SubmoduleError, match="of the host was set"):
        host(X)


def test_where_reads_are_not_known_nothing_may_be_set() -> None:
    host = hosting(Branching())
    assert host._captured.reads is None
    for name in ("scale", "delta"):
        with pytest.raises(SubmoduleError, match=f"setting its '{name}'"):
            setattr(host.inner, name, OFFSET)
    with pytest.raises(SubmoduleError, match="'scale' of the host cannot be set"):
        host.scale = 3.0
    host.scale, host.note = 0.5, "new"  # as it was, and an attribute that the source lacks


def test_a_folded_host_may_run_code_that_sets_attributes(
    model: Steps, lora: fxlora.CapturedModule
) -> None:
    host, source = (
        fxlora.hosted(model, fxlora.fold(lora)),
        fxlora.merged(model, fxlora.fold(lora)),
    )
    host(X, keep=True)
    assert_same([host.inner(X, None, True)], [source.inner(X, None, True)])  # the source's code
    assert_same([host.inner.last], [source.inner.last])


# ---- names of every kind, modes, and tensors that were None -----------------------------------


class Scaled(nn.Module):
    type: Any  # covers a method of nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.lin, self._scale, self.type = nn.Linear(5, 5), 1.5, 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self._scale * self.type


class ReadsAll(Scaled):
    """Reads private attributes, one with a name of nn.Module's, and tensors that are None."""

    mask: torch.Tensor | None
    gain: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.sub, self.scale = Scaled(), 0.5
        self.register_buffer("mask", None)
        self.register_parameter("gain", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(self.sub(x)) * self.scale
        y = y if self.mask is None else y * self.mask
        return y if self.gain is None else y * self.gain


class ReadsAllInBranches(ReadsAll):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() < 0, super().forward, torch.sin, (x,))


class ReadsAllAroundRegions(ReadsAll):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 2 if y.sum().item() > 1e9 else y


SETS = [
    ("", "_scale", 3.0), ("", "type", 3.0), ("", "scale", 3.0), ("sub", "_scale", 3.0),
    ("sub", "type", 3.0), ("", "mask", OFFSET[:5]), ("", "gain", nn.Parameter(OFFSET[:5])),
]  # fmt: skip


def set_and_call(module: nn.Module, path: str, name: str, value: Any) -> None:
    setattr(module.get_submodule(path), name, value)
    module(X)


@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        (ReadsAll, None),
        (ReadsAll, "sub"),
        (ReadsAllInBranches, None),
        (ReadsAllAroundRegions, None),
    ],
)
def test_no_attribute_that_a_forward_reads_is_set_without_effect(
    kind: type[ReadsAll], hosted: bool, modules: str | None
) -> None:
    source = kind().double()
    gm: Any = fxlora.capture(source, X, modules=modules)
    for path, name, value in SETS:
        changed, module = copy.deepcopy(source), copy.deepcopy(gm)
        module = fxlora.hosted(source, module) if hosted else module
        setattr(changed.get_submodule(path), name, value)
        assert (changed(X) - source(X)).abs().max() > 0.1
        unknown = kind is ReadsAllInBranches and not hosted and not path
        if unknown and name not in ("mask", "gain"):
            continue  # of a captured module itself, nothing is known there (limits.md)
        with pytest.raises(SubmoduleError):
            set_and_call(module, path, name, value)
    module = fxlora.hosted(source, gm) if hosted else gm
    module._hf_note = module.get_submodule("sub")._fsdp_note = object()  # a framework's own
    assert_same([module(X)], [source(X)])


class FreezesItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.frozen = nn.Linear(5, 7), nn.BatchNorm1d(7), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(x))

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self


def test_a_mode_that_the_sources_train_sets_is_not_forgotten() -> None:
    source = FreezesItsNorm().double()
    host = fxlora.hosted(source, fxlora.capture(source, X)).train()
    host(X)
    host.frozen = True
    host.train()
    with pytest.raises(SubmoduleError, match="'norm' was set to eval mode"):
        host(X)
    host.eval()
    assert_same([host(X)], [fxlora.merged(source, host._captured).eval()(X)])
    host.frozen = False
    host.train()(X)


def test_a_source_that_changed_after_the_capture_is_not_hosted(model: Steps) -> None:
    model = copy.deepcopy(model)
    gm = fxlora.capture(model, X)
    model.inner.scale = 4.0
    with pytest.raises(fxlora.InjectError, match=r"'inner\.scale' of the model was 2\.0"):
        fxlora.hosted(model, gm)
    model.inner.scale, model.scale = 2.0, 9.0  # not read in this call
    assert_same([fxlora.hosted(model, gm)(X)], [model(X)])


class ReadsFlags(nn.Module):
    """Reads the mode of its submodules, one of them by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.drop, self.part = nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.dropout(self.lin(x), self.drop.p, self.drop.training)
        return self.part(y) * factor_of(self.part)


def factor_of(part: nn.Module) -> float:
    return 2.0 if part.training else 1.0


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("modules", [None, "part"])
@pytest.mark.parametrize("path", ["drop", "part"])
def test_a_mode_that_other_code_reads_is_not_set_without_effect(
    hosted: bool, modules: str | None, path: str
) -> None:
    source = ReadsFlags().double()
    gm: Any = fxlora.capture(source, X, modules=modules)
    module = fxlora.hosted(source.eval(), gm) if hosted else gm  # the source's mode may change
    for mode in (True, False):
        module.train(mode)
        module.get_submodule(path).train(not mode)
        with pytest.raises(SubmoduleError, match=f"'{path}' was set to"):
            module(X)
        module.train(mode).lin.train(not mode)  # reads no mode
        module(X)


# ---- what is not refused ------------------------------------------------------------------------


class Config:
    k = 2


class Ordinary(nn.Module):
    """Has a config, an absent buffer that its forward does not read, and a property that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale, self.config = nn.Linear(5, 5), 2.0, Config()
        self.register_buffer("threshold", None)

    @property
    def trainer(self) -> Any:
        raise RuntimeError("not attached")

    @trainer.setter
    def trainer(self, value: Any) -> None:
        pass

    def calibrate(self, x: torch.Tensor) -> None:
        self.threshold = x.mean(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.scale * self.config.k


class OrdinaryAroundRegions(Ordinary):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        return self.lin(y) if y.sum().item() > 1e9 else y


@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
@pytest.mark.parametrize("kind", [Ordinary, OrdinaryAroundRegions])
def test_ordinary_code_may_set_what_changes_nothing(kind: type[Ordinary]) -> None:
    source = kind().double()
    gm: Any = fxlora.capture(source, X)
    gm.config, gm.trainer, gm.note = source.config, None, 3
    if kind is Ordinary:
        gm.scale = 2.0
        with pytest.raises(SubmoduleError, match="setting 'scale'"):
            gm.scale = 3.0
        weight, gm.lin.bias = gm.lin.bias, None
        gm.lin.bias = weight
        host = fxlora.hosted(source, gm)
        host.calibrate(X)
        assert_same([host.threshold], [X.mean(0)])
    assert_same([gm(X)], [source(X)])


class ReadsItsOwnDict(Ordinary):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * vars(self)["scale"]


def test_an_attribute_of_a_dict_that_is_read() -> None:
    gm: Any = fxlora.capture(ReadsItsOwnDict().double(), X)
    with pytest.raises(SubmoduleError, match="setting 'scale'"):
        gm.scale = 5.0


class AlwaysFrozen(nn.Module):
    """Its `train` keeps a part in eval mode, and its forward asks for that part's mode."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5)), nn.Linear(6, 4)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.part.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.part(x)
        return self.head(y if self.part.training else y * 2)


@pytest.mark.parametrize("modules", [None, "part"])
def test_a_mode_that_the_sources_train_always_sets(modules: str | None) -> None:
    source = AlwaysFrozen().double().train()
    host = fxlora.hosted(source, fxlora.capture(source, X, modules=modules))
    for mode in (True, False):
        for module in (host.train(mode), copy.deepcopy(host).train(mode)):
            assert_same([module(X)], [source.train(mode)(X)])
