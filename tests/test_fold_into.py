"""fold_into, fold(keep=True) and unfold: weights for a server, without drift."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fxlora
from fxlora import CapturedModule, ConfigError, InjectError, LoraConfig, Rule

from .checkpoints import nearest
from .laws import randomise
from .typed import plan_of

X = torch.randn(3, 5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 7)
        self.packed = nn.Parameter(torch.randn(9, 7))
        self.norm = nn.BatchNorm1d(9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.fc(x)) @ self.packed.T))


RULES = [
    Rule("packed", parts={"q": 4, "v": 5}, enable=["v"], lora=LoraConfig(r=2, lora_alpha=6)),
    Rule("fc", lora=LoraConfig(r=2, lora_alpha=6, use_dora=True, modules_to_save=["head"])),
]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def lora(model: nn.Module) -> CapturedModule:
    lora = fxlora.adapt(model, X, rules=RULES)
    randomise(lora)
    return lora


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_the_target_is_the_fold(model: nn.Module, lora: CapturedModule) -> None:
    server = copy.deepcopy(model)
    before = bits(lora)
    changed = fxlora.fold_into(lora, server.state_dict())
    assert set(changed) > {"fc.weight", "packed", "head.weight", "head.bias"}
    assert_same(server.state_dict(), fxlora.fold(lora).state_dict())
    assert_same(lora.state_dict(), before)
    different = {n for n, t in server.state_dict().items() if not torch.equal(t, before[n])}
    assert different == {"fc.weight", "packed"}
    assert (server.eval()(X) - lora.eval()(X)).abs().max() < 1e-5


def test_a_thousand_cycles_do_not_drift(model: nn.Module, lora: CapturedModule) -> None:
    server = copy.deepcopy(model)
    first = set(fxlora.fold_into(lora, server.state_dict()))
    changing = {n: t for n, t in server.state_dict().items() if n in first}
    before = bits(server)
    start = {name: lora.get_parameter(name).detach().clone() for name in lora.adapter_parameters()}
    w0 = bits(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(1000):
            for name, value in start.items():
                noise = torch.randn(value.shape, generator=generator)
                lora.get_parameter(name).copy_(value + noise)
            fxlora.fold_into(lora, changing)
        assert not torch.equal(server.state_dict()["fc.weight"], before["fc.weight"])
        for name, value in start.items():
            lora.get_parameter(name).copy_(value)
    fxlora.fold_into(lora, changing)
    assert_same(server.state_dict(), before)
    assert_same(model.state_dict(), w0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_target_of_another_dtype_is_rounded_once(
    model: nn.Module, lora: CapturedModule, dtype: torch.dtype
) -> None:
    target = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    target["norm.num_batches_tracked"] = torch.tensor(7)
    target["packed"] = target["packed"].T.contiguous().T  # also: with other strides
    fxlora.fold_into(lora, target)
    exact = model.state_dict()["packed"].double()
    (entry,) = (entry for entry in plan_of(lora) if entry.parameter == "packed")
    a, b = (lora.get_parameter(n).detach().double() for n in (entry.name_a, entry.name_b))
    exact[4:] += entry.scaling * (b @ a)
    if dtype == torch.float64:
        assert (target["packed"] - exact).abs().max() < 1e-12
    else:
        assert torch.equal(target["packed"], nearest(exact, dtype))
    assert target["norm.num_batches_tracked"] == 0


def test_inference_tensors_and_parameters(model: nn.Module, lora: CapturedModule) -> None:
    with torch.inference_mode():
        target = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fxlora.fold_into(lora, target)
    assert_same(target, fxlora.fold(lora).state_dict())
    server = copy.deepcopy(model)
    fxlora.fold_into(lora, {**dict(server.named_parameters()), **dict(server.named_buffers())})
    assert_same(server.state_dict(), target)
    assert all(parameter.requires_grad for parameter in server.parameters())


def without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if n != name}


def fake(*shape: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(shape)


def freed(*shape: int) -> torch.Tensor:
    tensor = torch.empty(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


BAD: dict[str, Any] = {
    "has no fc.weight, which training changes": lambda s: {
        n: t for n, t in s.items() if n != "fc.weight"
    },
    "has no head.bias": lambda s: {n: t for n, t in s.items() if n != "head.bias"},
    "has more, which the module has not": lambda s: s | {"more": torch.ones(1)},
    r"'packed' is \(7, 9\)": lambda s: s | {"packed": torch.ones(7, 9)},
    "'fc.bias' has several entries": lambda s: s | {"fc.bias": torch.empty(1).expand(7)},
    "'fc.weight' has several": lambda s: (
        s | {"fc.weight": torch.empty(20).as_strided((7, 5), (2, 1))}
    ),
    "'packed' is torch.sparse_coo": lambda s: s | {"packed": torch.zeros(9, 7).to_sparse()},
    "'packed' is a FakeTensor": lambda s: s | {"packed": fake(9, 7)},
    "'packed' has no memory .it was freed": lambda s: s | {"packed": freed(9, 7)},
    "'packed' has no shape yet": lambda s: s | {"packed": nn.UninitializedParameter()},
    "'fc.bias' is torch.float8": lambda s: s | {"fc.bias": torch.ones(7).to(torch.float8_e5m2)},
    "num_batches_tracked' is torch.int8": lambda s: (
        s | {"norm.num_batches_tracked": torch.tensor(0, dtype=torch.int8)}
    ),
    "'fc.weight' is torch.int8": lambda s: s | {"fc.weight": torch.ones(7, 5, dtype=torch.int8)},
    "'fc.weight' is torch.float8": lambda s: (
        s | {"fc.weight": torch.ones(7, 5).to(torch.float8_e5m2)}
    ),
    "'packed' has no memory": lambda s: s | {"packed": torch.ones(9, 7, device="meta")},
    "takes tensors by name": lambda s: [s],
    "by name": lambda s: s | {"packed": [1.0]},
}


@pytest.mark.parametrize("said", BAD)
def test_targets_that_are_refused(model: nn.Module, lora: CapturedModule, said: str) -> None:
    server = copy.deepcopy(model)
    target = BAD[said](dict(server.state_dict()))
    before = bits(server)
    with pytest.raises(ConfigError, match=said):
        fxlora.fold_into(lora, target)
    assert_same(server.state_dict(), before)


def test_memory_of_the_module_is_refused(model: nn.Module, lora: CapturedModule) -> None:
    before = bits(model)
    for held in (model.state_dict(), {n: lora.state_dict()[n] for n in model.state_dict()}):
        with pytest.raises(ConfigError, match="is in memory of the module"):
            fxlora.fold_into(lora, held)
    memory = torch.empty(63)
    target = bits(model) | {"packed": memory.view(9, 7), "head.weight": memory[:36].view(4, 9)}
    with pytest.raises(ConfigError, match="in one memory of the target"):
        fxlora.fold_into(lora, target)
    wide = torch.empty(9, 7 + 9)  # columns of one tensor lie between each other
    target = bits(model) | {"packed": wide[:, :7], "head.weight": wide[:4, 7:]}
    with pytest.raises(ConfigError, match=r"as columns of one tensor do .give rows of it"):
        fxlora.fold_into(lora, target)
    long = torch.empty(9 * 7 + 4 * 9)  # the advice
    target |= {"packed": long[:63].view(9, 7), "head.weight": long[63:].view(4, 9)}
    fxlora.fold_into(lora, target)
    assert_same(target, fxlora.fold(lora).state_dict())
    assert_same(model.state_dict(), before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.emb(ids)))


@pytest.mark.parametrize("tied", ["share", "rule"])
def test_ties_of_the_target(tied: Any) -> None:
    model, ids = Tied(), torch.randint(11, (3, 4))
    lora = fxlora.adapt(model, ids, rules=LoraConfig(r=2, target_modules=["emb"], tied=tied))
    randomise(lora)
    server = copy.deepcopy(model)
    before = bits(server)
    if tied == "share":
        fxlora.fold_into(lora, server.state_dict())
        assert (server(ids) - lora(ids)).abs().max() < 1e-5
        assert not torch.equal(server.emb.weight, before["emb.weight"])
        return
    with pytest.raises(ConfigError, match="a tie that the adapter splits"):
        fxlora.fold_into(lora, server.state_dict())
    assert_same(server.state_dict(), before)


def test_values_that_are_not_finite(model: nn.Module, lora: CapturedModule) -> None:
    server = copy.deepcopy(model)
    with pytest.raises(InjectError, match="no adapters"):
        fxlora.fold_into(fxlora.remove(lora), server.state_dict())
    entry = plan_of(lora).entries[0]
    with torch.no_grad():
        lora.get_parameter(entry.name_b).fill_(1e6)
    half = {name: tensor.half() for name, tensor in bits(model).items()}
    half["norm.num_batches_tracked"] = torch.tensor(0)
    with pytest.raises(InjectError, match=r"not finite in torch\.float16"):
        fxlora.fold_into(lora, half)
    with torch.no_grad():
        lora.get_parameter(entry.name_b).fill_(1)
        lora.get_parameter("head.weight")[0, 0] = 1e6  # which is trained in full
    with pytest.raises(InjectError, match=r"'head\.weight' is not finite in torch\.float16"):
        fxlora.fold_into(lora, half)
    with torch.no_grad():
        lora.get_parameter(entry.name_b)[0, 0] = torch.nan
    before = bits(server)
    with pytest.raises(InjectError, match="not finite"):
        fxlora.fold_into(lora, server.state_dict())
    assert_same(server.state_dict(), before)
    fxlora.fold_into(lora, server.state_dict(), allow_nonfinite=True)
    assert server.get_parameter(entry.parameter).isnan().any()


# ---- keep and unfold ----------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_unfold_gives_the_bits_back(model: nn.Module, inplace: bool) -> None:
    lora = fxlora.adapt(model, X, rules=RULES)
    randomise(lora)
    before, outputs, base = bits(lora), lora.eval()(X), bits(model)
    del model
    folded = fxlora.fold(lora, keep=True, inplace=inplace)
    assert (folded is lora) == inplace
    assert not torch.equal(folded.state_dict()["fc.weight"], base["fc.weight"])
    folded(X)
    for one in (folded, copy.deepcopy(folded), folded.derive()):
        again = fxlora.unfold(one)
        assert_same(again.state_dict(), before)
        assert torch.equal(again.eval()(X), outputs)
        assert again.training is one.training
        assert {p for p, t in again.named_parameters() if t.requires_grad} > again.trained
    again = fxlora.unfold(folded)
    again.get_parameter("fc.lora_B.default.weight").data.zero_()
    assert_same(fxlora.unfold(folded).state_dict(), before)


@pytest.mark.parametrize("name", ["fc.weight", "packed", "norm.weight"])
def test_unfold_after_the_source_was_trained(model: nn.Module, name: str) -> None:
    twin = copy.deepcopy(model)  # the advice
    loras = [fxlora.adapt(m, X, rules=RULES) for m in (model, twin)]
    before = bits(loras[1])
    kept = [fxlora.fold(lora, keep=True) for lora in loras]
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    with pytest.raises(InjectError, match=f"{name} was written to since the adapter was injected"):
        fxlora.unfold(kept[0])
    assert_same(fxlora.unfold(kept[1]).state_dict(), before)


def test_unfold_of_what_kept_nothing(lora: CapturedModule) -> None:
    for module in (lora, fxlora.fold(lora), fxlora.remove(lora)):
        with pytest.raises(InjectError, match="keep=True"):
            fxlora.unfold(module)
    kept = fxlora.fold(lora, keep=True)
    plan = fxlora.match(kept, LoraConfig(r=2, target_modules=["fc"]))
    with pytest.raises(InjectError, match="keep=True"):
        fxlora.unfold(fxlora.fold(fxlora.inject(kept, plan)))


def test_a_sharded_target(model: nn.Module, lora: CapturedModule) -> None:
    """On a mesh of one process; tests/sharded.py has more."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {n: t.clone() for n, t in model.state_dict().items()}
        sharded = distribute_tensor(state["fc.weight"], mesh, [Shard(0)])
        fxlora.fold_into(lora, state | {"fc.weight": sharded})
        expected = fxlora.fold(lora).state_dict()["fc.weight"]
        assert torch.allclose(sharded.full_tensor(), expected, rtol=0, atol=1e-6)
        assert not torch.equal(sharded.full_tensor(), model.state_dict()["fc.weight"])
    finally:
        dist.destroy_process_group()
