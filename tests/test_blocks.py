"""Submodules that are modules of their own, in models that are captured for several calls."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils import _pytree as pytree

import fxlora
from fxlora import LoraConfig

from .laws import assert_close, assert_same, randomise
from .typed import grad_of

CONFIG = LoraConfig(r=2, target_modules="all-linear")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
        self.drop = nn.Dropout(0.3)

    def forward(self, h: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.up(self.norm(h))
        return h + self.drop(self.down(inner if mask is None else inner * mask))


class Model(nn.Module):
    """Called with ids or embeddings, with a mask or labels or without; and by two methods."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.patches = nn.Linear(4, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(6, 11)

    def forward(self, ids: Any = None, mask: Any = None, labels: Any = None, h: Any = None) -> Any:
        logits = self.head(self.through(self.emb(ids) if h is None else h, mask))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.through(self.patches(images), None).mean(1)

    def through(self, h: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            h = layer(h, mask)
        return h


IDS = torch.randint(0, 11, (3, 5))
MASK = torch.rand(3, 5, 1, dtype=torch.double)
IMAGES = torch.randn(3, 7, 4, dtype=torch.double)
CALLS: list[tuple[Any, Any]] = [
    ((IDS,), {}),
    ((IDS[:2, :4],), {}),
    ((IDS, MASK), {}),
    ((IDS,), {"labels": IDS}),
    ((), {"h": torch.randn(3, 5, 6, dtype=torch.double)}),
]


@pytest.fixture(scope="module")
def source() -> Model:
    torch.manual_seed(0)
    return Model().double().eval()


@pytest.fixture(scope="module")
def flat(source: Model) -> fxlora.CapturedModule:
    return adapted(fxlora.capture(source, calls=CALLS, methods={"encode": IMAGES}))


@pytest.fixture(scope="module")
def captured(source: Model) -> fxlora.CapturedModule:
    return fxlora.capture(source, calls=CALLS, methods={"encode": IMAGES}, modules="layers.*")


@pytest.fixture
def lora(captured: fxlora.CapturedModule, flat: fxlora.CapturedModule) -> fxlora.CapturedModule:
    made = adapted(captured).eval()
    made.load_state_dict(flat.state_dict())
    return made


def adapted(module: fxlora.CapturedModule) -> fxlora.CapturedModule:
    made = fxlora.inject(module, fxlora.match(module, CONFIG))
    randomise(made)
    return made


def outputs(module: Any, training: bool) -> list[Any]:
    """Return the outputs of all calls, of a smaller one, and of the method."""
    module.train(training)
    made: list[Any] = []
    for args, kwargs in [*CALLS, ((IDS[:1, :2],), {})]:
        torch.manual_seed(3)
        made += pytree.tree_leaves(module(*args, **kwargs))
    torch.manual_seed(3)
    return [*made, module.encode(IMAGES)]


@pytest.mark.parametrize("training", [False, True])
def test_every_call_is_the_sources(
    source: Model, captured: fxlora.CapturedModule, training: bool
) -> None:
    assert_same(outputs(captured, training), outputs(copy.deepcopy(source), training))


@pytest.mark.parametrize("training", [False, True])
def test_every_call_is_a_flat_modules(
    source: Model, lora: fxlora.CapturedModule, flat: fxlora.CapturedModule, training: bool
) -> None:
    assert float((lora(IDS) - source(IDS)).detach().abs().max()) > 1e-3
    assert_same(outputs(lora, training), outputs(flat, training))
    assert_same(outputs(copy.deepcopy(lora), training), outputs(flat, training))
    assert_same(outputs(fxlora.fold(lora), training), outputs(fxlora.fold(flat), training))
    assert_same(outputs(fxlora.remove(lora), training), outputs(copy.deepcopy(source), training))


def test_hooks_parts_and_replacement_act_on_every_call(lora: fxlora.CapturedModule) -> None:
    seen: list[int] = []
    layer: Any = lora.get_submodule("layers.1")
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(len(args)))
    outputs(lora, training=False)
    assert len(seen) == len(CALLS) + 2
    handle.remove()
    lora.train()
    assert not torch.equal(lora(IDS), lora(IDS))  # dropout
    for part in lora.get_submodule("layers").children():
        part.eval()
    frozen = [lora(IDS), lora(IDS, MASK)]
    assert_same(frozen, [lora.eval()(IDS), lora(IDS, MASK)])
    lora.set_submodule("layers.1", nn.Identity())
    with pytest.raises(TypeError, match="positional argument"):
        lora(IDS)
    lora.set_submodule("layers.1", Layer().double().eval())
    assert float((lora(IDS) - frozen[0]).detach().abs().max()) > 1e-3


def test_checkpointed_and_compiled(lora: fxlora.CapturedModule, flat: Any) -> None:
    def gradients(module: Any) -> list[Any]:
        module.train(False).zero_grad()
        (
            module(IDS, MASK).sum() + module(IDS, labels=IDS)[0] + module.encode(IMAGES).sum()
        ).backward()
        held = {n: p.grad for n, p in module.named_parameters() if "lora_" in n}
        return [held[name.replace("_checkpoint_wrapped_module.", "")] for name in sorted(held)]

    wanted = gradients(flat)
    assert all(float(grad.abs().max()) > 1e-6 for grad in wanted)
    assert_same(gradients(lora), wanted)
    for layer in lora.get_submodule("layers").children():
        layer.compile(backend="eager")
    assert_same(gradients(lora), wanted)
    other = copy.deepcopy(lora)
    for number in (0, 1):
        path = f"layers.{number}"
        other.set_submodule(path, checkpoint_wrapper(other.get_submodule(path)))
    assert_same(gradients(other), wanted)


def test_a_block_called_by_itself(source: Model, captured: fxlora.CapturedModule) -> None:
    layer, theirs = captured.eval().get_submodule("layers.0"), source.layers[0]
    h = torch.randn(3, 5, 6, dtype=torch.double)
    assert_same([layer(h, None), layer(h, mask=MASK)], [theirs(h), theirs(h, MASK)])
    with pytest.raises(fxlora.InputError, match=r"'layers.0': none of the \d captured calls"):
        layer(h, MASK, MASK)


def test_saved_more_captured_and_moved(
    source: Model, lora: fxlora.CapturedModule, tmp_path: Path
) -> None:
    fxlora.save_adapter(lora, tmp_path)
    methods = {"encode": IMAGES}
    single = fxlora.capture(source, IDS, methods=methods, modules="layers.*")
    single = fxlora.load_adapter(single, tmp_path)
    more = fxlora.capture_more(single, source, (IDS, MASK)).eval()
    assert_same([more(IDS, MASK), more.encode(IMAGES)], [lora(IDS, MASK), lora.encode(IMAGES)])
    seen: list[Any] = []
    more.get_submodule("layers.0").register_forward_hook(lambda *given: seen.append(given))
    assert len([more(IDS, MASK), more.encode(IMAGES), more(IDS)]) == len(seen)
    moved = more.float()
    assert moved.encode(IMAGES.float()).dtype is torch.float32
    assert float((moved(IDS, MASK.float()).double() - lora(IDS, MASK)).detach().abs().max()) < 1e-3


class Stateful(nn.Module):
    """Its part reads an attribute that the forward sets, or how it is called in one forward."""

    def __init__(self, part: nn.Module, how: str) -> None:
        super().__init__()
        self.part, self.how = part, how
        self.part.scale = 1.0  # pyright: ignore[reportArgumentType]

    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        if self.how == "by an attribute":
            self.part.scale = 2.0 if flag else 3.0  # pyright: ignore[reportArgumentType]
        if self.how == "without gradient" and flag:
            with torch.no_grad():
                return self.part(x)
        if self.how == "twice":
            return self.part(self.part(x), x)
        return self.part(x)


class Part(nn.Module):
    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc(x) * self.scale + (0 if y is None else y)


X = torch.randn(3, 6)
BOTH: list[tuple[Any, Any]] = [((X,), {"flag": True}), ((X,), {"flag": False})]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("by an attribute", "not told apart by the arguments"),
        ("without gradient", "under torch.no_grad"),
    ],
)
def test_refusals(how: str, message: str) -> None:
    with pytest.raises(fxlora.SubmoduleError, match=f"'part'.*{message}"):
        fxlora.capture(Stateful(Part(), how), calls=BOTH, modules="part")
    fxlora.capture(Stateful(Part(), how), calls=BOTH)


class Hidden(nn.Module):
    """Its part reads a state that the forward sets to other values in its other call."""

    def __init__(self, part: nn.Module, value: Any, flagged: Any) -> None:
        super().__init__()
        self.part, self.values = part, (value, flagged)

    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        part: Any = self.part
        part.scale = self.values[flag](x)
        return part(x)


class Applies(nn.Module):
    scale: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.fc(x))


def with_gradients_times(factor: float) -> Any:
    """Return a function whose gradient is scaled; all such functions have one name."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * factor

    return lambda x: Scaled.apply


def size(x: torch.Tensor) -> Any:
    return x.shape[0]  # 3 in the examples


@pytest.mark.parametrize(
    ("part", "value", "flagged"),
    [
        (Part(), lambda x: 3, size),
        (Part(), lambda x: 0.0, lambda x: -0.0),
        (Applies(), with_gradients_times(2.0), with_gradients_times(3.0)),
    ],
    ids=["a size", "the sign of zero", "a function of the same name"],
)
def test_hidden_values_that_look_alike(part: nn.Module, value: Any, flagged: Any) -> None:
    with pytest.raises(fxlora.SubmoduleError, match="not told apart by the arguments"):
        fxlora.capture(Hidden(part, value, flagged), calls=BOTH, modules="part")


class Signs(nn.Module):
    def __init__(self, zero: float) -> None:
        super().__init__()
        self.zero = zero

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.copysign(x, torch.tensor([self.zero] * 6, dtype=x.dtype))


def test_zeros_of_both_signs() -> None:
    model, x = nn.Sequential(Signs(0.0), nn.Linear(6, 6), Signs(-0.0)).double(), X.double()
    assert_same([fxlora.capture(model, x, modules=["0", "2"])(x)], [model(x)])


class Attends(nn.Module):
    """Has views, whose sizes are computed, between its adapted weights."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        batch, length, _ = h.shape
        q, k, v = self.qkv(h).view(batch, length, 3, 2, 3).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, 6))


class Repeats(nn.Module):
    """Calls its part once, or twice with labels."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(6, 4)

    def forward(self, h: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        h = self.part(h)
        return self.head(h) if labels is None else (self.head(self.part(h)) * labels).sum()


def test_sizes_that_differ_and_other_numbers_of_calls() -> None:
    torch.manual_seed(0)
    model = Repeats(Attends()).double()
    h, labels = torch.randn(3, 5, 6).double(), torch.randn(3, 5, 4).double()
    calls: list[Any] = [((h,), {}), ((h[:2, :4],), {}), ((h, labels), {})]
    lora = adapted(fxlora.capture(model, calls=calls, modules="part"))
    folded = fxlora.fold(lora)
    fxlora.verify(lora, calls=calls, folded=folded)
    merged: Any = fxlora.merged(model, folded)
    assert float((lora(h) - model(h)).detach().abs().max()) > 1e-3
    found = [lora(h), lora(h[:1, :3]), lora(h, labels)]
    assert_close(found, [merged(h), merged(h[:1, :3]), merged(h, labels)])


class Past(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, past: Any = None, mask: Any = None) -> torch.Tensor:
        x = x if past is None else x + past[0] * past[1]
        if mask is not None:
            x = x.masked_fill(mask, 0.0) if mask.dtype is torch.bool else x * mask
        return self.fc(x)


class Around(nn.Module):
    def __init__(self, part: nn.Module, forward: Any) -> None:
        super().__init__()
        self.part, self.run = part, forward

    def forward(self, *args: Any) -> torch.Tensor:
        return self.run(self.part, *args)


def test_arguments_of_other_kinds_tell_calls_apart() -> None:
    model = Around(Past(), lambda part, x, past=None, mask=None: part(x, past, mask)).double()
    x = X.double()
    calls: list[Any] = [((x,), {}), ((x, (x, x)), {}), ((x, None, x > 0), {}), ((x, None, x), {})]
    gm = fxlora.capture(model, calls=calls, modules="part")
    assert_same([gm(*args) for args, _ in calls], [model(*args) for args, _ in calls])


def test_a_value_that_only_one_call_gives_twice() -> None:
    class Ignores(nn.Linear):
        def forward(self, input: torch.Tensor, y: Any = None) -> torch.Tensor:
            return super().forward(input)

    model = Around(Ignores(6, 4), lambda part, x, y=None: part(x, x if y is None else y))
    gm = fxlora.capture(model, calls=[((X,), {}), ((X, X + 1), {})], modules="part")
    assert_same([gm(X), gm(X, X + 1)], [model(X), model(X, X + 1)])


def test_called_without_gradient_besides() -> None:
    def to_target(part: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = part(x + 1)
        return part(x) - target

    with pytest.raises(fxlora.SubmoduleError, match=r"under torch.no_grad"):
        fxlora.capture(Around(nn.Linear(6, 4), to_target), X, modules="part")


def test_a_module_of_two_names_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model.append(model[0])
    with pytest.raises(fxlora.SubmoduleError, match="several names"):
        fxlora.capture(model, X, modules="0")


def test_a_mode_set_apart_stays_when_more_is_captured(
    source: Model, captured: fxlora.CapturedModule
) -> None:
    lora = adapted(captured).train()
    lora.get_submodule("layers.0").eval()
    more = fxlora.capture_more(lora, source, kwargs={"ids": IDS, "mask": MASK, "labels": IDS})
    assert more.training
    assert not more.get_submodule("layers.0").training


def with_constant(part: Any, x: torch.Tensor) -> torch.Tensor:
    return part.fc(x * torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=x.dtype))


def with_nested_graph(part: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        mean = x.mean()
    return part.fc(x - mean)


class Loss(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        part: Any = type("Part", (Part,), {"forward": forward})
        self.one, self.two = part(), part()

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        h = self.two(self.one(x))
        return h if y is None else (h - y).pow(2).mean()


@pytest.mark.parametrize("forward", [with_constant, with_nested_graph])
def test_equal_graphs_with_constants_and_nested_graphs(forward: Any) -> None:
    model, x = Loss(forward).double(), X.double()
    lora = adapted(fxlora.capture(model, calls=[((x,), {}), ((x, x), {})], modules="*"))
    merged: Any = fxlora.merged(model, fxlora.fold(lora))
    assert float((lora(x) - model(x)).detach().abs().max()) > 1e-3
    assert_close([lora(x), lora(x, x)], [merged(x), merged(x, x)])
    parts: list[Any] = [lora.get_submodule(name) for name in ("one", "two")]
    one, two = (type(part.chosen_call((x,), {})) for part in parts)
    assert one is two  # torch.compile compiles them once


def test_called_in_several_ways_in_one_forward() -> None:
    model = Stateful(Part(), "twice").double()
    x = X.double()
    gm = fxlora.capture(model, x, modules="part")
    lora = adapted(gm)
    seen: list[int] = []
    lora.get_submodule("part").register_forward_hook(lambda m, args, out: seen.append(len(args)))
    folded: Any = fxlora.merged(model, fxlora.fold(lora))
    assert_same([gm(x)], [model(x)])
    assert float((lora(x) - model(x)).detach().abs().max()) > 1e-3
    assert_close([lora(x)], [folded(x)])
    assert seen[:2] == [1, 2]


class Auxiliary(nn.Module):
    """Has a head that is called in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.body(x)
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


def test_called_in_one_mode_only() -> None:
    model = Auxiliary().eval()
    gm = fxlora.capture(model, X, modules=["head", "aux"])
    seen: list[Any] = []
    gm.get_submodule("aux").register_forward_hook(lambda *given: seen.append(given))
    assert_same([gm(X), *gm.train()(X)], [model(X), *model.train()(X)])
    assert len(seen) == 1
    h = torch.randn(3, 5)
    assert_same([gm.get_submodule("aux")(h)], [model.aux(h)])
    with pytest.raises(fxlora.InputError, match=r"'aux'.*in eval mode"):
        gm.eval().get_submodule("aux")(h)


def test_sizes_that_only_one_call_fixes() -> None:
    """One graph is dynamic in the length, the other is not: either may run where both hold."""
    model = Model().double().eval()
    gm = fxlora.capture(model, calls=[CALLS[0], CALLS[1], CALLS[3]], modules="layers.*")
    block: Any = gm.get_submodule("layers.0")
    assert [len(calls) for calls in block.calls.values()] == [2, 2]
    assert_same([gm(*a, **k) for a, k in CALLS[:2]], [model(*a, **k) for a, k in CALLS[:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = torch.randn(3, 5, 6, dtype=torch.double)
        assert_same([block(h, None)], [model.layers[0](h)])


class WithSize(nn.Linear):
    """Returns the size of its result beside it."""

    def forward(self, input: torch.Tensor) -> Any:
        out = super().forward(input)
        return out, out.shape[0]


def test_a_size_that_is_returned_is_there_after_fold() -> None:
    """Fold puts the op on the changed weight before the size that the graph computes."""
    torch.manual_seed(0)
    model = Around(WithSize(6, 4), lambda part, x: torch.div(*part(x))).double()
    x = X.double()
    lora = adapted(fxlora.capture(model, x, modules="part"))
    folded = fxlora.fold(lora)
    merged: Any = fxlora.merged(model, folded)
    assert float((lora(x) - model(x)).detach().abs().max()) > 1e-3
    assert_close([lora(x), lora(x[:2]), folded(x[:2])], [merged(x), merged(x[:2]), merged(x[:2])])
    folded.get_submodule("part").register_forward_hook(lambda m, args, out: (out[0], 5))
    with pytest.raises(fxlora.SubmoduleError, match=r"'part'.*changed its output 1"):
        folded(x)


class Nests(nn.Module):
    """Returns a size that it got from a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = WithSize(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> Any:
        h, rows = self.inner(x)
        return self.out(h / rows), rows


def test_a_size_that_blocks_in_each_other_return() -> None:
    torch.manual_seed(0)
    model = Around(Nests(), lambda part, x: torch.div(*part(x))).double()
    x = X.double()
    lora = adapted(fxlora.capture(model, x, modules=["part", "part.inner"]))
    folded = fxlora.fold(lora)
    merged: Any = fxlora.merged(model, folded)
    assert float((lora(x) - model(x)).detach().abs().max()) > 1e-3
    assert_close([lora(x), lora(x[:2]), folded(x[:2])], [merged(x), merged(x[:2]), merged(x[:2])])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 5), nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(self.up(x)))


class TwiceOrOnce(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(self.part(x))

    def once(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


def test_a_buffer_that_is_written_to_in_several_calls() -> None:
    """The first of two calls has what both write to before its own nodes."""
    torch.manual_seed(0)
    model, x = TwiceOrOnce(Normed()).double(), X.double()
    gm = fxlora.capture(model, x, methods={"once": x}, modules="part")
    lora = adapted(gm)
    merged: Any = fxlora.merged(model, fxlora.fold(lora))
    assert float((lora.eval()(x) - model.eval()(x)).detach().abs().max()) > 1e-3
    merged.eval()
    assert_close([lora(x), lora.once(x)], [merged(x), merged.once(x)])
    copied: Any = copy.deepcopy(model).train()
    assert_same([gm.train()(x), gm.once(x)], [copied(x), copied.once(x)])
    assert_same(list(gm.buffers()), list(copied.buffers()))


class ReadsGradient(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        return out * 2 if input.requires_grad else out


def test_a_block_that_reads_whether_its_argument_has_a_gradient() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 5), ReadsGradient(5, 4), nn.Linear(4, 3)).double()
    x, h = X.double(), torch.randn(3, 5).double()
    gm = fxlora.capture(model, x, modules=["1", "2"])
    one, two = (gm.get_submodule(name) for name in "12")
    given = model[0](x)
    assert_same([gm(x), one(given)], [model(x), model[1](given)])
    assert_same([two(h[:, :4])], [model[2](h[:, :4])])  # it reads none, so that any will do
    lora = adapted(gm)
    merged: Any = fxlora.merged(model, fxlora.fold(lora))
    assert float((lora(x) - model(x)).detach().abs().max()) > 1e-3
    assert_close([lora(x)], [merged(x)])
    last_only = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["2"])))
    other_state = r"'1': input: captured with requires_grad True, called with False"
    for call in (lambda: one(h), lambda: last_only(x)):  # there no weight before the block trains
        with pytest.raises(fxlora.InputError, match=other_state):
            call()
    with pytest.raises(fxlora.InputError, match=r"'1': input: captured with is_leaf False"):
        one(h.clone().requires_grad_())
    one.register_forward_pre_hook(lambda part, args: (args[0].detach(),))
    with pytest.raises(fxlora.InputError, match=other_state):
        gm(x)


def test_a_block_that_reads_a_gradient_without_effect() -> None:
    """Under no_grad, what a graph computes has none; capture has seen that it does not matter."""

    class Reads(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            assert input.requires_grad or not torch.is_grad_enabled()
            return super().forward(input)

    model: Any = nn.Sequential(nn.Linear(6, 5), Reads(5, 4)).double()
    x = X.double()
    gm: Any = fxlora.capture(model, x, modules="1")
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert_same([gm(x)], [model(x)])


class Asks(nn.Module):
    """Has two methods that call its part; one of them does not hold for every mode."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.part, self.run = nn.Linear(6, 4), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self.part(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


def test_gradients_that_only_the_code_around_a_block_asks_for() -> None:
    torch.manual_seed(0)
    model, x = Asks(lambda h: h * 2 if torch.is_grad_enabled() else h).double(), X.double()
    lora = adapted(fxlora.capture(model, x, methods={"encode": x}, modules="part"))
    merged: Any = fxlora.merged(model, fxlora.fold(lora))
    assert float((lora(x) - model(x)).detach().abs().max()) > 1e-3
    part: Any = lora.get_submodule("part")
    with torch.no_grad():
        assert_close([lora.encode(x), part(x)], [merged.encode(x), merged.part(x)])
        with pytest.raises(fxlora.InputError, match=r"called under torch.no_grad"):
            lora(x)
    reentrant: Any = CheckpointImpl.REENTRANT  # runs the part under no_grad, and then again
    lora.set_submodule("part", checkpoint_wrapper(part, checkpoint_impl=reentrant))
    leaf = x.clone().requires_grad_()
    lora(leaf).sum().backward()
    assert_close(
        [lora(leaf), grad_of(leaf)], [merged(x), 2 * merged.part.weight.sum(0).expand(3, 6)]
    )


def test_gradients_that_a_block_asks_for() -> None:
    class Doubles(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            out = super().forward(input)
            return out * 2 if torch.is_grad_enabled() else out

    model: Any = nn.Sequential(Doubles(6, 5), nn.Linear(5, 4)).double()
    gm: Any = fxlora.capture(model, X.double(), modules="0")
    with (
        torch.no_grad(),
        pytest.raises(fxlora.InputError, match=r"'0': called under torch.no_grad"),
    ):
        gm.get_submodule("0")(X.double())


def in_single_precision_only(h: torch.Tensor) -> torch.Tensor:
    if h.dtype is not torch.float32:
        raise ValueError(h.dtype)
    return h * 3


@pytest.mark.autocast
def test_an_autocast_that_only_one_of_two_methods_holds_for() -> None:
    model = Asks(in_single_precision_only)
    gm = fxlora.capture(model, X, methods={"encode": X}, modules="part")
    part: Any = gm.get_submodule("part")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([gm.encode(X), part(X)], [model.encode(X), model.part(X)])
        with pytest.raises(fxlora.InputError, match=r"called under torch.autocast"):
            gm(X)


class OfSize(nn.Linear):
    """Does something else for some sizes of its arguments."""

    def __init__(self, other: Any) -> None:
        super().__init__(6, 4)
        self.other = other

    def forward(self, input: torch.Tensor, other: Any = None) -> torch.Tensor:
        out = super().forward(input)
        return out * 2 if self.other(input, other) else out


ROWS = [torch.randn(*sizes, 6, dtype=torch.double) for sizes in ((3, 4), (2, 7))]
ONE_ROW = lambda x, y: x.shape[0] == 1  # noqa: E731
GUARDED: dict[str, Any] = {
    "flat": (ONE_ROW, lambda part, x: part(x.flatten(0, 1)), "input.shape[0] != 1"),
    "longer": (
        ONE_ROW,
        lambda part, x: part(torch.cat([x, x[:, :1]], 1).flatten(0, 1)),
        "input.shape[0] != 1",
    ),
    "two calls": (
        ONE_ROW,
        lambda part, x: part(x.flatten(0, 1)).sum() + part(x[:, 0]),
        "input.shape[0] != 1",
    ),
    "a ratio": (
        lambda x, y: x.shape[0] // y.shape[0] == 1,
        lambda part, x: part(x.flatten(0, 1), x[:, 0]),
        "(input.shape[0] // max(1, other.shape[0])) != 1",
    ),
    "an integer": (
        lambda x, n: n == 1,
        lambda part, x: part(x, x.shape[0] * x.shape[1]),
        "other != 1",
    ),
}


@pytest.mark.parametrize("how", list(GUARDED))
def test_sizes_that_a_block_gets_multiplied(how: str) -> None:
    """A guard on the whole model's sizes is one on the block's, which it may be called with."""
    other, forward, text = GUARDED[how]
    torch.manual_seed(0)
    model = Around(OfSize(other), forward).double()
    gm = fxlora.capture(model, calls=[((x,), {}) for x in ROWS], modules="part")
    lora = adapted(gm)
    merged: Any = fxlora.merged(model, fxlora.fold(lora))
    assert float((lora(ROWS[1]) - model(ROWS[1])).detach().abs().max()) > 1e-3
    assert_close([lora(x) for x in ROWS], [merged(x) for x in ROWS])
    part: Any = gm.get_submodule("part")
    calls = [call for of_mode in part.calls.values() for call in of_mode]
    assert {guard.text for call in calls for guard in call.inputs.guards} == {text}
    assert_same([part(*given(how, 5))], [model.part(*given(how, 5))])
    branch, ours = model.part(*given(how, 1)).detach(), part(*given(how, 5)).detach()
    assert float((branch / 2 - ours[..., :1, :]).abs().max()) < 1e-10
    with pytest.raises(fxlora.InputError, match=r"'part': the captured graph holds only where"):
        part(*given(how, 1))


def given(how: str, rows: int) -> tuple[Any, ...]:
    """Return arguments of a block with a number of rows, or this many for each of another."""
    x = ROWS[0].flatten(0, 1)[:rows]
    return {"a ratio": (x, x[:1]), "an integer": (x[None], rows)}.get(how, (x,))


def test_sizes_that_only_the_code_around_a_block_assumes() -> None:
    """They are no functions of the block's sizes, so that its own code cannot assume them."""

    def forward(part: Any, x: torch.Tensor) -> torch.Tensor:
        h = part(x.flatten(0, 1))
        return h if x.shape[0] != 9 and x.shape[1] <= 512 else h * 2

    model = Around(nn.Linear(6, 4), forward).double()
    gm = fxlora.capture(model, calls=[((x,), {}) for x in ROWS], modules="part")
    for rows in (1, 9):
        h = torch.randn(rows, 6, dtype=torch.double)
        assert_same([gm.get_submodule("part")(h)], [model.part(h)])
    with pytest.raises(fxlora.InputError, match=r"holds only where .*shape\[0\] != 9"):
        gm(torch.randn(9, 2, 6, dtype=torch.double))


def test_sizes_that_cannot_be_told_from_a_blocks() -> None:
    def forward(part: Any, x: torch.Tensor) -> torch.Tensor:
        return part((x[:, :, None] + x[:, None]).flatten(0, 2), x.flatten(0, 1))

    model = Around(OfSize(lambda x, y: x.shape[0] // y.shape[0] == 1), forward).double()
    with pytest.raises(fxlora.SubmoduleError, match=r"'part'.*its arguments' sizes do not tell"):
        fxlora.capture(model, calls=[((x,), {}) for x in ROWS], modules="part")


def test_keywords_in_another_order() -> None:
    class Subtracts(nn.Linear):
        def forward(self, input: torch.Tensor, other: Any = None) -> torch.Tensor:
            return super().forward(input) - other

    class InBothWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Subtracts(6, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.part(x, y)

        def by_name(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.part(other=y, input=x)

    torch.manual_seed(0)
    model, x, y = InBothWays().double(), X.double(), torch.randn(3, 4).double()
    lora = adapted(
        fxlora.capture(model, (x, y), methods={"by_name": {"x": x, "y": y}}, modules="part")
    )
    merged: Any = fxlora.merged(model, fxlora.fold(lora))
    assert float((lora(x, y) - model(x, y)).detach().abs().max()) > 1e-3
    assert_close([lora(x, y), lora.by_name(x, y)], [merged(x, y), merged.by_name(x, y)])
    part: Any = lora.get_submodule("part")
    assert_close([part(x, y), part(other=y, input=x)], [merged.part(x, y)] * 2)
