from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

import fxlora
from fxlora import ConfigError, InjectError, LoraConfig, Rule
from fxlora.fx.compare import difference
from fxlora.passes import FoldConstants, Inject, Remove, ToWeightForm, as_pass

from .laws import check_laws, randomise
from .models import Mlp, Normed, Readers, Tied
from .typed import plan_of, untyped

R = LoraConfig(r=2, lora_alpha=3)


def code(graph: fx.Graph) -> str:
    """Return a graph as text that does not depend on torch's version."""
    lines = []
    for node in graph.nodes:
        target = node.target if node.op != "placeholder" else ""
        lines.append(f"{node.name} = {node.op}[{target}]{node.args}{node.kwargs or ''}")
    return "\n".join(lines)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 5)
        self.fc = nn.Linear(5, 7)
        self.depthwise = nn.Conv1d(7, 7, 3, groups=7)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.fc(self.emb(index)).transpose(1, 2))


def test_the_graphs_of_every_pass(golden: Callable[[str, str], None]) -> None:
    gm = fxlora.capture(Small())
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=0.1)
    rules = [Rule("fc", lora=config), Rule(lora=R)]
    lora = fxlora.inject(gm, fxlora.match(gm, rules))
    distributed = ToWeightForm()(lora)
    texts = {
        "captured": gm.graphs["eval"],
        "injected, eval": lora.graphs["eval"],
        "injected, train": lora.graphs["train"],
        "distributed": distributed.graphs["eval"],
        "folded": fxlora.fold(lora).graphs["eval"],
    }
    golden("passes.txt", "\n\n".join(f"# {name}\n{code(g)}" for name, g in texts.items()))


def test_passes_are_pure_and_run_in_a_pass_manager() -> None:
    gm = fxlora.capture(Normed(), torch.randn(2, 3, 9, 7))
    plan = fxlora.match(gm, Rule(op=["linear", "conv2d"], lora=R))
    before = {m: code(g) for m, g in gm.graphs.items()}
    steps = [Inject(plan), ToWeightForm(), FoldConstants()]
    folded = PassManager([as_pass(step) for step in steps])(gm).graph_module
    assert {m: code(g) for m, g in gm.graphs.items()} == before
    assert gm.plan is None
    assert all(p.requires_grad for p in gm.parameters())
    assert difference(folded.graphs["eval"], gm.graphs["eval"]) is None
    lora = Inject(plan)(gm)
    text = code(lora.graphs["eval"])
    Remove()(lora)
    fxlora.fold(lora)
    assert code(lora.graphs["eval"]) == text


def test_frozen_weights_are_shared_and_what_trains_is_not() -> None:
    model = Normed()
    gm = fxlora.capture(model, torch.randn(2, 3, 9, 7))
    config = LoraConfig(r=2, target_modules=["twice"], modules_to_save=["fc"])
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    assert lora.get_parameter("conv.weight").data_ptr() == model.conv.weight.data_ptr()
    assert lora.get_parameter("fc.weight").data_ptr() != model.fc.weight.data_ptr()
    assert (
        lora.get_buffer("bn.running_mean").data_ptr() != gm.get_buffer("bn.running_mean").data_ptr()
    )
    folded = fxlora.fold(lora)
    assert folded.get_parameter("conv.weight").data_ptr() == model.conv.weight.data_ptr()
    head = folded.get_parameter("fc.weight").clone()
    with torch.no_grad():
        lora.get_parameter("fc.weight").add_(1)
    assert torch.equal(folded.get_parameter("fc.weight"), head)


def test_what_is_frozen_stays_frozen() -> None:
    lora = fxlora.adapt(Normed(), torch.randn(2, 3, 9, 7), rules=Rule("twice", lora=R))
    for module in (lora.train(), lora.eval(), lora.train(), copy.deepcopy(lora), lora.double()):
        trains = {n for n, p in module.named_parameters() if p.requires_grad}
        assert trains == {f"twice.lora_{x}.default.weight" for x in "AB"}


def test_names_and_shapes_of_the_adapters() -> None:
    gm = fxlora.capture(Readers(), (torch.randn(3, 5), torch.ones(3, 4).long()))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=R), adapter_name="mine"))
    shapes = {n: tuple(p.shape) for n, p in lora.named_parameters() if "lora_" in n}
    assert shapes["emb.lora_A.mine.weight"] == (2, 13)
    assert shapes["emb.lora_B.mine.weight"] == (6, 2)
    assert shapes["functional.lora_A.mine.weight"] == (2, 5)
    assert shapes["w_addmm_adapter.lora_A.mine.weight"] == (2, 7)
    assert shapes["w_addmm_adapter.lora_B.mine.weight"] == (8, 2)
    assert len(shapes) == 14


def test_dropout_stands_in_the_train_graph_alone() -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)))
    config = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.5)
    lora = fxlora.inject(gm, fxlora.match(gm, config))
    randomise(lora)
    assert str(lora.train().graph).count("aten.dropout") == 2
    assert "dropout" not in str(lora.eval().graph)
    x = torch.randn(64, 5)
    assert not torch.equal(lora.train()(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))
    for module in (fxlora.fold(lora), fxlora.remove(lora)):
        assert module.graphs["train"] is module.graphs["eval"]


def test_dropout_is_on_the_branchs_input() -> None:
    single, x = nn.Linear(5, 7), torch.randn(64, 5)
    one = fxlora.adapt(single, rules=Rule("weight", lora=LoraConfig(r=2, lora_dropout=0.5)))
    randomise(one)
    a, b = fxlora.lora_parameters(one)
    torch.manual_seed(3)
    found = one.train()(x)
    torch.manual_seed(3)
    expected = single(x) + torch.dropout(x, 0.5, True) @ a.T @ b.T * 4
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_tie_is_kept_by_the_fold() -> None:
    gm = fxlora.capture(Tied(), torch.tensor([[1, 2]]))
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(["emb", "head"], lora=R)))
    randomise(lora)
    folded = fxlora.fold(lora)
    assert folded.get_parameter("emb.weight") is folded.get_parameter("head.weight")
    assert not torch.equal(folded.get_parameter("emb.weight"), gm.get_parameter("emb.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(70, 50), nn.Conv2d(20, 30, 3), nn.Embedding(90, 40)])
def test_folded_weights_are_correctly_rounded(
    layer: nn.Linear | nn.Conv2d | nn.Embedding, dtype: torch.dtype
) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    lora = fxlora.adapt(layer, rules=Rule("weight", lora=LoraConfig(r=16, lora_alpha=24)))
    randomise(lora, std=1.0)
    a, b = (p.detach().double().flatten(1) for p in fxlora.lora_parameters(lora))
    product = b @ a
    if isinstance(layer, nn.Embedding):
        product = product.T
    exact = layer.weight.detach().double() + 1.5 * product.reshape(layer.weight.shape)
    folded = fxlora.fold(lora).get_parameter("weight")
    assert not torch.equal(folded, layer.weight)
    wrong = (folded != exact.to(dtype)).double().mean()
    # float32 accumulation may round near-ties wrongly: one entry in thousands, by one ulp
    assert wrong < 2e-3
    assert torch.allclose(folded.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-7)


# ---- initialisation -----------------------------------------------------------------------------


def initial(layer: nn.Module, init: bool | str, r: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    config = LoraConfig(r=r, init_lora_weights=init)
    a, b = fxlora.lora_parameters(fxlora.adapt(layer, rules=Rule("weight", lora=config)))
    return a.detach(), b.detach()


def test_inits() -> None:
    layer = nn.Linear(400, 300)
    a, b = initial(layer, True)
    assert float(a.abs().max()) <= 400**-0.5  # Kaiming uniform with a=√5: ±1/√fan_in
    assert abs(float(a.std()) - (400 * 3) ** -0.5) < 0.002
    assert not b.any()
    a, b = initial(layer, "kaiming_normal")
    assert float(a.abs().max()) > 400**-0.5
    assert not b.any()
    a, b = initial(layer, "gaussian")
    assert abs(float(a.std()) - 1 / 8) < 0.01
    assert not b.any()
    a, b = initial(layer, False)
    assert a.any()
    assert b.any()


def test_an_embedding_starts_as_loralibs() -> None:
    a, b = initial(nn.Embedding(90, 40), True)
    assert not a.any()
    assert abs(float(b.std()) - 1) < 0.1
    a, _ = initial(nn.Embedding(90, 40, padding_idx=3), "gaussian")
    assert not a[:, 3].any()
    assert a[:, 4].any()


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_training_leaves_the_padding_row_alone(init: bool | str) -> None:
    layer = nn.Embedding(13, 6, padding_idx=2)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=init)
    lora = fxlora.adapt(layer, rules=Rule("weight", lora=config)).train()
    optimizer = torch.optim.SGD(fxlora.lora_parameters(lora), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (lora(torch.tensor([[1, 2, 5]])) - 1).square().sum().backward()
        optimizer.step()
    folded = fxlora.fold(lora).get_parameter("weight")
    assert not torch.equal(folded[1], layer.weight[1])
    assert torch.equal(folded[2], layer.weight[2])


def test_the_same_as_pefts_start() -> None:
    peft = pytest.importorskip("peft", reason="peft is optional")
    model = nn.Sequential(nn.Linear(400, 300))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, target_modules=["0"]))
    a = next(p for n, p in theirs.named_parameters() if "lora_A" in n)
    ours, _ = initial(model[0], True)
    assert ours.shape == a.shape
    assert abs(float(ours.std() - a.detach().std())) < 0.002


# ---- training -----------------------------------------------------------------------------------


def test_lora_parameters() -> None:
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    lora = fxlora.adapt(Mlp(), torch.randn(2, 5), rules=config)
    assert len(fxlora.lora_parameters(lora)) == 3
    groups = fxlora.lora_parameters(lora, groups=True, lr=1e-3, lr_ratio=4)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [
        ("lora_A", 1e-3, 1),
        ("lora_B", 4e-3, 1),
        ("full", 1e-3, 1),
    ]
    torch.optim.AdamW(groups)
    torch.optim.AdamW(fxlora.lora_parameters(lora, groups=True), lr=1e-3)
    alike = fxlora.lora_parameters(lora, groups=True, lr=1e-3)  # only lr_ratio turns LoRA+ on
    assert [group["lr"] for group in alike] == [1e-3] * 3
    with pytest.raises(ConfigError, match=r"lr=0\.001 needs groups=True"):
        fxlora.lora_parameters(lora, lr=1e-3)
    with pytest.raises(ConfigError, match="lr_ratio"):
        fxlora.lora_parameters(lora, groups=True, lr=1e-3, lr_ratio=0)
    with pytest.raises(ConfigError, match="needs groups=True"):
        fxlora.lora_parameters(lora, lr=1e-3, lr_ratio=4)
    with pytest.raises(InjectError, match="no adapters to train"):
        fxlora.lora_parameters(fxlora.fold(lora))


# ---- refusals -----------------------------------------------------------------------------------


def test_inject_refuses_what_does_not_fit() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    plan = fxlora.match(gm, Rule("up", lora=R))
    lora = fxlora.inject(gm, plan)
    with pytest.raises(InjectError, match="has an adapter 'default' already"):
        fxlora.inject(lora, plan)
    with pytest.raises(fxlora.NotCapturedError, match="captured module"):
        fxlora.inject(untyped(Mlp()), plan)
    with pytest.raises(InjectError, match="takes a Plan"):
        fxlora.inject(gm, untyped(R))
    other = fxlora.capture(nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises(
        InjectError, match=r"no graph of this module reads a parameter 'up\.weight'"
    ):
        fxlora.inject(other, plan)
    wrong = dataclasses.replace(plan.entries[0], shape=(9, 5))
    with pytest.raises(InjectError, match=r"made for a weight \(9, 5\), the module's is \(7, 5\)"):
        fxlora.inject(gm, dataclasses.replace(plan, entries=(wrong,)))


def test_a_layer_with_an_adapter_of_its_own_is_refused() -> None:
    class Loralib(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.lora_A = nn.Parameter(torch.randn(2, 5))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + (input @ self.lora_A.T).sum()

    gm = fxlora.capture(nn.Sequential(Loralib()), torch.randn(2, 5))
    with pytest.raises(InjectError, match=r"has a '0\.lora_A' of its own"):
        fxlora.inject(gm, fxlora.match(gm, Rule("0.weight", lora=R)))


def test_nothing_to_fold_or_remove() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5))
    with pytest.raises(InjectError, match="nothing to fold"):
        fxlora.fold(gm)
    with pytest.raises(InjectError, match="nothing to remove"):
        fxlora.remove(gm)
    with pytest.raises(fxlora.NotCapturedError, match="takes a captured module"):
        fxlora.fold(untyped(Mlp()))


def test_a_folded_module_can_be_adapted_again() -> None:
    gm = fxlora.capture(Mlp(), torch.randn(2, 5)).eval()
    x = torch.randn(4, 5)
    outputs = [gm(x)]
    for _ in range(2):
        lora = fxlora.inject(gm, fxlora.match(gm, Rule("up", lora=R)))
        randomise(lora, 3.0)
        gm = fxlora.fold(lora).eval()
        outputs.append(gm(x))
        assert torch.allclose(outputs[-1], lora.eval()(x), atol=1e-5)
    assert len(gm.folded) == 2
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)


# ---- products of weights, and reads inside whole modules ----------------------------------------


def test_two_adapted_weights_multiplied_with_each_other() -> None:
    class Factored(nn.Module):
        subscripts: ClassVar = {"u": "oi", "v": "io"}

        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.u @ self.v)

    _, lora = check_laws(Factored(), (torch.randn(3, 5).double(),), rules=Rule(["u", "v"], lora=R))
    assert {entry.form for entry in plan_of(lora)} == {"weight"}


def test_a_tied_weight_that_a_whole_module_reads_is_refused() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.fc = nn.Linear(6, 6, bias=False)
            self.fc.weight = self.attention.out_proj.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.attention(x, x, x)[0])

    with pytest.raises(fxlora.UnsupportedOpError, match="read inside module attention"):
        fxlora.match(fxlora.capture(Whole()), Rule(["fc", "out_proj"], lora=R))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    check_laws(Whole(), (x,), rules=Rule(["fc", "out_proj"], lora=R))


def test_parameters_in_the_same_memory_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 7))
    model[2].weight = nn.Parameter(model.get_parameter("0.weight").data)
    gm = fxlora.capture(model)
    with pytest.raises(fxlora.UnsupportedOpError, match=r"'0' .* shares memory with '2\.weight'"):
        fxlora.match(gm, Rule("0", lora=R))
    fxlora.match(gm, Rule("1", lora=R))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_padding_by_word(padding: str) -> None:
    layer = nn.Conv2d(3, 5, 3, padding=padding)
    check_laws(layer, (torch.randn(2, 3, 8, 9).double(),), rules=Rule("weight", lora=R))


def test_what_trains_outside_the_plan_is_refused() -> None:
    lora = fxlora.adapt(Mlp(), torch.randn(2, 5), rules=Rule("up", lora=R))
    lora.get_parameter("down.weight").requires_grad_(True)
    with pytest.raises(InjectError, match=r"'down\.weight' requires gradients but is not"):
        fxlora.lora_parameters(lora)
    assert not any(p.requires_grad for p in fxlora.fold(lora).parameters())


def test_a_part_that_trains_has_memory_of_its_own() -> None:
    """The advice of limits.md for writes by hand, such as those of nn.init."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    before = copy.deepcopy(model.state_dict())
    gm = fxlora.capture(model, torch.randn(2, 6))
    part: Any = gm.get_submodule("0").requires_grad_(True)
    for write in (nn.init.normal_, nn.init.orthogonal_, nn.init.eye_):
        write(part.weight)
    part.weight.data.mul_(2)
    x = torch.randn(3, 6)
    assert float((gm(x) - model(x)).detach().abs().max()) > 1e-3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
