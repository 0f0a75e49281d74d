"""Variants and inits: each against PEFT's, and under all laws for every kind of read."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import ConfigError, LoraConfig, Rule, UnsupportedOpError
from fxlora.lora.variants import VARIANTS

from . import oracle
from .laws import assert_close, assert_same, check_laws, merged_weights, randomise, run
from .models import Mlp, Tied
from .typed import plan_of

# ---- against PEFT -------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's linear layer, which stores its weight as (in, out)."""

    def __new__(cls, out: int, size: int) -> Any:
        utils = pytest.importorskip("transformers.pytorch_utils")
        layer = utils.Conv1D(out, size)
        nn.init.normal_(layer.bias)
        return layer


class Layers(nn.Module):
    """A layer of each kind that PEFT supports variants for; takes indices (N, T)."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6)
        self.conv = nn.Conv2d(1, 7, (2, 3), stride=(1, 2), padding=(1, 0), bias=bias)
        self.fc = nn.Linear(7, 5, bias=bias)
        self.gpt = Conv1D(4, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv(self.emb(ids).unsqueeze(1))).mean((2, 3))
        return self.gpt(torch.tanh(self.fc(x)))


IDS = torch.tensor([[1, 2, 3, 4, 5], [12, 0, 7, 7, 2], [0, 3, 3, 9, 11]])
EVERY = ["emb", "conv", "fc", "gpt"]

Pair = tuple[nn.Module, fxlora.CapturedModule]


@functools.cache
def layers(*, bias: bool) -> tuple[nn.Module, fxlora.CapturedModule]:
    """Return a model, and its capture in float64, which serve all tests."""
    model = Layers(bias=bias)
    return model, fxlora.capture(copy.deepcopy(model).double(), IDS)


def both(targets: list[str], bias: bool = True, **keys: Any) -> Pair:
    """Return the same adapters by PEFT and by fxlora, in float64; PEFT's are cast after init."""
    model, gm = layers(bias=bias)
    peft = pytest.importorskip("peft", reason="peft is optional")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, **keys)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).double()
    rules = LoraConfig(r=2, lora_alpha=6, target_modules=targets, **keys)
    return theirs, fxlora.inject(gm, fxlora.match(gm, rules))


def trainable(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """Return PEFT's trainable parameters by fxlora's names."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_")
            found[name if name.endswith(".weight") else f"{name}.weight"] = parameter
    return found


def copy_over(theirs: nn.Module, ours: fxlora.CapturedModule) -> None:
    with torch.no_grad():
        for name, tensor in trainable(theirs).items():
            ours.get_parameter(name).copy_(tensor.reshape(ours.get_parameter(name).shape))


def assert_same_training(theirs: nn.Module, ours: fxlora.CapturedModule, base: nn.Module) -> None:
    """Assert equal outputs and equal gradients of all trainable parameters."""
    assert (theirs(IDS) - base(IDS)).abs().max() > 1e-3
    assert_close([ours(IDS)], [theirs(IDS)])
    expected = trainable(theirs)
    assert set(expected) == {n for n, p in ours.named_parameters() if p.requires_grad}
    for module in (theirs, ours):
        module(IDS).square().sum().backward()
    for name, parameter in expected.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        found = ours.get_parameter(name).grad
        assert found is not None
        assert_close([found.reshape(parameter.shape)], [parameter.grad])


@pytest.mark.parametrize(
    ("targets", "bias"),
    [(EVERY, True), (EVERY, False), *(([name], n % 2 == 0) for n, name in enumerate(EVERY))],
)
def test_dora_is_pefts(targets: list[str], bias: bool) -> None:
    theirs, ours = both(targets, bias, use_dora=True)
    magnitudes = {n: p for n, p in trainable(theirs).items() if "magnitude" in n}
    assert len(magnitudes) == len(targets)
    for name, magnitude in magnitudes.items():  # PEFT computed it in float32, before the cast
        assert_close([ours.get_parameter(name)], [magnitude.flatten()], 1e-5)
    with torch.no_grad():
        for parameter in trainable(theirs).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    copy_over(theirs, ours)
    assert {entry.form for entry in plan_of(ours)} == {"branch"}
    assert_same_training(theirs, ours, layers(bias=bias)[1])
    folded = fxlora.fold(ours)
    assert_close([folded(IDS)], [theirs(IDS)])


def test_rslora_is_pefts() -> None:
    theirs, ours = both(EVERY, use_rslora=True, init_lora_weights=False)
    copy_over(theirs, ours)
    assert_same_training(theirs, ours, layers(bias=True)[1])


def product(lora: nn.Module, site: str) -> torch.Tensor:
    a, b = (lora.get_parameter(f"{site}.lora_{x}.default.weight") for x in "AB")
    return b @ a


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_weight_are_pefts(init: str) -> None:
    model = Mlp()
    x = torch.randn(4, 5).double()
    peft = pytest.importorskip("peft", reason="peft is optional")
    keys = {"r": 2, "lora_alpha": 3, "target_modules": ["up", "down"], "init_lora_weights": init}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**keys)).double().eval()
    ours = fxlora.adapt(model.double(), x, rules=LoraConfig(**keys)).eval()
    base = model.eval()(x)
    assert_close([ours(x)], [base], 1e-12)
    for site in ("up", "down"):  # PEFT computes its factors in float32
        expected = product(theirs.base_model.model, site)
        assert_close([product(ours, site)], [expected], 1e-5)
        for factor in "AB":
            name = f"{site}.lora_{factor}.default.weight"
            found = ours.get_parameter(name).abs()
            assert_close([found], [theirs.base_model.model.get_parameter(name).abs()], 1e-4)

    with torch.no_grad():  # in float64: our factors, and the residual weight W0 - s·B'A'
        for site in ("up", "down"):
            layer = theirs.base_model.model.get_submodule(site)
            weight = model.get_parameter(f"{site}.weight")
            layer.base_layer.weight.copy_(weight - 1.5 * product(ours, site))
            for factor in "AB":
                name = f"{site}.lora_{factor}.default.weight"
                theirs.base_model.model.get_parameter(name).copy_(ours.get_parameter(name))
    assert_close([theirs(x)], [base], 1e-12)
    for module in (theirs, ours):
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        for _ in range(5):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert (ours(x) - base).abs().max() > 1e-2
    assert_close([ours(x)], [theirs(x)], 1e-8)
    assert_close([fxlora.fold(ours).eval()(x)], [theirs(x)], 1e-8)


def test_orthogonal_starts_with_a_product_of_zero() -> None:
    model, x = Mlp().double(), torch.randn(4, 5).double()
    keys = {"lora_alpha": 3, "target_modules": ["up", "down"], "init_lora_weights": "orthogonal"}
    gm = fxlora.capture(model, x)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, **keys))).eval()
    for site in ("up", "down"):
        a, b = (lora.get_parameter(f"{site}.lora_{n}.default.weight") for n in "AB")
        assert a.abs().min() > 0 and b.abs().min() > 0
        assert product(lora, site).abs().max() < 1e-15
    assert_close([lora(x)], [gm.eval()(x)], 1e-12)
    with pytest.raises(ConfigError, match=r"r=3 for .* must be even"):
        fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=3, **keys)))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_fold_as_they_were_trained(bias: Any) -> None:
    gm = layers(bias=True)[1]
    rules = LoraConfig(r=2, target_modules=["conv", "fc"], bias=bias)
    lora = fxlora.inject(gm, fxlora.match(gm, rules))
    biases = {"none": [], "lora_only": ["conv", "fc"], "all": ["conv", "fc", "gpt"]}[bias]
    assert set(lora.trained) == {f"{name}.bias" for name in biases}
    randomise(lora)
    with torch.no_grad():
        for name in lora.trained:
            lora.get_parameter(name).normal_()
    folded = fxlora.fold(lora)
    assert_close([folded(IDS)], [lora(IDS)])
    for name in ("conv.bias", "fc.bias", "gpt.bias"):
        assert torch.equal(folded.get_parameter(name), lora.get_parameter(name))
        same = torch.equal(folded.get_parameter(name), gm.get_parameter(name))
        assert same == (name not in lora.trained)


# ---- the laws -----------------------------------------------------------------------------------


class Convs(nn.Module):
    """Grouped and transposed convolutions; takes (N, 4, 9, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, (2, 3), groups=2, padding=1)
        self.turned = nn.ConvTranspose2d(6, 10, (3, 2), stride=2, groups=2, output_padding=1)
        self.one = nn.ConvTranspose1d(10, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(torch.tanh(self.turned(torch.tanh(self.grouped(x)))).mean(3))


class Products(nn.Module):
    """Matrix products, and stacks of them; takes (N, 5)."""

    subscripts: ClassVar = {"w_addmm": "io", "experts": "eio", "turned": "eoi", "heads": "ioo"}

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 7)
        self.bias = nn.Parameter(torch.randn(6))
        self.w_addmm = nn.Parameter(torch.randn(7, 6))
        self.experts = nn.Parameter(torch.randn(3, 6, 4))
        self.turned = nn.Parameter(torch.randn(3, 8, 4))
        self.heads = nn.Parameter(torch.randn(8, 2, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.addmm(self.bias, torch.tanh(self.fc(x)), self.w_addmm)
        x = torch.bmm(torch.tanh(x).expand(3, -1, 6), self.experts)  # (3, N, 4)
        x = torch.einsum("eni,eoi->neo", torch.tanh(x), self.turned).mean(1)
        return torch.einsum("ni,ihd->nhd", torch.tanh(x), self.heads)


class Recurrent(nn.Module):
    """An LSTM, which only the weight form can adapt; takes (N, T, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Words(nn.Module):
    """Look-ups in embeddings; takes indices (N, T)."""

    subscripts: ClassVar = {"table": "io"}

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6, padding_idx=2)
        self.table = nn.Parameter(torch.randn(13, 6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.emb(ids)).sum(1) + F.embedding(ids, self.table).sum(1)


class Bags(nn.Module):
    """Means of look-ups; takes indices (N, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(13, 6, mode="mean")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.bag(ids)


class Packed(nn.Module):
    """Three projections in one weight; takes (N, 5)."""

    subscripts: ClassVar = {"back": "io"}

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 16)
        self.back = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        return (q * torch.cat([k, v], -1)) @ self.back


PACKED = {"q": 8, "k": 4, "v": 4}
SHARE: dict[str, Any] = {"tied": "share"}


def rules_for(what: str, **keys: Any) -> list[Rule]:
    config = LoraConfig(r=2, lora_alpha=3, **keys)
    if what == "packed":
        packed = Rule("qkv", lora=config, parts=PACKED, enable=["q", "v"])
        return [packed, Rule("back", lora=config, parts=3, enable=[False, True, True])]
    if what == "tied share":
        return [Rule("emb", lora=LoraConfig(r=2, lora_alpha=3, **keys, **SHARE))]
    return [Rule("head" if what == "tied" else None, lora=config)]


torch.manual_seed(0)
PLACES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "linear": (Mlp, (torch.randn(4, 5).double(),)),
    "convolutions": (Convs, (torch.randn(2, 4, 9, 7).double(),)),
    "look-ups": (Words, (torch.tensor([[1, 2, 3, 4], [5, 2, 12, 0]]),)),
    "bags": (Bags, (torch.tensor([[1, 2, 3, 4], [5, 2, 12, 0]]),)),
    "products": (Products, (torch.randn(4, 5).double(),)),
    "recurrent": (Recurrent, (torch.randn(2, 3, 5).double(),)),
    "packed": (Packed, (torch.randn(4, 5).double(),)),
    "tied": (Tied, (torch.tensor([[1, 2, 3], [5, 0, 16]]),)),
    "tied share": (Tied, (torch.tensor([[1, 2, 3], [5, 0, 16]]),)),
}

KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "DoRA+PiSSA": {"use_dora": True, "init_lora_weights": "pissa"},
}


@functools.cache
def captured(what: str, road: str, dtype: torch.dtype) -> tuple[nn.Module, Any, Any]:
    """Return a place's model, inputs and capture, which serve all kinds: no verb changes them."""
    torch.manual_seed(0)
    make, args = PLACES[what]
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    model = make().to(dtype)
    return model, args, fxlora.capture(model, args if road == "exported" else None)


WHOLE = [("recurrent", "traced"), ("bags", "traced")]  # the tracer does not see inside
ROADS = [(what, road) for what in PLACES for road in ("exported", "traced")]
# Traced graphs have other ops than exported ones; the quick run covers that with these places.
TRACED = ("linear", "convolutions", "products", "tied")


@pytest.mark.parametrize(
    ("what", "road"),
    [
        pytest.param(
            what, road, marks=pytest.mark.slow if road == "traced" and what not in TRACED else ()
        )
        for what, road in ROADS
        if (what, road) not in WHOLE
    ],
)
@pytest.mark.parametrize(
    "kinds", [["DoRA", "PiSSA"], pytest.param([*KINDS], marks=pytest.mark.slow)], ids=len
)
def test_laws(kinds: list[str], what: str, road: str) -> None:
    check_kinds(kinds, what, road)


@pytest.mark.parametrize("what", ["linear", "convolutions", "packed"])
def test_laws_of_the_other_kinds(what: str) -> None:
    check_kinds(["OLoRA", "orthogonal", "DoRA+PiSSA"], what, "exported")


def check_kinds(kinds: list[str], what: str, road: str) -> None:
    model, args, gm = captured(what, road, torch.float64)
    for kind in kinds:
        rules = rules_for(what, **KINDS[kind])
        _, lora = check_laws(model, args, rules=rules, capture=lambda _: gm)
        assert len(plan_of(lora)) > 0


# DoRA+PiSSA everywhere, and each of the other kinds in one place.
ROUNDED = {(what, "DoRA+PiSSA") for what in PLACES if what != "tied share"}
ROUNDED |= {*zip(PLACES, [*KINDS][:4], strict=False)}


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        pytest.param(what, kind, marks=() if (what, kind) in ROUNDED else pytest.mark.slow)
        for what in PLACES
        for kind in KINDS
    ],
)
def test_a_fold_in_bfloat16_is_rounded_once(what: str, kind: str) -> None:
    model, args, gm = captured(what, "exported", torch.bfloat16)
    lora = fxlora.inject(gm, fxlora.match(gm, rules_for(what, **KINDS[kind])))
    with torch.no_grad():  # a small step from the init, as in training
        for parameter in fxlora.lora_parameters(lora):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for entry in plan_of(lora):
            if entry.padding_idx is not None:
                lora.get_parameter(entry.name_a)[:, entry.padding_idx] = 0
    folded = fxlora.fold(lora)
    fxlora.verify(lora, args, folded=folded)
    # The papers' formula in float64, independent of the graphs and of verify's reference.
    factors = {name: lora.get_parameter(name).double() for e in plan_of(lora) for name in e.tensors}
    exact = merged_weights(copy.deepcopy(model).double(), lora, factors)
    assert exact
    for name, weight in exact.items():
        found = folded.get_parameter(name)
        assert found.dtype == torch.bfloat16
        assert not torch.equal(found, lora.get_parameter(name))
        error = (found.double() - weight).abs()
        half_a_step = torch.exp2(weight.abs().log2().floor() - 8)  # half an ulp of bfloat16
        assert bool((error <= 1.001 * half_a_step + 1e-6 * weight.abs().max()).all()), name


# ---- a user's own variant -----------------------------------------------------------------------


@pytest.fixture
def _size(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Add CONTRIBUTING.md's example variant by running its text, and its formula to the laws."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("## To add a variant")[2].partition("```python\n")[2]
    plain = oracle.formula

    def sized(*given: Any) -> torch.Tensor:
        *_, tensor = given
        return tensor("lora_size") * plain(*given)

    monkeypatch.setattr(oracle, "formula", sized)
    try:
        exec(block.partition("```")[0], {})
        yield
    finally:
        del VARIANTS["size"]


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize(
    "what",
    [
        pytest.param(
            what, marks=() if what in ("convolutions", "packed", "tied") else pytest.mark.slow
        )
        for what in PLACES
    ],
)
def test_a_new_variant_is_one_row(what: str, tmp_path: Path) -> None:
    model, args, gm = captured(what, "exported", torch.float64)
    rules = rules_for(what, variant="size")
    _, lora = check_laws(model, args, rules=rules, capture=lambda _: gm)
    assert all(len(entry.tensors) == 3 for entry in plan_of(lora))
    fxlora.verify(lora, args, folded=fxlora.fold(lora))
    fxlora.save_adapter(lora, tmp_path)
    again = fxlora.load_adapter(gm, tmp_path)
    assert_same(run(again.eval(), args, {}), run(lora.eval(), args, {}))
    assert "variant size" in (tmp_path / "adapter_config.json").read_text()


# ---- refusals, and padding rows -----------------------------------------------------------------


def test_dora_leaves_the_padding_row_alone_or_is_refused() -> None:
    model, ids = Words(), torch.tensor([[1, 2, 3, 4], [5, 2, 12, 0]])
    with torch.no_grad():
        model.emb.weight[2] = 1.0
    config = LoraConfig(r=2, target_modules=["emb"], use_dora=True)
    with pytest.raises(UnsupportedOpError, match="padding_idx=2"):
        fxlora.match(fxlora.capture(model, ids), config)
    with torch.device("meta"):  # no values to check
        fxlora.match(fxlora.capture(Words(), ids.to("meta")), config)


def test_dora_without_a_direction_is_refused() -> None:
    model = Mlp()
    with torch.no_grad():
        model.up.weight[3] = 0
    with pytest.raises(ConfigError, match="'up': DoRA learns"):
        fxlora.adapt(
            model, torch.randn(2, 5), rules=LoraConfig(target_modules=["up"], r=2, use_dora=True)
        )


@pytest.mark.parametrize("first", ["head", "emb"])
def test_a_head_that_is_tied_with_an_embedding_that_pads(first: str) -> None:
    """The head trains the padding row, but look-ups of that row must not; both are branches."""

    class Padded(nn.Module):
        head: nn.Linear
        emb: nn.Embedding

        def __init__(self) -> None:
            super().__init__()
            layers = {
                "head": nn.Linear(6, 17, bias=False),
                "emb": nn.Embedding(17, 6, padding_idx=11),
            }
            self.add_module(first, layers.pop(first))
            self.add_module(*layers.popitem())
            self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.emb(ids)))

    rules = Rule("head", lora=LoraConfig(r=2, tied="share"))
    _, lora = check_laws(Padded(), (torch.tensor([[1, 2, 11], [5, 0, 16]]),), rules=rules)
    assert [entry.form for entry in plan_of(lora)] == ["branch"]


# ---- LoRA-FA ------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Layers whose input is a sum, which nothing else keeps for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(40, 24), nn.Linear(40, 24)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x + y
        return self.q(z) + self.v(z)


def kept_bytes(module: nn.Module, args: tuple[torch.Tensor, ...]) -> int:
    """Return the bytes that a forward keeps for its backward, besides the module's own."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            found[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*args)
    output.sum().backward()
    return sum(found.values())


def test_a_frozen_a_keeps_no_input_for_the_backward(tmp_path: Path) -> None:
    args = tuple(torch.randn(32, 40).double().requires_grad_() for _ in range(2))
    config = LoraConfig(r=2, target_modules=["q", "v"], variant="fa")
    gm, lora = check_laws(Sum(), args, rules=config)
    plain = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["q", "v"])))
    plain.load_state_dict(lora.state_dict())
    x, hidden = 32 * 40 * 8, 32 * 2 * 8  # of each layer: A·x, and s·A·x
    for optimize in (False, True):
        sides = [fxlora.optimize(side) if optimize else side for side in (plain, lora)]
        whole, fixed = (kept_bytes(side.zero_grad() or side, args) for side in sides)
        assert fixed <= 2 * 2 * hidden < x <= whole - fixed
        for entry in plan_of(lora):
            grads = [side.get_parameter(entry.name_b).grad for side in sides]
            assert grads[0] is not None and grads[1] is not None and grads[0].any()
            assert_close([grads[1]], [grads[0]])
            assert sides[1].get_parameter(entry.name_a).grad is None
    optimized = fxlora.optimize(lora)
    with pytest.raises(fxlora.InputError, match="gradient of gradients"):
        torch.autograd.grad(optimized(*args).square().sum(), args[0], create_graph=True)
    fxlora.save_adapter(lora, tmp_path)
    peft = pytest.importorskip("peft", reason="peft is optional")
    base = Sum().double()
    base.load_state_dict(gm.state_dict())
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert_close(run(theirs, args, {}), run(lora, args, {}))
    again = fxlora.load_adapter(gm, tmp_path)
    assert plan_of(again).entries == plan_of(lora).entries
    assert len(fxlora.lora_parameters(again)) == 2


def test_a_frozen_a_of_an_embedding_is_not_zero() -> None:
    _, lora = check_laws(Tied(), (IDS,), rules=Rule("emb", lora=LoraConfig(r=2, variant="fa")))
    assert lora.get_parameter("emb.lora_A.default.weight").any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_plan_that_would_leave_the_initial_pair_in_is_refused(init: str) -> None:
    """An edited plan: it starts from the weight, and nothing takes the first s·BA away."""
    gm = fxlora.capture(Mlp(), torch.randn(4, 5))
    plain = LoraConfig(r=2, target_modules="all-linear")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=init)
    plan = fxlora.match(gm, config)
    fxlora.inject(gm, plan)
    for entries in (
        [dataclasses.replace(entry, variants=()) for entry in plan],
        [dataclasses.replace(e, init=init) for e in fxlora.match(gm, plain)],
    ):
        edited = dataclasses.replace(plan, entries=tuple(entries))
        with pytest.raises(fxlora.InjectError, match="from_weight"):
            fxlora.inject(gm, edited)
