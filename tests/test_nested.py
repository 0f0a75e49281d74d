"""Weights that nested graphs read are adapted, folded and found like others."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch._higher_order_ops.map import map as _map
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxlora
from fxlora import LoraConfig, Rule
from fxlora.fx.compare import difference
from fxlora.fx.nested import OPERANDS, checkpointed, every_call
from fxlora.reads.sites import find_sites

from .laws import check_laws, randomise
from .typed import grad_of, plan_of, untyped

map_over = untyped(_map)
R = LoraConfig(r=2, lora_alpha=3)
EVERY = [Rule(lora=R)]


class Pair(nn.Module):
    """Two layers, 5 → 7 → 5, in `block`, which the subclasses call in nested graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 5, bias=False)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(F.linear(x, self.up.weight, self.up.bias)), self.down.weight)


class Autocast(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.block(x)
        return y.to(x.dtype) * 2


class EnableGrad(Pair):
    """The first layer under no_grad, and both layers with gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = F.linear(x, self.up.weight)
        return self.block(x) + y[:, :5]


class OneBranch(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, self.block, lambda x: x * 1.5, (x,))


class BothBranches(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = lambda x: F.linear(F.linear(x, self.up.weight) * 2, self.down.weight)  # noqa: E731
        return torch.cond(x.sum() > 0, self.block, other, (x,)) + F.linear(x, self.up.weight)[:, :5]


class Twice(Pair):
    """A cond inside a cond."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x[0, 0] < 9, self.block, lambda x: x + 1, (x,))

        return torch.cond(x.sum() > 0, inner, lambda x: x * 1.5, (x,))


class Scan(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def step(carry: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            carry = torch.tanh(self.block(carry) + row)
            return carry, carry.clone()

        return scan(step, x[0], x, dim=0)[1]


class While(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def test(i: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return i < 3

        def body(i: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return i + 1, self.block(x)

        return while_loop(test, body, (torch.tensor(0), x))[1]


class Map(Pair):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return map_over(self.block, x)


class Checkpoint(Pair):
    reentrant: bool | None = False  # None: no checkpoints

    def checkpointed(self, function: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        if self.reentrant is None:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().block(x), 0.4, self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.checkpointed(self.block, x) * 2


class Reentrant(Checkpoint):
    reentrant = True


class CheckpointInAutocast(Checkpoint):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x + 1)


class Deep(Checkpoint):
    """Autocast and no_grad inside a checkpoint that is inside another one."""

    def block(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().block(x).to(x.dtype)
        with torch.no_grad():
            mean = F.linear(x, self.up.weight).mean()
        return y * mean

    def outer(self, x: torch.Tensor) -> torch.Tensor:
        return self.checkpointed(self.block, x) + F.linear(x, self.down.weight.T)[0, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.checkpointed(self.outer, x)


class Mixed(Checkpoint):
    """A convolution, an embedding, an addmm and an einsum in a checkpoint, with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.emb = nn.Embedding(11, 4)
        self.subscripts = {"w": "io", "v": "io"}
        self.w = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.v = nn.Parameter(torch.randn(6, 2))

    def block(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.norm(self.conv(x)).mean((2, 3)) + self.emb(ids)
        x = torch.addmm(self.bias, torch.tanh(x), self.w)
        return torch.einsum("ni,io->no", x, self.v)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.checkpointed(self.block, x, ids)


def plain(model: Any) -> nn.Module:
    """Turn a model's checkpoints off, so that it keeps every activation."""
    model.reentrant = None
    return model


def positive(rows: int = 3) -> torch.Tensor:
    return torch.rand(rows, 5).double() + 0.1


KINDS = [Autocast, EnableGrad, OneBranch, BothBranches, Twice, Scan, While, Map]
KINDS += [Checkpoint, Reentrant, CheckpointInAutocast, Deep]
ALIKE = (OneBranch, Map, CheckpointInAutocast)  # parts of the others, or like them


@functools.cache
def captured(kind: type[Pair]) -> tuple[Any, fxlora.CapturedModule]:
    """Return a model and its capture, which serve all tests: no verb changes them."""
    model = kind().double()
    return model, fxlora.capture(model, (positive(),))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in ALIKE else ()) for kind in KINDS]
)
def test_the_laws(kind: type[Pair]) -> None:
    model, gm = captured(kind)
    reference, capture = plain(kind()), lambda _: gm
    _, lora = check_laws(model, (positive(),), rules=EVERY, reference=reference, capture=capture)
    assert any(True for _ in every_call(gm.graphs["eval"], gm))
    assert [(e.site, e.op, e.form) for e in plan_of(lora)] == [
        ("up", "linear", "branch"),
        ("down", "linear", "branch"),
    ]
    fxlora.verify(lora, (positive(),))


def test_every_kind_of_op() -> None:
    args = (torch.randn(3, 3, 5, 7).double(), torch.tensor([1, 2, 3]))
    gm, lora = check_laws(Mixed(), args, rules=EVERY, reference=plain(Mixed()))
    assert {e.site: (e.op, e.form) for e in plan_of(lora)} == {
        "conv": ("conv2d", "branch"),
        "emb": ("embedding", "branch"),
        "w": ("addmm", "branch"),
        "v": ("einsum", "branch"),
    }
    sites = {site.name: site for site in find_sites(gm)}
    assert (sites["conv"].in_features, sites["conv"].out_features) == (3, 4)
    assert (sites["w"].in_features, sites["w"].out_features) == (4, 6)
    assert sites["conv"].readers[0].call_site == "conv"
    line = inspect.getsourcelines(Mixed.forward)[1] + 1  # torch.export only knows lines of forward
    assert sites["w"].readers[0].line == f"{__file__}:{line}"
    assert len(fxlora.match(gm, Rule(op="conv2d", min_features=3, lora=R))) == 1


# ---- nodes and operands -------------------------------------------------------------------------


def test_each_branch_of_a_cond_counts() -> None:
    gm = captured(BothBranches)[1]
    (site,) = [site for site in find_sites(gm) if site.name == "up"]
    assert sorted(len(reader.path) for reader in site.readers) == [0, 1, 1]
    lora = fxlora.inject(gm, fxlora.match(gm, Rule("up", lora=R)))
    (call,) = every_call(lora.graphs["eval"], lora)
    fetched = [n.target for n in call.operands[-2:]]
    assert fetched == ["up.lora_A.default.weight", "up.lora_B.default.weight"]
    for nested in call.graphs:  # A and B are passed in once, and used in each graph
        assert str(nested.graph).count("aten.linear.default") == 4
    (base,) = every_call(gm.graphs["eval"], gm)
    assert len(base.operands) == len(call.operands) - 2


def test_passes_leave_the_given_nested_graphs_alone() -> None:
    gm = captured(Deep)[1]

    def code(module: fxlora.CapturedModule) -> list[str]:
        calls = every_call(module.graphs["train"], module)
        return [graph.code for call in calls for graph in call.graphs]

    before = code(gm)
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=R)))
    adapted = code(lora)
    assert adapted != before
    fxlora.fold(lora)
    fxlora.remove(copy.deepcopy(lora))
    assert code(gm) == before
    assert code(lora) == adapted
    assert code(fxlora.fold(lora)) == before


def test_a_changed_nested_graph_is_a_difference() -> None:
    gm = captured(Checkpoint)[1]
    other = copy.deepcopy(gm)
    (call,) = every_call(other.graphs["eval"], other)
    node = next(n for n in call.graphs[0].graph.nodes if n.target is torch.ops.aten.tanh.default)
    node.target = torch.ops.aten.sigmoid.default
    assert "tanh" in str(difference(gm.graphs["eval"], other.graphs["eval"]))


def test_dropout_in_a_nested_graph_stands_in_the_train_graph_alone() -> None:
    gm = captured(Autocast)[1]
    assert gm.graphs["train"] is gm.graphs["eval"]
    config = LoraConfig(r=2, target_modules=["up"], lora_dropout=0.5)
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    text = {
        mode: "".join(str(n.graph) for call in every_call(graph, lora) for n in call.graphs)
        for mode, graph in lora.graphs.items()
    }
    assert "aten.dropout" in text["train"]
    assert "aten.dropout" not in text["eval"]
    randomise(lora)
    x = positive(64)
    assert not torch.equal(lora.train()(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))
    for module in (fxlora.fold(lora), fxlora.remove(lora)):
        assert module.graphs["train"] is module.graphs["eval"]
        assert len(module.nested_graphs()) == len(gm.nested_graphs())


def test_a_graph_that_several_calls_share_keeps_its_weights_outside() -> None:
    gm = copy.deepcopy(captured(OneBranch)[1])
    (call,) = every_call(gm.graphs["eval"], gm)
    with gm.graphs["eval"].inserting_after(call.node):
        again = gm.graphs["eval"].node_copy(call.node)
    call.node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    gm.graphs["train"] = gm.graphs["eval"]
    gm.refresh()
    plan = fxlora.match(gm, Rule("up", min_features=5, lora=R))
    assert [(e.op, e.form) for e in plan] == [("linear", "weight")]
    assert plan.entries[0].reason == "in a graph that several calls share"
    lora = fxlora.inject(gm, plan)
    randomise(lora)
    fxlora.verify(lora, (positive(),))


def test_two_weights_that_are_multiplied_inside() -> None:
    class Factored(Pair):
        subscripts: ClassVar = {"up.weight": "io"}  # as the right operand of a product

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return F.linear(x, self.down.weight @ self.up.weight)

    _, lora = check_laws(Factored(), (positive(),), rules=EVERY)
    assert {entry.form for entry in plan_of(lora)} == {"weight"}


def test_what_is_read_under_no_grad_alone_is_refused() -> None:
    class Frozen(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                y = self.up(x)
            return self.down(y)

    gm = fxlora.capture(Frozen(), (positive().float(),))
    with pytest.raises(fxlora.UnsupportedOpError, match=r"'up' .* only under torch\.no_grad\(\)"):
        fxlora.match(gm, Rule(lora=R))
    assert len(fxlora.match(gm, Rule("down", lora=R))) == 1


def test_an_unknown_higher_order_op_keeps_the_weight_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(OPERANDS, "cond")
    model, gm = captured(OneBranch)
    _, lora = check_laws(model, (positive(),), rules=EVERY, capture=lambda _: gm)
    assert [(e.op, e.form, e.reason) for e in plan_of(lora)] == [
        ("cond", "weight", "read by cond")
    ] * 2


# ---- precision ----------------------------------------------------------------------------------


def test_autocast_in_single_precision() -> None:
    lora = fxlora.adapt(Autocast(), (positive().float(),), rules=EVERY)
    randomise(lora, 2.0)
    fxlora.verify(lora, (positive(64).float(),))


# ---- checkpoints --------------------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts how often tanh runs."""

    tanh = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.tanh += func is torch.ops.aten.tanh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Checkpoint, Reentrant, CheckpointInAutocast])
def test_what_is_checkpointed_is_computed_again(kind: type[Pair]) -> None:
    x = positive().requires_grad_()
    source, gm = copy.deepcopy(captured(kind))
    lora = fxlora.inject(gm, fxlora.match(gm, EVERY))
    for module in (source, gm, lora, fxlora.fold(lora), fxlora.remove(lora)):
        with Count() as count:
            module.train()(x).sum().backward()
        assert count.tanh == 2


@pytest.mark.parametrize("kind", [Checkpoint, Reentrant])
def test_dropout_is_drawn_alike_in_both_passes(kind: type[Pair]) -> None:
    """With or without checkpoints, the same seed gives the same outputs and gradients."""
    x = positive(9)
    checkpointed, gm = captured(kind)
    other = fxlora.capture(plain(copy.deepcopy(checkpointed)), (x,))
    config = LoraConfig(r=2, target_modules=["up", "down"], lora_dropout=0.3)
    loras = [fxlora.inject(m, fxlora.match(m, config)).train() for m in (gm, other)]
    with torch.no_grad():
        for pair in zip(*map(fxlora.lora_parameters, loras), strict=True):
            pair[0].normal_()
            pair[1].copy_(pair[0])
    outputs = []
    for lora in loras:
        torch.manual_seed(5)
        outputs.append(lora(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for a, b in zip(*map(fxlora.lora_parameters, loras), strict=True):
        assert a.grad.abs().max() > 0
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("autocast", [False, True])
def test_buffers_are_written_as_in_the_source(autocast: bool) -> None:
    """A checkpoint around a batch norm updates its statistics in both of its passes."""

    class Source(Mixed):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return super().forward(torch.tanh(x), ids) * 2

    args = (torch.randn(3, 3, 5, 7).double(), torch.tensor([1, 2, 3]))
    source = Source().double().train()
    gm = fxlora.capture(source, args)
    lora = fxlora.inject(gm, fxlora.match(gm, EVERY))
    for module in (source, gm, lora):
        module.train()(*args).square().sum().backward()
    assert source.norm.num_batches_tracked == 2
    for name, buffer in source.named_buffers():
        for module in (gm, lora):
            assert torch.equal(module.get_buffer(name), buffer), name
    for name, parameter in source.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(grad_of(gm.get_parameter(name)), parameter.grad)


def test_checkpoints_keep_the_batch_dynamic() -> None:
    source = Checkpoint().eval()
    gm = fxlora.capture(source, (positive(1).float(),)).eval()
    for rows in (1, 2, 7):
        x = positive(rows).float()
        assert torch.equal(gm(x), source(x))


# ---- export and compile -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(Deep, marks=pytest.mark.slow), OneBranch])
def test_delivery(kind: type[Pair], tmp_path: Path) -> None:
    """Adapted and folded modules with nested graphs export and compile."""
    x = positive(4).float()
    lora = fxlora.adapt(kind(), (x,), rules=EVERY).eval()
    randomise(lora)
    for module in (lora, fxlora.fold(lora).eval()):
        with torch.no_grad():
            expected = module(x)
            path = fxlora.export(module, tmp_path / "m.pt2", (x,))
            assert torch.allclose(torch.export.load(path).module()(x), expected)
            torch._dynamo.reset()
            compiled = torch.compile(module, backend="eager")
            assert torch.allclose(compiled(x), expected, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(lora.train(), backend="aot_eager")
    compiled(x).sum().backward()
    for parameter in fxlora.lora_parameters(lora):
        assert parameter.grad.abs().max() > 0


def test_a_transformer_with_gradient_checkpointing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).double().train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]])
    rules = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")
    fixed = {"input_ids": None}  # twice as fast; no checkpoint depends on it
    gm = fxlora.capture(model, (), {"input_ids": ids}, dynamic_shapes=fixed)
    _, lora = check_laws(model, (), {"input_ids": ids}, rules=rules, capture=lambda _: gm)
    calls = every_call(gm.graphs["train"], gm)
    assert sum(call.node.target is checkpointed for call in calls) == 1
    assert {(e.op, e.form) for e in plan_of(lora)} == {("linear", "branch")}
    assert len(plan_of(lora)) == 7
    q = next(s for s in find_sites(gm) if s.name == "model.layers.0.self_attn.q_proj")
    assert {r.call_site for r in q.readers} == {q.name}
    assert all(n.target is not checkpointed for n in gm.graphs["eval"].nodes)
    randomise(lora)
    gradients = []
    for training in (True, False):  # the eval graph keeps every activation
        logits = lora.train(training)(input_ids=ids).logits
        gradients.append(torch.autograd.grad(logits.square().sum(), fxlora.lora_parameters(lora)))
    for a, b in zip(*gradients, strict=True):
        assert b.abs().max() > 0
        assert torch.equal(a, b)
