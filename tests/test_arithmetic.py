"""Arithmetic of adapters: scaled and combined ones equal PEFT's; extracted ones, the SVD."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
import fxlora.peft
from fxlora import AdapterError, ConfigError, FxLoraWarning, InjectError, LoraConfig, Rule
from fxlora.arithmetic.combination import TYPES

from .typed import plan_of, untyped

peft = pytest.importorskip("peft")


class Net(nn.Module):
    """An embedding, linears and a convolution, no two sizes equal; takes indices (N, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.a = nn.Linear(6, 9)
        self.conv = nn.Conv2d(1, 5, 3)
        self.b = nn.Linear(5, 7)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(self.words(index)))
        x = self.conv(x[:, None]).mean((-1, -2))
        return self.b(torch.tanh(x))


@pytest.fixture
def net(double: None) -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    return captured_net()


@functools.cache
def captured_net() -> tuple[nn.Module, torch.Tensor, fxlora.CapturedModule]:
    """Return one model, captured once: no function changes what it is given."""
    model, x = Net(), torch.randint(0, 11, (3, 8))
    return model, x, fxlora.capture(model, x)


@pytest.fixture
def double() -> Any:
    """Have PEFT hold its factors and weights in float64, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def adapted(gm: fxlora.CapturedModule, **config: Any) -> fxlora.CapturedModule:
    """Return a module with random A and B."""
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(init_lora_weights=False, **config)))
    with torch.no_grad():
        for name, value in lora.named_parameters():
            if "magnitude" in name:
                value.mul_(1 + 0.3 * torch.rand_like(value))
    return lora.eval()


def in_peft(model: nn.Module, folder: Path, **adapters: fxlora.CapturedModule) -> Any:
    """Return PEFT's model with the adapters, read from folders that fxlora writes."""
    found: Any = None
    for name, lora in adapters.items():
        fxlora.save_adapter(lora, folder / name)
        if found is None:
            base = copy.deepcopy(model)
            found = peft.PeftModel.from_pretrained(base, folder / name, adapter_name=name)
        else:
            found.load_adapter(folder / name, name)
    return found.eval()


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ---- scale_adapter ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.7, -1.5, 0.0])
@pytest.mark.parametrize(
    "config",
    [{}, {"use_rslora": True}, {"use_dora": True}],
    ids=["lora", "rslora", "dora"],
)
def test_scaled_as_by_peft(net: Any, tmp_path: Path, factor: float, config: Any) -> None:
    model, x, gm = net
    lora = adapted(gm, r=2, lora_alpha=3, target_modules=["words", "a", "conv"], **config)
    before = lora(x)
    theirs = in_peft(model, tmp_path, default=lora)
    for layer in theirs.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", factor)
    assert not torch.allclose(theirs(x), before)
    scaled = fxlora.scale_adapter(lora, factor)
    assert_same(scaled(x), theirs(x))
    assert_same(fxlora.fold(scaled)(x), theirs(x))
    assert torch.equal(lora(x), before), "the given module changed"
    if factor:  # verify says of s = 0 that the adapter has no effect
        fxlora.verify(scaled, x)
    fxlora.save_adapter(scaled, tmp_path / "scaled")
    assert torch.equal(fxlora.load_adapter(gm, tmp_path / "scaled").eval()(x), scaled(x))
    assert_same(in_peft(model, tmp_path, again=scaled)(x), theirs(x))
    assert torch.equal(fxlora.remove(scaled)(x), gm.eval()(x))


def test_a_scaled_pissa_goes_from_the_base_to_the_adapter(net: Any) -> None:
    _, _, gm = net
    lora = fxlora.inject(gm, fxlora.match(gm, Rule(lora=LoraConfig(2, init_lora_weights="pissa"))))
    with torch.no_grad():
        for name in [entry.name_b for entry in plan_of(lora)]:
            lora.get_parameter(name).add_(torch.randn_like(lora.get_parameter(name)))
    halved = fxlora.fold(fxlora.scale_adapter(lora, 0.25))
    folded = fxlora.fold(lora)
    for entry in plan_of(lora):
        before, after = (m.get_parameter(entry.parameter) for m in (gm, folded))
        assert not torch.allclose(before, after)
        assert_same(halved.get_parameter(entry.parameter), torch.lerp(before, after, 0.25))


def test_scaling_keeps_what_else_training_made(net: Any) -> None:
    _, x, gm = net
    config = LoraConfig(2, ["a"], modules_to_save=["b"], lora_dropout=0.5)
    lora = fxlora.inject(gm, fxlora.match(gm, config)).train()
    with torch.no_grad():
        for parameter in fxlora.lora_parameters(lora):
            parameter.add_(torch.randn_like(parameter))
    name = plan_of(lora).entries[0].name_a
    lora.get_parameter(name).requires_grad_(False)
    same = fxlora.scale_adapter(lora, 1)
    assert same.training and not same.get_parameter(name).requires_grad
    for seed in (0, 1):
        torch.manual_seed(seed)
        ours = lora(x)
        torch.manual_seed(seed)
        assert torch.equal(same(x), ours)
    other = fxlora.scale_adapter(lora, 2).eval()
    assert torch.equal(other.get_parameter("b.weight"), lora.get_parameter("b.weight"))
    assert not torch.equal(other(x), lora.eval()(x))
    with torch.no_grad():
        other.get_parameter(name).zero_()
    assert lora.get_parameter(name).any(), "both modules hold one A"
    assert torch.equal(fxlora.remove(other)(x), gm.eval()(x))
    assert not plan_of(other).rules and "alpha" in str(other.plan)


def test_what_scaling_refuses(net: Any) -> None:
    _, _, gm = net
    with pytest.raises(InjectError, match="no adapters"):
        fxlora.scale_adapter(gm, 0.5)
    lora = adapted(gm, r=2, target_modules=["a"])
    for factor in (float("nan"), float("inf"), "2", True):
        with pytest.raises(ConfigError, match="finite number"):
            fxlora.scale_adapter(lora, untyped(factor))


# ---- combine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "elects"),
    [(kind, "total") for kind in TYPES] + [("ties", "frequency"), ("dare_ties_svd", "frequency")],
)
def test_combined_as_by_peft(net: Any, tmp_path: Path, kind: str, elects: str) -> None:
    model, x, gm = net
    options: dict[str, Any] = {"majority_sign_method": elects}
    if kind not in ("linear", "svd", "cat"):
        options["density"] = 0.6
    loras = {  # some sites in all, some in one
        "p": adapted(gm, r=2, lora_alpha=3, target_modules=["words", "a", "conv"]),
        "q": adapted(gm, r=2, lora_alpha=8, target_modules=["a", "conv", "b"]),
        "s": adapted(gm, r=2, lora_alpha=1, target_modules=["a"]),
    }
    weights = [0.7, -0.4, 1.3]
    theirs = in_peft(model, tmp_path, **loras)
    inject = type(theirs.base_model).inject_adapter
    with pytest.MonkeyPatch.context() as patch:

        def seeded(*args: Any, **kwargs: Any) -> None:  # before it draws masks, it draws an init
            inject(*args, **kwargs)
            torch.manual_seed(7)

        patch.setattr(type(theirs.base_model), "inject_adapter", seeded)
        theirs.add_weighted_adapter([*loras], weights, "c", combination_type=kind, **options)
    theirs.set_adapter("c")
    torch.manual_seed(7)
    ours = fxlora.combine([*loras.values()], weights, kind, **options)
    assert not torch.allclose(theirs(x), gm.eval()(x))
    assert_same(ours(x), theirs(x))
    assert_same(fxlora.fold(ours)(x), theirs(x))
    fxlora.verify(ours, x)
    fxlora.save_adapter(ours, tmp_path / "c")
    assert torch.equal(fxlora.load_adapter(gm, tmp_path / "c").eval()(x), ours(x))
    assert torch.equal(fxlora.remove(ours)(x), gm(x))


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_different_ranks_clamps_and_ranks_of_an_svd(net: Any, tmp_path: Path, kind: str) -> None:
    model, x, gm = net
    loras = {
        "p": adapted(gm, r=2, target_modules=["a", "b"], rank_pattern={"b": 4}),
        "q": adapted(gm, r=3, target_modules=["a", "conv"]),
    }
    theirs = in_peft(model, tmp_path, **loras)
    every: list[dict[str, Any]] = [{}]
    if kind != "cat":
        every += [{"svd_rank": 1}, {"svd_rank": 5}, {"svd_rank": 2, "svd_clamp": 0.8}]
    for number, options in enumerate(every):
        options |= {"density": 0.5} if "ties" in kind else {}
        name = f"c{number}"
        theirs.add_weighted_adapter([*loras], [1.0, 0.5], name, combination_type=kind, **options)
        theirs.set_adapter(name)
        ours = fxlora.combine([*loras.values()], [1.0, 0.5], kind, adapter_name="x", **options)
        assert not torch.allclose(theirs(x), gm.eval()(x))
        assert_same(ours(x), theirs(x))
        assert {entry.adapter for entry in plan_of(ours)} == {"x"}
    with pytest.raises(AdapterError, match=r'ranks 2, 3.*"cat"'):
        fxlora.combine([*loras.values()], [1.0, 0.5], "linear")


def test_combined_parts_stacks_and_pissa(double: None) -> None:
    """What PEFT does not combine: the folded weights are the sums of the updates."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.w = nn.Linear(6, 12), nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(self.qkv(x).view(3, -1, 4), self.w)

    gm = fxlora.capture(Mixed(), torch.randn(3, 6))
    pissa = LoraConfig(2, init_lora_weights="pissa")
    rules = [
        [Rule("qkv", lora=LoraConfig(2), parts=3), Rule("w", lora=LoraConfig(2))],
        [
            Rule("qkv", lora=pissa, parts=3, enable=[True, False, True]),
            Rule("w", lora=LoraConfig(3)),
        ],
    ]
    loras = [fxlora.inject(gm, fxlora.match(gm, untyped(rule))) for rule in rules]
    with torch.no_grad():
        for lora in loras:
            for parameter in fxlora.lora_parameters(lora):
                parameter.add_(torch.randn_like(parameter))
    folded = [fxlora.fold(lora) for lora in loras]
    for kind, rank in (("cat", None), ("svd", 9)):
        both = fxlora.combine(loras, [0.5, -2.0], kind, svd_rank=rank)
        merged = fxlora.fold(both)
        for name in ("qkv.weight", "w"):
            base = gm.get_parameter(name)
            updates = [module.get_parameter(name) - base for module in folded]
            assert all(update.any() for update in updates)
            assert_same(merged.get_parameter(name), base + 0.5 * updates[0] - 2.0 * updates[1])


def test_a_script_of_peft(net: Any) -> None:
    model, x, _ = net
    made: list[Any] = []
    for library, example in ((peft, ()), (fxlora.peft, (x,))):
        torch.manual_seed(3)
        config = library.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False)
        found = library.get_peft_model(copy.deepcopy(model), config, *example)
        other = library.LoraConfig(r=3, target_modules=["a", "b"], init_lora_weights=False)
        found.add_adapter("other", other)
        found.add_weighted_adapter(["default", "other"], [0.7, -0.5], "both", "cat")
        found.set_adapter("both")
        made.append(found.eval())
    theirs, ours = made
    with torch.no_grad():
        for name, value in theirs.named_parameters():  # A and B are drawn in another order
            if ".lora_" in name and ".both." not in name:
                value.copy_(torch.randn_like(value))
        held = dict(theirs.named_parameters())
        for adapter in ("default", "other"):
            ours.set_adapter(adapter)
            for name, value in ours.named_parameters():
                if f".{adapter}." in name:
                    value.copy_(held[f"base_model.model.{name}"])
        for found in made:
            found.delete_adapter("both")
            found.add_weighted_adapter(["default", "other"], [0.7, -0.5], "both", "svd")
            found.set_adapter("both")
            found.eval()
    assert not torch.allclose(theirs(x), model(x))
    assert_same(ours(x), theirs(x))
    assert ours.peft_config["both"].r == theirs.peft_config["both"].r == 3


def test_one_trains_a_module_in_full(net: Any) -> None:
    _, x, gm = net
    first = adapted(gm, r=2, target_modules=["a"])
    second = adapted(gm, r=2, target_modules=["a"], modules_to_save=["b"])
    with torch.no_grad():
        second.get_parameter("b.weight").add_(1.0)
    both = fxlora.combine([first, second], [1, 0], "linear")
    assert torch.equal(both.get_parameter("b.weight"), second.get_parameter("b.weight"))
    assert plan_of(both).modules_to_save == ("b",)
    assert torch.equal(fxlora.remove(both)(x), gm.eval()(x))
    with pytest.raises(AdapterError, match=r"b\.weight.* more than one"):
        fxlora.combine([second, second], [1, 1], "linear")


def test_what_combine_refuses(net: Any) -> None:
    model, x, gm = net
    lora = adapted(gm, r=2, target_modules=["a"])
    dora = adapted(gm, r=2, target_modules=["a"], use_dora=True)
    with pytest.raises(AdapterError, match=r"(?s)DoRA.*extract"):
        fxlora.combine([lora, dora], [1, 1])
    other = fxlora.adapt(nn.Linear(6, 4), torch.randn(2, 6), rules=Rule(lora=LoraConfig(2)))
    with pytest.raises(AdapterError, match="different models"):
        fxlora.combine([lora, other], [1, 1])
    parts = fxlora.inject(gm, fxlora.match(gm, Rule("a", lora=LoraConfig(2), parts=3)))
    with pytest.raises(AdapterError, match=r"same rows.*the same parts"):
        fxlora.combine([lora, parts], [1, 1], "cat")
    with pytest.raises(InjectError, match="no adapters"):
        fxlora.combine([lora, gm], [1, 1])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.b.weight.mul_(2)
    elsewhere = adapted(fxlora.capture(changed, x), r=2, target_modules=["a"])
    with pytest.raises(AdapterError, match=r"different bases: b\.weight differs"):
        fxlora.combine([lora, elsewhere], [1, 1])
    for arguments, said in (
        (([], []), "list of adapted modules"),
        (([lora], [1, 2]), "2 weights for 1"),
        (([lora], [float("nan")]), "finite"),
        (([lora], [1], "mean"), "combination_type"),
        (([lora, lora], [1, 1], "ties"), "needs density"),
    ):
        with pytest.raises(ConfigError, match=said):
            fxlora.combine(*untyped(arguments))
    for options, said in (
        ({"combination_type": "cat", "svd_rank": 3}, "svd_rank"),
        ({"svd_rank": 0}, "svd_rank"),
        ({"svd_clamp": 2.0}, "svd_clamp"),
        ({"density": 0.5}, "no effect"),
        ({"combination_type": "dare_linear", "density": 0.0}, "above 0"),
        ({"majority_sign_method": "mean"}, "majority_sign_method"),
        ({"adapter_name": "a.b"}, "adapter_name"),
        ({"generator": 7}, "torch.Generator"),
    ):
        with pytest.raises(ConfigError, match=said):
            fxlora.combine([lora, lora], [1, 1], **untyped(options))


def test_a_base_that_was_written_to(net: Any) -> None:
    _, _, gm = net
    loras = [adapted(gm, r=2, target_modules=["a"]) for _ in range(2)]
    loras[1].get_parameter("b.weight").requires_grad_(True)  # gets storage of its own
    with torch.no_grad():
        loras[1].get_parameter("b.weight").add_(1.0)
    with pytest.raises(AdapterError, match=r"b\.weight was written to after"):
        fxlora.combine(loras, [1, 1])


def test_buffers_must_agree(double: None) -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.randn(5, 6))
    loras = [adapted(gm, r=2, target_modules=["0"]) for _ in range(2)]
    loras[1].train()(torch.randn(5, 6))
    with pytest.raises(AdapterError, match=r"other\.get_buffer"):
        fxlora.combine(loras, [1, 1])
    for name, buffer in loras[0].named_buffers():
        buffer.copy_(loras[1].get_buffer(name))
    both = fxlora.combine(loras, [1, 1])
    assert torch.equal(both.get_buffer("1.running_mean"), loras[1].get_buffer("1.running_mean"))
    assert not fxlora.remove(both).get_buffer("1.running_mean").any()


# ---- extract ------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Weights of every layout: a look-up, parts, a stack, convolutions of both kinds; (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6, padding_idx=0)
        self.qkv = nn.Linear(6, 12)
        self.w = nn.Parameter(torch.randn(3, 4, 5))
        self.conv = nn.Conv1d(4, 7, 3)
        self.up = nn.ConvTranspose1d(7, 3, 2)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.qkv(self.emb(index)))  # (N, 4, 12)
        x = torch.einsum("nlec,eck->nlek", x.unflatten(-1, (3, 4)), self.w).sum(2)
        return self.norm(self.up(torch.tanh(self.conv(x))))


PLACES = ["emb", "qkv", "w", "conv", "up"]


def notes(lora: fxlora.CapturedModule) -> dict[str, tuple[float, float]]:
    """Return the relative change and error that the plan's notes have, by site."""
    found: dict[str, tuple[float, float]] = {}
    for entry in plan_of(lora):
        match = re.search(r"change (\S+), error (\S+)$", entry.reason)
        assert match and match[0] in str(lora.plan)
        found[entry.site] = float(match[1]), float(match[2])
    return found


def checkpoints(r: int, places: Any = PLACES) -> tuple[Mixed, Mixed, Any, torch.Tensor]:
    """Return a model, a copy with updates of rank r, the captured model and an input."""
    model, index = Mixed().eval(), torch.randint(1, 11, (2, 4))
    gm = fxlora.capture(model, index)
    tuned = copy.deepcopy(model)
    rule = Rule(lora=LoraConfig(r, init_lora_weights=False))
    lora = fxlora.inject(gm, fxlora.match(gm, [Rule([*places], lora=rule.lora)]))
    tuned.load_state_dict(fxlora.fold(lora).state_dict())
    return model, tuned, gm, index


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("how", [{}, {"rank": 2}, {"energy": 1.0}])
def test_an_adapter_of_the_updates_rank_is_the_update(
    double: None, how: Any, rslora: bool, tmp_path: Path
) -> None:
    model, tuned, gm, index = checkpoints(2)
    config = LoraConfig(2 if not how else 1, lora_alpha=3, use_rslora=rslora)
    assert not torch.allclose(tuned(index), model(index))
    lora = fxlora.extract(gm, tuned, Rule(PLACES, lora=config), **how).eval()
    assert_same(lora(index), tuned(index))
    for name, weight in fxlora.fold(lora).state_dict().items():
        assert_same(weight, tuned.state_dict()[name])
    assert {entry.site: entry.r for entry in plan_of(lora)} == dict.fromkeys(PLACES, 2)
    assert all(error < 1e-12 < change for change, error in notes(lora).values())
    s = 3 / 2**0.5 if rslora else 1.5
    assert all(abs(entry.scaling - s) < 1e-12 for entry in plan_of(lora))
    fxlora.verify(lora, index)
    fxlora.save_adapter(lora, tmp_path)
    assert torch.equal(fxlora.load_adapter(gm, tmp_path).eval()(index), lora(index))


def test_the_nearest_of_a_lower_rank(double: None) -> None:
    _, tuned, gm, _ = checkpoints(3)
    rules = [
        Rule("qkv", lora=LoraConfig(1), parts=3),
        Rule(["emb", "w", "conv", "up"], lora=LoraConfig(1)),
    ]
    lora = fxlora.extract(gm, tuned, rules)
    folded = fxlora.fold(lora)

    def cut(change: torch.Tensor) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        return u[..., :1] * s[..., None, :1] @ vh[..., :1, :]

    for name, parts in (("emb", 1), ("qkv", 3), ("w", 1), ("conv", 1), ("up", 1)):
        parameter = name if name == "w" else f"{name}.weight"
        base = gm.get_parameter(parameter).detach()
        change = tuned.get_parameter(parameter).detach() - base
        flat = change if name == "w" else change.flatten(1)
        nearest = torch.cat([cut(part) for part in flat.chunk(parts)]).reshape(change.shape)
        assert not torch.allclose(nearest, change)
        assert_same(folded.get_parameter(parameter), base + nearest)
        if parts == 1:
            size, error = notes(lora)[name]
            assert f"{error:.1e}" == f"{float((change - nearest).norm() / change.norm()):.1e}"
            assert f"{size:.1e}" == f"{float(change.norm() / base.norm()):.1e}"
    assert notes(lora)["qkv.1"][1] > 0.1


def test_the_least_rank_with_an_energy(double: None) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    gm, tuned = fxlora.capture(model, torch.randn(3, 6)), copy.deepcopy(model)
    u, v = (torch.linalg.qr(torch.randn(n, 3)).Q for n in (5, 6))
    with torch.no_grad():  # shares of the energy: 0.8, 0.15, 0.05
        tuned.get_parameter("0.weight").add_(
            u @ torch.diag(torch.tensor([0.8, 0.15, 0.05]).sqrt()) @ v.T
        )
    for energy, rank in ((0.5, 1), (0.79, 1), (0.81, 2), (0.94, 2), (0.96, 3), (1.0, 3)):
        lora = fxlora.extract(gm, tuned, Rule(), energy=energy)  # its r=8 does not matter
        left = (0.2, 0.05, 0.0)[rank - 1]
        assert [entry.r for entry in plan_of(lora)] == [rank]
        assert abs(notes(lora)["0"][1] ** 2 - left) < 0.01
    same = fxlora.extract(gm, model, Rule(), energy=0.9)
    assert [entry.r for entry in plan_of(same)] == [1] and notes(same)["0"] == (0.0, 0.0)
    assert torch.equal(fxlora.fold(same).get_parameter("0.weight"), gm.get_parameter("0.weight"))


def test_what_no_rule_covers_is_said(double: None) -> None:
    model, tuned, gm, index = checkpoints(2)
    with torch.no_grad():
        tuned.norm.weight.mul_(1.5)
        tuned.get_buffer("norm.running_mean").add_(0.25)
        tuned.emb.weight[0] += 1.0
    rules = [Rule(["emb", "w", "conv", "up"], lora=LoraConfig(2))]
    rules += [Rule("qkv", lora=LoraConfig(2), parts=3, enable=[True, False, True])]
    said = r"emb\.weight .*qkv\.weight .*norm\.weight .5\.0e-01. differ.*modules_to_save"
    with pytest.raises(AdapterError, match=said):
        fxlora.extract(gm, tuned, rules)
    with pytest.warns(FxLoraWarning, match=f"(?s){said.partition('.*modules')[0]}.*left as in"):
        lora = fxlora.extract(gm, tuned, rules, leave=True).eval()
    assert torch.equal(lora.get_parameter("norm.weight"), model.norm.weight)
    assert torch.equal(lora.get_buffer("norm.running_mean"), tuned.get_buffer("norm.running_mean"))
    assert not fxlora.remove(lora).get_buffer("norm.running_mean").any()

    rules = [Rule("norm", train=True), Rule("emb", train=True), Rule(lora=LoraConfig(2))]
    lora = fxlora.extract(gm, tuned.state_dict(), rules).eval()
    assert_same(lora(index), tuned(index))
    assert torch.equal(fxlora.remove(lora)(index), gm.eval()(index))


def test_tied_weights_differ_together(double: None) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.emb(index)))

    model, index = Tied().eval(), torch.randint(0, 11, (2, 4))
    gm, tuned = fxlora.capture(model, index), copy.deepcopy(model)
    with torch.no_grad():
        tuned.emb.weight.add_(torch.randn(11, 1) @ torch.randn(1, 6))
    both = Rule(["emb", "head"], lora=LoraConfig(1, tied="share"))
    assert_same(fxlora.extract(gm, tuned, both).eval()(index), tuned(index))
    with pytest.raises(AdapterError, match=r"head\.weight .*no rule covers"):
        fxlora.extract(gm, tuned, Rule("emb", lora=LoraConfig(1)))
    tuned.head.weight = nn.Parameter(tuned.head.weight.detach() + 1)
    with pytest.raises(AdapterError, match="untied"):
        fxlora.extract(gm, tuned, both)


def test_dora_adapters_combine_by_way_of_extract(net: Any) -> None:
    """The advice of combine's error: the folds' changes, at full rank, are combined exactly."""
    _, x, gm = net
    loras = [adapted(gm, r=2, target_modules=["a"], use_dora=True) for _ in range(2)]
    rule = Rule("a", lora=LoraConfig(2))
    plain = [fxlora.extract(gm, fxlora.fold(lora), rule, energy=1.0) for lora in loras]
    both = fxlora.fold(fxlora.combine(plain, [0.5, 0.25], "cat"))
    base = gm.get_parameter("a.weight")
    changes = [fxlora.fold(lora).get_parameter("a.weight") - base for lora in loras]
    assert_same(both.get_parameter("a.weight"), base + 0.5 * changes[0] + 0.25 * changes[1])
    assert not torch.allclose(both(x), gm.eval()(x))


def test_what_extract_refuses(net: Any) -> None:
    model, x, gm = net
    lora = adapted(gm, r=2, target_modules=["a"])
    rule = Rule("a", lora=LoraConfig(2))
    state = model.state_dict()
    cases: list[tuple[Any, str]] = [
        (lora, "give its fold"),
        (3, "module or a state dict"),
        ({k: v for k, v in state.items() if k != "b.bias"}, r"has no b\.bias"),
        (state | {"c.weight": x}, r"has also c\.weight"),
        (state | {"b.bias": x}, r"other shapes of b\.bias"),
        (state | {"a.weight": state["a.weight"] / 0}, "NaN or infinities"),
        ({k: v.to("meta") for k, v in state.items()}, "meta device"),
    ]
    for tuned, said in cases:
        with pytest.raises(AdapterError, match=said):
            fxlora.extract(gm, tuned, rule)
    for keys, said in (
        ({"rank": 2, "energy": 0.5}, "not both"),
        ({"rank": 0}, "rank must be"),
        ({"energy": 1.5}, "energy must be"),
        ({"energy": "half"}, "energy must be"),
    ):
        with pytest.raises(ConfigError, match=said):
            fxlora.extract(gm, model, rule, **untyped(keys))
    for config in (LoraConfig(2, use_dora=True), LoraConfig(2, init_lora_weights="pissa")):
        with pytest.raises(ConfigError, match="plain LoRA"):
            fxlora.extract(gm, model, Rule("a", lora=config))
