from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora import ConfigError, LoraConfig, NoMatchError, Rule, UnsupportedOpError, match
from fxlora.config import Rules
from fxlora.reads.sites import find_sites

from .models import Attention, Convolutions, Normed, Readers, Tied
from .typed import untyped


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 7)
        self.v_proj = nn.Linear(7, 6)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.v_proj(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.spare = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@pytest.fixture(scope="module")
def gm() -> fxlora.CapturedModule:
    return fxlora.capture(Model())


def names(plan: fxlora.Plan) -> list[str]:
    return [entry.site for entry in plan]


R = LoraConfig(r=2)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rule("lm_head", lora=R), ["lm_head"]),
        (Rule("q_proj", lora=R), [f"layers.{i}.q_proj" for i in range(3)]),
        (Rule("*.0.?_proj", lora=R), ["layers.0.q_proj", "layers.0.v_proj"]),
        (Rule(r"re:layers\.[12]\.mlp\.2", lora=R), ["layers.1.mlp.2", "layers.2.mlp.2"]),
        (Rule(["emb", "lm_head"], lora=R), ["emb", "lm_head"]),
        (Rule("emb.weight", lora=R), ["emb"]),
        (Rule(op="embedding", lora=R), ["emb"]),
        (Rule(op="emb*", lora=R), ["emb"]),
        (Rule(min_features=7, lora=R), []),
        (Rule(max_features=7, op="linear", lora=R), ["q", "v"]),
        (Rule(min_out_features=10, op="linear", lora=R), ["lm_head"]),
        (Rule(min_in_features=9, max_out_features=6, op="linear", lora=R), ["mlp.2"]),
        (Rule(where=lambda s: s.shape == (9, 6), lora=R), ["mlp.0"]),
        (LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), ["q", "lm_head"]),
        (
            LoraConfig(r=2, target_modules=r".*\.1\.[qv]_proj"),
            ["layers.1.q_proj", "layers.1.v_proj"],
        ),
        (LoraConfig(r=2, target_parameters=["q_proj.weight"]), ["q"]),
        (
            LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2]),
            ["layers.0.q_proj", "layers.2.q_proj"],
        ),
        (
            LoraConfig(
                r=2, target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"
            ),
            ["layers.1.q_proj"],
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["1.q_proj"]),
            ["layers.0.q_proj", "layers.2.q_proj"],
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=r".*\.[12]\..*"),
            ["layers.0.q_proj"],
        ),
    ],
)
def test_matching(gm: fxlora.CapturedModule, rules: Rules, expected: list[str]) -> None:
    short = {"q": "q_proj", "v": "v_proj", "mlp.0": "mlp.0", "mlp.2": "mlp.2"}
    wanted = [
        name
        for e in expected
        for name in ([f"layers.{i}.{short[e]}" for i in range(3)] if e in short else [e])
    ]
    if not wanted:
        with pytest.raises(NoMatchError):
            match(gm, rules)
    else:
        assert sorted(names(match(gm, rules))) == sorted(wanted)


def test_all_linear(gm: fxlora.CapturedModule) -> None:
    plan = match(gm, LoraConfig(r=2, target_modules="all-linear"))
    assert len(plan) == 13
    assert {entry.op for entry in plan} == {"linear"}
    both = match(gm, LoraConfig(r=2, target_modules=["all-linear", "emb"]))
    assert len(both) == 14
    tied = fxlora.capture(Tied())
    # `head` shares the embedding's weight, but is called as a linear layer.
    assert names(match(tied, LoraConfig(r=2, target_modules="all-linear"))) == ["mix", "head"]


def test_the_first_rule_that_matches_wins(gm: fxlora.CapturedModule) -> None:
    rules = [
        Rule("lm_head", lora=None),
        Rule("q_proj", lora=LoraConfig(r=3)),
        Rule(op="linear", lora=R),
    ]
    plan = match(gm, rules)
    assert {entry.r for entry in plan if entry.site.endswith("q_proj")} == {3}
    assert len(plan) == 12
    assert ("lm_head", "rule 1 leaves it alone") in plan.skipped
    assert ("emb", "no rule matches its embedding") in plan.skipped


def test_patterns(gm: fxlora.CapturedModule) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={r"layers\.0\.q_proj": 4, "v_proj": 3},
        alpha_pattern={r"^layers.1.v_proj": 9},
    )
    plan = {entry.site: entry for entry in match(gm, config)}
    assert [plan[f"layers.{i}.q_proj"].r for i in range(3)] == [4, 2, 2]
    assert plan["layers.0.q_proj"].scaling == 1.5
    assert plan["layers.1.v_proj"].scaling == 3.0
    assert plan["layers.2.v_proj"].scaling == 2.0
    rslora = match(gm, LoraConfig(r=4, lora_alpha=6, target_modules=["emb"], use_rslora=True))
    assert rslora.entries[0].scaling == 3.0


@pytest.mark.parametrize("name", ["norm", "*norm", "norm.bias", r"re:norm\..*"])
def test_vectors_take_no_adapter_but_train(gm: fxlora.CapturedModule, name: str) -> None:
    with pytest.raises(NoMatchError, match=r"less than two dimensions \(.*norm\.bias") as error:
        match(gm, [Rule("q_proj", lora=R), Rule(name, lora=R)])
    advice = f"Rule({name!r}, train=True)"
    assert f"{advice} trains them in full" in str(error.value)
    plan = match(gm, [Rule("q_proj", lora=R), eval(advice)])
    assert "norm.bias" in plan.trained


@pytest.mark.parametrize(
    ("name", "said"),
    [("running_mean", "bn.running_mean is a buffer"), ("angles", "angles.* are buffers")],
)
def test_a_buffer_of_any_shape_is_named_as_such(name: str, said: str) -> None:
    model = Normed()
    model.angles = nn.Module()
    model.angles.register_buffer("sin", torch.ones(3, 4))
    model.angles.register_buffer("cos", torch.ones(3, 4))
    gm = fxlora.capture(model, torch.randn(2, 3, 9, 7))
    for rule in (Rule(name, lora=R), Rule(name, train=True)):
        with pytest.raises(NoMatchError, match=f"{said}: only parameters can be adapted"):
            match(gm, rule)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            Rule("q_prj", lora=R),
            r"rule 1 \('q_prj'\) matched none of 14 sites. Did you mean 'layers.0.q_proj',",
        ),
        (LoraConfig(r=2, target_modules=["q_proj", "v_prj"]), "'v_prj'.*mean 'layers.0.v_proj'"),
        (LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["k_proj"]), "exclude_modules"),
        (
            LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"k_proj": 3}),
            r"rank_pattern of rule 1 \('k_proj'\) matched none of the 3 sites that .*q_proj",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], alpha_pattern={"emb": 3}),
            "alpha_pattern.*emb",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]),
            "modules_to_save.*lm_head",
        ),
        (
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head.weight"]),
            "modules_to_save.* sites. Did you mean 'lm_head'",
        ),
        (LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["w9"]), "'w9'"),
        (Rule("spare", lora=R), "'spare' is in the model, but no graph reads"),
        (Rule(op="conv2d", lora=R), "Kinds of op here: embedding, linear"),
        (
            [Rule(op="linear", lora=R), Rule("q_proj", lora=R)],
            "Rule 1 already took the sites that rule 2 matches: put rule 2 before rule 1",
        ),
        ([Rule("q_proj", lora=None)], "adapt none"),
    ],
)
def test_what_matches_nothing_raises(gm: fxlora.CapturedModule, rules: Rules, message: str) -> None:
    with pytest.raises(NoMatchError) as error:
        match(gm, rules)
    assert re.search(message, str(error.value)), str(error.value)


def test_shapes_of_convolutions() -> None:
    gm = fxlora.capture(Convolutions())
    by_kernel = match(gm, Rule(kernel_size=3, lora=R))
    assert names(by_kernel) == ["c2", "grouped", "depthwise", "c1"]
    assert names(match(gm, Rule(kernel_size=(3, 1), lora=R))) == ["reflect"]
    assert names(match(gm, Rule(op="conv2d", min_in_features=15, lora=LoraConfig(r=1)))) == [
        "depthwise"
    ]


def test_one_weight_of_several_in_a_module() -> None:
    gm = fxlora.capture(Attention(), torch.randn(2, 3, 8), dynamic_shapes=(None,))
    assert names(match(gm, Rule("mha", lora=R))) == ["mha.in_proj_weight", "mha.out_proj"]
    assert names(match(gm, Rule("mha.in_proj_weight", lora=R))) == ["mha.in_proj_weight"]
    assert names(match(gm, LoraConfig(r=2, target_modules=["mha.out_proj"]))) == ["mha.out_proj"]
    readers = fxlora.capture(Readers(), (torch.randn(3, 5), torch.ones(3, 4).long()))
    assert names(match(readers, Rule("w_matmul", lora=R))) == ["w_matmul"]


def test_forms_and_their_reasons() -> None:
    gm = fxlora.capture(Readers(), (torch.randn(3, 5), torch.ones(3, 4).long()))
    forms = {e.site: (e.form, e.reason) for e in match(gm, Rule(lora=R))}
    assert forms["emb"] == ("branch", "")
    assert forms["w_addmm"] == ("branch", "")
    assert forms["w_left"] == ("branch", "")
    assert forms["w_einsum"] == ("branch", "")
    assert forms["w_sliced"][0] == "weight"
    assert forms["w_sliced"][1] == "read by matmul through slice"
    grouped = {e.site: e for e in match(fxlora.capture(Convolutions()), Rule(lora=R))}
    assert grouped["depthwise"].form == "weight"
    assert "15 groups" in grouped["depthwise"].reason
    with pytest.raises(ConfigError, match="no input to drop"):
        match(gm, Rule("w_sliced", lora=LoraConfig(r=2, lora_dropout=0.1)))


def test_what_no_form_can_adapt_raises() -> None:
    renormed = fxlora.capture(nn.Embedding(7, 3, max_norm=1.0), torch.tensor([[1, 2]]))
    with pytest.raises(UnsupportedOpError, match="written to in every call, by embedding_renorm_"):
        match(renormed, Rule("weight", lora=R))


def test_match_changes_nothing(gm: fxlora.CapturedModule) -> None:
    code, keys = gm.code, list(gm.state_dict())
    grads = [p.requires_grad for p in gm.parameters()]
    match(gm, Rule(op="linear", lora=R))
    assert (gm.code, list(gm.state_dict())) == (code, keys)
    assert [p.requires_grad for p in gm.parameters()] == grads


def test_modules_to_save(gm: fxlora.CapturedModule) -> None:
    plan = match(
        gm, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head", "norm"])
    )
    assert plan.trained == ("norm.weight", "norm.bias", "lm_head.weight")
    assert ("lm_head", "trained in full") in plan.skipped
    by_rule = match(gm, [Rule("lm_head", train=True), Rule("q_proj", lora=R)])
    assert by_rule.trained == ("lm_head.weight",)
    with pytest.warns(fxlora.FxLoraWarning, match="same tensor"):
        tied = match(
            fxlora.capture(Tied()),
            LoraConfig(r=2, target_modules=["mix"], modules_to_save=["head"]),
        )
    assert tied.trained == ("emb.weight",)


@pytest.mark.parametrize(
    ("bias", "expected"),
    [("none", 0), ("lora_only", 3), ("all", 14)],
)
def test_bias(gm: fxlora.CapturedModule, bias: Any, expected: int) -> None:
    plan = match(gm, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    assert len([n for n in plan.trained if n.endswith("bias")]) == expected


def test_a_rank_beyond_the_weights_is_warned_about(gm: fxlora.CapturedModule) -> None:
    with pytest.warns(fxlora.FxLoraWarning, match="r=9 for 'emb' is more than the rank 6"):
        match(gm, Rule("emb", lora=LoraConfig(r=9)))


def test_output_embeddings_are_spared_by_all_linear() -> None:
    class WithHead(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    plan = match(fxlora.capture(WithHead()), LoraConfig(r=2, target_modules="all-linear"))
    assert "lm_head" not in names(plan)
    assert len(plan) == 12


def test_plan(gm: fxlora.CapturedModule, golden: Callable[[str, str], None]) -> None:
    rules = [
        Rule("lm_head", lora=None),
        Rule("re:.*[qv]_proj", lora=LoraConfig(r=3, lora_alpha=12, modules_to_save=["norm"])),
        Rule(op="embedding", lora=LoraConfig(r=2, lora_alpha=5)),
    ]
    plan = match(gm, rules)
    assert len(plan) == len(list(plan)) == 7
    golden("plan.txt", str(plan))


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_plan_is_written_and_read_back(
    gm: fxlora.CapturedModule, suffix: str, tmp_path: Path
) -> None:
    rules = [
        Rule("lm_head", lora=None),
        Rule(
            ["q_proj", "*.v_proj"], min_features=6, lora=LoraConfig(r=3, rank_pattern={"q_proj": 2})
        ),
        Rule(op="embedding", train=True),
        LoraConfig(r=2, target_modules=["mlp.0"], layers_to_transform=[1], use_rslora=True),
    ]
    plan = match(gm, rules)
    path = tmp_path / f"plan.{suffix}"
    path.write_text(plan.to_toml() if suffix == "toml" else plan.to_json())
    again = match(gm, path)
    assert again == plan
    assert names(again) == names(plan)


def test_the_head_of_a_plan_says_which_half_to_edit(
    gm: fxlora.CapturedModule, tmp_path: Path
) -> None:
    plan = match(gm, Rule("q_proj", lora=R))
    head, rules, _ = re.split(r"^\[\[(?:rule|site)\]\]\n", plan.to_toml(), maxsplit=2, flags=re.M)
    assert head.startswith("# A plan of fxlora. Edit the rules: ")
    assert "sites below them" in head
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml().replace("r = 2", "r = 3", 1))  # in the rule
    assert "r = 2" in rules
    assert [entry.r for entry in match(gm, path)] == [3, 3, 3]
    path.write_text(
        re.sub(r"^r = 2$", "r = 3", plan.to_toml(), flags=re.M).replace("r = 3", "r = 2", 1)
    )
    assert [entry.r for entry in match(gm, path)] == [2, 2, 2]


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_the_plan_of_a_loaded_adapter_has_no_rules(
    gm: fxlora.CapturedModule, suffix: str, tmp_path: Path
) -> None:
    fxlora.save_adapter(fxlora.inject(gm, match(gm, Rule("q_proj", lora=R))), tmp_path / "adapter")
    plan = fxlora.load_adapter(gm, tmp_path / "adapter").plan
    assert plan is not None and "rule" not in plan.to_data()
    path = tmp_path / f"plan.{suffix}"
    path.write_text(plan.to_toml() if suffix == "toml" else plan.to_json())
    with pytest.raises(ConfigError, match=r"plan without rules.*load_adapter"):
        match(gm, path)


def test_a_function_is_not_written(gm: fxlora.CapturedModule) -> None:
    plan = match(gm, Rule(where=lambda site: site.name == "emb", lora=R))
    with pytest.raises(ConfigError, match="where="):
        plan.to_toml()


def test_match_needs_a_captured_module() -> None:
    with pytest.raises(fxlora.NotCapturedError, match="match takes a captured module"):
        match(untyped(Model()), R)
    gm = fxlora.capture(Model())
    with pytest.raises(ConfigError, match="adapter_name"):
        match(gm, Rule("emb", lora=R), adapter_name="a.b")
    lora = fxlora.inject(gm, match(gm, Rule("emb", lora=R)))
    with pytest.raises(ConfigError, match="has an adapter 'default' already"):
        match(lora, Rule("emb", lora=R))


def test_norms_and_biases_train_in_full_by_name(gm: fxlora.CapturedModule) -> None:
    plan = match(gm, [Rule("q_proj", lora=R), Rule(["norm", "re:layers.0.*bias"], train=True)])
    assert plan.trained[-2:] == ("norm.weight", "norm.bias")
    assert all(name.startswith("layers.0.") for name in plan.trained[:-2])
    assert len(plan.trained) > 2
    with pytest.raises(NoMatchError, match="'nrm'"):
        match(gm, Rule("nrm", train=True))
    both: tuple[dict[str, Any], ...] = ({"lora": LoraConfig(r=2)}, {"parts": 2})
    for more in both:
        with pytest.raises(ConfigError, match="trains in full"):
            Rule("norm", train=True, **more)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6, 5))
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(x @ self.down.T) @ self.up.T)


def test_training_a_bare_parameter_leaves_its_siblings_alone() -> None:
    gm = fxlora.capture(nn.Sequential(Bare()), torch.randn(4, 6))
    plan = fxlora.match(gm, [Rule("0.down", lora=R), Rule("0.up", train=True)])
    assert ([entry.site for entry in plan], plan.trained) == (["0.down"], ("0.up",))
    plan = fxlora.match(gm, [Rule("0.layer", train=True), Rule("0.down", lora=R)])
    assert plan.trained == ("0.layer.weight", "0.layer.bias")
    plan = fxlora.match(gm, Rule("0", train=True))
    assert set(plan.trained) == {name for name, _ in gm.named_parameters()}


@pytest.mark.parametrize(
    "later", [Rule("0", train=True), Rule("up", lora=LoraConfig(modules_to_save=["0"]))]
)
def test_a_later_rule_does_not_take_an_adapter_away_in_silence(later: Rule) -> None:
    gm = fxlora.capture(nn.Sequential(Bare()), torch.randn(4, 6))
    with pytest.raises(ConfigError, match=r"rule 1 adapts '0\.down', and rule 2 trains '0'"):
        fxlora.match(gm, [Rule("0.down", lora=R), later])
    fxlora.match(gm, [Rule("0", train=True)])  # as the error advises


# ---- experts, and what is left out --------------------------------------------------------------


class Routed(nn.Module):
    """Layers with a projection, and experts: stacked, or a list; takes (N, 6)."""

    def __init__(self, stacked: bool, top_k: int | None = 2) -> None:
        super().__init__()
        self.proj, self.router, self.top_k = nn.Linear(6, 6), nn.Linear(6, 4), top_k
        self.up = nn.Parameter(torch.randn(4, 6, 50)) if stacked else None
        self.experts = None if stacked else nn.ModuleList(nn.Linear(6, 50) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, scores = self.proj(x), self.router(x).softmax(-1)
        least = scores.amax(-1) if self.top_k is None else scores.topk(self.top_k, -1)[0][:, -1]
        gates = scores * (scores >= least.unsqueeze(-1))
        if self.up is not None:
            return torch.einsum("ni,eio,ne->no", x, self.up, gates)
        assert self.experts is not None
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (outputs * gates.unsqueeze(-1)).sum(1)


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def test_experts_share_the_rank_of_a_dense_layer() -> None:
    gm = fxlora.capture(Layers(Routed(True), Routed(False, 3)), torch.randn(5, 6))
    config = LoraConfig(r="4/topk")
    assert (config.r, config.expert_rank) == (4, "r/topk")
    plan = match(gm, Rule(lora=config))
    ranks = {entry.site: (entry.r, entry.scaling) for entry in plan}
    assert ranks["layers.0.proj"] == ranks["layers.1.proj"] == ranks["layers.0.router"] == (4, 2.0)
    assert ranks["layers.0.up"] == (2, 4.0)
    assert {ranks[f"layers.1.experts.{n}"] for n in range(4)} == {(1, 8.0)}  # 4 / 3
    assert not plan.remarks


class Besides(Routed):
    """Experts among stacks and lists that look like them: before, beside and after."""

    def __init__(self) -> None:
        super().__init__(True)
        self.before, self.beside = (nn.Parameter(torch.randn(4, 6, n)) for n in (6, 50))
        self.after = nn.Parameter(torch.randn(4, 50, 5))
        self.shared_experts = nn.ModuleList(nn.Linear(6, 50) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("ni,eio->no", x, self.before)
        y = super().forward(x) + torch.einsum("ni,eio->no", x, self.beside)
        y = y + torch.stack([expert(x) for expert in self.shared_experts]).sum(0)
        return torch.einsum("ni,eio->no", y, self.after)


def test_experts_are_what_a_topk_selects_from() -> None:
    gm = fxlora.capture(nn.Sequential(Besides(), nn.Linear(5, 6), Besides()), torch.randn(3, 6))
    plan = fxlora.match(gm, Rule(lora=LoraConfig(r="4/topk")))
    assert {entry.site for entry in plan if entry.r != 4} == {"0.up", "2.up"}
    assert {entry.r for entry in plan} == {2, 4}
    (remark,) = plan.remarks
    assert remark.startswith("r=\"r/topk\": r is not divided at '0.before', '0.beside', '0.after'")
    with pytest.raises(ConfigError, match="no top-k of a graph selects from it"):
        fxlora.match(gm, LoraConfig(r="4/topk", target_parameters=["beside"]))


def test_a_share_of_the_rank_needs_experts_and_their_number() -> None:
    one = fxlora.capture(Layers(Routed(True, None)), torch.randn(5, 6))
    with pytest.raises(ConfigError, match=r"not known.*no top-k.*rank_pattern=\{r\"\.\*up\": …\}"):
        fxlora.match(one, LoraConfig(r="r/topk", target_parameters=["up"]))
    advised = LoraConfig(r=6, rank_pattern={r".*up": 3}, target_parameters=["up"])
    assert [entry.r for entry in fxlora.match(one, advised)] == [3]
    with pytest.raises(NoMatchError, match="none of the weights that it adapts is of experts"):
        fxlora.match(one, LoraConfig(expert_rank="r/topk", r=2, target_modules=["proj"]))
    for wrong in ("topk", "0/topk", "r/2"):
        with pytest.raises(ConfigError, match="r must be"):
            LoraConfig(r=wrong)


def test_a_plan_says_what_it_leaves_alone() -> None:
    gm = fxlora.capture(Layers(Routed(True), Routed(False)), torch.randn(5, 6))
    plan = fxlora.match(gm, LoraConfig(r=2, target_modules=["proj"]))
    (remark,) = plan.remarks
    assert str(plan).endswith(remark)
    left = 1 - 2 * 36 / sum(site.parameters for site in find_sites(gm))
    assert remark.startswith(f"{left:.0%} of the parameters in the layers that it adapts")
    assert "experts, up" in remark or "up, experts" in remark
    more = LoraConfig(r=2, target_modules="all-linear", target_parameters=["up"])
    assert not fxlora.match(gm, more).remarks
