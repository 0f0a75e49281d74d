"""Models without a whole graph: their submodules are captured, and their own Python calls them."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.errors import (
    CaptureError,
    ExportError,
    FxLoraWarning,
    InputError,
    SubmoduleError,
    UnsupportedOpError,
    VerificationError,
)

from .laws import (
    assert_close,
    assert_same,
    assert_untouched,
    called_with,
    check_laws,
    merged_weights,
    randomise,
    run,
    snapshot,
)
from .typed import doubled, grad_of, plan_of, untyped

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*submodules are captured instead"),
    pytest.mark.filterwarnings("ignore:no rule can adapt"),
]

ALL = Rule(op=["linear", "conv*", "embedding"], lora=LoraConfig(r=2, lora_alpha=3))


class Boxes:
    """An object that no graph takes as an argument."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features


class Trunk(nn.Module):
    """3 → 5 → 6 channels, with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 6, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.relu(self.norm(self.first(x)))
        return {"fine": F.pad(x, (0, 0, 0, 0, 0, 1)), "coarse": self.second(x)}


class Head(nn.Module):
    """Called with a region's vectors and, besides, a number, a string and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 7)
        self.outer = nn.Linear(7, 4)
        self.drop = nn.Dropout(0.3)

    def forward(
        self, x: torch.Tensor, scale: float = 1.0, *, kind: str = "relu", bias: bool = True
    ) -> torch.Tensor:
        x = self.drop(getattr(F, kind)(self.inner(x))) * scale
        return self.outer(x) if bias else F.linear(x, self.outer.weight)


class Detector(nn.Module):
    """Selects as many vectors as there are large activations: a number that no graph can give."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.side = nn.Linear(6, 5)
        self.head = Head()
        self.scale = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, images: list[torch.Tensor], threshold: float = 0.4
    ) -> dict[str, torch.Tensor]:
        self.calls += 1
        found, sides = [], []
        for image in images:
            levels = self.trunk(image[None])
            sides.append(self.side(levels["fine"].mean((2, 3))))
            boxes = self.select(levels["coarse"], threshold)
            found.append(self.head(boxes.features) + self.head(boxes.features, 0.5, kind="tanh"))
        scores = torch.cat(found) @ self.scale
        return {"scores": scores, "side": torch.cat(sides)}

    def select(self, features: torch.Tensor, threshold: float) -> Boxes:
        rows = features[0].flatten(1).T
        order = rows.sum(1).argsort(descending=True)
        count = int((rows.abs().amax(1) > threshold).sum())  # depends on the data
        return Boxes(rows[order[:count]])


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.fixture
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector().double()


SIZES = ((8, 9), (10, 7))


@functools.cache
def _captured() -> fxlora.CapturedModule:
    torch.manual_seed(0)
    return fxlora.capture(Detector().double(), (images(*SIZES),))


@pytest.fixture
def gm() -> fxlora.CapturedModule:
    """Return a capture of the detector with the weights of the other fixture's."""
    return copy.deepcopy(_captured())


def test_all_laws_hold_by_regions(detector: Detector, gm: fxlora.CapturedModule) -> None:
    _, lora = check_laws(detector, (images(*SIZES),), rules=ALL, capture=lambda _: gm)
    assert gm.regions == ("trunk", "side", "head")
    sites = [entry.site for entry in plan_of(lora)]
    assert sites == ["trunk.first", "trunk.second", "side", "head.inner", "head.outer"]
    assert {entry.form for entry in plan_of(lora)} == {"branch"}


def test_one_graph_serves_a_region_unless_constants_differ(gm: fxlora.CapturedModule) -> None:
    assert [p.path for p in gm.programs] == ["trunk", "side", "head", "head"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [((12, 5),), ((4, 4), (6, 11), (9, 9))])
def test_images_of_other_sizes(
    detector: Detector,
    gm: fxlora.CapturedModule,
    sizes: tuple[tuple[int, int], ...],
    training: bool,
) -> None:
    gm.train(training)
    source = copy.deepcopy(detector).train(training)
    args = (images(*sizes),)
    assert_same(run(gm, args, {}), run(source, args, {}))
    assert torch.equal(
        gm.get_buffer("trunk.norm.running_mean"), source.get_buffer("trunk.norm.running_mean")
    )
    assert gm.get_buffer("calls") == source.calls == 1 != detector.calls


def test_no_box_at_all(detector: Detector, gm: fxlora.CapturedModule) -> None:
    gm.eval()
    args = (images(*SIZES), 1e9)
    expected = copy.deepcopy(detector).eval()(*args)
    found = gm(*args)
    assert found["scores"].shape == (0, 3) == expected["scores"].shape
    assert torch.equal(found["side"], expected["side"])


def test_an_example_with_no_box_serves_calls_with_some(detector: Detector) -> None:
    gm = fxlora.capture(detector, (images(*SIZES), 1e9)).eval()
    args = (images(*SIZES),)
    assert_same(run(gm, args, {}), run(copy.deepcopy(detector).eval(), args, {}))


def test_print_says_the_regions_and_what_none_covers(gm: fxlora.CapturedModule) -> None:
    text = str(gm)
    for word in ("trunk", "head", "side", "by regions", "scale", Path(__file__).name):
        assert word in text
    assert list(gm.uncovered) == ["scale"]
    gm.graph.lint()


@pytest.mark.parametrize("rule", ["scale", "*"])
def test_targeting_what_no_region_covers_raises(gm: fxlora.CapturedModule, rule: str) -> None:
    line = rf"'scale' .*{Path(__file__).name}:\d+"
    with pytest.raises(UnsupportedOpError, match=line):
        fxlora.match(gm, Rule(rule, lora=LoraConfig(r=1)))


def test_the_shell_keeps_the_source_as_it_was(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no weight is copied on the way."""
    source = sys.modules["fxlora.frontends.exported"].Source
    own = {parameter.untyped_storage().data_ptr() for parameter in detector.parameters()}
    seen: list[Any] = []
    copied = source.copied

    def watched(self: Any) -> Any:
        seen.append(copied(self))
        return seen[-1]

    monkeypatch.setattr(source, "copied", watched)
    before = snapshot(detector)
    with pytest.warns(FxLoraWarning, match="Detector could not be captured.*trunk"):
        gm = fxlora.capture(detector, (images(*SIZES),))
    tensors = [p for s in seen for m in s.modules.values() for p in m.parameters()]
    assert tensors and {p.untyped_storage().data_ptr() for p in tensors} <= own
    lora = fxlora.inject(gm, fxlora.match(gm, ALL)).train()
    randomise(lora)
    lora(images(*SIZES))["scores"].sum().backward()
    assert_untouched(detector, before)
    assert (
        gm.get_parameter("trunk.first.weight").data_ptr() == detector.trunk.first.weight.data_ptr()
    )


def test_derived_modules_do_not_disturb_each_other(gm: fxlora.CapturedModule) -> None:
    args = (images(*SIZES),)
    gm.eval()
    expected = run(gm, args, {})
    lora = fxlora.inject(gm, fxlora.match(gm, ALL)).eval()
    randomise(lora)
    folded = fxlora.fold(lora).eval()
    other = copy.deepcopy(lora).eval()
    assert not torch.equal(run(lora, args, {})[0], expected[0])
    assert_same(run(other, args, {}), run(lora, args, {}))
    for name in fxlora.lora_parameters(other):
        name.data.zero_()
    assert not torch.equal(run(lora, args, {})[0], expected[0])
    assert torch.allclose(run(folded, args, {})[0], run(lora, args, {})[0], rtol=1e-10)
    assert_same(run(gm, args, {}), expected)


def test_adapters_report_and_verify(gm: fxlora.CapturedModule, tmp_path: Path) -> None:
    args = (images(*SIZES),)
    lora = fxlora.inject(gm, fxlora.match(gm, ALL))
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path / "adapter")
    loaded = fxlora.load_adapter(gm, tmp_path / "adapter")
    assert_same(run(loaded.eval(), args, {}), run(lora.eval(), args, {}))
    assert "head.inner" in fxlora.report(lora)
    assert "head.inner" in str(fxlora.verify(lora, args))
    assert len(fxlora.lora_parameters(lora)) == 10


def test_verify_finds_a_region_that_was_folded_wrong(gm: fxlora.CapturedModule) -> None:
    args = (images(*SIZES),)
    lora = fxlora.inject(gm, fxlora.match(gm, ALL))
    randomise(lora)
    folded = fxlora.fold(lora)
    bias = folded.get_parameter("head.inner.bias")
    folded.set_parameter("head.inner.bias", nn.Parameter(bias + 0.1))
    with pytest.raises(VerificationError):
        fxlora.verify(lora, args, folded=folded)


def test_there_is_no_whole_graph_to_export(gm: fxlora.CapturedModule, tmp_path: Path) -> None:
    folded = fxlora.fold(fxlora.inject(gm, fxlora.match(gm, ALL)))
    with pytest.raises(ExportError, match=r"regions \(trunk, side, head\)"):
        fxlora.export(folded, tmp_path / "model.pt2", (images(*SIZES),))
    assert not list(tmp_path.iterdir())


def test_actions_on_regions_advise_what_works(detector: Detector) -> None:
    gm = _captured()
    for action in (
        lambda part: part.register_forward_hook(print),
        lambda part: part.compile(),
        lambda part: part(torch.randn(1)),
        lambda part: setattr(part, "other", nn.Identity()),
    ):
        with pytest.raises(SubmoduleError, match=r"fxlora\.merged") as raised:
            action(gm.get_submodule("trunk"))
        assert "modules=" not in str(raised.value)
        assert "methods=" not in str(raised.value)
    called = []
    merged = fxlora.merged(detector, gm)
    merged.trunk.register_forward_hook(lambda *_: called.append(1))
    merged(images((8, 8)))
    assert called


def test_submodules_of_their_own_need_a_whole_graph(detector: Detector) -> None:
    with pytest.raises(CaptureError, match=r"With modules=, whole graphs are needed"):
        fxlora.capture(detector, (images((8, 8)),), modules="trunk")


def test_a_call_that_no_graph_of_a_region_holds_for(gm: fxlora.CapturedModule) -> None:
    gm.eval()
    with pytest.raises(InputError, match="region 'trunk'"):
        gm([image.float() for image in images(*SIZES)])


class ReadsBehind(nn.Module):
    """Calls a layer and, depending on the data, also reads its weight directly."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.b = nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x.to(self.a.weight.dtype).reshape(-1, self.a.weight.shape[1])))
        y /= 2  # in place, on a region's output
        return F.linear(y, self.a.weight) if bool((x.sum() > 0).item()) else y


def test_a_weight_that_python_was_seen_to_read_is_refused() -> None:
    gm = fxlora.capture(ReadsBehind(), torch.ones(3, 5))
    assert list(gm.uncovered) == ["a.weight"]
    with pytest.raises(UnsupportedOpError, match=r"'a' .*python|'a' .*Python"):
        fxlora.match(gm, Rule("a", lora=LoraConfig(r=2)))
    fxlora.match(gm, Rule("b", lora=LoraConfig(r=2)))


def test_a_weight_that_python_reads_later_raises_there() -> None:
    source = ReadsBehind()
    rule = Rule("a", lora=LoraConfig(r=2))
    lora = fxlora.adapt(source, -torch.ones(3, 5), rules=rule)
    lora(-torch.ones(3, 5))
    fxlora.verify(lora, -torch.ones(3, 5))
    with pytest.raises(UnsupportedOpError, match=r"'a\.weight' is adapted"):
        lora(torch.ones(3, 5))
    folded = fxlora.fold(lora)  # A and B are as they were initialised
    assert_same(run(folded, (torch.ones(3, 5),), {}), run(source, (torch.ones(3, 5),), {}))


class LayerDrop(nn.Module):
    """Skips layers at random in train mode; one layer has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.again = self.layers[0]
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for layer in (*self.layers, self.again):
            if not self.training or bool(torch.rand([]) > 0.5):
                x = x + layer(x)
        return self.head(x if mask is None else x * mask)


def test_layers_that_a_run_skips() -> None:
    torch.manual_seed(0)
    gm, lora = check_laws(LayerDrop(), (torch.randn(3, 6, dtype=torch.float64),), rules=ALL)
    assert gm.regions == ("layers.0", "layers.1", "layers.2", "head")
    assert [entry.site for entry in plan_of(lora)] == [*gm.regions]


def test_batch_norms_that_the_user_froze_stay_frozen(detector: Detector) -> None:
    detector.train()
    detector.trunk.norm.eval()
    args = (images(*SIZES),)
    gm = fxlora.capture(detector, args)
    assert_same(run(gm, args, {}), run(copy.deepcopy(detector), args, {}))
    assert torch.equal(gm.get_buffer("trunk.norm.running_mean"), torch.zeros(5).double())
    assert_same(run(gm.eval(), args, {}), run(copy.deepcopy(detector).eval(), args, {}))
    assert_same(run(gm.train(), args, {}), run(copy.deepcopy(detector), args, {}))


def test_inputs_that_the_model_itself_refuses(detector: Detector) -> None:
    with pytest.raises(CaptureError):
        fxlora.capture(detector, (torch.randn(2, 4),))


def test_a_model_without_any_region_says_why() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.w.T if bool(x.sum() > 0) else x

    line = Bare.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"Bare .*{Path(__file__).name}:{line}"):
        fxlora.capture(Bare(), torch.randn(2, 5))


def test_torchvisions_detection() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    trunk: Any = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3)
    )
    trunk.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    pool = detection.faster_rcnn.MultiScaleRoIAlign(["0"], 3, 2)
    model = detection.FasterRCNN(
        trunk, min_size=64, max_size=96, rpn_anchor_generator=anchors, box_roi_pool=pool,
        box_head=detection.faster_rcnn.TwoMLPHead(72, 20),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(20, 5),
    ).double()  # fmt: skip
    boxes = torch.tensor([[5.0, 6, 20, 30], [10, 12, 40, 38]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3])}] * 2
    args = (images((64, 64), (64, 64)), targets)
    gm = fxlora.capture(model, args)
    assert gm.regions == ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")
    assert gm.uncovered == {} and list(gm.state_dict()) == list(model.state_dict())
    for inputs in (args, (images((64, 40)), targets[:1])):
        for training in (False, True):
            source = copy.deepcopy(model).train(training)
            assert_same(run(gm.train(training), inputs, {}), run(source, inputs, {}))
    lora = fxlora.inject(gm, fxlora.match(gm, ALL)).train()
    randomise(lora)
    # Compare losses: boxes jump where rounding moves a score across a threshold.
    factors = {
        n: lora.get_parameter(n).detach() for e in plan_of(lora) for n in (e.name_a, e.name_b)
    }
    torch.manual_seed(1)
    source = copy.deepcopy(model).train()
    expected = called_with(source, merged_weights(source, lora, factors), args)
    assert len(factors) == 18 and len(expected) == 4
    assert all((a != b).all() for a, b in zip(expected, run(gm.train(), args, {}), strict=True))
    assert_close(run(lora, args, {}), expected)
    assert_close(run(fxlora.fold(lora).train(), args, {}), expected)
    torch.manual_seed(1)
    sum(lora(*args).values(), torch.zeros(())).backward()
    assert all(grad_of(lora.get_parameter(name)).abs().max() > 0 for name in factors)
    fxlora.verify(lora, args)


def test_an_attempt_that_takes_too_long_gives_way_to_a_less_dynamic_one(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fxlora.frontends.regions"], "EXPORT_TIMEOUT", 0.0)
    gm = fxlora.capture(detector, (images(*SIZES),)).eval()
    (head, *_) = (p for p in gm.programs if p.path == "side")  # always called with one row
    spec = head.inputs["eval"]
    assert spec and [type(dim) for dim in untyped(spec.leaves[0][0]).dims] == [int, int]
    args = (images(*SIZES),)
    assert_same(run(gm, args, {}), run(copy.deepcopy(detector).eval(), args, {}))


class Around(nn.Module):
    """Python that also uses a region without calling it: hooks, attributes, mode, references."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.region, self.seen = kind, Stateful(), 0.0
        if kind == "hook":
            self.region.register_forward_hook(doubled)
        if kind == "pre-hook":
            self.region.register_forward_pre_hook(lambda m, given: (given[0] + 1,))
        if kind == "list":
            self.kept = [self.region.inner.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "sets":
            self.region.scale = 1 + float(x.abs().max())
        if self.kind == "mode":
            self.region.train()
        y = self.region(x) * (1 if float(x.sum()) > -1e9 else 2)
        y = y + self.region.aux if self.kind == "reads" else y
        return y + self.kept[0].sum() if self.kind == "list" and x.shape[0] == 7 else y


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.scale = nn.Linear(5, 3), nn.Dropout(0.5), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.inner(x)) * self.scale
        self.aux = y.detach().square().mean()
        return y


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "sets", "mode", "reads", "list"])
def test_what_passes_by_a_region_is_not_lost(kind: str) -> None:
    torch.manual_seed(0)
    model = Around(kind).double()
    before = snapshot(model)
    example = (torch.randn(4, 5).double(),)
    if kind == "mode":  # its dropout is on in eval mode, too
        gm = lora = fxlora.capture(model, example)
    else:
        gm, lora = check_laws(model, example, rules=ALL)
    assert gm.regions == (("region",) if "hook" in kind or kind == "list" else ("region.inner",))
    x = torch.randn(2, 5).double()
    for training in (False, True):
        source = copy.deepcopy(model).train(training)
        assert_same(run(gm.train(training), (x,), {}), run(source, (x,), {}))
    if kind == "list":
        with pytest.raises(UnsupportedOpError, match="outside of them"):
            lora(torch.randn(7, 5).double())
    assert_untouched(model, before)


def test_functions_that_reach_the_model_by_themselves_are_refused() -> None:
    class Reaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner = nn.Linear(5, 3)
            self.function = lambda x: inner(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.function(x) * (1 if float(x.sum()) > 0 else 2)

    with pytest.raises(CaptureError, match=r"Reaches\.function' holds a function"):
        fxlora.capture(Reaches(), torch.randn(4, 5))


def test_experts_that_the_example_did_not_reach_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[int(x.sum() > 1e9)](x)

    gm = fxlora.capture(Experts(), torch.randn(4, 5))
    with pytest.warns(FxLoraWarning, match=r"no rule can adapt 1 weight,.*experts\.1"):
        plan = fxlora.match(gm, LoraConfig(r=2, target_modules="all-linear"))
    assert "ran nothing that reads it" in dict(plan.skipped)["experts.1"]


def test_a_squeeze_of_what_the_data_decide_is_right_or_refused() -> None:
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x).squeeze(0)
            return y * 2 if y.dim() == 1 else y

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Squeezes()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x[(x.sum(1) > 0).nonzero()[:, 0]])

    model, x = Chosen(), torch.ones(4, 5)
    gm, one = fxlora.capture(model, x), x * torch.tensor([1.0, -1, -1, -1])[:, None]
    assert torch.equal(gm(x), model(x))
    with pytest.raises(InputError, match="region 'head'"):
        gm(one)
    assert torch.equal(fxlora.capture(model, one)(one), model(one))
