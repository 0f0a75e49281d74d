"""Adapters in their own dtype: A, B and parameters trained in full, over bases of any precision."""

from __future__ import annotations

import copy
import functools
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.fx.compare import difference
from fxlora.lora.dtypes import correctly_rounded

from .laws import randomise
from .oracle import adapted, declare

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
EPS = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 6e-2}


class Many(nn.Module):
    """Every kind of read: look-up, convolution, einsum, stack, packed weight, and a bent one."""

    subscripts: ClassVar = {"w": "ioo", "stack": "eio"}

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 10, 3, padding=1)
        self.norm = nn.LayerNorm(10)
        self.w = nn.Parameter(torch.randn(10, 3, 5) * 0.3)
        self.stack = nn.Parameter(torch.randn(3, 5, 7) * 0.3)
        self.qkv = nn.Linear(7, 18)
        self.head = nn.Linear(6, 9, bias=False)
        self.bent = nn.Linear(9, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        hidden = torch.einsum("bti,ihd->bhtd", self.norm(hidden), self.w)
        hidden = torch.matmul(hidden, self.stack).sum(1)
        q, k, v = self.qkv(hidden).split([6, 6, 6], -1)
        hidden = self.head(q * k + v)
        return nn.functional.linear(hidden, self.bent.weight.tanh(), self.bent.bias)


def rules() -> list[Rule]:
    """Return rules whose scalings are powers of two: others would round where a sum is a tie."""
    lora = LoraConfig(r=2, bias="lora_only")
    names = ["emb", "conv", "w", "stack", "bent"]
    parts = {"q": 6, "k": 6, "v": 6}
    return [
        Rule("qkv", parts=parts, enable=["q", "v"], lora=LoraConfig(r=3, lora_alpha=5)),
        Rule(["norm", "head"], train=True),
        Rule(names, lora=lora),
    ]


IDS = torch.tensor([[0, 3, 5, 9, 1], [2, 2, 10, 7, 4]])


@functools.cache
def many(base: torch.dtype) -> tuple[Many, fxlora.CapturedModule]:
    """Return a model and its capture, which all tests share: no verb changes them."""
    torch.manual_seed(0)
    model = Many().to(base)
    return model, fxlora.capture(model, IDS)


def adapted_many(base: torch.dtype, **options: Any) -> fxlora.CapturedModule:
    gm = many(base)[1]
    return fxlora.inject(gm, fxlora.match(gm, rules()), **options)


@functools.cache
def two_layers(base: torch.dtype) -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 7)).to(base)
    x = torch.randn(5, 12).to(base)
    return model, x, fxlora.capture(model, x)


@functools.cache
def one_layer(base: torch.dtype) -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    model, x = nn.Sequential(nn.Linear(12, 7)).to(base), torch.randn(3, 12).to(base)
    return model, x, fxlora.capture(model, x)


def trained(lora: fxlora.CapturedModule) -> fxlora.CapturedModule:
    """Draw all that trains at random, in all digits of its dtype."""
    randomise(lora)
    with torch.no_grad():
        for name in lora.trained:
            parameter = lora.get_parameter(name)
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return lora


def exact_weights(lora: fxlora.CapturedModule) -> dict[str, torch.Tensor]:
    """Return the adapted weights in float64, by name."""
    found: dict[str, torch.Tensor] = {}
    declare(lora, Many.subscripts)
    for entry in lora.plan or ():
        weight = found.get(entry.parameter, lora.get_parameter(entry.parameter).detach().double())
        factors = {n: lora.get_parameter(n).detach().double() for n in entry.tensors}
        found[entry.parameter] = adapted(lora, lora, entry, weight, factors)
    return found


def assert_folds_exactly(lora: fxlora.CapturedModule) -> fxlora.CapturedModule:
    folded = fxlora.fold(lora)
    exact = exact_weights(lora)
    assert exact
    for name, value in exact.items():
        weight = folded.get_parameter(name)
        assert not torch.equal(weight, lora.get_parameter(name))
        if weight.dtype == F64:
            assert float((weight - value).abs().max()) < 1e-14
        else:
            assert torch.equal(weight, correctly_rounded(value.clone(), weight.dtype)), name
    for name in lora.trained:
        base = folded.get_parameter(name)
        assert torch.equal(base, lora.get_parameter(name).to(base.dtype))
    return folded


def dtypes(lora: fxlora.CapturedModule) -> set[torch.dtype]:
    return {parameter.dtype for parameter in fxlora.lora_parameters(lora)}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.dtype == expected.dtype
    scale = float(expected.detach().double().abs().max())
    gap = float((found.double() - expected.double()).detach().abs().max())
    return gap <= EPS[found.dtype] * scale


# ---- which dtype --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "over_bf16", "over_f64"),
    [(True, F32, F64), (False, BF16, F64), (F64, F64, F64), ("torch.float32", F32, F32)],
    ids=str,
)
def test_the_dtype_that_is_asked_for(rule: Any, over_bf16: Any, over_f64: Any) -> None:
    for base, expected in ((BF16, over_bf16), (F64, over_f64)):
        model, x, gm = one_layer(base)
        config = LoraConfig(r=2, target_modules=["0"], autocast_adapter_dtype=rule)
        assert dtypes(fxlora.inject(gm, fxlora.match(gm, config))) == {expected}
        plain = fxlora.match(gm, LoraConfig(r=2, target_modules=["0"]))
        assert dtypes(fxlora.inject(gm, plain, adapter_dtype=rule)) == {expected}
        again = fxlora.adapt(
            model,
            x,
            rules={"rule": [{"lora": {"r": 2}}]},  # type: ignore[arg-type]
            adapter_dtype=rule,
        )
        assert dtypes(again) == {expected}


@pytest.mark.parametrize("wrong", ["int8", torch.int32, torch.complex64, "float8_e4m3fn", 32, None])
def test_a_dtype_in_which_nothing_trains_is_refused(wrong: Any) -> None:
    with pytest.raises(fxlora.ConfigError, match="autocast_adapter_dtype must be True, False"):
        LoraConfig(autocast_adapter_dtype=wrong)


def test_the_plan_says_the_dtype_where_it_is_another(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    model[0].bfloat16()
    gm = fxlora.capture(lambda_module(model), torch.randn(3, 6))
    config = LoraConfig(r=2, target_modules=["0", "1"], autocast_adapter_dtype=F32)
    plan = fxlora.match(gm, config)
    assert str(plan).count("A and B in float32") == 1
    assert plan == fxlora.Plan(
        tuple(fxlora.Entry.from_data(entry.to_data()) for entry in plan),
        skipped=plan.skipped,
        model_parameters=plan.model_parameters,
        rules=plan.rules,
    )
    (tmp_path / "rules.toml").write_text(plan.to_toml())
    (rule,) = fxlora.load_rules(tmp_path / "rules.toml")
    assert rule.lora is not None and rule.lora.autocast_adapter_dtype == "float32"
    lora = fxlora.inject(gm, plan, adapter_dtype=False)
    assert "float32" not in str(lora.plan) and dtypes(lora) == {BF16, F32}


def lambda_module(model: nn.Sequential) -> nn.Module:
    """Return the model with a cast between its layers, which have several dtypes."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number, layer in enumerate(model):
                self.add_module(str(number), layer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.children():
                x = layer(x.to(layer.weight.dtype))  # type: ignore[arg-type]
            return x

    return Mixed()


def test_float32_graphs_have_no_casts() -> None:
    for dtype in (F32, F64):
        lora = adapted_many(dtype)
        assert "to.dtype" not in lora.code and dtypes(lora) == {dtype}


# ---- the laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [None, False, F64, BF16], ids=str)
@pytest.mark.parametrize("base", [BF16, F16, F32, F64], ids=str)
def test_laws(base: torch.dtype, held: Any) -> None:
    model, gm = many(base)
    lora = adapted_many(base, adapter_dtype=held)
    assert torch.equal(lora.eval()(IDS), model.eval()(IDS))
    trained(lora)
    found = lora(IDS)
    assert not close(found, model(IDS))
    found.float().square().sum().backward()
    for parameter in fxlora.lora_parameters(lora):
        assert parameter.grad is not None and parameter.grad.any()
        assert parameter.grad.dtype == parameter.dtype
    folded = assert_folds_exactly(lora)
    assert close(folded.eval()(IDS), found)
    assert fxlora.verify(lora, IDS, folded=folded)
    for made in (folded, fxlora.remove(lora)):
        for mode in ("train", "eval"):
            assert difference(made.graphs[mode], gm.graphs[mode]) is None
    assert torch.equal(fxlora.remove(lora).eval()(IDS), model(IDS))
    assert {p.dtype for p in folded.parameters()} == {base}


@pytest.mark.parametrize("init", ["kaiming_uniform", "pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("variant", [None, "dora"])
@pytest.mark.parametrize("base", [BF16, F16], ids=str)
def test_variants_and_inits(base: torch.dtype, variant: str | None, init: str) -> None:
    model, x, gm = two_layers(base)
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=["0", "2"], init_lora_weights=init, variant=variant, lora_dropout=0.1
    )
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    assert dtypes(lora) == {F32}
    start, expected = lora.eval()(x), model(x)
    assert torch.equal(start, expected) if init != "orthogonal" else close(start, expected)
    if variant and init == "kaiming_uniform":  # in float32, the norms are those of the weight
        untrained = fxlora.fold(lora)
        gap = untrained.get_parameter("0.weight").ne(model.get_parameter("0.weight")).sum()
        assert int(gap) <= 1
    randomise(lora)
    assert not close(lora(x), expected)
    assert close(assert_folds_exactly(lora).eval()(x), lora(x))
    assert fxlora.verify(lora, x)


def test_small_changes_of_a_magnitude_count() -> None:
    """DoRA's g - 1 has its own digits: in bfloat16, g = 1.003 would be 1."""
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(12, 10, bias=False)).bfloat16()
    x = torch.randn(4000, 12).bfloat16()
    lora = fxlora.adapt(model, x, rules=LoraConfig(r=2, target_modules=["0"], use_dora=True))
    with torch.no_grad():
        lora.get_parameter("0.lora_magnitude_vector.default.weight").mul_(1.003)
        before, after = model(x).double(), lora.eval()(x).double()
    slope = float((before * (after - before)).sum() / before.square().sum())
    assert slope == pytest.approx(3e-3, rel=0.4)


def test_eva_in_float32_over_bfloat16() -> None:
    model, x = nn.Sequential(nn.Linear(12, 7)).bfloat16(), torch.randn(40, 12).bfloat16()
    lora = fxlora.adapt(model, x, rules=LoraConfig(r=3, target_modules=["0"]))
    assert fxlora.initialize_from(lora, [x]).sites == ("0",)
    a = lora.get_parameter("0.lora_A.default.weight")
    assert a.dtype == F32
    expected = torch.linalg.svd(x.double()).Vh[:3]
    assert float(((a.double() @ expected.mT).abs() - torch.eye(3)).abs().max()) < 1e-6


# ---- nested graphs, regions, ties ---------------------------------------------------------------


class Nested(nn.Module):
    """Reads in a checkpoint, in an autocast region and in both branches of a cond."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 10), nn.Linear(10, 9), nn.Linear(9, 7)
        self.norm = nn.LayerNorm(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(lambda given: self.norm(self.a(given)).tanh(), x, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            x = self.b(x)
        return torch.cond(x.sum() > 0, lambda y: self.c(y), lambda y: self.c(-y), (x,))


def test_nested_graphs() -> None:
    torch.manual_seed(2)
    model, x = Nested().bfloat16(), torch.randn(4, 12).bfloat16()
    gm = fxlora.capture(model, x)
    named = LoraConfig(r=2, target_modules=["a", "b", "c"], modules_to_save=["norm"])
    lora = fxlora.inject(gm, fxlora.match(gm, named))
    assert torch.equal(lora.eval()(x), model(x))
    trained(lora)
    found = lora.train()(x)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fxlora.lora_parameters(lora))
    assert dtypes(lora) == {F32}
    assert close(assert_folds_exactly(lora).eval()(x), lora.eval()(x))
    moved = copy.deepcopy(lora).half()
    assert dtypes(moved) == {F32} and moved(x.half()).dtype == F16
    assert fxlora.verify(moved, x.half())
    removed = fxlora.remove(moved)
    assert torch.equal(removed.eval()(x.half()), copy.deepcopy(model).half()(x.half()))


class Odd(nn.Module):
    """Python between two regions, which also reads a weight that trains in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 10), nn.Linear(10, 7)
        self.scale = nn.Parameter(torch.randn(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        if float(hidden.float().sum()) > 0:
            hidden = hidden * 2
        return self.last(hidden * self.scale)


def test_regions() -> None:
    torch.manual_seed(3)
    model, x = Odd().bfloat16(), torch.randn(4, 12).bfloat16()
    with pytest.warns(fxlora.FxLoraWarning, match="captured instead"):
        gm = fxlora.capture(model, x)
    assert gm.regions != ("",)
    chosen = [Rule(["last", "scale"], train=True), Rule("first", lora=LoraConfig(r=2))]
    lora = fxlora.inject(gm, fxlora.match(gm, chosen))
    assert torch.equal(lora.eval()(x), model(x))
    assert lora.get_parameter("last.weight").dtype == F32
    assert lora.get_parameter("scale").dtype == BF16  # Python multiplies by it
    trained(lora)(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in fxlora.lora_parameters(lora))
    assert_folds_exactly(lora)
    assert fxlora.verify(lora, x)


def test_a_tied_weight_that_trains_in_full() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.mid = nn.Embedding(11, 12), nn.Linear(12, 12)
            self.head = nn.Linear(12, 11, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.mid(self.emb(ids)))

    model = Tied().bfloat16()
    config = LoraConfig(r=2, target_modules=["mid"], modules_to_save=["emb", "head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxlora.FxLoraWarning)
        lora = fxlora.adapt(model, IDS, rules=config)
    weight = lora.get_parameter("emb.weight")
    assert weight is lora.get_parameter("head.weight") and weight.dtype == F32
    assert torch.equal(lora.eval()(IDS), model(IDS))
    trained(lora)
    folded = assert_folds_exactly(lora)
    assert folded.get_parameter("emb.weight") is folded.get_parameter("head.weight")
    assert close(folded.eval()(IDS), lora(IDS)) and fxlora.verify(lora, IDS)


# ---- moves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("base", [BF16, F32], ids=str)
def test_a_move_of_the_base_keeps_the_digits_of_what_trains(base: Any, to: torch.dtype) -> None:
    torch.manual_seed(4)
    lora = trained(adapted_many(base))
    lora.eval()(IDS).float().sum().backward()
    moved = copy.deepcopy(lora).to(to)
    for parameter in lora.parameters():
        parameter.grad = None
    expected = F64 if to == F64 else F32
    assert dtypes(moved) == {expected}
    for name in (*lora.adapter_parameters(), *lora.trained):
        assert torch.equal(moved.get_parameter(name), lora.get_parameter(name).to(expected)), name
    assert moved(IDS).dtype == to and ("to.dtype" in moved.code) == (to in (BF16, F16))
    moved(IDS).float().sum().backward()
    assert_folds_exactly(moved)
    assert fxlora.verify(moved, IDS)
    back = copy.deepcopy(moved).to(base)
    if to == F32 or base == to:
        assert back.code == lora.code and torch.equal(back(IDS), lora(IDS))


def test_adapters_that_follow_the_base() -> None:
    x = torch.randn(3, 12)
    lora = fxlora.adapt(
        nn.Sequential(nn.Linear(12, 7)),
        x,
        rules=LoraConfig(r=2, target_modules=["0"], autocast_adapter_dtype=False),
    )
    assert dtypes(lora.half()) == {F16} and "to.dtype" not in lora.code
    assert lora(x.half()).dtype == F16


@pytest.mark.parametrize("by_hand", [F32, BF16, F64], ids=str)
def test_adapters_converted_by_hand(by_hand: torch.dtype, tmp_path: Path) -> None:
    model, x, gm = one_layer(F16)
    torch.manual_seed(5)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["0"])))
    randomise(lora)
    for parameter in fxlora.lora_parameters(lora):
        parameter.data = parameter.data.to(by_hand)  # as diffusers' cast_training_params does
    assert not close(lora.eval()(x), model(x))
    assert close(assert_folds_exactly(lora).eval()(x), lora(x))
    fxlora.save_adapter(lora, tmp_path)
    if by_hand == F32:
        assert fxlora.verify(lora, x)
    else:
        with pytest.raises(fxlora.VerificationError, match=r"inject\(…, adapter_dtype="):
            fxlora.verify(lora, x)


# ---- training -----------------------------------------------------------------------------------


def test_a_grad_scaler_works_over_float16() -> None:
    torch.manual_seed(6)
    model, x = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7)).half(), torch.randn(3, 12).half()
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    lora = fxlora.adapt(model, x, rules=config).train()
    optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in fxlora.lora_parameters(lora)]
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = lora(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and scaler.get_scale() == 2.0**10
    after = fxlora.lora_parameters(lora)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_updates_smaller_than_a_step_of_the_base_count() -> None:
    """At a learning rate of 1e-5, 100 steps of A in bfloat16 would mostly be rounded away."""
    torch.manual_seed(7)
    model, x = nn.Sequential(nn.Linear(12, 10)).bfloat16(), torch.randn(64, 12).bfloat16()
    moved: dict[Any, float] = {}
    gm = fxlora.capture(model, x)
    plan = fxlora.match(gm, LoraConfig(r=4, target_modules=["0"]))
    for held in (True, False):
        torch.manual_seed(8)
        lora = fxlora.inject(gm, plan, adapter_dtype=held).train()
        randomise(lora)
        a = lora.get_parameter("0.lora_A.default.weight")
        before = a.detach().double().clone()
        optimizer = torch.optim.AdamW(fxlora.lora_parameters(lora), lr=1e-5, weight_decay=0)
        for _ in range(20):
            optimizer.zero_grad()
            lora(x).float().square().mean().backward()
            optimizer.step()
        moved[held] = float((a.detach().double() - before).abs().mean())
    assert moved[True] > 1e-4 > 4 * moved[False]


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes saved for the backward, besides the module's own tensors."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(x).float().square().mean()
    loss.backward()
    return sum(storage.nbytes() for storage in held.values())


def test_nothing_as_wide_as_the_input_is_copied() -> None:
    model, x = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 80)).bfloat16(), torch.randn(200, 64)
    gm = fxlora.capture(model, x.bfloat16())
    plan = fxlora.match(gm, LoraConfig(r=4, target_modules=["0", "1"]))
    found = {
        held: saved_bytes(fxlora.inject(gm, plan, adapter_dtype=held).train(), x.bfloat16())
        for held in (True, False)
    }
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["0", "1"])
    )
    assert found[True] <= 1.1 * found[False]
    assert found[True] < saved_bytes(theirs, x.bfloat16()) / 1.3


# ---- on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [None, False, F64], ids=str)
@pytest.mark.parametrize("base", [BF16, F32], ids=str)
def test_save_and_load_keep_every_bit(base: torch.dtype, held: Any, tmp_path: Path) -> None:
    torch.manual_seed(9)
    gm = many(base)[1]
    lora = trained(adapted_many(base, adapter_dtype=held))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PEFT cannot read")
        fxlora.save_adapter(lora, tmp_path / "one")
        again = fxlora.load_adapter(gm, tmp_path / "one")
        fxlora.save_adapter(again, tmp_path / "two")
    for name, parameter in lora.named_parameters():
        found = again.get_parameter(name)
        assert found.dtype == parameter.dtype and torch.equal(found, parameter), name
    assert again.code == lora.code and torch.equal(again.eval()(IDS), lora.eval()(IDS))
    files = [(tmp_path / which / "adapter_model.safetensors") for which in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_load_that_rounds_says_so(tmp_path: Path) -> None:
    torch.manual_seed(10)
    gm = one_layer(BF16)[2]
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["0"])))
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path)
    with pytest.warns(fxlora.FxLoraWarning, match="2 tensors rounded from float32 to bfloat16.*"):
        narrow = fxlora.load_adapter(gm, tmp_path, adapter_dtype=False)
    assert dtypes(narrow) == {BF16}
    fxlora.save_adapter(narrow, tmp_path)
    wide = fxlora.load_adapter(gm, tmp_path, adapter_dtype=True)  # widening is exact, and silent
    assert dtypes(wide) == {F32}
    name = "0.lora_B.default.weight"
    assert torch.equal(wide.get_parameter(name), narrow.get_parameter(name).float())


@pytest.mark.parametrize("base", [BF16, F16], ids=str)
def test_pefts_folders_in_both_directions(base: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(11)
    model, x = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7)).to(base), torch.randn(3, 12)
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]),
    )
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    key = "base_model.model.0.lora_B.weight"
    assert stored[key].dtype == F32
    lora = fxlora.load_adapter(fxlora.capture(model, x.to(base)), tmp_path / "theirs")
    assert torch.equal(lora.get_parameter("0.lora_B.default.weight"), stored[key])
    assert dtypes(lora) == {F32}
    merged = copy.deepcopy(theirs).merge_and_unload().get_parameter("0.weight")
    assert torch.equal(assert_folds_exactly(lora).get_parameter("0.weight"), merged)
    assert close(lora.eval()(x.to(base)), theirs.eval()(x.to(base)))
    randomise(lora)
    fxlora.save_adapter(lora, tmp_path / "ours")
    assert "dtype" not in (tmp_path / "ours" / "adapter_config.json").read_text()
    read = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    found = read.get_parameter("base_model.model.0.lora_A.default.weight")
    assert found.dtype == F32
    assert torch.equal(found, lora.get_parameter("0.lora_A.default.weight"))
    assert close(read.eval()(x.to(base)), lora.eval()(x.to(base)))


# ---- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "digits", "least"), [(BF16, 8, -126), (F16, 11, -14), (F32, 24, -126)], ids=str
)
def test_float64_is_rounded_once(dtype: torch.dtype, digits: int, least: int) -> None:
    """Against Python's integers: round m·2^e to a whole number of last places, half to even."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-13, 6, (4000,), generator=generator)
    near = torch.randint(2 ** (digits - 1), 2**digits, (4000,), generator=generator).double()
    tail = torch.tensor([0.5, 0.5 + 2.0**-30, 0.5 - 2.0**-30, 0.25, 0.5 + 2.0**-20, 0.0]).double()
    values = torch.ldexp(near + tail.repeat(667)[:4000], exponents.double() - digits + 1)
    values = torch.where(torch.rand(4000, generator=generator) < 0.5, values, -values)
    expected = [_rounded(value, digits, least) for value in values.tolist()]
    found = correctly_rounded(values, dtype)
    assert found.double().tolist() == expected
    for few in (1, 8, 500):  # rows without a value halfway between two take the fast way
        assert torch.equal(correctly_rounded(values.view(-1, few), dtype).flatten(), found)
    if dtype != F32:  # torch's own conversion rounds twice
        assert found.double().tolist() != values.to(dtype).double().tolist()


def _rounded(value: float, digits: int, least: int) -> float:
    numerator, denominator = value.as_integer_ratio()
    exponent = max(abs(numerator).bit_length() - denominator.bit_length(), least)
    if abs(numerator) < denominator * 2.0**exponent:
        exponent -= 1
    exponent = max(exponent, least)
    last = Fraction(2) ** (exponent - digits + 1)
    return float(round(Fraction(value) / last) * last)
