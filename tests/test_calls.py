"""One module, and one set of adapters, for several ways of calling a model."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import fxlora
from fxlora.module.example_calls import Call

from .laws import randomise


class Tagger(nn.Module):
    """Has labels or none, a mask or none, and a second head that only some calls reach."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.proj = nn.Linear(6, 7)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(7, 11, bias=False)
        self.extra = nn.Linear(7, 3)

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        wide: bool = False,
    ) -> Any:
        h = self.norm(self.emb(ids).flatten(0, 1)).unflatten(0, ids.shape)
        h = self.drop(F.gelu(self.proj(h)))
        if mask is not None:
            h = h * mask[..., None]
        logits = self.head(h)
        if wide:
            return logits, self.extra(h)
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


IDS, MASK = torch.randint(0, 11, (3, 5)), torch.rand(3, 5, dtype=torch.float64)
LABELS = torch.randint(0, 11, (3, 5))
CALLS: list[Call] = [
    ((IDS,), {}),
    ((IDS,), {"labels": LABELS}),
    ((IDS, MASK), {"labels": LABELS}),
    ((IDS,), {"wide": True}),
]


@pytest.fixture(scope="module")
def model() -> Tagger:
    torch.manual_seed(0)
    return Tagger().double().eval()


@pytest.fixture(scope="module")
def captured(model: Tagger) -> fxlora.CapturedModule:
    return fxlora.capture(model, calls=[*CALLS, ((IDS[:2],), {})])


@pytest.fixture(scope="module")
def lora(captured: fxlora.CapturedModule) -> fxlora.CapturedModule:
    config = fxlora.LoraConfig(r=2, target_modules="all-linear")
    adapted = fxlora.inject(captured, fxlora.match(captured, config))
    randomise(adapted)
    return adapted


def outputs(module: nn.Module, call: Call) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return pytree.tree_leaves(module(*call[0], **call[1]))


def equal(first: nn.Module, second: nn.Module, call: Call) -> bool:
    pairs = zip(outputs(first, call), outputs(second, call), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("training", [False, True])
def test_each_call_is_the_sources(
    model: Tagger, captured: fxlora.CapturedModule, training: bool
) -> None:
    ours, source = copy.deepcopy(captured).train(training), copy.deepcopy(model).train(training)
    assert len(ours.programs) == 4  # the call with another batch needs none of its own
    for call in [*CALLS, ((IDS[:1].expand(4, 5),), {})]:
        assert equal(ours, source, call)
    buffers = dict(ours.named_buffers())
    for name, buffer in source.named_buffers():  # batch statistics are one set, too
        assert torch.equal(buffer, buffers[name])


def test_every_calls_reads_are_adapted_and_folded(
    model: Tagger, lora: fxlora.CapturedModule
) -> None:
    merged = fxlora.merged(model, fxlora.fold(lora)).eval()
    assert {entry.site for entry in lora.plan or ()} == {"proj", "head", "extra"}
    for call in CALLS:
        assert not equal(lora, model, call)
        for ours, theirs in zip(outputs(lora, call), outputs(merged, call), strict=True):
            assert (ours - theirs).abs().max() <= 1e-10
    assert all(site.effect > 0 for site in fxlora.verify(lora, calls=CALLS).sites)
    removed = fxlora.remove(lora)
    assert all(equal(removed, model, call) for call in CALLS)


def test_gradients_of_one_call_reach_the_adapters_of_all(lora: fxlora.CapturedModule) -> None:
    ours = copy.deepcopy(lora).train()
    for call in (CALLS[2], CALLS[3]):
        torch.stack([out.sum() for out in outputs(ours, call)]).sum().backward()
    grads = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())


def test_verify_asks_for_calls_that_reach_every_adapter(lora: fxlora.CapturedModule) -> None:
    with pytest.raises(fxlora.VerificationError, match=r"'extra'.*several as calls="):
        fxlora.verify(lora, IDS)


def test_a_call_like_none_is_refused(lora: fxlora.CapturedModule) -> None:
    with pytest.raises(fxlora.InputError, match="none of the 4 captured calls") as refused:
        lora(IDS, MASK)
    assert "(ids, mask, labels): labels: missing" in str(refused.value)
    assert str(refused.value).count("called with 2 positional") == 1  # the same for three calls


def test_a_signature_with_an_optional_argument_before_others() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, mask: Any = None, y: Any = None) -> torch.Tensor:
            return self.fc(x if mask is None else x * mask) + y

    model, y = Padded().double(), torch.randn(3, 3, dtype=torch.float64)
    calls: list[Call] = [((X,), {"y": y}), ((X,), {"mask": X, "y": y})]
    gm = fxlora.capture(model, calls=calls)
    assert str(inspect.signature(gm.forward)) == "(x, mask=None, y=None)"
    assert all(equal(gm, model, call) for call in calls)


def test_the_nearest_calls_are_named(lora: fxlora.CapturedModule) -> None:
    with pytest.raises(fxlora.InputError, match="The nearest: ") as refused:
        lora(IDS.float(), labels=LABELS)
    assert str(refused.value).count("ids: captured as torch.int64") == 1
    assert "missing" not in str(refused.value)


def test_torch_exports_a_call_with_optional_arguments(lora: fxlora.CapturedModule) -> None:
    program = torch.export.export(lora, (IDS, MASK), {"labels": LABELS})
    loss, expected = (m(IDS, MASK, labels=LABELS)[0] for m in (program.module(), lora))
    assert torch.equal(loss, expected)


def test_defaults_may_be_given(model: Tagger, captured: fxlora.CapturedModule) -> None:
    one = fxlora.capture(model, IDS)
    compiled: Any = torch.compile(captured, backend="eager", fullgraph=True)
    for module in (one, captured, compiled):
        for call in (((IDS, None), {}), ((IDS, None, None, False), {}), ((IDS,), {"mask": None})):
            assert equal(module, model, call)
    for call in (((IDS, None, None, 0), {}), ((IDS,), {"wide": True}), ((IDS, MASK), {})):
        with pytest.raises(fxlora.InputError):
            one(*call[0], **call[1])


def test_a_position_means_what_it_means_in_the_source(captured: fxlora.CapturedModule) -> None:
    """`model(ids, x)` gives a mask, although the call captured next to ids had labels."""
    one = fxlora.capture(Tagger().double(), (IDS,), {"labels": LABELS})
    with pytest.raises(fxlora.InputError, match="2 positional arguments, captured with 1"):
        one(IDS, LABELS)
    with pytest.raises(fxlora.InputError, match="ids: given twice"):
        one(IDS, ids=IDS, labels=LABELS)
    assert outputs(one.eval(), ((), {"ids": IDS, "labels": LABELS}))


def test_the_signature_names_every_argument(lora: fxlora.CapturedModule) -> None:
    parameters = inspect.signature(lora.forward).parameters
    assert list(parameters) == ["ids", "mask", "labels", "wide"]
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    assert required == ["ids"]


def test_on_disk(
    tmp_path: Path, captured: fxlora.CapturedModule, lora: fxlora.CapturedModule
) -> None:
    fxlora.save_adapter(lora, tmp_path / "adapter")
    again = fxlora.load_adapter(captured, tmp_path / "adapter")
    assert all(equal(again, lora, call) for call in CALLS)
    for number in (1, 2):
        args, kwargs = CALLS[number]
        path = fxlora.export(fxlora.fold(lora), tmp_path / "call.pt2", args, kwargs)
        program = torch.export.load(path).module()
        assert equal(program, fxlora.fold(lora), CALLS[number])


def test_hosted(model: Tagger, lora: fxlora.CapturedModule) -> None:
    host = fxlora.hosted(model, lora)
    for call in CALLS:
        assert equal(host, lora, call)
    assert equal(host, lora, ((IDS,), {})) and not torch.equal(host(IDS, None, None), model(IDS))
    with pytest.raises(fxlora.InputError):
        host(IDS, MASK)


def test_compiled(lora: fxlora.CapturedModule) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(lora), fullgraph=True, backend="eager")
    assert all(equal(compiled, lora, call) for call in CALLS)


class Branches(nn.Module):
    """Cannot be one graph; each of its submodules can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        h = self.first(x)
        if h.sum() > 1e6:
            h = -h
        if twice:
            h = self.first(self.second(h))
        return h


def test_by_regions() -> None:
    """The second call reaches a submodule that the first does not."""
    model, x = Branches().double(), torch.randn(3, 4, dtype=torch.float64)
    calls: list[Call] = [((x,), {}), ((x,), {"twice": True})]
    with pytest.warns(fxlora.FxLoraWarning, match="submodules are captured"):
        gm = fxlora.capture(model, calls=calls)
    assert set(gm.regions) == {"first", "second"}
    assert all(equal(gm, model, call) for call in calls)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"calls": []}, "calls must be a list of pairs"),
        ({"calls": [(IDS,)]}, "calls must be a list of pairs"),
        ({"calls": CALLS, "args": IDS}, "one of calls"),
        ({"calls": CALLS, "dynamic_shapes": {"ids": None}}, "a list of 4"),
    ],
)
def test_what_is_no_call(model: Tagger, given: dict[str, Any], said: str) -> None:
    with pytest.raises(fxlora.CaptureError, match=said):
        fxlora.capture(model, **given)


class OnlyThen(nn.Module):
    """Normalises, and has a second layer, in one kind of call only."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.norm, self.then = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, more: bool = False) -> torch.Tensor:
        h = self.proj(x)
        return self.then(self.norm(h)) if more else h


X = torch.randn(3, 4, dtype=torch.float64)


def test_a_mode_that_matters_in_a_later_call_only_is_refused() -> None:
    gm = fxlora.capture(OnlyThen().double(), calls=[((X,), {}), ((X,), {"more": True})]).train()
    gm.norm.eval()
    with pytest.raises(fxlora.SubmoduleError, match="'norm' was set to eval mode"):
        gm(X, more=True)


def test_whoever_interprets_the_graph_gets_the_calls_own() -> None:
    model = OnlyThen().double().eval()
    gm = fxlora.capture(model, calls=[((X,), {}), ((X,), {"more": True})]).eval()
    assert torch.equal(fx.Interpreter(gm).run(X), model(X))
    assert torch.equal(fx.Interpreter(gm).run(X, True), model(X, True))
    with pytest.raises(fxlora.InputError, match="none of the 2 captured calls"):
        fx.Interpreter(gm).run(X, 1)


class ByGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) if x.requires_grad else self.second(x)


@pytest.mark.parametrize("size", [3, 7])
def test_calls_that_a_gradient_tells_apart(size: int) -> None:
    model, other = ByGrad().double(), torch.randn(size, 4, dtype=torch.float64)
    calls: list[Call] = [((X,), {}), ((other.requires_grad_(),), {})]
    gm = fxlora.capture(model, calls=calls)
    assert gm.regions == ("",)
    assert all(equal(gm, model, call) for call in calls)


class ByKind(ByGrad):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) if isinstance(x, nn.Parameter) else self.second(x)


@pytest.mark.parametrize("size", [3, 7])
def test_calls_that_nothing_tells_apart_are_captured_by_regions(size: int) -> None:
    """Also where the second call is the larger one, of which a graph for both would be made."""
    model, other = ByKind().double(), torch.randn(size, 4, dtype=torch.float64)
    calls: list[Call] = [((X,), {}), ((nn.Parameter(other),), {})]
    with pytest.warns(fxlora.FxLoraWarning, match="differ in nothing that a call is told by"):
        gm = fxlora.capture(model, calls=calls)
    assert all(equal(gm, model, call) for call in calls)


class BySize(nn.Module):
    """Takes another way for one step than for several, as a prompt and a decoding step do."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.one = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x) if x.shape[1] == 1 else self.many(x)


@pytest.mark.parametrize("order", [1, -1])
def test_calls_that_differ_in_sizes_get_the_graphs_that_they_need(order: int) -> None:
    model = BySize().double()
    inputs = [torch.randn(2, length, 4, dtype=torch.float64) for length in (5, 7, 1)][::order]
    calls: list[Call] = [((x,), {}) for x in inputs]
    gm = fxlora.capture(model, calls=calls)
    assert len(gm.programs) == 2
    for call in [*calls, ((torch.randn(3, 6, 4, dtype=torch.float64),), {})]:
        assert equal(gm, model, call)


class CountsAndBranches(Branches):
    """Writes to a buffer, and cannot be one graph; one kind of call runs in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        if twice and self.training:
            raise ValueError
        return super().forward(self.norm(x), twice)


@pytest.mark.filterwarnings("ignore:CountsAndBranches could not be captured:fxlora.FxLoraWarning")
def test_regions_of_several_calls_that_write_to_a_buffer() -> None:
    model, x = CountsAndBranches().double(), torch.randn(3, 4, dtype=torch.float64)
    calls: list[Call] = [((x,), {}), ((x,), {"twice": True})]
    gm = fxlora.capture(model, calls=calls)
    assert set(gm.regions) == {"norm", "first", "second"}
    for training, mine in ((True, calls[:1]), (False, calls)):
        for call in mine:
            assert equal(gm.train(training), model.train(training), call)


def test_dynamic_shapes_of_a_call_are_its_own() -> None:
    """Although the graphs of the call before would hold for its example."""
    model, call = nn.Linear(4, 6).double(), ((torch.randn(2, 5, 4, dtype=torch.float64),), {})
    gm = fxlora.capture(model, calls=[call, call], dynamic_shapes=[None, ({1: Dim.AUTO},)])
    assert gm(torch.randn(2, 9, 4, dtype=torch.float64)).shape == (2, 9, 6)


def test_symbolic_sizes_choose_as_the_example_does() -> None:
    class Parity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.even(x) if x.shape[0] % 2 == 0 else self.odd(x)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = Parity().double()
    inputs = [torch.randn(size, 4, dtype=torch.float64) for size in (4, 5)]
    calls: list[Call] = [((x,), {}) for x in inputs]
    gm = fxlora.capture(model, calls=calls, dynamic_shapes=[({0: Dim.AUTO},)] * 2)
    for x in inputs:
        program = torch.export.export(Wrapper(), (x,), dynamic_shapes=({0: Dim.AUTO},))
        assert torch.equal(program.module()(x), model(x))


class Strides(nn.Module):
    """Computes with something that depends on how a tensor lies in memory."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.scale = nn.Linear(4, 3), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.scale(x)


@pytest.mark.parametrize(
    ("scale", "graphs"),
    [
        (lambda x: 1, 1),
        (lambda x: x.shape[1], 1),
        (lambda x: 2 if x.is_contiguous() else 3, 2),
        (lambda x: x.clone().stride(0), 2),
        (lambda x: x.stride(0), 2),
    ],
    ids=["nothing", "a size", "is_contiguous", "stride of a copy", "stride"],
)
def test_examples_in_another_memory_order(scale: Any, graphs: int) -> None:
    model, batch = Strides(scale).eval(), torch.randn(8, 6, 4)
    examples = [batch[:5].clone(), batch[:4, 1:5]]
    gm = fxlora.capture(model, calls=[((x,), {}) for x in examples])
    assert len(gm.programs) == graphs
    for x in examples:
        assert torch.equal(gm(x), model(x))
    if graphs == 1:
        assert torch.equal(gm(batch[:2, :3]), model(batch[:2, :3]))


def test_a_stride_of_a_copy_of_a_transposed_input() -> None:
    model, x = Strides(lambda x: x.clone().stride(0)).eval(), torch.randn(6, 5, 4).transpose(0, 1)
    assert torch.equal(fxlora.capture(model, x)(x), model(x))


class Slices(nn.Module):
    """Takes parts of a table and of its input, by the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 5)
        self.table = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        half = x[:, : length // 2].sum(1, keepdim=True)
        near = x[:, : min(length, 7)].sum(1, keepdim=True)
        return self.lin(x + half + near) + self.table[:length] + self.table[None, :length].cos()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("size", [5, 8])  # of the other example; 8 takes the whole table
@pytest.mark.parametrize("state", ["gradient", "transposed"])
def test_one_graph_that_slices_is_proved_for_calls_in_two_states(
    state: str, size: int, first: int
) -> None:
    model = Slices().double()
    x = torch.randn(4, 6, 3).double()
    other = torch.randn(2, size, 3).double().requires_grad_()
    if state == "transposed":
        other = torch.randn(3, size, 2).double().permute(2, 1, 0)
    given: list[Any] = [((x,), {}), ((other,), {})]
    gm = fxlora.capture(model, calls=given[first:] + given[:first])
    assert not gm.parent_module
    for call in (x, other, torch.randn(3, 7, 3).double()):
        assert torch.equal(gm(call), model(call))
