"""Law 8: what looks like a module behaves like one, or says that it does not."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

import fxlora
from fxlora import LoraConfig, SubmoduleError
from fxlora.fx.compare import difference

from .laws import assert_close, assert_same, randomise, run
from .typed import plan_of

CONFIG = LoraConfig(r=2, target_modules=["up", "down", "q", "emb"])
TENSOR = torch.get_default_dtype()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 5)
        self.o = nn.Linear(5, 6)
        self.drop = nn.Dropout(0.3)

    def forward(self, h: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        scores = self.q(h)
        return self.drop(self.o(scores if mask is None else scores * mask))


class Layer(nn.Module):
    """Takes keywords and a constant, returns a dict, needs the batch's size, and has a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.attention = Attention()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, h: torch.Tensor, mask: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        h = h + self.attention(self.bn(h), mask=mask)
        flat = self.down(torch.relu(self.up(h))).view(h.shape[0], -1) * scale
        return {"h": h + flat.view(h.shape), "mask": mask}


class Model(nn.Module):
    """Layers between an embedding and a head that are tied."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (ids > 3).unsqueeze(-1).double()
        h = self.emb(ids)
        for number, layer in enumerate(self.layers):
            h = layer(h, mask=mask, scale=0.5 if number else 2.0)["h"]
        return self.head(h).reshape(ids.shape[0], -1)


def ids(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 11, (batch, 4))


@pytest.fixture(scope="module")
def source() -> Model:
    torch.manual_seed(0)
    return Model().double().eval()


@pytest.fixture(scope="module")
def captured(source: Model) -> fxlora.CapturedModule:
    return fxlora.capture(source, ids(), modules=["layers.*", "layers.*.attention"])


@pytest.fixture(scope="module")
def adapted(captured: fxlora.CapturedModule) -> fxlora.CapturedModule:
    lora = fxlora.inject(captured, fxlora.match(captured, CONFIG))
    randomise(lora)
    return lora


@pytest.fixture
def lora(adapted: fxlora.CapturedModule) -> fxlora.CapturedModule:
    return copy.deepcopy(adapted)


@pytest.fixture(scope="module")
def captured_flat(source: Model) -> fxlora.CapturedModule:
    return fxlora.capture(source, ids())


@pytest.fixture(scope="module")
def adapted_flat(captured_flat: fxlora.CapturedModule) -> fxlora.CapturedModule:
    lora = fxlora.inject(captured_flat, fxlora.match(captured_flat, CONFIG))
    randomise(lora)
    return lora


@pytest.fixture
def flat(adapted_flat: fxlora.CapturedModule) -> fxlora.CapturedModule:
    return copy.deepcopy(adapted_flat)


# ---- outlined submodules --------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_the_source_bit_for_bit(
    source: Model, captured: fxlora.CapturedModule, training: bool, batch: int
) -> None:
    x = ids(batch)
    model, gm = copy.deepcopy(source).train(training), copy.deepcopy(captured).train(training)
    assert_same(run(gm, (x,), {}), run(model, (x,), {}))
    assert_same(list(gm.buffers()), list(model.buffers()))


def test_the_same_as_a_flat_module(
    source: Model, captured: Any, captured_flat: Any, adapted: Any, flat: Any
) -> None:
    x, lora = ids(), flat
    for mode in ("train", "eval"):
        assert difference(captured.graphs[mode], captured_flat.graphs[mode]) is None
    assert list(captured.state_dict()) == list(source.state_dict())
    lora.load_state_dict(adapted.state_dict())
    found = adapted(x)
    assert float((found - captured(x)).abs().max()) > 1e-3
    assert_same([found], [lora(x)])
    assert_close([fxlora.fold(adapted)(x)], [found])
    assert_same([fxlora.remove(adapted)(x)], [captured(x)])
    assert fxlora.verify(adapted, x)
    assert fxlora.fold(adapted).outlined_modules.keys() == captured.outlined_modules.keys()


def test_saved_and_loaded(
    adapted: fxlora.CapturedModule, captured: fxlora.CapturedModule, tmp_path: Any
) -> None:
    fxlora.save_adapter(adapted, tmp_path)
    x = ids()
    assert_same([fxlora.load_adapter(captured, tmp_path)(x)], [adapted(x)])


def test_hooks_get_what_the_source_gives(source: Model, captured: fxlora.CapturedModule) -> None:
    def seen(model: Any) -> list[Any]:
        found: list[Any] = []
        for path in ("layers.1", "layers.2.attention"):
            model.get_submodule(path).register_forward_hook(
                lambda m, args, kwargs, output: found.append((args, kwargs, output)),
                with_kwargs=True,
            )
        model(torch.arange(12).view(3, 4) % 11)
        return found

    ours, theirs = seen(copy.deepcopy(captured)), seen(copy.deepcopy(source))
    assert len(ours) == len(theirs) == 2
    flat = [pytree.tree_flatten(calls) for calls in (ours, theirs)]
    assert flat[0][1] == flat[1][1]
    for mine, other in zip(flat[0][0], flat[1][0], strict=True):
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def test_a_hook_that_changes_the_output(lora: fxlora.CapturedModule) -> None:
    before = lora(x := ids())
    lora.layers[1].register_forward_hook(lambda m, a, out: {**out, "h": out["h"] * 2})
    assert float((lora(x) - before).detach().abs().max()) > 1e-3
    assert_same([copy.deepcopy(lora)(x)], [lora(x)])  # a deep copy has the hooks, too


def test_a_part_in_eval_mode(lora: fxlora.CapturedModule) -> None:
    lora.train()
    lora.layers[0].eval()
    lora(ids())
    assert int(lora.layers[0].bn.num_batches_tracked) == 0
    assert int(lora.layers[1].bn.num_batches_tracked) == 1


def test_a_replaced_submodule_is_called(lora: fxlora.CapturedModule) -> None:
    before, block = lora(x := ids()), lora.layers[1]
    lora.layers[1] = Twice()
    assert float((lora(x) - before).detach().abs().max()) > 1e-3
    for verb in (fxlora.fold, fxlora.remove, fxlora.lora_parameters, copy.deepcopy):
        with pytest.raises(SubmoduleError, match="was replaced by a Twice"):
            verb(lora)
    lora.set_submodule("layers.1", lora.outlined_modules["layers.1"])  # the advice
    assert lora.layers[1] is block
    assert_same([lora(x)], [before])
    assert fxlora.fold(lora) is not None


def test_checkpointed_submodules(lora: fxlora.CapturedModule) -> None:
    def gradients(module: fxlora.CapturedModule) -> list[torch.Tensor]:
        torch.manual_seed(1)
        module.train()(torch.arange(12).view(3, 4) % 11).square().sum().backward()
        return [p.grad for p in fxlora.lora_parameters(module) if p.grad is not None]

    wrapped = copy.deepcopy(lora)
    for number in range(3):
        wrapped.layers[number] = checkpoint_wrapper(wrapped.layers[number])
    x = ids()
    assert_same([fxlora.fold(wrapped)(x)], [fxlora.fold(lora)(x)])
    found, expected = gradients(wrapped), gradients(lora)
    assert_close(found, expected)
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in lora.named_parameters()]


def test_submodules_compiled_one_by_one(lora: fxlora.CapturedModule) -> None:
    expected = lora(x := ids())
    for number in (0, 1):
        lora.layers[number].compile(backend="eager", fullgraph=True)
    assert_close([lora(x)], [expected])


def test_a_submodule_called_by_itself(source: Model, captured: fxlora.CapturedModule) -> None:
    h, mask = torch.randn(2, 4, 6).double(), torch.ones(2, 4, 1).double()
    found = captured.layers[0](h, mask=mask, scale=2.0)
    assert_same([found["h"]], [source.layers[0](h, mask=mask, scale=2.0)["h"]])
    with pytest.raises(fxlora.InputError, match=r"layers\.0"):
        captured.layers[0](h[:, :3], mask=mask[:, :3], scale=2.0)
    with pytest.raises(fxlora.InputError, match="scale"):
        captured.layers[0](h, mask=mask, scale=3.0)


def test_unknown_modules_are_refused_with_a_suggestion(source: Model) -> None:
    with pytest.raises(fxlora.NoMatchError, match="layers"):
        fxlora.capture(source, ids(), modules="layer.*")
    gm = fxlora.capture(Model(2).double(), ids(), modules=Attention)
    assert list(gm.outlined_modules) == ["layers.0.attention", "layers.1.attention"]


class Side(nn.Module):
    """Passes a value to the code around it by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        self.kept = [y * 2]
        return y


class ReadsSide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.side = Side()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.side(x) + self.side.kept[0]


def test_values_that_go_around_the_call_are_refused() -> None:
    with pytest.raises(SubmoduleError, match="other than by its return"):
        fxlora.capture(ReadsSide(), torch.randn(3, 6), modules="side")


# ---- assumptions of the code around an outlined submodule --------------------------------------


def outlined(model: nn.Module, modules: Any, *args: torch.Tensor) -> tuple[nn.Module, Any]:
    """Return a copy of the model, and the model captured with submodules outlined."""
    gm = fxlora.capture(model, args or torch.randn(3, 4), modules=modules)
    return copy.deepcopy(model), gm


class Part(nn.Module):
    """A linear layer in a model whose forward is given by two functions."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("step", torch.zeros(()))
        self.given = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.given(self, *args, **kwargs)


class Around(nn.Module):
    def __init__(self, part: Callable[..., Any], around: Callable[..., Any]) -> None:
        super().__init__()
        self.part = Part(part)
        self.around = around

    def forward(self, x: torch.Tensor) -> Any:
        return self.around(self.part, x)


def stepped(part: Any, x: torch.Tensor) -> torch.Tensor:
    part.step.add_(1)
    return part.lin(x)


def added(part: Any, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    total.add_(1)
    return part.lin(x)


def with_total(part: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(4)
    return part(x, total) + total


@pytest.mark.parametrize(
    ("part", "around"),
    [
        (stepped, lambda part, x: part(x) * part.step),
        (stepped, lambda part, x: part(part(x) * part.step) + part.step / 2),
        (lambda part, x: stepped(part, x) * (part.step + 2), lambda part, x: part(x)),
        (added, with_total),
    ],
)
def test_what_a_submodule_writes_in_place_is_written_once(part: Any, around: Any) -> None:
    x = torch.randn(3, 4)
    model, gm = outlined(Around(part, around), "part")
    for _ in range(2):  # the second time from another state
        found, expected = gm(x), model(x)
        assert_same([found, *gm.buffers()], [expected, *model.buffers()])
    if part is not added:
        assert float(gm.part.step) > 1


def twice_returned(part: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = part.lin(x)
    return h, h


def passed_on(part: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return part.lin(x), x


def own_weight(part: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return part.lin(x), part.lin.weight


def both(part: Any, x: torch.Tensor) -> torch.Tensor:
    one, other = part(x)
    return (one * 2).sum() + (other * 3).sum()


def hooked(*models: Any, hook: Callable[..., Any]) -> None:
    for model in models:
        model.part.register_forward_hook(hook)


@pytest.mark.parametrize("part", [twice_returned, passed_on, own_weight])
def test_an_output_that_is_the_same_tensor_as_another_value(part: Any) -> None:
    x = torch.randn(3, 4)
    plain = outlined(Around(part, both), "part")
    model, gm = copy.deepcopy(plain)
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    hooked(model, gm, hook=lambda m, args, output: (output[0], output[1]))
    assert_same([gm(x), compiled(x)], [model(x)] * 2)
    hooked(model, gm, hook=lambda m, args, output: (output[0].mul_(2), output[1]))
    assert_same([gm(x)], [model(x)])
    changes: list[Callable[[torch.Tensor], Any]] = [
        lambda out: out * 3,
        lambda out: out.detach() if out.requires_grad else out + 1,
        lambda out: out.view_as(out) if out.requires_grad else 1,
    ]
    for change in changes:
        model, gm = copy.deepcopy(plain)
        hooked(model, gm, hook=lambda m, a, out, change=change: (out[0], change(out[1])))
        if change is changes[0]:
            assert not torch.equal(model(x), plain[0](x))  # it has an effect
        with pytest.raises(SubmoduleError, match=r"'part'.* output 1"):
            gm(x)
    if part is not twice_returned:  # there, the graph does not tell which output is used
        unused, gm = outlined(Around(part, lambda part, x: part(x)[0] * 2), "part")
        hooked(unused, gm, hook=lambda m, args, out: (out[0], out[1] * 3))
        assert_same([gm(x)], [unused(x)])


def test_a_result_of_another_shape_or_structure_is_refused() -> None:
    x = torch.randn(3, 4)
    around: Callable[..., Any] = lambda part, x: part(x)["h"].sum(0) / x.shape[0]  # noqa: E731
    part: Callable[..., Any] = lambda part, x: {"h": part.lin(x), "n": None, "y": x + 1}  # noqa: E731
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda out: {**out, "h": out["h"][:2]}, "has size 2 in dimension 0, not 3"),
        (lambda out: {**out, "h": out["h"][:, :1]}, "has size 1 in dimension 1, not 4"),
        (lambda out: {**out, "h": out["h"][None]}, "has 3 dimensions"),
        (lambda out: {"y": out["y"], "n": None, "h": out["h"]}, "structure"),
        (lambda out: {**out, "n": 1}, "constant"),
        (lambda out: (out["h"], None, out["y"]), "structure"),
    ]
    plain = outlined(Around(part, around), "part")
    for change, message in changes:
        model, gm = copy.deepcopy(plain)
        assert_same([gm(x)], [model(x)])
        hooked(model, gm, hook=lambda m, args, out, change=change: change(out))
        with pytest.raises(SubmoduleError, match=message):
            gm(x)
    model, gm = outlined(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), "1")
    other = nn.Linear(4, 7)
    for module in (model, gm):  # a result that is only returned may have another size
        module.register_module("1", other)
    assert_same([gm(x)], [model(x)])


@pytest.mark.parametrize("part", [nn.Identity(), Part(lambda part, x: part.lin.weight)])
def test_a_submodule_that_computes_nothing_is_refused(part: nn.Module) -> None:
    with pytest.raises(SubmoduleError, match=r"'0'.* computes nothing"):
        outlined(nn.Sequential(part, nn.Linear(4, 4)), "0")


def attention(part: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (part.lin(q) @ k.T).softmax(-1) @ v


def test_arguments_that_were_one_tensor() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    model, gm = outlined(Around(attention, lambda part, x: part(x * 2, *[x] * 2)), "part")
    with pytest.raises(fxlora.InputError, match="args_1 and args_2"):
        gm.part(x, x, x.detach())  # the same values, but no gradient
    model, gm = outlined(Around(attention, lambda part, x: part(x, x, x)), "part")
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert_same([gm(x), gm.part(x, x, x), compiled(x)], [model(x)] * 3)
    others = torch.randn(3, 3, 4)
    assert not torch.equal(model.get_submodule("part")(*others), model(others[0]))
    with pytest.raises(fxlora.InputError, match=r"'part': args_0 and args_1: .* one value"):
        gm.part(*others)
    gm.part.register_forward_pre_hook(lambda m, args: (args[0], args[1], args[2] * 2))
    with pytest.raises(fxlora.InputError, match="args_0 and args_2"):
        gm(x)


@pytest.mark.usefixtures("one_process")
def test_sharded_submodules_with_tensors_that_are_one() -> None:
    part: Callable[..., Any] = lambda part, x, y: (part.lin(x) * y, y)  # noqa: E731

    def around(part: Any, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        y, h = part(h, h)
        return y + h

    x = torch.randn(3, 4).double().requires_grad_(True)
    model, gm = outlined(Around(part, around).double(), "part", x)
    gm.requires_grad_(True)
    fully_shard(gm.part)
    found, expected = gm(x), model(x)
    assert_same([found], [expected])
    wanted = torch.autograd.grad(expected.sum(), [x])
    assert_close(list(torch.autograd.grad(found.sum(), [x])), list(wanted))


def test_a_submodule_refuses_the_sizes_that_the_model_refuses() -> None:
    def branch(part: Any, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        return part.lin(x) * (7 if x.shape[0] > 4 else 1) + y.sum() * size

    def not_one(part: Any, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
        return part.lin(x) * (0 if size == 1 else 1) + y.sum() * size

    def around(part: Any, x: torch.Tensor) -> torch.Tensor:
        return part(x, torch.cat([x, x]), x.shape[0])

    for part in (branch, not_one):
        model, gm = outlined(Around(part, around), "part")
        for size in (1, 2, 3, 4, 6):
            x, y = torch.randn(size, 4), torch.randn(2 * size, 4)
            whole, ours = gm.contract.holds_for((x,), {}), gm.part.contract.holds_for
            assert ours((x, y, size), {}) is whole
            assert not ours((x, y[1:], size), {}) and not ours((x, y, size + 1), {})
            if whole:
                expected = model.get_submodule("part")(x, y, size)
                assert_same([gm.part(x, y, size), gm(x)], [expected, model(x)])
        assert gm.contract.holds_for((torch.randn(3, 4),), {})
        assert not all(gm.contract.holds_for((torch.randn(n, 4),), {}) for n in (1, 6))


@pytest.mark.autocast
def test_a_submodule_refuses_other_dtypes_than_the_models() -> None:
    def normed(part: Any, x: torch.Tensor) -> torch.Tensor:
        return part.lin(x) + torch.finfo(x.dtype).eps * 1e4

    x = torch.randn(3, 4)
    model, gm = outlined(Around(normed, lambda part, x: part(x * 2)), "part")
    with pytest.raises(fxlora.InputError, match=r"'part': args_0: captured as torch\.float32"):
        gm.part(x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same([gm.part(x)], [model.get_submodule("part")(x)])
    assert_same([gm.double()(x.double())], [gm.part(x.double() * 2)])
    assert gm.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_a_submodule_called_on_several_shapes_and_dtypes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(torch.cat([x, x]).double())
            return self.act(x).sum() + y.sum() + self.act(x[:2]).sum()

    model, gm = outlined(Model(), "act")
    for size in (2, 3, 8):
        assert_same([gm(x := torch.randn(size, 4))], [model(x)])
    with pytest.raises(fxlora.InputError):
        gm.act(torch.randn(3, 5))


# ---- everything that a user can do to a submodule ---------------------------------------------


class Twice(nn.Module):
    def forward(self, h: torch.Tensor, mask: Any = None, scale: float = 1.0) -> Any:
        return {"h": 2 * h, "mask": mask}


def doubled(h: Any) -> Any:
    return {**h, "h": h["h"] * 2}


def assign_forward(m: Any) -> None:
    forward = m.layers[0].forward
    m.layers[0].forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))


def call(m: Any) -> None:
    h, mask = torch.ones(2, 4, 6).double(), torch.ones(2, 4, 1).double()
    assert m.layers[0](h, mask=mask, scale=2.0)["h"].shape == h.shape


def load(m: Any) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in m.layers[0].state_dict().items()}
    m.layers[0].load_state_dict(zeros)


def look(m: Any) -> None:
    layer = m.layers[0]
    assert isinstance(layer, Layer) and isinstance(layer.up, nn.Linear) and len(m.layers) == 3
    assert [name for name, _ in layer.named_children()] == ["bn", "attention", "up", "down"]
    assert len(list(layer.parameters())) == len(list(layer.named_parameters())) == 10


def shard(m: Any) -> None:
    fully_shard(m.layers[0])


def checkpoint(m: Any) -> None:
    m.layers[0] = checkpoint_wrapper(m.layers[0])


def compile_it(m: Any) -> None:
    m.layers[0] = torch.compile(m.layers[0], backend="eager")


# Each action: a function, and whether it works on an outlined submodule, and on another one.
ACTIONS: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "read it: its class, children, parameters, `state_dict()`": (look, "works", "works"),
    "write to it: `load_state_dict`": (load, "works", "works"),
    "set its parameter: `layer.up.weight = nn.Parameter(…)`": (
        lambda m: setattr(m.layers[0].up, "weight", nn.Parameter(torch.ones(8, 6).double())),
        *("works", "works"),
    ),
    "freeze it: `requires_grad_(False)`": (
        lambda m: m.layers[0].requires_grad_(False),
        *("works", "works"),
    ),
    "call it": (call, "works", "raises"),
    "`register_forward_hook`": (
        lambda m: m.layers[0].register_forward_hook(lambda part, args, output: doubled(output)),
        *("works", "raises"),
    ),
    "`register_forward_pre_hook`": (
        lambda m: m.layers[0].register_forward_pre_hook(lambda part, args: (args[0] * 2,)),
        *("works", "raises"),
    ),
    "`register_full_backward_hook`": (
        lambda m: m.layers[0].register_full_backward_hook(lambda part, before, after: None),
        *("works", "raises"),
    ),
    "`eval()` of it in a training model": (
        lambda m: (m.train(), m.layers[0].eval()),
        *("works", "raises"),
    ),
    "`train()` of it in a model in eval mode": (
        lambda m: m.layers[0].train(),
        *("works", "raises"),
    ),
    "replace it: `model.layers[0] = other`": (
        lambda m: m.layers.__setitem__(0, Twice()),
        *("works", "raises"),
    ),
    "replace it: `model.set_submodule(…)`": (
        lambda m: m.set_submodule("layers.0", Twice()),
        *("works", "raises"),
    ),
    "assign its `forward`": (assign_forward, "works", "raises"),
    "set its `__class__`": (
        lambda m: setattr(m.layers[0], "__class__", type("Other", (Twice, type(m.layers[0])), {})),
        *("works", "raises"),
    ),
    "`checkpoint_wrapper`": (checkpoint, "works", "raises"),
    "`torch.compile` it, and put it back": (compile_it, "works", "raises"),
    "`compile()` it in place": (
        lambda m: m.layers[0].compile(backend="eager"),
        *("works", "raises"),
    ),
    "`fully_shard`": (shard, "works", "raises"),
    "add another: `model.layers.append(…)`": (
        lambda m: m.layers.append(Layer().double()),
        *("raises", "raises"),
    ),
    "delete it: `del model.layers[1]`": (
        lambda m: m.layers.__delitem__(1),
        *("raises", "raises"),
    ),
    "set an attribute: `layer.gradient_checkpointing = True`": (
        lambda m: setattr(m.layers[0], "gradient_checkpointing", True),
        *("raises", "raises"),
    ),
    "anything of these to a submodule inside it": (
        lambda m: m.layers[0].up.register_forward_hook(print),
        *("raises", "raises"),
    ),
    "`torch.nn.utils.parametrizations`": (
        lambda m: nn.utils.parametrizations.weight_norm(m.layers[0].up),
        *("raises", "raises"),
    ),
    "`torch.nn.utils.prune`": (
        lambda m: prune.l1_unstructured(m.layers[0].up, "weight", 0.5),
        *("raises", "raises"),
    ),
    "`quantize_dynamic`": (
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
        *("raises", "raises"),
    ),
    "`SyncBatchNorm.convert_sync_batchnorm`": (
        lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m),
        *("raises", "raises"),
    ),
    "`swa_utils.update_bn`": (
        lambda m: torch.optim.swa_utils.update_bn([ids()], m),
        *("raises", "raises"),
    ),
}


@pytest.fixture(scope="module")
def plain(captured: Any, captured_flat: Any) -> dict[str, fxlora.CapturedModule]:
    return {"outlined": captured, "flat": captured_flat}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["outlined", "flat"])
@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.filterwarnings("ignore:torch.ao")
@pytest.mark.usefixtures("one_process")
def test_a_submodule_does_what_the_sources_does_or_raises(
    source: Model, plain: dict[str, fxlora.CapturedModule], name: str, kind: str
) -> None:
    action, *expected = ACTIONS[name]
    gm = copy.deepcopy(plain[kind])
    before = gm(x := ids())
    if expected[kind == "flat"] == "raises":
        with pytest.raises(SubmoduleError):
            _ = action(gm), gm(x)
        assert_same([gm.eval()(x)], [before])
        return
    model = copy.deepcopy(source)
    for module in (gm, model):
        action(module)
    assert_same(run(gm, (x,), {}), run(model, (x,), {}))


def test_the_table_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "submodules.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    assert rows[1:] == [[name, *cells] for name, (_, *cells) in ACTIONS.items()]


def _note_call(called: list[Any], module: nn.Module, *_: Any) -> None:
    called.append(module)


@pytest.mark.parametrize("path", ["layers", "layers.1", "layers.1.up"])
def test_the_advice_makes_modules_that_take_hooks(source: Model, path: str) -> None:
    flat, x = fxlora.capture(source, ids()), ids()
    for action in (
        lambda part: part.register_forward_hook(print),
        lambda part: part(x),
        lambda part: part.extend([nn.Identity()]) if path == "layers" else part.compile(),
    ):
        with pytest.raises(SubmoduleError) as raised:
            action(flat.get_submodule(path))
        asked = re.findall(r"modules='([^']+)'", str(raised.value))
        assert asked or "adding it" in str(raised.value)
        for paths in asked:
            gm = fxlora.capture(source, x, modules=paths)
            called: list[Any] = []
            hooked = gm.get_submodule(path if paths == path else f"{path}.1")
            hooked.register_forward_hook(functools.partial(_note_call, called))
            gm(x)
            assert called


def test_a_part_in_another_mode_raises_where_it_matters(flat: fxlora.CapturedModule) -> None:
    flat.train()
    for module in flat.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    with pytest.raises(SubmoduleError, match=r"modules='layers\.0\.bn'"):
        flat(ids())
    flat.train()
    flat.layers[0].up.eval()  # the same ops in both modes
    assert flat(ids()) is not None
    for module in flat.modules():  # Lightning restores the flags one by one
        module.training = False
    assert not flat.training
    assert_same([flat(x := ids())], [flat(x)])


def test_flags_follow_the_module_unless_they_were_set_on_their_own(flat: Any) -> None:
    def raises(module: fxlora.CapturedModule) -> bool:
        try:
            return module(ids()) is None
        except SubmoduleError:
            return True

    bn = flat.layers[0].bn
    flat.eval()
    flat.training = True  # as Lightning does
    assert bn.training and not raises(flat)
    assert not torch.equal(flat(x := ids()), flat(x))  # dropout
    bn.training = False
    for module in (flat, copy.deepcopy(flat), fxlora.fold(flat)):
        assert raises(module)
    flat.training = False
    assert not raises(flat)
    flat.training = True
    assert raises(flat)
    flags = [(module, module.training) for module in flat.modules()]
    for order in (flags, flags[::-1]):  # saved and restored one by one
        flat.eval()
        for module, training in order:
            module.training = training
        assert raises(flat)
    flat.train()
    assert not raises(flat)


# ---- readers outside the graph --------------------------------------------------------------


def test_an_adapted_weight_read_outside_the_graph(
    source: Model, flat: fxlora.CapturedModule
) -> None:
    h = torch.randn(3, 6).double()
    entry = next(e for e in plan_of(flat) if e.op == "linear")
    a, b = (flat.get_parameter(name) for name in (entry.name_a, entry.name_b))
    path = entry.parameter.removesuffix(".weight")
    module: Any = flat.get_submodule(path)
    weight = source.get_parameter(entry.parameter)
    expected = F.linear(h, weight + 4.0 * b @ a)
    found = F.linear(h, module.weight)
    assert float((expected - F.linear(h, weight)).detach().abs().max()) > 1e-3
    assert_close([found], [expected])
    wanted = torch.autograd.grad(expected.square().sum(), [a, b])
    assert_close(list(torch.autograd.grad(found.square().sum(), [a, b])), list(wanted))
    same: Any = fxlora.hosted(source, flat).get_submodule(path)
    assert_close([same.weight.norm()], [module.weight.norm()])
    assert_same([torch.fx.Interpreter(flat).run(x := ids())], [flat(x)])


READS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "data": lambda w: w.data.abs().max(),
    "detach": lambda w: w.detach().sum(),
    "index": lambda w: w[0] * 2 + w[:1].sum(),
    "transposed": lambda w: w.T @ w + w.t().contiguous().norm(),
    "unbind": lambda w: torch.stack(w.unbind()).mean() + w.split(2)[0].sum(),
    "as it is": lambda w: w.to(w.dtype).reshape(w.shape).exp(),
    "copied": lambda w: torch.zeros_like(w).copy_(w).mul_(2),
    "added": lambda w: torch.zeros_like(w).add_(w).add_(1),
    "clone": lambda w: w.detach().clone().mul_(3),
    "deepcopy": lambda w: copy.deepcopy(w.detach()).zero_() + w,
}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("how", READS)
def test_reads_of_an_adapted_weight(flat: Any, how: str, backend: str | None) -> None:
    read, base = READS[how], flat.get_parameter("layers.0.up.weight")
    plain = flat.layers[0].up.weight.detach().clone()
    assert type(plain) is torch.Tensor and not torch.equal(plain, base)
    call: Any = torch.compile(read, backend=backend) if backend else read
    found = call(flat.layers[0].up.weight)
    assert_close([found.detach()], [read(plain)])


def augmented(part: Any) -> None:
    part.weight *= 0.5


# Each does something to the weight of the source's part: to its value, its flag or its gradient.
WEIGHT_WRITES: dict[str, Callable[[Any], object]] = {
    "zero_": lambda part: part.weight.zero_(),
    "index": lambda part: part.weight.__setitem__(1, 0),
    "augmented": augmented,
    "data": lambda part: part.weight.data.zero_(),
    "set data": lambda part: setattr(part.weight, "data", torch.zeros(8, 6).double()),
    "a row": lambda part: part.weight.detach()[0].fill_(9),
    "a view": lambda part: part.weight.data.t().reshape(6, 8).mul_(2),
    "unbind": lambda part: part.weight.unbind()[0].zero_(),
    "out": lambda part: torch.ones(8, 6, out=part.weight),
    "foreach": lambda part: torch._foreach_mul_([part.weight], 2.0),
    "in place": lambda part: F.relu(part.weight, inplace=True),
    "norm": lambda part: F.embedding(torch.tensor([0]), part.weight, max_norm=1e-3),
    "renorm": lambda part: torch.embedding_renorm_(part.weight, torch.tensor([0]), 1e-3, 2.0),
    "init": lambda part: nn.init.xavier_uniform_(part.weight),
    "init normal": lambda part: nn.init.normal_(part.weight),
    "reset": nn.Linear.reset_parameters,
    "freeze": lambda part: part.weight.requires_grad_(False),
    "set its flag": lambda part: setattr(part.weight, "requires_grad", False),
    "hook": lambda part: part.weight.register_hook(lambda grad: grad * 0),
    "set grad": lambda part: setattr(part.weight, "grad", torch.ones(8, 6).double()),
}


@pytest.mark.parametrize("how", WEIGHT_WRITES)
def test_writes_to_an_adapted_weight_raise(source: Model, flat: Any, how: str) -> None:
    model, x = copy.deepcopy(source), ids()
    part: Any = model.layers[0].up
    values = [part.weight.detach().clone(), part.weight.grad, part.weight.requires_grad]
    with torch.no_grad():
        WEIGHT_WRITES[how](part)
    changed = [part.weight.detach(), part.weight.grad, part.weight.requires_grad]
    assert str(changed) != str(values) or part.weight._backward_hooks
    before = flat(x)
    with torch.no_grad(), pytest.raises(SubmoduleError, match="get_parameter"):
        WEIGHT_WRITES[how](flat.layers[0].up)
    assert_same([flat(x)], [before])
    with torch.no_grad():
        flat.get_parameter("layers.0.up.weight").zero_()  # the advice
    assert not torch.equal(flat(x), before)


def test_an_array_of_an_adapted_weight_is_read_only(flat: Any) -> None:
    weight = flat.layers[0].up.weight.detach()
    array = weight.numpy()
    assert array.tolist() == weight.tolist()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_merged_is_the_users_own_model(source: Model, flat: fxlora.CapturedModule) -> None:
    before = copy.deepcopy(source.state_dict())
    folded = fxlora.fold(flat).eval()
    with pytest.warns(fxlora.FxLoraWarning, match=r"merged splits a tie: emb\.weight"):
        model = fxlora.merged(source, folded)
    assert type(model) is Model
    assert_same([model(x := ids())], [folded(x)])
    assert float((model(x) - source(x)).abs().max()) > 1e-3
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    with pytest.raises(fxlora.InjectError, match="fold"):
        fxlora.merged(source, flat)


# ---- copies and moves ---------------------------------------------------------------------------


def test_moves_and_copies_keep_hooks() -> None:
    def twice(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2

    source = nn.Sequential(Attention(), Attention()).double().eval()
    gm = fxlora.capture(source, x := torch.randn(2, 4, 6).double(), modules="*")
    before, part = gm(x), gm.get_submodule("1")
    part.register_forward_hook(twice)
    hooked = gm(x)
    assert float((hooked - before).abs().max()) > 1e-3
    gm.float().double()
    assert gm.get_submodule("1") is part
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["q"]))).eval()
    for module in (gm, lora, fxlora.fold(lora), fxlora.remove(lora), copy.deepcopy(lora)):
        assert float((module(x) - hooked).abs().max()) < 1e-5  # float() rounded the weights


def test_a_copy_does_not_lose_an_assigned_forward_silently(lora: fxlora.CapturedModule) -> None:
    assign_forward(lora)
    for verb in (fxlora.fold, fxlora.remove, copy.deepcopy):
        with pytest.raises(SubmoduleError, match=r"lose the forward that was assigned"):
            verb(lora)
    del lora.get_submodule("layers.0").forward  # the advice
    assert fxlora.fold(lora) is not None


def test_a_merged_copy_has_the_sources_frozen_batch_norms() -> None:
    source = copy.deepcopy(Layer()).double().train()
    source.bn.eval()
    h, mask = torch.randn(3, 4, 6).double(), torch.ones(3, 4, 1).double()
    lora = fxlora.adapt(source, (h, mask), rules=LoraConfig(r=2, target_modules=["up"]))
    randomise(lora)
    folded = fxlora.fold(lora)
    model = fxlora.merged(source, folded)
    assert not model.bn.training
    assert_close(run(model, (h, mask), {}), run(folded, (h, mask), {}))


# ---- the source's bits ----------------------------------------------------------------------


def zeros_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in module.state_dict().items()}


WRITES: dict[str, Callable[[Any], object]] = {
    "load": lambda part: part.load_state_dict(zeros_of(part)),
    "load some": lambda part: part.load_state_dict(
        {n: v for n, v in zeros_of(part).items() if "up" in n}, strict=False
    ),
    "train": lambda part: trained(part.requires_grad_(True)),
}


def trained(part: Any) -> None:
    optimizer = torch.optim.SGD(part.parameters(), 0.1)
    torch.stack([p.square().sum() for p in part.parameters()]).sum().backward()
    optimizer.step()


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


@pytest.mark.parametrize("modules", ["layers.*", None])
def test_a_write_to_a_submodule_leaves_the_source(modules: str | None) -> None:
    model = Model(1).double().eval().requires_grad_(False)
    gm: Any = fxlora.capture(model, x := ids(), modules=modules)
    before = bits(model)
    derived = [(gm.derive(), write, host) for write in WRITES.values() for host in (False, True)]
    itself = [(gm, WRITES[how], False) for how in ("load some", "train")]
    for module, write, host in [*derived, *itself]:
        output = module(x)
        write((fxlora.hosted(model, module) if host else module).layers[0])
        assert not torch.equal(module(x), output)
        assert_same(list(model.state_dict().values()), list(before.values()))


def by_attribute(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad = True


def step(module: nn.Module, backend: str | None = None) -> None:
    by_attribute(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    call: Any = torch.compile(module, backend=backend) if backend else module
    for _ in range(2):
        optimizer.zero_grad()
        call(ids()).square().mean().backward()
        optimizer.step()


SHARING: dict[str, Callable[[fxlora.CapturedModule], fxlora.CapturedModule]] = {
    "derive": fxlora.CapturedModule.derive,
    "remove": lambda gm: fxlora.remove(fxlora.inject(gm, fxlora.match(gm, CONFIG))),
    "fold": lambda gm: fxlora.fold(fxlora.inject(gm, fxlora.match(gm, CONFIG))),
    "copy of a derived one": lambda gm: copy.copy(gm.derive()),
}


@pytest.mark.parametrize(
    ("requires_grad", "backend", "ways"),
    [(True, None, [*SHARING]), (False, None, [*SHARING]), (True, "aot_eager", ["derive"])],
    ids=["trainable", "frozen", "compiled"],
)
def test_training_changes_no_other_module(
    requires_grad: bool, backend: str | None, ways: list[str]
) -> None:
    model = Model(1).double().eval().requires_grad_(requires_grad)
    gm = fxlora.capture(model, x := ids())
    modules = [*(SHARING[how](gm) for how in ways), gm]
    for trains in modules:
        rest = [model, *(module for module in modules if module is not trains)]
        before, held = [bits(module) for module in rest], list(trains.parameters())
        output, ties = trains(x), trains.aliases()
        step(trains, backend)
        assert not torch.equal(trains(x), output)
        for module, was in zip(rest, before, strict=True):
            assert_same(list(module.state_dict().values()), list(was.values()))
        assert all(a is b for a, b in zip(trains.parameters(), held, strict=True))
        assert trains.aliases() == ties


def test_what_is_a_copy_is_not_copied_when_it_trains(captured_flat: Any) -> None:
    copied = copy.deepcopy(captured_flat)
    moved = fxlora.capture(Model(1).double().eval(), ids()).requires_grad_(True)
    for module in (copied, moved):
        places = [p.data_ptr() for p in module.parameters()]
        before = bits(module)
        step(module)
        assert not torch.equal(module.state_dict()["emb.weight"], before["emb.weight"])
        assert [p.data_ptr() for p in module.parameters()] == places


class Overlapping(nn.Module):
    """Two parameters in one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down.weight = nn.Parameter(self.up.weight.data.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize("copied", [False, True])
def test_parameters_in_one_memory_stay_in_one_when_they_train(copied: bool) -> None:
    model, x = Overlapping(), torch.randn(3, 6)
    gm: Any = fxlora.capture(model, x)
    gm = copy.copy(gm) if copied else gm
    before = bits(model)
    optimizer = torch.optim.SGD([gm.up.weight], 0.1)
    gm(x).sum().backward()
    optimizer.step()
    assert not torch.equal(gm.up.weight, model.up.weight)
    assert torch.equal(gm.up.weight.t(), gm.down.weight)
    assert_same(list(model.state_dict().values()), list(before.values()))


# ---- tensors that the graph does not read, or was not made for ------------------------------


def ones(dtype: torch.dtype = torch.double) -> nn.Parameter:
    return nn.Parameter(torch.ones(11, 6, dtype=dtype))


def add_bias(linear: Any) -> None:
    linear.bias = nn.Parameter(torch.ones(11).double())


class Unbiased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11, bias=False)
        self.norms = nn.ModuleDict({"bn": nn.BatchNorm1d(11, affine=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms["bn"](self.head(x))


# Changes that have an effect on the source, and raise on the captured module.
NO_EFFECT: dict[str, Callable[[Any], object]] = {
    "a bias": lambda m: add_bias(m.head),
    "a registered bias": lambda m: m.head.register_parameter(
        "bias", nn.Parameter(torch.ones(11).double())
    ),
    "a weight": lambda m: setattr(
        m.norms["bn"], "weight", nn.Parameter(2 * torch.ones(11).double())
    ),
    "a new buffer": lambda m: m.head.register_buffer("new", ones()),
    "another dtype": lambda m: m.head.to(torch.bfloat16),
    "half": lambda m: m.head.half(),
    "another device": lambda m: m.head.to("meta"),
    "a weight of another dtype": lambda m: setattr(m.head, "weight", ones(torch.float)),
    "a buffer of another dtype": lambda m: setattr(
        m.norms["bn"], "running_mean", torch.ones(11, dtype=torch.float)
    ),
    "a loaded dtype": lambda m: m.head.load_state_dict({"weight": ones(torch.half)}, assign=True),
    "a dtype loaded from above": lambda m: m.load_state_dict(
        {"head.weight": ones(torch.half)}, assign=True, strict=False
    ),
    "update": lambda m: m.norms.update({"other": nn.Identity()}),
    "update of the dict": lambda m: m.norms._modules.update(other=nn.Identity()),
    "or": lambda m: m.norms._modules.__ior__({"other": nn.Identity()}),
    "setdefault": lambda m: m.norms._modules.setdefault("other", nn.Identity()),
    "pop": lambda m: m.norms._modules.pop("bn"),
    "popitem": lambda m: m.norms._modules.popitem(),
    "clear": lambda m: m.norms.clear(),
}


def outcome(module: nn.Module, x: torch.Tensor) -> Any:
    try:
        return list(module.state_dict()), [m for m, _ in module.named_modules()], module(x).tolist()
    except Exception as error:  # noqa: BLE001 - any effect counts
        return repr(error)


@functools.cache
def unbiased(*modules: str) -> tuple[nn.Module, fxlora.CapturedModule]:
    model = Unbiased().double().eval()
    return model, fxlora.capture(model, torch.randn(3, 6).double(), modules=modules or None)


@pytest.mark.parametrize("modules", [(), ("head", "norms.bn")])
@pytest.mark.parametrize("how", NO_EFFECT)
def test_what_has_no_effect_on_the_graph_raises(how: str, modules: tuple[str, ...]) -> None:
    x = torch.randn(3, 6).double()
    model, gm = copy.deepcopy(unbiased(*modules))
    before, output, expected = outcome(model, x), outcome(gm, x), gm(x)
    with pytest.raises(SubmoduleError):
        NO_EFFECT[how](gm)
    assert outcome(gm, x) == output
    NO_EFFECT[how](model)
    assert outcome(model, x) != before
    assert_same([gm(x)], [expected])


@pytest.mark.parametrize("modules", [(), ("head", "norms.bn")])
def test_what_the_graph_reads_may_be_set(modules: tuple[str, ...]) -> None:
    x = torch.randn(3, 6).double()
    pair: tuple[Any, Any] = copy.deepcopy(unbiased(*modules))
    model, gm = pair
    before = gm(x)
    for m in pair:
        m.head.weight = nn.Parameter(x.repeat(4, 1)[:11])
        norm: Any = m.norms["bn"]
        norm.register_buffer("running_mean", torch.ones(11).double())
        m.head.to("cpu", torch.double)  # as it is
    assert not torch.equal(gm(x), before)
    assert_same([gm(x)], [model(x)])
    gm.float()
    assert gm.head.weight.dtype is torch.float
    assert_same([gm(x.float())], [model.float()(x.float())])


@pytest.mark.usefixtures("one_process")
def test_fsdp_may_cast_the_shards_of_a_submodule() -> None:
    model, x = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6)), ids()
    gm: Any = fxlora.capture(model, x)
    policy, model = MixedPrecisionPolicy(param_dtype=torch.bfloat16), copy.deepcopy(model)
    for m in (gm, model):
        fully_shard(m, mp_policy=policy)
    assert gm(x).dtype is torch.bfloat16
    assert_same([gm(x)], [model(x)])


@pytest.mark.parametrize("modules", [None, ["norms.bn"]])
def test_what_a_submodule_lacks_is_named(modules: list[str] | None) -> None:
    model = Unbiased().double()
    norm: Any = model.norms["bn"]
    norm.reset_running_stats()
    gm: Any = fxlora.capture(model, torch.randn(3, 6).double(), modules=modules)
    with pytest.raises(SubmoduleError, match="track_running_stats"):
        gm.norms["bn"].reset_running_stats()
    assert not hasattr(gm.norms["bn"], "track_running_stats")


def test_a_list_of_submodules_has_no_slices(source: Model, flat: Any) -> None:
    assert len(source.layers[:1]) == 1
    with pytest.raises(SubmoduleError, match="no slices"):
        flat.layers[:1]


# ---- a weight of a called submodule, read by the code around it ------------------------------


class ReadsItsBlocks(nn.Module):
    """A tie by a functional call, and reads of weights of submodules that it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.part: Any = nn.Sequential(nn.Linear(6, 7), nn.Tanh())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.part(self.emb(ids)) @ self.part[0].weight[:, :5]
        return F.linear(F.pad(h, (0, 1)), self.emb.weight) + self.part[0].weight.square().sum()


@pytest.mark.parametrize("modules", ["emb", "part", "*", ["part", "part.0"]])
@pytest.mark.parametrize("wrap", [False, True])
def test_the_code_around_reads_weights_of_a_called_submodule(modules: Any, wrap: bool) -> None:
    model, x = ReadsItsBlocks().double(), ids()
    config = LoraConfig(r=2, target_modules=["emb", "part.0"])
    lora = fxlora.adapt(model, x, rules=config, modules=modules)
    randomise(lora)
    if wrap:
        for path in sorted(lora.outlined_modules, reverse=True):  # the innermost first
            lora.set_submodule(path, checkpoint_wrapper(lora.get_submodule(path)))
    for module in (lora, copy.deepcopy(lora)):
        module.refresh()
        merged = fxlora.merged(model, fxlora.fold(module))
        assert (merged(x) - model(x)).abs().max() > 0.1
        assert_close(run(module, (x,), {}), run(merged, (x,), {}))
        assert fxlora.verify(module, x)


def test_a_host_runs_the_called_submodules_of_the_captured_module(source: Model) -> None:
    x = ids()
    gm = fxlora.capture(source, x, modules="layers.*")
    host = fxlora.hosted(source, gm)
    with pytest.raises(SubmoduleError, match=r"captured module, .* get_submodule\('layers.1'\)"):
        host.layers[1].register_forward_hook(print)
    called: list[Any] = []
    gm.get_submodule("layers.1").register_forward_hook(functools.partial(_note_call, called))
    host(x)
    assert called


def test_a_detached_adapted_weight_takes_a_gradient_of_its_own(flat: fxlora.CapturedModule) -> None:
    h = torch.randn(5, 6, dtype=torch.float64)
    up = flat.layers[0].up
    leaf = up.weight.detach().requires_grad_()
    other = up.weight.detach()
    other.requires_grad_(True)
    assert leaf.is_leaf and other.is_leaf
    F.linear(h, leaf).sin().sum().backward()
    (grad,) = torch.autograd.grad(F.linear(h, other).sin().sum(), other)
    expected = F.linear(h, up.weight).cos().T @ h
    assert_close([leaf.grad, grad], [expected, expected])
    for write in (leaf.detach().zero_, other.data.zero_, up.weight.requires_grad_):
        with pytest.raises(SubmoduleError, match="no effect"):
            write()
