"""Models, adapters and checks that the tests of routed graphs share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import (
    CapturedModule,
    LoraConfig,
    Rule,
)
from fxlora.fx.compare import difference

from .laws import TOLERANCE, assert_same, randomise
from .models import Attention, Convolutions, Mlp, Normed, Readers, Tied
from .oracle import floats
from .typed import grad_of, untyped

ALL = "all-linear"
X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([0, -1, 1, 1, 2, 0])


def config(r: int, targets: Any = ALL, **more: Any) -> LoraConfig:
    return LoraConfig(r=r, target_modules=targets, **more)


def adapted(gm: CapturedModule, rules: Any) -> CapturedModule:
    """Return a module with a random adapter, and other values of what trains in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxlora.FxLoraWarning)  # a pair larger than its weight
        lora = fxlora.inject(gm, fxlora.match(gm, rules))
    randomise(lora)
    with torch.no_grad():
        for name in sorted(lora.trained):
            lora.get_parameter(name).add_(torch.randn_like(lora.get_parameter(name)), alpha=0.3)
    return lora.eval()


def captured(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedModule:
    torch.manual_seed(1)
    return fxlora.capture(model.double(), args, kwargs).eval()


def check_samples(
    routed: CapturedModule,
    gm: CapturedModule,
    loras: Sequence[CapturedModule],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    ids: torch.Tensor = IDS,
) -> None:
    """Assert that each sample is what its adapter's module computes, and that no two agree."""
    kwargs = kwargs or {}
    with torch.no_grad():
        single = [floats(module(*args, **kwargs)) for module in [*loras, gm]]
        mixed = floats(routed(*args, **kwargs, adapter_ids=ids))
    compared = False
    for number, found in enumerate(mixed):
        if not found.ndim or found.shape[0] != len(ids):
            continue
        compared = True
        whole = [outputs[number] for outputs in single]
        assert all((a - whole[-1]).abs().max() > 1e-4 for a in whole[:-1])  # each has an effect
        for sample, slot in enumerate(ids.tolist()):
            used = slot if 0 <= slot < len(loras) else -1  # an empty slot is the base
            expected = whole[used][sample]
            scale = float(expected.abs().max())
            assert float((found[sample] - expected).abs().max()) <= TOLERANCE * scale
    assert compared


def check(model: nn.Module, args: tuple[Any, ...], *rules: Any, **kwargs: Any) -> CapturedModule:
    gm = captured(model, *args, **kwargs)
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras, slots=len(loras) + 1)
    check_samples(routed, gm, loras, args, kwargs)
    removed = fxlora.remove(routed)
    for mode in ("train", "eval"):
        assert difference(removed.graphs[mode], gm.graphs[mode]) is None
    assert list(removed.state_dict()) == list(gm.state_dict())
    for lora, number in zip(loras, range(len(loras)), strict=True):
        taken = fxlora.take_adapter(routed, number)
        assert_same(floats(taken(*args, **kwargs)), floats(lora(*args, **kwargs)))
    return routed


def per_slot(routed: CapturedModule) -> bool:
    """Whether something is computed once per slot, and not gathered."""
    return any(node.target is torch.ops.aten.where.self for node in routed.graphs["eval"].nodes)


def check_gradients(model: nn.Module, args: tuple[Any, ...], rules: list[Any]) -> None:
    """Assert that each adapter's gradients are those of its own module on its own samples."""
    gm = captured(model, *args)
    loras = [adapted(gm, rule) for rule in rules]
    routed = fxlora.route(loras, slots=3)
    routed(*args, adapter_ids=IDS).square().sum().backward()
    routing = routed.known.routing
    assert routing is not None
    places = {entry.prefix: entry for entry in routing.entries}
    for slot, lora in enumerate(loras):
        own = slot == IDS
        lora(*(given[own] for given in args)).square().sum().backward()
        for entry in lora.plan or ():
            for name, stack in zip(entry.tensors, places[entry.prefix].tensors, strict=True):
                parameter = lora.get_parameter(name)
                if parameter.requires_grad:
                    _compare_gradient(routed.get_parameter(stack), slot, grad_of(parameter))
        for name in lora.trained:
            stack = routed.get_parameter(routing.full[name])
            _compare_gradient(stack, slot, grad_of(lora.get_parameter(name)))
    for name in routing.trainable:
        assert not grad_of(routed.get_parameter(name))[2:].any()  # the empty slot, and the base


def _compare_gradient(stack: nn.Parameter, slot: int, expected: torch.Tensor) -> None:
    found = grad_of(stack)[slot]
    own = tuple(slice(size) for size in expected.shape)
    assert float(expected.abs().max()) > 0
    scale = float(expected.abs().max())
    assert float((found[own] - expected).abs().max()) <= 1e-9 * scale
    rest = found.clone()
    rest[own] = 0
    assert not rest.any()  # the padding


# ---- every kind of read -------------------------------------------------------------------------

CONVOLUTIONS = ["c3", "c2", "reflect", "grouped", "depthwise", "c1"]


class Turned(nn.Module):
    """Transposed convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1)
        self.grouped = nn.ConvTranspose1d(6, 9, 2, groups=3, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(torch.tanh(self.plain(x)))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 5, padding_idx=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids)


def long(*shape: int, high: int = 11) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(4))


def wide(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


GATHERED: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[Any]]] = {
    "linear": (Mlp, (X,), [config(3), config(1, ["up"], lora_alpha=3)]),
    "linear, 4 dimensions": (Mlp, (wide(6, 2, 3, 5),), [config(3), config(2, ["down"])]),
    "pissa": (Mlp, (X,), [config(r, init_lora_weights="pissa") for r in (2, 1)]),
    "convolutions": (
        Convolutions,
        (wide(6, 6, 5, 18, 11),),
        [config(2, CONVOLUTIONS), config(1, CONVOLUTIONS[2:])],
    ),
    "transposed": (
        Turned,
        (wide(6, 4, 5),),
        [config(2, ["plain", "grouped"]), config(1, "grouped")],
    ),
    "padding": (Padded, (long(6, 4),), [config(2, ["emb"]), config(1, ["emb"])]),
    "tied": (
        Tied,
        (long(6, 4),),
        [Rule("emb", lora=LoraConfig(r=2, tied="share")), config(1, ["mix"])],
    ),
    "attention": (Attention, (wide(6, 3, 8),), [Rule(lora=LoraConfig(r=r)) for r in (2, 1)]),
    "normed": (
        Normed,
        (wide(6, 3, 5, 5),),
        [Rule(lora=LoraConfig(r=2)), config(1, ["conv", "fc"])],
    ),
    "parts": (
        lambda: nn.Sequential(nn.Linear(5, 9)),
        (X,),
        [Rule("0", parts=3, enable=[True, False, True], lora=LoraConfig(r=2)), config(1, ["0"])],
    ),
}


class Positions(nn.Module):
    """A look-up of positions, which all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos, self.out = nn.Embedding(11, 5), nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.emb(ids) + self.pos(torch.arange(ids.shape[1])))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 4, batch_first=batch_first), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0])


class Two(nn.Module):
    """Two linear layers, with an order of the samples between them that a subclass chooses."""

    subscripts: ClassVar = {}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))


class Flipped(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)).flip(0)).flip(0)


class Sorted(Two):
    """The second layer sees the samples in an order of values, as the experts of a mixture do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x)
        order = hidden.sum(1).argsort()
        return self.b(hidden[order])[order.argsort()]


class Checkpointed(Two):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(lambda given: torch.tanh(self.a(given)), x, use_reentrant=False)
        return self.b(untyped(hidden))


PER_SLOT: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[Any]]] = {
    "dora": (Mlp, (X,), [config(2, use_dora=True), config(1, ["up"], use_dora=True)]),
    "head in full": (Mlp, (X,), [config(2, ["up"], modules_to_save=["down"]), config(1, ["up"])]),
    "a head only": (Mlp, (X,), [Rule("down", train=True), config(1, ["up"])]),
    "biases": (Mlp, (X,), [config(2, ["up"], bias="all"), config(1, ["up"])]),
    "tied, in full": (Tied, (long(6, 4),), [config(2, ["mix"], modules_to_save=["emb"])] * 2),
    "readers": (Readers, (X, long(6, 4)), [Rule(lora=LoraConfig(r=r)) for r in (2, 1)]),
    "positions": (Positions, (long(6, 7),), [config(2, ["emb", "pos"]), config(1, ["pos"])]),
    "recurrent": (
        Recurrent,
        (wide(6, 7, 5),),
        [Rule(lora=LoraConfig(r=2)), Rule("lstm.*", lora=LoraConfig(r=1))],
    ),
    "flipped": (Flipped, (X,), [config(2), config(1)]),
    "sorted": (Sorted, (X,), [config(2), config(1)]),
}


class Dropped(Two):
    """Draws random numbers in training, in a nested graph and outside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(given: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(torch.tanh(self.a(given)), 0.5, self.training)

        hidden = untyped(checkpoint(inner, x, use_reentrant=False))
        return self.b(nn.functional.dropout(hidden, 0.5, self.training))
