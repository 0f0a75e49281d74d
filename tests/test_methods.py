"""One module, and one set of adapters, for several methods of a model."""

from __future__ import annotations

import copy
import inspect
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora

from .laws import randomise

IMAGES, IDS = torch.randn(3, 2, 6, dtype=torch.float64), torch.randint(0, 11, (3, 5))
METHODS: dict[str, Any] = {
    "encode_image": IMAGES,
    "encode_text": [((IDS,), {}), ((IDS,), {"mask": torch.ones(3, 5, dtype=torch.float64)})],
    "scores": {"images": IMAGES, "ids": IDS},
}


class TwoTowers(nn.Module):
    """Encodes images and texts, and compares them: a method calls the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.BatchNorm1d(7))
        self.words = nn.Embedding(11, 5)
        self.text = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.3), nn.GELU())
        self.project = nn.Linear(9, 7, bias=False)

    def encode_image(self, images: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
        found = self.image(images)
        return found / found.norm(dim=-1, keepdim=True) if normalize else found

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.text(self.words(ids))
        return self.project((h if mask is None else h * mask[..., None]).mean(1))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.encode_image(images, normalize=True) @ self.encode_text(ids).T

    def scores(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self(images, ids).softmax(-1)

    def plan(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids)


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("encode_image", (IMAGES[:2],), {}),
    ("encode_text", (IDS,), {}),
    ("encode_text", (IDS[:2], torch.rand(2, 5, dtype=torch.float64)), {}),
    ("scores", (IMAGES, IDS), {}),
    ("forward", (IMAGES, IDS), {}),
]


@pytest.fixture(scope="module")
def model() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers().double().eval()


@pytest.fixture(scope="module")
def captured(model: TwoTowers) -> fxlora.CapturedModule:
    return fxlora.capture(model, (IMAGES, IDS), methods=METHODS)


@pytest.fixture(scope="module")
def lora(captured: fxlora.CapturedModule) -> fxlora.CapturedModule:
    config = fxlora.LoraConfig(r=2, target_modules="all-linear")
    adapted = fxlora.inject(captured, fxlora.match(captured, config))
    randomise(adapted)
    return adapted


def output(module: nn.Module, call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> torch.Tensor:
    name, args, kwargs = call
    torch.manual_seed(1)
    return (module if name == "forward" else getattr(module, name))(*args, **kwargs)


@pytest.mark.parametrize("training", [False, True])
def test_each_method_is_the_sources(
    model: TwoTowers, captured: fxlora.CapturedModule, training: bool
) -> None:
    ours, source = copy.deepcopy(captured).train(training), copy.deepcopy(model).train(training)
    assert ours.captured_methods == ("forward", *METHODS)
    for call in CALLS:
        assert torch.equal(output(ours, call), output(source, call))
    buffers = dict(ours.named_buffers())
    for name, buffer in source.named_buffers():  # all methods write to one set
        assert torch.equal(buffer, buffers[name])


def test_adapters_act_in_every_method(model: TwoTowers, lora: fxlora.CapturedModule) -> None:
    merged = fxlora.merged(model, fxlora.fold(lora)).eval()
    assert {entry.site for entry in lora.plan or ()} == {"image.1", "text.0", "project"}
    for call in CALLS:
        assert (output(lora, call) - output(model, call)).abs().max() > 1e-3
        assert (output(lora, call) - output(merged, call)).abs().max() <= 1e-10
    found = fxlora.verify(lora, methods={name: METHODS[name] for name in list(METHODS)[:2]})
    assert all(site.effect > 0 for site in found.sites)
    removed = fxlora.remove(lora)
    assert all(torch.equal(output(removed, call), output(model, call)) for call in CALLS)


def test_training_one_method_trains_what_the_others_read(lora: fxlora.CapturedModule) -> None:
    ours = copy.deepcopy(lora).train()
    before = output(ours.eval(), CALLS[-1]).detach()
    ours.train().encode_text(IDS).square().sum().backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert {name.partition(".lora")[0] for name in grads} == {"text.0", "project"}
    torch.optim.SGD(fxlora.lora_parameters(ours), lr=0.1).step()
    assert (output(ours.eval(), CALLS[-1]) - before).abs().max() > 1e-3


def test_a_host_runs_its_methods_on_the_graphs(
    model: TwoTowers, lora: fxlora.CapturedModule
) -> None:
    host = fxlora.hosted(model, lora)
    for call in CALLS:
        assert torch.equal(output(host, call), output(lora, call))
    assert torch.equal(host.encode_image(images=IMAGES, normalize=False), host.encode_image(IMAGES))
    with pytest.raises(fxlora.InputError, match="normalize: not among the captured"):
        host.encode_image(IMAGES, normalize=True)


def test_each_method_can_be_exported(lora: fxlora.CapturedModule, tmp_path: Path) -> None:
    path = fxlora.export(fxlora.fold(lora), tmp_path / "m.pt2", IDS, method="encode_text")
    program = torch.export.load(path).module()
    assert torch.allclose(program(IDS[:2]), lora.encode_text(IDS[:2]), atol=1e-10)
    with pytest.raises(fxlora.InputError, match="the method decode was not captured"):
        fxlora.export(lora, tmp_path / "m.pt2", IDS, method="decode")


def test_an_adapter_goes_through_a_file(
    model: TwoTowers, lora: fxlora.CapturedModule, tmp_path: Path
) -> None:
    fxlora.save_adapter(lora, tmp_path)
    text = fxlora.capture(model, methods={"encode_text": IDS, "encode_image": IMAGES})
    loaded = fxlora.load_adapter(text, tmp_path)
    for call in CALLS[:2]:
        assert torch.equal(output(loaded, call), output(lora, call))


def test_a_copy_and_a_compiled_method(lora: fxlora.CapturedModule) -> None:
    compiled = torch.compile(copy.deepcopy(lora).encode_text, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS[:2]), lora.encode_text(IDS[:2]))


def test_hooks_of_the_model_run_where_the_source_runs_them() -> None:
    torch.manual_seed(0)
    model = TwoTowers().double().eval()
    model.register_forward_hook(lambda *call: call[-1] * 2)
    gm = fxlora.capture(model, (IMAGES, IDS), methods=METHODS)
    for call in CALLS:  # `scores` calls the model, whose hook runs then; `encode_image` does not
        assert torch.equal(output(gm, call), output(model, call))
    assert len(model._forward_hooks) == 1


def test_a_method_of_a_model_that_cannot_be_copied() -> None:
    model = TwoTowers().double().eval()
    held = model.image
    model.outside = lambda x: held(x)  # type: ignore[assignment]
    gm = fxlora.capture(model, methods={"encode_image": IMAGES})
    assert torch.equal(gm.encode_image(IMAGES), model.encode_image(IMAGES))
    assert "forward" not in vars(model)


def test_what_was_not_captured_is_refused(model: TwoTowers) -> None:
    gm = fxlora.capture(model, methods={"encode_text": IDS})
    with pytest.raises(fxlora.InputError, match=r"method forward was not captured \(encode_text"):
        gm(IMAGES, IDS)
    with pytest.raises(AttributeError, match="encode_image"):
        gm.encode_image(IMAGES)
    with pytest.raises(fxlora.InputError, match="called with torch"):
        gm.encode_text(IDS.double())
    rule = fxlora.LoraConfig(r=2, target_modules=["image.1"])
    with pytest.raises(fxlora.NoMatchError):  # no captured method reads it
        fxlora.match(gm, rule)
    host = fxlora.hosted(model, gm)
    with pytest.raises(fxlora.InputError, match="method forward was not captured"):
        host.scores(IMAGES, IDS)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"decode": IDS}, "has no method or submodule 'decode'"),
        ({"image.encode": IMAGES}, "For a method of a submodule, capture a method of the model"),
        ({"": IMAGES}, "has no method or submodule ''"),
        ({"plan": IDS}, "every captured module has an attribute"),
        ({"encode_text": (IDS, IDS)}, r"methods=\{'encode_text': \(\(x, mask\), \{\}\)\}"),
        ({"forward": ((IMAGES, IDS), {})}, "as args and kwargs, or as calls"),
        ([], "must be a dict"),
    ],
)
def test_refusals_of_capture(model: TwoTowers, methods: Any, message: str) -> None:
    with pytest.raises(fxlora.CaptureError, match=message):
        fxlora.capture(model, (IMAGES, IDS), methods=methods)


# ---- submodules that are called from outside -----------------------------------------------------

FEATURES = torch.randn(3, 4, 5, dtype=torch.float64)
PARTS: dict[str, Any] = {"image": IMAGES, "text": FEATURES, "text.0": {"input": FEATURES}}


@pytest.fixture(scope="module")
def with_parts(model: TwoTowers) -> fxlora.CapturedModule:
    config = fxlora.LoraConfig(r=2, target_modules="all-linear")
    lora = fxlora.adapt(model, (IMAGES, IDS), methods=PARTS, rules=config)
    randomise(lora)
    return lora


def called(module: nn.Module, path: str) -> torch.Tensor:
    torch.manual_seed(1)
    part, given = module.get_submodule(path), PARTS[path]
    return part(**given) if isinstance(given, dict) else part(given)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", PARTS)
def test_a_submodule_is_called_on_its_own(
    model: TwoTowers, with_parts: fxlora.CapturedModule, path: str, training: bool
) -> None:
    lora = copy.deepcopy(with_parts).train(training)
    source = copy.deepcopy(model).train(training)
    merged = fxlora.merged(model, fxlora.fold(lora)).train(training)
    host = fxlora.hosted(model, copy.deepcopy(lora))
    wanted = called(merged, path)
    assert (wanted - called(source, path)).abs().max() > 1e-3
    for module in (lora, host):
        assert (called(module, path) - wanted).abs().max() <= 1e-10
    buffers = dict(lora.named_buffers())  # a call of the batch norm's module counts as one
    assert all(torch.allclose(b, buffers[n], 1e-10) for n, b in merged.named_buffers())
    plain = fxlora.remove(with_parts).train(training)
    assert torch.equal(called(plain, path), called(copy.deepcopy(model).train(training), path))


def test_a_submodules_own_hooks_run_and_the_models_do_not() -> None:
    torch.manual_seed(0)
    model = TwoTowers().double().eval()
    model.text.register_forward_hook(lambda *call: call[-1] * 2)
    model.register_forward_hook(lambda *call: call[-1] * 3)
    gm = fxlora.capture(model, (IMAGES, IDS), methods={"text": FEATURES})
    assert torch.equal(gm.text(FEATURES), model.text(FEATURES))
    assert torch.equal(gm(IMAGES, IDS), model(IMAGES, IDS))


class TwoNames(nn.Module):
    """Has one submodule under two names and a property."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.again = self.body
        self.head = nn.Linear(4, 2)

    @property
    def base(self) -> nn.Module:
        return self.body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x) + self.again(x))


@pytest.mark.parametrize("name", ["body", "again", "base"])
def test_a_submodule_has_all_its_names(name: str) -> None:
    torch.manual_seed(0)
    model, x = TwoNames().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    config = fxlora.LoraConfig(r=2, target_modules="all-linear")
    lora = fxlora.adapt(model, x, methods={name: x}, rules=config)
    randomise(lora)
    assert lora.captured_methods == ("forward", "body")
    wanted = fxlora.merged(model, fxlora.fold(lora)).eval().body(x)
    host = fxlora.hosted(model, lora)
    for found in (lora.body(x), lora.again(x), host.body(x), host.again(x), host.base(x)):
        assert (found - wanted).abs().max() <= 1e-10 < (wanted - model.body(x)).abs().max()
    with pytest.raises(fxlora.SubmoduleError, match="Copy the host"):
        copy.deepcopy(host.body)(x)


def test_the_sources_code_in_a_host_calls_its_own_submodules() -> None:
    """Without adapters, a submodule that was not captured runs its own code, inside and out."""
    torch.manual_seed(0)
    model, x = TwoNames().double().eval(), torch.randn(3, 6, dtype=torch.float64)
    host = fxlora.hosted(model, fxlora.capture(model, x, methods={"body.0": x}))
    wide = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(host.body(wide), model.body(wide))  # "body.0" was captured for (3, 6)
    with pytest.raises(fxlora.InputError, match="captured with 2 dimensions"):
        host.body[0](wide)


def test_a_submodule_that_was_not_captured_is_refused_with_advice_that_works(
    model: TwoTowers, with_parts: fxlora.CapturedModule
) -> None:
    x = torch.randn(3, 9, dtype=torch.float64)
    given = {"capture": fxlora.capture, "model": model, "args": (x,), "kwargs": {}}
    for module in (with_parts, fxlora.hosted(model, with_parts)):
        with pytest.raises(fxlora.SubmoduleError) as refused:
            module.get_submodule("project")(x)
        advice = re.search(r"capture\(model, …, methods=\{.*?\}\)", str(refused.value))
        assert advice is not None
        gm = eval(advice[0].replace(" …,", ""), given)
        assert torch.equal(gm.project(x), model.project(x))
    with pytest.raises(fxlora.InputError, match="called with torch"):
        with_parts.text(FEATURES.float())


# ---- what a method may do -----------------------------------------------------------------------


class Kept(nn.Module):
    """Keeps bound methods of itself, and a hook that sets an attribute which `features` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.heads = {"noisy": self._noisy}
        self.feature: torch.Tensor | None = None
        self.first.register_forward_hook(self._keep)

    def _noisy(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.first(x), 0.5, self.training)

    def _keep(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        self.feature = output

    def noisy(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads["noisy"](x)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        self.second(self.first(x))
        assert self.feature is not None
        return self.feature * 1

    def hooked(self, x: torch.Tensor) -> torch.Tensor:
        self.register_forward_hook(lambda *_: None)
        return self.first(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("copied", [True, False])
def test_the_method_and_what_it_calls_have_one_self(training: bool, copied: bool) -> None:
    torch.manual_seed(0)
    model, x = Kept().double().train(training), torch.randn(3, 6, dtype=torch.float64)
    if not copied:
        model.lock = threading.Lock()  # type: ignore[assignment]
    names = ("noisy", "features", "hooked")
    gm = fxlora.capture(model, x, methods=dict.fromkeys(names, x))
    assert model.feature is None and not model._forward_hooks and "forward" not in vars(model)
    other = torch.randn(2, 6, dtype=torch.float64)
    for mode in (True, False):
        for name in names:
            found = output(gm.train(mode), (name, (other,), {}))
            assert torch.equal(found, output(model.train(mode), (name, (other,), {})))


class Images(nn.Module):
    """As segmenters do, keeps the features of an image for the prompts that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 5), nn.Linear(6, 5)
        self.features: torch.Tensor | None = None

    def set_image(self, image: torch.Tensor) -> torch.Tensor:
        self.features = features = self.encoder(image)
        return features.sum()

    def predict(self, prompt: torch.Tensor) -> torch.Tensor:
        assert self.features is not None
        return self.decoder(prompt) + self.features

    def forward(self, image: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        self.set_image(image)
        return self.predict(prompt)


def test_what_one_method_leaves_for_another_is_refused() -> None:
    model, x = Images().double(), torch.randn(3, 6, dtype=torch.float64)
    model.set_image(x)
    with pytest.raises(fxlora.CaptureError, match=r"Images\.predict reads features, which another"):
        fxlora.capture(model, (x, x), methods={"set_image": x, "predict": x})
    gm = fxlora.capture(model, (x, x), methods={"set_image": x})  # forward sets it before it reads
    assert torch.equal(gm(2 * x, x), model(2 * x, x))


class Switched(nn.Module):
    """One call leaves a plain value that the other asks for."""

    def __init__(self, ask: str) -> None:
        super().__init__()
        self.fc, self.ask = nn.Linear(6, 4), ask
        self.flag, self.mode, self.value = True, "plain", None

    def forward(self, x: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
        if k is not None:
            self.flag, self.mode, self.value = False, "scaled", 2.0
            return self.fc(x) * k
        asked = {"flag": lambda: self.flag, "mode": lambda: self.mode == "plain"}
        asked["value"] = lambda: not isinstance(self.value, float)
        return self.fc(x) * (2 if asked[self.ask]() else 1)


@pytest.mark.parametrize("ask", ["flag", "mode", "value"])
def test_a_plain_value_that_one_call_leaves_for_another(ask: str) -> None:
    model, x, k = Switched(ask).double(), torch.randn(3, 6).double(), torch.rand(3, 1).double()
    with pytest.warns(fxlora.FxLoraWarning, match=f"reads .*{ask}.*, which another"):
        gm = fxlora.capture(model, calls=[((x,), {}), ((x, k), {})])
    for call in ((x,), (x, k), (x,)):
        assert torch.equal(gm(*call), model(*call))
    fresh = Switched(ask).double()
    one = fxlora.capture(fresh, x)
    with pytest.raises(fxlora.InputError, match="Capture all calls together"):
        fxlora.capture_more(one, fresh, (x, k))


class CallsMore(Kept):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs).relu()


def test_code_that_a_method_does_not_run_is_refused() -> None:
    x = torch.randn(3, 6)
    with pytest.raises(fxlora.CaptureError, match="a __call__ of its own"):
        fxlora.capture(CallsMore(), methods={"noisy": x})
    gm = fxlora.capture(CallsMore(), x)
    with pytest.raises(fxlora.InjectError, match="__call__ of its own"):
        fxlora.hosted(CallsMore(), gm)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(fxlora.CaptureError, match="hooks for all modules"):
            fxlora.capture(Kept(), methods={"noisy": x})
    finally:
        handle.remove()


class ReadsAnother(nn.Module):
    """Reads the weight of a module that is not its child."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.held = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) @ self.held[0].weight.T


class WithReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.plain = nn.Linear(6, 5), nn.Linear(6, 5)
        self.reader = ReadsAnother(self.fc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.reader(x) + self.plain(x)


def test_a_submodule_without_adapters_runs_its_own_code_in_a_host() -> None:
    torch.manual_seed(0)
    model, x = WithReader().double(), torch.randn(3, 6, dtype=torch.float64)
    lora = fxlora.adapt(model, x, rules=fxlora.LoraConfig(r=2, target_modules=["fc"]))
    randomise(lora)
    host, merged = fxlora.hosted(model, lora), fxlora.merged(model, fxlora.fold(lora))
    assert torch.equal(host.plain(x), model.plain(x))
    assert not torch.allclose(merged.reader(x), model.reader(x))
    assert torch.allclose(host.reader(x), merged.reader(x), rtol=1e-10)
    with pytest.raises(fxlora.SubmoduleError, match="'fc' of a host has adapters"):
        host.fc(x)


def test_a_host_does_not_run_the_models_hooks_twice(model: TwoTowers) -> None:
    hooked = copy.deepcopy(model)
    handle = hooked.register_forward_hook(lambda *call: call[-1] * 2)
    gm = fxlora.capture(hooked, (IMAGES, IDS))
    with pytest.raises(fxlora.InjectError, match="Remove them from the model before hosted"):
        fxlora.hosted(hooked, gm)
    expected = hooked(IMAGES, IDS)
    handle.remove()
    assert torch.equal(fxlora.hosted(hooked, gm)(IMAGES, IDS), expected)


def test_signatures(captured: fxlora.CapturedModule) -> None:
    assert list(inspect.signature(captured.forward).parameters) == ["images", "ids"]
