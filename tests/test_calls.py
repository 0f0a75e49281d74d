"""One module, and one set of adapters, for several ways of calling a model."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
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
    assert list(parameters) == ["ids", "labels", "mask", "wide"]
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    assert required == ["ids"]


def test_on_disk(tmp_path: Path, model: Tagger, lora: fxlora.CapturedModule) -> None:
    fxlora.save_adapter(lora, tmp_path / "adapter")
    again = fxlora.load_adapter(fxlora.capture(model, calls=CALLS), tmp_path / "adapter")
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
    compiled: Any = torch.compile(copy.deepcopy(lora), fullgraph=True, backend="aot_eager")
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
        ({"calls": CALLS, "modules": "proj"}, "one example call"),
    ],
)
def test_what_is_no_call(model: Tagger, given: dict[str, Any], said: str) -> None:
    with pytest.raises(fxlora.CaptureError, match=said):
        fxlora.capture(model, **given)
