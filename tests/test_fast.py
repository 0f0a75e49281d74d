"""Fast graphs: equal to the explicit ones, in every mode and form; and the op that they call."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import CapturedModule, LoraConfig, Rule

from .laws import randomise

F64 = torch.float64
LINEARS = torch.ops.fxlora.linears.default


class Attention(nn.Module):
    """q, k and v of one input (v without bias), and a gate that reads it later."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10, bias=False)
        self.gate, self.out = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        weights = (self.q(h) @ self.k(h).transpose(-1, -2)).softmax(-1)
        return x + self.out(weights @ self.v(h) * self.gate(h).sigmoid())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(3, 4, 6, dtype=F64)
CONFIG = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", bias="lora_only")


def adapted(model: nn.Module | None = None, x: torch.Tensor = X, **options: Any) -> CapturedModule:
    torch.manual_seed(0)
    rules = options.pop("rules", CONFIG)
    model = (model or Model()).to(x.dtype if x.is_floating_point() else F64)
    lora = fxlora.adapt(model, x, rules=rules, **options)
    randomise(lora)
    return lora


def joined(module: CapturedModule) -> list[list[str]]:
    """Return the sites of each joint op in the current mode's graph, and in the blocks'."""
    schedule = module.schedule
    assert schedule is not None
    return [list(g.sites) for g in schedule.groups if not g.reason and module.mode in g.modes]


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    given = x.clone().requires_grad_(x.is_floating_point())
    trained = [p for p in module.parameters() if p.requires_grad]
    wrt = [given, *trained] if x.is_floating_point() else trained
    return list(torch.autograd.grad(module(given).sin().sum(), wrt))


def assert_equal_to_explicit(lora: CapturedModule, x: torch.Tensor = X) -> CapturedModule:
    """Return the optimized module, after a comparison with the explicit one in each mode."""
    fast, plain = fxlora.optimize(lora), fxlora.remove(lora)
    for mode in (True, False):
        for module in (lora, fast, plain):
            module.train(mode)
        expected = lora(x)
        assert float((expected - plain(x)).abs().max()) > 0.01
        torch.testing.assert_close(fast(x), expected, rtol=1e-12, atol=1e-12)
        pairs = zip(gradients(fast, x), gradients(lora, x), strict=True)
        for found, gradient in pairs:
            torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)
    return fast


QKV = [[f"layers.{n}.{s}" for s in ("q", "k", "v", "gate")] for n in range(2)]
SINGLE = [["layers.0.out"], ["layers.1.out"], ["head"]]


def test_layers_of_one_input_are_one_op() -> None:
    lora = adapted()
    fast = assert_equal_to_explicit(lora)
    assert sorted(joined(fast)) == sorted([*QKV, *SINGLE])
    assert lora.schedule is None
    code = fast.running(fast.graph).python_code("self").src
    assert code.count("direct_linears(") == 5 and "aten.linear" not in code


def test_the_schedule_is_measured_on_request() -> None:
    fast = fxlora.optimize(adapted(rules=LoraConfig(r=2, target_modules=["q", "k", "head"])))
    schedule = fast.schedule
    assert schedule is not None and "ms" not in str(schedule)
    measured = schedule.measured()
    assert str(measured).splitlines()[0].split()[-2:] == ["ms", "explicit"]
    for group in measured.groups:
        assert group.shapes is not None and group.seconds is not None and min(group.seconds) > 0
        assert (group.shapes.rows, group.shapes.inputs) == (12, 6)
        assert (
            group.shapes.layers == ((8, 2, True),) * 2 if len(group.sites) > 1 else ((5, 2, True),)
        )


def test_the_graphs_stay_the_explicit_ones() -> None:
    lora = adapted()
    fast = fxlora.optimize(lora)
    assert str(fast.graph) == str(lora.graph) and fast.code == lora.code
    back = fxlora.explicit(fast)
    assert back.schedule is None and str(back.graph) == str(lora.graph)
    assert torch.equal(back(X), lora(X))
    assert list(fast.state_dict()) == list(lora.state_dict())


def test_the_other_functions_take_optimized_modules(tmp_path: Path) -> None:
    lora = adapted()
    fast = fxlora.optimize(lora)
    x = X.clone()
    fxlora.verify(fast, x)
    assert str(fxlora.report(fast)) == str(fxlora.report(lora))
    folded = fxlora.fold(fast)
    torch.testing.assert_close(folded(x), lora(x), rtol=1e-10, atol=1e-10)
    assert str(fxlora.remove(fast).graph) == str(fxlora.remove(lora).graph)
    fxlora.save_adapter(fast, tmp_path / "adapter")
    loaded = fxlora.load_adapter(fxlora.remove(fast), tmp_path / "adapter")
    assert len(joined(loaded)) == 5  # the module is still an optimized one
    assert torch.equal(loaded(x), fast(x))
    fxlora.export(fast.eval(), tmp_path / "model.pt2", x)
    served = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(served(x), lora.eval()(x), rtol=1e-10, atol=1e-10)
    for copied in (copy.deepcopy(fast), copy.copy(fast), fast.derive()):
        assert len(joined(copied)) == 5 and torch.equal(copied(x), fast(x))


def test_blocks_run_fast_graphs() -> None:
    lora = adapted(modules="layers.*")
    fast = assert_equal_to_explicit(lora)
    assert sorted(joined(fast)) == sorted([*QKV, *SINGLE])
    calls: list[int] = []
    fast.get_submodule("layers.1").register_forward_hook(lambda *_: calls.append(1))
    fast(X)
    assert calls == [1]
    assert fxlora.explicit(fast).schedule is None


class Gpt2(nn.Module):
    """x @ W with W as (in, out), by addmm and by @."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))
        self.other = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(self.b, rows, self.w) * (rows @ self.other)


def test_weights_with_inputs_first() -> None:
    fast = assert_equal_to_explicit(adapted(Gpt2(), rules=Rule(["w", "other"], lora=CONFIG_R)))
    assert joined(fast) == [["w", "other"]]


CONFIG_R = LoraConfig(r=2, lora_alpha=3)


class Full(nn.Module):
    """addmm with a whole matrix as its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 6)
        return torch.addmm(rows @ torch.ones(6, 9, dtype=x.dtype), rows, self.w)


class Writes(nn.Module):
    """Writes to the second layer's bias, between the layers."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        self.seen.add_(x.detach().mean())
        return y * F.linear(x, self.two.weight, self.seen)


class Chained(nn.Module):
    """The second layer's weight depends on the first layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        return F.linear(x, self.two.weight, y.mean((0, 1)))


class ReadTwice(nn.Module):
    """A layer's output is read by itself, and an input is a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        return self.two(y) + self.one(y) * y + self.two(x)


class Overwrites(nn.Module):
    """Writes to the layers' own outputs, and to a view of one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.one(x), self.two(x)
        y += 2
        z[..., 1:].mul_(3)
        return y * z


class Draws(nn.Module):
    """The second layer's bias is drawn after other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.dropout(self.one(x), 0.5, True)
        return y * F.linear(x, self.two.weight, F.dropout(self.two.bias, 0.5, True))


def test_random_numbers_are_drawn_in_the_same_order() -> None:
    lora = adapted(Draws(), rules=Rule(["one", "two"], lora=CONFIG_R))
    fast = fxlora.optimize(lora)
    assert len(joined(fast)) == 2 and not torch.equal(lora(X), lora(X))
    found: list[torch.Tensor] = []
    for module in (lora, fast):
        torch.manual_seed(0)
        found.append(module(X))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


OTHERS: dict[str, tuple[type[nn.Module], int]] = {
    "a matrix as the bias": (Full, 0),
    "a write between": (Writes, 2),
    "a bias from another layer": (Chained, 2),
    "reads that repeat": (ReadTwice, 2),
    "writes to the outputs": (Overwrites, 1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_only_what_may_be_joined_is(kind: str) -> None:
    model, ops = OTHERS[kind]
    rules = Rule("*w*" if model is Full else ["one", "two"], lora=CONFIG_R)
    fast = assert_equal_to_explicit(adapted(model(), rules=rules))
    assert len(joined(fast)) == ops
    assert fast.schedule is not None and all(g.reason for g in fast.schedule.groups[ops:])


VARIANTS: dict[str, Any] = {
    "dropout": LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"),
    "dora": LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
    "rslora": LoraConfig(r=2, use_rslora=True, target_modules="all-linear"),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear"),
    "ranks": LoraConfig(r=2, rank_pattern={"q": 3, "v": 1}, target_modules="all-linear"),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants(kind: str) -> None:
    lora = adapted(rules=VARIANTS[kind])
    fast = fxlora.optimize(lora)
    for mode in (True, False):
        for module in (lora, fast):
            module.train(mode)
        found = []
        for module in (lora, fast):
            torch.manual_seed(1)
            found.append([module(X), *gradients(module, X)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    counts = [len(joined(fast.train(mode))) for mode in (True, False)]
    assert counts == {"dropout": [0, 5]}.get(kind, [5, 5])
    text = str(fast.schedule)
    assert ("dropout on its input" in text) is (kind == "dropout")


class Mixed(nn.Module):
    """A weight as (in, out), a bias, none, and an output that is also read as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.one, self.two = nn.Linear(6, 7), nn.Linear(7, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.b, x.flatten(0, 1), self.w)
        return rows.sum(-1, keepdim=True) + self.two(self.one(x).tanh()).flatten(0, 1) * x.mean()


@pytest.mark.parametrize("options", [{}, {"modules": "layers.*"}], ids=["flat", "blocks"])
def test_dora_is_scaled_in_one_step(options: Any) -> None:
    dora = VARIANTS["dora"]
    fast = assert_equal_to_explicit(adapted(rules=dora, **options))
    assert sorted(joined(fast)) == sorted([*QKV, *SINGLE])
    for graph in [fast.running(fast.graph)] if not options else []:
        code = graph.python_code("self").src
        assert code.count("fxlora.sum_norms") == 11 and "vector_norm" not in code
        assert code.count("aten.addcmul") == 9 and "aten.sub" not in code  # v has no bias
    compiled: Any = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, X), gradients(fast, X), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    every = Rule(lora=LoraConfig(r=2, use_dora=True))  # "all-linear" means layers, and w is none
    mixed = assert_equal_to_explicit(adapted(Mixed(), rules=every))
    assert len(joined(mixed)) == 3


def test_the_norms_of_a_sum() -> None:
    weight, down, up = (torch.randn(*s, dtype=F64) for s in ((5, 7), (3, 7), (5, 3)))
    found = torch.ops.fxlora.sum_norms(weight, down.requires_grad_(), -1.5 * up)
    expected = torch.linalg.vector_norm(weight - 1.5 * up @ down, 2, -1).detach()
    assert float((expected - weight.norm(dim=-1)).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert not found.requires_grad


def test_the_norms_of_a_sum_that_cancels() -> None:
    weight, down = torch.randn(6, 4), torch.eye(4)
    up = -(1 - 1e-4) * weight
    found = torch.ops.fxlora.sum_norms(weight, down, up)
    expected = (weight.double() + up.double()).norm(dim=-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)


@pytest.mark.autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", [CONFIG, VARIANTS["dora"]], ids=["lora", "dora"])
def test_precision(rules: Any, base: torch.dtype, dtype: torch.dtype) -> None:
    if (base, dtype) == (torch.bfloat16, torch.float16):
        dtype = torch.bfloat16  # layer_norm takes no mixture of the two
    x = X.to(base)
    lora = adapted(x=x, rules=rules)
    fast = fxlora.optimize(lora)
    assert {p.dtype for n, p in fast.named_parameters() if "lora_" in n} == {torch.float32}
    with torch.autocast("cpu", dtype):
        expected, found = lora(x), fast(x)
        assert found.dtype == expected.dtype
        found.float().sum().backward()
    assert found.dtype == expected.dtype
    tolerance = 8 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    grads = {n: p.grad for n, p in fast.named_parameters() if p.requires_grad}
    assert all(
        g is not None and g.any() and g.dtype == torch.float32
        for n, g in grads.items()
        if "lora_" in n
    )
    torch.testing.assert_close(fast(x), lora(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("rules", [CONFIG, VARIANTS["dora"]], ids=["lora", "dora"])
def test_under_checkpointing_and_in_functions(rules: Any) -> None:
    lora = adapted(rules=rules)
    fast = fxlora.optimize(lora)
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(lora(x).sin().sum(), x)[0]
    found = torch.autograd.grad(checkpoint(fast, x, use_reentrant=False).sin().sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    params = {n: p.detach() for n, p in fast.named_parameters()}

    def loss(module: nn.Module, params: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, params, (x,)).sin().sum()

    for transform in (torch.func.grad, torch.func.jacfwd):
        ours, theirs = (transform(loss, argnums=1)(m, params, X) for m in (fast, lora))
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10)


def test_compiled_without_breaks_and_again() -> None:
    lora = adapted()
    fast = fxlora.optimize(lora)
    torch._dynamo.reset()
    compiled: Any = torch.compile(fast, backend="aot_eager", fullgraph=True)
    expected = gradients(lora, X)
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            found = gradients(compiled, X)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Regions(nn.Module):
    """Layers in a checkpoint, in an autocast inside one, in an autocast and under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(6, 5)

    def full(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.layers[1](x) + torch.arange(6.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.layers[0], x, use_reentrant=False)
        x = checkpoint(self.full, x, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            x = self.layers[2](x)
        with torch.no_grad():
            y = self.layers[0](x)
        return self.head(x + y)


def test_regions_of_the_forward() -> None:
    lora = adapted(Regions())
    fast = assert_equal_to_explicit(lora)
    assert {tuple(names) for names in joined(fast)} == {
        *((*(f"layers.{n}.{s}" for s in ("q", "k", "v", "gate")),) for n in range(3)),
        *((f"layers.{n}.out",) for n in range(3)),
        ("head",),
    }
    torch._dynamo.reset()
    compiled: Any = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for module in (compiled, fxlora.optimize(lora, recompute=True)):
        for ours, theirs in zip(gradients(module, X), gradients(lora, X), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    fast.float()  # with the constant of a nested graph
    torch.testing.assert_close(fast(X.float()), lora.float()(X.float()))


class InFull(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x) + torch.arange(6.0)


class Inside(nn.Module):
    """Submodules whose forwards have a region."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([InFull(), InFull()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


def test_regions_in_submodules_that_are_modules() -> None:
    lora = adapted(Inside(), modules="layers.*")
    fast = assert_equal_to_explicit(lora)
    assert joined(fast) == [] and "a region of a submodule" in str(fast.schedule)


# ---- recomputation ------------------------------------------------------------------------------


class Gelu(nn.Module):
    """A GELU that is written out, a gate, and a residual that must not be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.rand(8) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h.pow(3)))) * self.scale
        return x + self.down(h) + self.down(F.silu(self.gate(x)) * h.sin().abs())


def recomputed(module: CapturedModule) -> list[int]:
    """Return the number of ops in each chain."""
    assert module.schedule is not None
    return sorted(len(chain.ops) for chain, _ in module.schedule.recomputed)


def test_chains_are_computed_again() -> None:
    lora = adapted(Gelu())
    fast = fxlora.optimize(lora, recompute=True)
    assert recomputed(fast) == [4, 9]
    assert recomputed(fxlora.optimize(lora)) == []
    for mode in (True, False):
        for module in (lora, fast):
            module.train(mode)
        torch.testing.assert_close(fast(X), lora(X), rtol=1e-12, atol=1e-12)
        for found, gradient in zip(gradients(fast, X), gradients(lora, X), strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), lora(X), rtol=1e-12, atol=1e-12)
    fxlora.verify(fast, X)
    assert "recomputed" in str(fast.schedule)


def test_less_is_saved() -> None:
    x = torch.randn(64, 32, 6)
    lora = adapted(Gelu(), x)
    kinds = (lora, fxlora.optimize(lora), fxlora.optimize(lora, recompute=True))
    before, fast, after = (saved(module, x) for module in kinds)
    assert fast <= before * 1.001
    assert after < 0.7 * before
    plain = adapted(x=x)
    assert saved(fxlora.optimize(plain, recompute=True), x) <= saved(plain, x) * 1.001


def saved(module: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes saved for the backward."""
    held: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module(x).sum()
    loss.backward()
    return sum(storage.nbytes() for storage in held.values())


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.down(torch.tanh(h * torch.tanh(h) + h.sigmoid() * h))


@pytest.mark.autocast
def test_a_chain_is_computed_again_under_the_autocast_of_its_forward() -> None:
    x = X.float()
    lora = adapted(Gates(), x)
    plain, fast = fxlora.optimize(lora), fxlora.optimize(lora, recompute=True)
    assert recomputed(fast)
    found: list[list[torch.Tensor]] = []
    for module in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        output.float().sin().sum().backward()  # outside of autocast
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        found.append([output, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_a_chain_has_second_gradients_and_transforms() -> None:
    lora = adapted(Gelu())
    fast = fxlora.optimize(lora, recompute=True)

    def second(module: nn.Module) -> torch.Tensor:
        x = X.clone().requires_grad_()
        first = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(fast), second(lora), rtol=1e-9, atol=1e-9)
    for transform in (torch.func.grad, torch.func.jacfwd):
        ours, theirs = (transform(lambda x, m=m: m(x).sin().sum())(X) for m in (fast, lora))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()
    compiled: Any = torch.compile(fast, backend="aot_eager", fullgraph=True)
    for found, gradient in zip(gradients(compiled, X), gradients(lora, X), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)
    x = X.clone().requires_grad_()
    again = torch.autograd.grad(checkpoint(fast, x, use_reentrant=False).sin().sum(), x)[0]
    torch.testing.assert_close(again, gradients(lora, X)[0], rtol=1e-10, atol=1e-10)


class Gated(nn.Module):
    """An input of a chain is computed from another one, and a weight of the chain trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        return torch.sigmoid(h * self.scale) * torch.tanh(self.b(h)) * h.tanh()


def test_gradients_with_a_graph_of_inputs_that_depend_on_each_other() -> None:
    rules = [Rule("scale", train=True), Rule(["a", "b"], lora=CONFIG_R)]
    lora = adapted(Gated(), rules=rules)
    fast = fxlora.optimize(lora, recompute=True)
    assert recomputed(fast)
    found: list[Any] = []
    for module in (lora, fast):
        trained = fxlora.lora_parameters(module)
        module.get_parameter("scale").register_hook(lambda gradient: gradient * 2)
        first = torch.autograd.grad(module(X).sin().sum(), trained, create_graph=True)
        norm = torch.stack([g.square().sum() for g in first]).sum()
        found.append([*first, *torch.autograd.grad(norm, trained)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class Overlapping(nn.Module):
    """Writes to a buffer through another one over the same memory."""

    part: torch.Tensor
    whole: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.register_buffer("whole", torch.zeros(8))
        self.register_buffer("part", self.whole[:4])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        y = torch.sigmoid(torch.exp(h * 0.1) + self.whole) * torch.exp(h)
        self.part.add_(1)
        return y


class WritesInputs(nn.Module):
    """Writes to the input of a chain, through a view, after the chain."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        y = torch.exp(h + 1).sin()
        h.view(-1).mul_(2)
        return y + h


@pytest.mark.parametrize("kind", [Overlapping, WritesInputs])
def test_what_is_written_later_is_not_read_again(kind: type[nn.Module]) -> None:
    lora = adapted(kind())
    fast = fxlora.optimize(lora, recompute=True)
    for found, gradient in zip(gradients(fast, X), gradients(lora, X), strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)


class Counts(nn.Module):
    """Writes to a buffer inside of a chain, which reads it before and after."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.register_buffer("seen", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        h = torch.tanh(h * self.seen.clone() * torch.tanh(h))
        g = h.sigmoid() * h
        self.seen.add_(1)
        return torch.tanh(g * g.tanh() + self.seen)  # of which autograd saves nothing


def test_a_write_inside_of_a_chain_keeps_it_as_it_is() -> None:
    lora = adapted(Counts())
    fast = fxlora.optimize(lora, recompute=True)
    for _ in range(3):
        for found, gradient in zip(gradients(fast, X), gradients(lora, X), strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)
    both = [module(X).sum() + module(X).sum() for module in (lora, fast)]  # the second one writes
    found, expected = (
        torch.autograd.grad(s, fxlora.lora_parameters(m))
        for s, m in zip(both[::-1], (fast, lora), strict=True)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.autocast
@pytest.mark.parametrize("kind", ["plain", "blocks", "autocast"])
def test_dropout_is_drawn_again(kind: str) -> None:
    x = X.float() if kind == "autocast" else X
    rules, modules = VARIANTS["dropout"], "layers.*" if kind == "blocks" else None
    lora = adapted(x=x, rules=rules, modules=modules).train()
    fast = fxlora.optimize(lora, recompute=True)
    assert fast.schedule is not None
    dropouts = ("aten.dropout.default", "aten.linear.default")
    chains = sum(n for chain, n in fast.schedule.recomputed if chain.ops == dropouts)
    assert chains == (10 if kind == "blocks" else 11)  # the size of a block's result is not known
    found: list[Any] = []
    for module in (lora, fast):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            first = module(x)
            second = module(x)  # draws other numbers before the first one's backward
        trained = fxlora.lora_parameters(module)
        grads = torch.autograd.grad(first.double().sin().sum(), trained, retain_graph=True)
        again = torch.autograd.grad(first.double().sin().sum(), trained)
        other = torch.autograd.grad(second.double().sin().sum(), trained)
        found.append([first, second, *grads, *again, *other, torch.rand(3)])
    assert not torch.equal(found[0][0], found[0][1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **({} if kind == "autocast" else EXACT))
    before, after = saved(lora, x), saved(fast, x)
    assert after < 0.85 * before


def test_dropout_is_drawn_again_for_a_batch_of_gradients() -> None:
    lora = adapted(rules=VARIANTS["dropout"]).train()
    basis = torch.randn(3, 3, 4, 5, dtype=F64)
    found: list[Any] = []
    for module in (lora, fxlora.optimize(lora, recompute=True)):
        torch.manual_seed(3)
        wrt = fxlora.lora_parameters(module)
        batch = torch.autograd.grad(module(X), wrt, basis, is_grads_batched=True)
        found.append([*batch, torch.rand(3)])
    for ours, theirs in zip(*found, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, **EXACT)


EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


# ---- the op -------------------------------------------------------------------------------------


def given(biases: bool = True, r: tuple[int, int] = (2, 3)) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator).requires_grad_()

    weights, downs = [made(4, 5), made(3, 5)], [made(r[0], 5), made(r[1], 5)]
    ups = [made(4, r[0]), made(3, r[1])]
    return made(2, 3, 5), weights, [made(4), None] if biases else [None, None], downs, ups, [1.5, 2]


def formula(x: Any, weights: Any, biases: Any, downs: Any, ups: Any, scales: Any) -> list[Any]:
    layers = zip(weights, biases, downs, ups, scales, strict=True)
    return [
        x @ w.T + (0 if b is None else b) + s * (x @ down.T @ up.T) for w, b, down, up, s in layers
    ]


def flat(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    x, weights, biases, downs, ups, _ = arguments
    return [x, *weights, *(b for b in biases if b is not None), *downs, *ups]


def test_the_op_and_its_gradients() -> None:
    arguments = given()
    tensors = flat(arguments)

    def run(*tensors: torch.Tensor) -> Any:
        x, w0, w1, b, *rest = tensors
        return tuple(LINEARS(x, [w0, w1], [b, None], rest[:2], rest[2:], [1.5, 2.0]))

    found, expected = run(*tensors), formula(*arguments)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)
    torch.library.opcheck(
        LINEARS, arguments, test_utils=("test_schema", "test_autograd_registration")
    )


def test_gradients_of_some_outputs_only() -> None:
    arguments = given()
    tensors = flat(arguments)
    for chosen in (0, 1):
        sums = [made(*arguments)[chosen].sin().sum() for made in (LINEARS, formula)]
        ours, theirs = (
            torch.autograd.grad(s, tensors, allow_unused=True, materialize_grads=True) for s in sums
        )
        for found, gradient in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["x", "weights", "downs", "ups", "all"])
def test_gradients_of_some_arguments_only(frozen: str) -> None:
    arguments = given(biases=False)
    x, weights, _, downs, ups, _ = arguments
    groups = {"x": [x], "weights": weights, "downs": downs, "ups": ups}
    for name, group in groups.items():
        for tensor in group:
            tensor.requires_grad_(frozen not in (name, "all"))
    outputs = LINEARS(*arguments)
    wrt = [t for t in flat(arguments) if t.requires_grad]
    assert any(out.requires_grad for out in outputs) is bool(wrt)
    if wrt:
        ours = torch.autograd.grad(torch.stack([out.sin().sum() for out in outputs]).sum(), wrt)
        theirs = torch.autograd.grad(
            torch.stack([out.sin().sum() for out in formula(*arguments)]).sum(), wrt
        )
        for found, gradient in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_layers_that_a_loss_does_not_use_have_no_gradient() -> None:
    arguments = given()
    for number, output in enumerate(LINEARS(*arguments)):
        for tensor in flat(arguments):
            tensor.grad = None
        output.sum().backward(retain_graph=True)
        for group in (arguments[1], arguments[3], arguments[4]):
            assert group[number].grad is not None and group[1 - number].grad is None
            assert group[number].grad.untyped_storage().nbytes() == group[number].numel() * 8


@pytest.mark.parametrize("of_x", [True, False])
def test_the_backward_is_not_under_autocast(of_x: bool) -> None:
    arguments = given()
    arguments[0].requires_grad_(of_x)
    floats = [[t if t is None else t.detach().float() for t in of] for of in arguments[1:5]]
    for tensor in (t for of in floats for t in of if t is not None):
        tensor.requires_grad_()
    x = arguments[0].detach().float().requires_grad_(of_x)
    wrt = [t for of in ([x] if of_x else [], *floats) for t in of if t is not None]
    results: list[Any] = []
    for made in (LINEARS, formula):
        outputs = made(x, floats[0], floats[1], floats[2], floats[3], [1.5, 2.0])
        loss = torch.stack([out.sin().sum() for out in outputs]).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=made is LINEARS):
            results.append(torch.autograd.grad(loss, wrt))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batches_of_gradients() -> None:
    arguments = given()
    outputs, expected = LINEARS(*arguments)[0], formula(*arguments)[0]
    batch = torch.randn(3, *outputs.shape, dtype=F64)
    results = (
        torch.autograd.grad(out, flat(arguments)[:1], batch, is_grads_batched=True)[0]
        for out in (outputs, expected)
    )
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_weight_may_change_if_no_gradient_reads_it() -> None:
    x, weights, *rest = given()
    x.requires_grad_(False)
    frozen = [weight.detach() for weight in weights]
    loss = torch.stack([out.sum() for out in LINEARS(x, frozen, *rest)]).sum()
    frozen[0].add_(1)
    loss.backward()
    assert rest[1][0].grad is not None


def test_on_the_meta_device() -> None:
    lora = copy.deepcopy(adapted(Gelu())).to("meta")
    fast = fxlora.optimize(lora, recompute=True)
    output = fast(X.to("meta"))
    output.sum().backward()
    assert output.is_meta and output.shape == (3, 4, 6)


def test_vectors_and_no_rows() -> None:
    _, *rest = given()
    for shape in ((5,), (0, 5), (2, 1, 3, 5)):
        x = torch.randn(*shape, dtype=F64)
        for found, expected in zip(LINEARS(x, *rest), formula(x, *rest), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_vmap() -> None:
    arguments = given()
    xs = torch.randn(4, 2, 3, 5, dtype=F64)
    found = torch.func.vmap(lambda x: LINEARS(x, *arguments[1:]))(xs)
    for ours, theirs in zip(found, formula(xs, *arguments[1:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
