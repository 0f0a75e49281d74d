from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxlora
from fxlora import InjectError, LoraConfig, Rule, VerificationError
from fxlora.lora.ops import OPS
from fxlora.module.memory import copied_values
from fxlora.passes.structure import Insertion, insertions, remove_insertion
from fxlora.proof.graph_checks import check_modes, without_adapters

from .laws import randomise
from .models import Convolutions, Mlp, Normed, Readers, Reads, Tied
from .patterns import PATTERNS
from .typed import grad_of, plan_of, untyped

R = LoraConfig(r=2, lora_alpha=3)


@functools.cache
def _normed() -> fxlora.CapturedModule:
    torch.manual_seed(0)
    return fxlora.capture(Normed(), torch.randn(2, 3, 9, 7))


@functools.cache
def _sound() -> fxlora.CapturedModule:
    return randomly_adapted(_normed(), ["conv", "twice", "first", "second"])


def randomly_adapted(gm: fxlora.CapturedModule, names: Any = None) -> fxlora.CapturedModule:
    result = fxlora.inject(gm, fxlora.match(gm, Rule(names, lora=R)))
    randomise(result)
    return result


@pytest.fixture
def lora() -> fxlora.CapturedModule:
    """Return a copy of one adapted module for each test, which may damage it."""
    return copy.deepcopy(_sound())


X = torch.randn(3, 3, 9, 7)


def test_a_sound_module_verifies(lora: fxlora.CapturedModule) -> None:
    state = {n: t.clone() for n, t in lora.state_dict().items()}
    found = fxlora.verify(lora, X, folded=fxlora.fold(lora))
    assert [check.site for check in found.sites] == ["conv", "twice", "first"]
    assert all(check.effect > 0 for check in found.sites)
    assert [check.reads_in("eval") for check in found.sites] == [1, 2, 2]
    assert found.output_error < found.tolerance
    assert "twice" in str(found)
    assert all(torch.equal(t, state[n]) for n, t in lora.state_dict().items())
    assert all(p.grad is None for p in lora.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_form_and_dtype(dtype: torch.dtype) -> None:
    model = Convolutions().to(dtype)
    x = torch.randn(2, 6, 5, 18, 11, dtype=dtype)
    adapted = fxlora.adapt(model, x, rules=Rule(lora=R))
    randomise(adapted)
    assert {check.form for check in fxlora.verify(adapted, x).sites} == {"branch", "weight"}
    tied = fxlora.adapt(Tied().to(dtype), torch.tensor([[1, 2]]), rules=Rule("emb", lora=R))
    randomise(tied)
    fxlora.verify(tied, torch.tensor([[1, 2]]))


def test_an_untrained_module_verifies() -> None:
    adapted = fxlora.inject(_normed(), fxlora.match(_normed(), Rule("twice", lora=R)))
    assert fxlora.verify(adapted, X).output_error == 0


def test_a_wrong_fold_is_named(lora: fxlora.CapturedModule) -> None:
    folded = fxlora.fold(lora)
    with torch.no_grad():
        folded.get_parameter("twice.weight")[2, 1] += 1e-4
    with pytest.raises(VerificationError, match=r"'twice': its folded weight is not W0 \+ s·BA"):
        fxlora.verify(lora, X, folded=folded)


def test_the_fold_of_another_module_is_noticed(lora: fxlora.CapturedModule) -> None:
    base = copy.deepcopy(_normed())
    base.load_state_dict(Normed().state_dict())
    other = randomly_adapted(base, ["conv", "twice", "first", "second"])
    with pytest.raises(VerificationError, match="'conv'"):
        fxlora.verify(lora, X, folded=fxlora.fold(other))
    with pytest.raises(VerificationError, match="not the captured one node for node"):
        fxlora.verify(lora, X, folded=lora)


def test_an_adapter_that_cannot_change_the_output() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = nn.Linear(5, 4), nn.Linear(5, 4)
            self.gate = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.live(x) + self.gate * self.dead(x)

    x = torch.randn(3, 5)
    adapted = fxlora.adapt(Gated(), x, rules=Rule(["live", "dead"], lora=R))
    with pytest.raises(VerificationError, match="'dead' cannot change the outputs"):
        fxlora.verify(adapted, x)


def test_a_branch_that_was_cut_is_noticed(lora: fxlora.CapturedModule) -> None:
    broken = lora.derive()
    for graph in broken.distinct_graphs():
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.add.Tensor and "conv2d" in str(node.args[0]):
                node.replace_all_uses_with(node.args[0])
    broken.recompile()
    with pytest.raises(VerificationError, match="'conv'"):
        fxlora.verify(broken, X)


def test_a_weight_that_only_the_train_graph_reads() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.aux = nn.Linear(5, 4), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self.main(F.dropout(x, 0.1, self.training))
            return (out, self.aux(x)) if self.training else (out,)

    adapted = fxlora.adapt(Auxiliary(), torch.randn(3, 5), rules=Rule(["main", "aux"], lora=R))
    found = fxlora.verify(adapted, torch.randn(3, 5))
    (aux,) = (check for check in found.sites if check.site == "aux")
    assert (aux.reads_in("train"), aux.reads_in("eval")) == (1, 0)
    assert "1/0" in str(found)


def test_what_has_nothing_to_verify(lora: fxlora.CapturedModule) -> None:
    with pytest.raises(InjectError, match="nothing to verify"):
        fxlora.verify(fxlora.fold(lora), X)
    with pytest.raises(fxlora.InputError, match=r"as one tuple: verify\(module, \(a, b\)\)"):
        fxlora.verify(lora, X, X)  # type: ignore[arg-type]


# ---- each law, broken on purpose ----------------------------------------------------------------

aten = torch.ops.aten


def standing(lora: fxlora.CapturedModule, mode: str, site: str) -> list[Insertion]:
    """Return the insertions of a site's adapter in the graph of a mode."""
    return [i for i in insertions(lora, lora.graphs[mode]) if i.entry.site == site]


def prove(lora: fxlora.CapturedModule) -> None:
    """Check that every read has its adapter, without running the module."""
    check_modes(lora, without_adapters(lora))


def readers_lora() -> tuple[fxlora.CapturedModule, tuple[torch.Tensor, torch.Tensor]]:
    """Return a copy of an adapted module with both forms, whose modes differ by dropout."""
    lora, args = _readers_lora()
    return copy.deepcopy(lora), args


@functools.cache
def _readers() -> tuple[fxlora.CapturedModule, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    args = (torch.randn(3, 5, dtype=torch.float64), torch.randint(13, (3, 4)))
    return fxlora.capture(Readers().double(), args), args


@functools.cache
def _readers_lora() -> tuple[fxlora.CapturedModule, tuple[torch.Tensor, torch.Tensor]]:
    gm, args = _readers()
    dropped = LoraConfig(r=2, lora_alpha=3, lora_dropout=0.2)
    rules = [Rule("functional", lora=dropped), Rule(lora=R)]
    lora = fxlora.inject(gm, fxlora.match(gm, rules))
    assert lora.graphs["train"] is not lora.graphs["eval"]
    randomise(lora)
    fxlora.verify(lora, args)
    return lora, args


def line_of(text: str) -> int:
    source = (Path(__file__).parent / "models.py").read_text(encoding="utf-8")
    return source[: source.index(text)].count("\n") + 1


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("site", "op", "line"),
    [
        ("functional", "linear", "x = F.linear"),
        ("w_matmul", "matmul", "x = torch.addmm"),
        ("w_einsum", "einsum", "x = torch.einsum"),
        ("w_sliced", "slice", "return x + x @"),
    ],
)
def test_an_insertion_that_is_missing_in_one_mode(mode: str, site: str, op: str, line: str) -> None:
    lora, args = readers_lora()
    (insertion,) = standing(lora, mode, site)
    remove_insertion(insertion)
    lora.refresh()
    where = re.escape(f"{Path(__file__).parent / 'models.py'}:{line_of(line)}")
    law = f"coverage: '{site}' is read without its adapter by {op} at {where} in the {mode} graph"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, args)


def test_one_read_of_several_that_is_missing(lora: fxlora.CapturedModule) -> None:
    insertion = standing(lora, "train", "first")[1]
    remove_insertion(insertion)
    lora.refresh()
    law = r"coverage: 'first' is read without its adapter by linear .* in the train graph"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, X)


@pytest.mark.parametrize("site", ["functional", "w_einsum"])
def test_a_second_use_that_goes_past_the_adapter(site: str) -> None:
    lora, args = readers_lora()
    (insertion,) = standing(lora, "train", site)
    graph, last = lora.graphs["train"], lora.graphs["train"].output_node()
    first, *others = untyped(last.args[0])
    with graph.inserting_before(last):
        past = graph.call_function(aten.sum.default, (insertion.base,))
        result = graph.call_function(aten.add.Tensor, (first, past))
    last.args = ((result, *others),)
    lora.refresh()
    law = f"coverage: '{site}': sum bypasses its adapter in the train graph"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, args)


def test_a_missing_read_before_one_that_is_adapted() -> None:
    """The unadapted read feeds the adapted one, which must not hide it."""

    model = Reads(lambda x, w: F.linear(torch.tanh(x @ w), w), "io", 6, 6)
    lora = fxlora.adapt(model, torch.randn(2, 6), rules=Rule("w", lora=R))
    prove(lora)
    remove_insertion(standing(lora, "eval", "w")[0])
    with pytest.raises(VerificationError, match="'w' is read without its adapter by matmul"):
        prove(lora)


READ = [
    *("RepVGG: another read in eval", "a head in training only", "packed QKV: q and v"),
    *("head.weight = emb.weight, rule on head", "head.weight = emb.weight, tied=share"),
    *("stacked experts, bmm", "a clone of W, changed in place", "a weight times a weight"),
    *("checkpoint", "torch.cond", "experts chosen by Python", "LSTM, projected, both ways"),
]
READ_ALIKE = [  # in form, or in how many graphs they are read in
    *("DoRA", "PiSSA: F.linear(x, self.lin.weight)", "weight_norm"),
    *("MultiheadAttention: q and v", "one module under two names"),
    *("DoRA: embedding", "EmbeddingBag, sum"),
]


@pytest.mark.filterwarnings("ignore::fxlora.FxLoraWarning")
@pytest.mark.parametrize(
    "name", [*READ, *(pytest.param(name, marks=pytest.mark.slow) for name in READ_ALIKE)]
)
def test_each_adapter_of_a_pattern_that_is_taken_out_is_missed(name: str) -> None:
    pattern = PATTERNS[name]
    model, args = pattern.built()
    gm = fxlora.capture(model, args)
    lora = fxlora.inject(gm, fxlora.match(gm, pattern.fxlora_rules(), **pattern.match))
    randomise(lora)
    fxlora.verify(lora, args)
    programs = range(len(lora.programs))
    for program, mode in itertools.product(programs, ("train", "eval")):
        for index in range(len(insertions(lora, lora.programs[program].graphs[mode]))):
            broken = copy.deepcopy(lora)
            found = insertions(broken, broken.programs[program].graphs[mode])[index]
            remove_insertion(found)
            with pytest.raises(VerificationError, match=f"coverage: '{found.entry.site}'"):
                prove(broken)


@pytest.mark.parametrize("site", ["functional", "w_einsum"])
def test_adapters_on_parts_of_one_weight_are_proved_one_by_one(site: str) -> None:
    gm = _readers()[0]
    plan = fxlora.match(gm, Rule(site, lora=R))
    entry = plan.entries[0]
    rows = entry.shape[entry.layout.part_dim]
    parts = {"one": (0, 2), "two": (2, rows)}
    more = tuple(
        dataclasses.replace(entry, site=f"{site}.{part}", part=part, rows=span, form="weight")
        for part, span in parts.items()
    )
    lora = fxlora.inject(gm, dataclasses.replace(plan, entries=more))
    prove(lora)
    for part in parts:
        broken = copy.deepcopy(lora)
        remove_insertion(standing(broken, "train", f"{site}.{part}")[0])
        with pytest.raises(VerificationError, match=rf"coverage: '{site}\.(one|two)'"):
            prove(broken)


def test_a_scaling_of_zero_in_one_graph(lora: fxlora.CapturedModule) -> None:
    broken = 0
    for node in lora.graphs["train"].nodes:
        if node.target is aten.mul.Tensor and node.args[1] == 1.5 and not broken:
            assert node < standing(lora, "train", "conv")[0].output
            node.args, broken = (node.args[0], 0.0), 1
    lora.refresh()
    assert broken
    with pytest.raises(VerificationError, match=r"modes agree: the train graph .* at 'conv'"):
        fxlora.verify(lora, X)


def test_a_node_that_only_the_adapted_graph_has(lora: fxlora.CapturedModule) -> None:
    insertion = standing(lora, "train", "twice")[1]
    with lora.graphs["train"].inserting_after(insertion.output):
        more = lora.graphs["train"].call_function(aten.add.Tensor, (insertion.output, 0.1))
    insertion.output.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)
    lora.refresh()
    fxlora.verify(lora, X)  # an edit outside the adapters is the user's own, and remove keeps it
    assert any(n.args[1:] == (0.1,) for n in fxlora.remove(lora).graphs["train"].nodes)


@pytest.mark.parametrize("write", ["in place", "data", "swap", "then move"])
def test_a_base_weight_that_was_written_to(lora: fxlora.CapturedModule, write: str) -> None:
    weight = lora.get_parameter("twice.weight")
    before = weight.detach().clone()
    with torch.no_grad():
        if write == "data":
            weight.data[1, 2] += 1e-6
        elif write == "swap":
            lora.get_submodule("twice").weight = nn.Parameter(weight + 1e-6, requires_grad=False)
        else:
            weight[1, 2] += 1e-6
    if write == "then move":
        lora.double()
    assert not torch.equal(lora.get_parameter("twice.weight").float(), before)
    law = "base unchanged: the weight under 'twice' was written to"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, X.to(lora.get_parameter("twice.weight").dtype))


def test_training_and_loading_leave_the_base_as_it_is(lora: fxlora.CapturedModule) -> None:
    optimizer = torch.optim.SGD(fxlora.lora_parameters(lora), lr=0.1)
    lora.train()(X)["logits"].sum().backward()
    optimizer.step()
    fxlora.verify(lora, X)
    fxlora.verify(copy.deepcopy(lora).double(), X.double())
    other = Normed().state_dict()
    lora.load_state_dict(other, strict=False)  # another base, on purpose
    assert torch.equal(lora.get_parameter("conv.weight"), other["conv.weight"])
    fxlora.verify(lora, X)


def test_a_base_that_trains(lora: fxlora.CapturedModule) -> None:
    lora.get_parameter("bn.weight").requires_grad_(True)
    with pytest.raises(VerificationError, match=r"base unchanged: 'bn\.weight' requires gradients"):
        fxlora.verify(lora, X)


def test_a_fold_off_by_little_in_double_precision() -> None:
    lora, args = readers_lora()
    folded = fxlora.fold(lora)
    with torch.no_grad():
        folded.get_parameter("w_einsum")[3, 1] += 1e-8
    law = r"fold: 'w_einsum': its folded weight is not W0 \+ s·BA \(off by 1e-08"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, args, folded=folded)


def test_a_weight_that_the_fold_has_no_business_with(lora: fxlora.CapturedModule) -> None:
    folded = fxlora.fold(lora)
    bias = folded.get_parameter("fc.bias")
    folded.set_parameter("fc.bias", nn.Parameter(bias + 1e-7))
    assert not torch.equal(folded.get_parameter("fc.bias"), bias)
    with pytest.raises(VerificationError, match=r"fold: 'fc\.bias' has no adapter, and is another"):
        fxlora.verify(lora, X, folded=folded)


@functools.cache
def _tied() -> tuple[fxlora.CapturedModule, torch.Tensor]:
    ids = torch.tensor([[1, 2, 5]])
    return fxlora.capture(Tied(), ids), ids


def test_a_tie_that_is_lost() -> None:
    gm, ids = _tied()
    lora = randomly_adapted(gm, ["emb", "head"])
    folded = fxlora.fold(lora)
    fxlora.verify(lora, ids, folded=folded)
    folded.set_parameter("head.weight", nn.Parameter(folded.get_parameter("head.weight").clone()))
    law = r"fold: a tie is lost\. 'emb\.weight' is adapted like head\.weight, .* with no other"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, ids, folded=folded)


def test_a_tie_that_the_adapter_split_and_somebody_made_again() -> None:
    gm, ids = _tied()
    lora = randomly_adapted(gm, "head")
    folded = fxlora.fold(lora)
    fxlora.verify(lora, ids, folded=folded)
    folded.set_parameter("emb.weight", folded.get_parameter("head.weight"))
    law = r"fold: a tie is made\. 'emb\.weight' is adapted like no other, .* with head\.weight"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, ids, folded=folded)


def test_a_node_more_in_the_folded_graph(lora: fxlora.CapturedModule) -> None:
    folded = fxlora.fold(lora)
    graph = folded.graphs["train"]
    last = graph.output_node()
    first = last.all_input_nodes[0]
    with graph.inserting_before(last):
        last.replace_input_with(first, graph.call_function(aten.neg.default, (first,)))
    folded.refresh()
    with pytest.raises(VerificationError, match="fold: the folded train graph is not the captured"):
        fxlora.verify(lora, X, folded=folded)


class Experts(nn.Module):
    """The first sample chooses which of three layers counts; all of them are called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(5, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = F.one_hot(x[0, 0].long().expand(len(x)), 3).to(x.dtype)  # (N, 3)
        every = torch.stack([expert(x) for expert in self.experts], 1)  # (N, 3, 4)
        return (chosen[..., None] * every).sum(1) * self.gate(x).sum()


def test_every_adapter_that_the_inputs_do_not_reach_is_named() -> None:
    x = torch.rand(2, 5)
    lora = fxlora.adapt(Experts(), x, rules=Rule(lora=R))
    law = r"effect and gradient: .*'experts\.1'.*, nor can 1 more: experts\.2\. Give inputs"
    with pytest.raises(VerificationError, match=law):
        fxlora.verify(lora, x)


def test_a_gradient_that_is_off_where_it_trains() -> None:
    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.on = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(not self.training):
                x = torch.tanh(self.lin(x))
            return self.on(x)

    lora = fxlora.adapt(Off(), torch.randn(2, 5), rules=Rule(lora=R))
    with pytest.raises(VerificationError, match=r"gradient: in the train graph 'lin' .*no_grad"):
        fxlora.verify(lora, torch.randn(2, 5))


class Jumpy(nn.Module):
    """Python that branches on data between two layers, so that there is no whole graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x if x.sum().item() > 0 else -x)


@pytest.mark.filterwarnings("ignore:.*submodules are captured instead")
def test_a_region_is_named() -> None:
    x = torch.randn(3, 5)
    lora = fxlora.adapt(Jumpy(), x, rules=Rule(lora=R))
    fxlora.verify(lora, x)
    (program,) = (p for p in lora.programs if p.path == "b")
    (insertion,) = insertions(lora, program.graphs["eval"])
    remove_insertion(insertion)
    lora.refresh()
    with pytest.raises(VerificationError, match=r"coverage: 'b' is read .* graph of 'b'"):
        fxlora.verify(lora, x)


# ---- results and random state -------------------------------------------------------------------


def test_the_reads_as_data_and_as_a_table() -> None:
    lora, args = readers_lora()
    found = fxlora.verify(lora, args)
    data = json.loads(found.to_json())
    assert data == json.loads(json.dumps(found.to_data()))
    assert [site["site"] for site in data["sites"]] == [entry.site for entry in lora.plan or ()]
    (sliced,) = (site for site in data["sites"] if site["site"] == "w_sliced")
    line = f"{Path(__file__).parent / 'models.py'}:{line_of('return x + x @')}"
    expected = {"op": "matmul", "through": "slice", "call_site": "", "line": line, "region": ""}
    assert sliced["reads"] == [expected | {"mode": mode} for mode in ("train", "eval")]
    table = found.reads().splitlines()
    assert len(table) == 2 + 2 * len(found.sites)
    assert sum(line in row for row in table) == 2
    assert max(map(len, str(found).splitlines()[-4:])) <= 100


def test_the_dice_stay_the_users(lora: fxlora.CapturedModule) -> None:
    torch.manual_seed(3)
    fxlora.verify(lora, X)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))


def test_no_memory_to_compute_with() -> None:
    with torch.device("meta"):
        lora = fxlora.adapt(Normed(), torch.randn(2, 3, 9, 7), rules=Rule("conv", lora=R))
    with pytest.raises(InjectError, match="meta device"):
        fxlora.verify(lora, X)


def test_a_weight_that_a_symmetric_delta_leaves_alone() -> None:
    layer = torch.nn.utils.parametrizations.orthogonal(nn.Linear(6, 6))
    adapted = fxlora.adapt(nn.Sequential(layer), torch.randn(3, 6), rules=Rule("0", lora=R))
    randomise(adapted)
    fxlora.verify(adapted, torch.randn(3, 6))


def test_a_training_that_diverged_is_called_so(lora: fxlora.CapturedModule) -> None:
    with torch.no_grad():
        lora.get_parameter(plan_of(lora).entries[0].name_b)[0, 0] = float("nan")
    with pytest.raises(VerificationError, match="diverged"):
        fxlora.verify(lora, X)


# ---- no false alarms ----------------------------------------------------------------------------


def deep(depth: int, *acts: Callable[[], nn.Module], norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(16, 16), *(act() for act in acts), *([nn.LayerNorm(16)] * norm)]
    return nn.Sequential(*layers)


def trained(model: nn.Module, x: torch.Tensor, std: float, **config: Any) -> fxlora.CapturedModule:
    """Adapt a model, and draw A and B at random, as after some training.

    With fixed sizes the capture takes half as long, and nothing here depends on them.
    """
    rules = LoraConfig(target_modules="all-linear", **config)
    lora = fxlora.adapt(model, x, rules=rules, dynamic_shapes=(None,))
    with torch.no_grad():
        for name in sorted(lora.adapter_parameters()):
            lora.get_parameter(name).normal_(std=std)
    return lora


def steep() -> nn.Module:
    """Return an activation whose gradient is as small as that of four layers with a sigmoid."""
    return nn.Sequential(*(nn.Sigmoid() for _ in range(5)))


F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Each with the adapters' alpha, and whether the first layer's gradient underflows to zero.
DEEP = [
    (F32, 3, nn.Tanh, False, 256, False),
    (F32, 15, steep, False, 1, True),
    (F32, 10, nn.Identity, False, 256, False),
    (BF16, 8, nn.Tanh, False, 256, False),
    (F16, 12, nn.Sigmoid, False, 1, True),
    (F16, 12, nn.ReLU, True, 256, False),
    (F64, 6, nn.Softmax, False, 256, False),
]
DEEPER = [
    (F32, 12, nn.Sigmoid, False, 256, False),
    (F32, 65, nn.Sigmoid, False, 1, True),
    (F32, 20, nn.Identity, False, 256, False),
    (F32, 60, nn.Identity, False, 1, False),
    (F32, 60, nn.Identity, False, 256, False),
    (F32, 200, nn.ReLU, False, 1, True),
    (F32, 200, nn.ReLU, False, 256, True),
    (F32, 3, nn.Tanh, False, 1, False),
    (F32, 6, nn.Softsign, True, 256, False),
    (F32, 12, nn.Softsign, True, 1, False),
    (BF16, 12, nn.Tanh, False, 1, False),
    (BF16, 12, nn.GELU, True, 256, False),
    (BF16, 40, nn.GELU, True, 1, False),
    (BF16, 40, nn.GELU, True, 256, False),
    (F16, 12, nn.Sigmoid, False, 256, True),
    (F16, 40, nn.ReLU, True, 1, False),
    (F16, 40, nn.ReLU, True, 256, False),
    (F64, 6, nn.Softmax, False, 1, False),
]


@pytest.mark.parametrize(
    ("dtype", "depth", "act", "norm", "alpha", "underflows"),
    [*DEEP, *(pytest.param(*case, marks=pytest.mark.slow) for case in DEEPER)],
)
def test_what_saturates_or_underflows_is_no_dead_adapter(
    dtype: torch.dtype, depth: int, act: Any, norm: bool, alpha: int, underflows: bool
) -> None:
    x = torch.randn(4, 16).to(dtype)
    kind = (lambda: nn.Softmax(-1)) if act is nn.Softmax else act
    model = deep(depth, kind, norm=norm).to(dtype)
    model(x).float().square().sum().backward()
    assert underflows is not bool(grad_of(model.get_parameter("0.weight")).any())
    model.zero_grad()
    found = fxlora.verify(trained(model, x, 0.02, r=2, lora_alpha=alpha), x)
    assert len(found.sites) == depth
    assert all(check.effect > 0 and check.gradient_a > 0 for check in found.sites)


@pytest.mark.parametrize("act", [nn.Tanh, pytest.param(nn.ReLU, marks=pytest.mark.slow)])
def test_a_dead_adapter_in_a_deep_stack_is_still_found(act: type[nn.Module]) -> None:
    class Blocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead, self.last = deep(12, act), deep(2, act), nn.Linear(16, 3)
            self.register_buffer("nothing", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.live(x) + self.nothing * self.dead(x))

    x = torch.randn(4, 16)
    lora = trained(Blocked(), x, 0.02, r=2)
    with pytest.raises(VerificationError, match=r"'dead\.0' .* nor can 1 more: dead\.2\."):
        fxlora.verify(lora, x)


def test_a_gradient_that_is_never_finite_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 4)
            self.register_buffer("nothing", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.nothing * self.lin(x)).abs().sqrt()

    lora = fxlora.adapt(Root(), torch.randn(3, 5), rules=Rule(lora=R))
    with pytest.raises(VerificationError, match="on 'lin' a gradient is not finite"):
        fxlora.verify(lora, torch.randn(3, 5))


def test_the_modes_that_it_is_called_in_change_nothing(lora: fxlora.CapturedModule) -> None:
    expected = fxlora.verify(lora, X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fxlora.verify(lora, X) == expected
    with torch.inference_mode():
        assert fxlora.verify(lora, X) == expected
    with torch.no_grad(), torch.autograd.set_detect_anomaly(True):
        assert fxlora.verify(lora, X) == expected
    torch.use_deterministic_algorithms(True)
    try:
        assert fxlora.verify(lora, X) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_that_the_model_writes_to_stay_as_they_are() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(x.add_(1))

    lora = fxlora.adapt(Writes(), torch.randn(3, 5), rules=Rule(lora=R))
    x = torch.randn(3, 5)
    before = x.clone()
    fxlora.verify(lora, x)
    assert torch.equal(x, before)


def test_a_registered_branch_that_is_wrong_is_noticed_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overload = torch.ops.aten.linear.default
    row = OPS[overload, 1]
    x = torch.randn(4, 5)
    gm = fxlora.capture(Mlp(), x)
    plan = fxlora.match(gm, Rule("up", lora=R))
    fxlora.verify(fxlora.inject(gm, plan), x)
    doubled = dataclasses.replace(
        row, branch=lambda read, a, b: torch.ops.aten.mul.Tensor(row.branch(read, a, b), 2)
    )
    monkeypatch.setitem(OPS, (overload, 1), doubled)
    lora = fxlora.inject(gm, plan)
    with pytest.raises(VerificationError, match="folded and unfolded outputs differ"):
        fxlora.verify(lora, x)


class BranchIsWrong(nn.Module):
    """Reads a weight by an op whose registered branch is twice as large, in the chosen modes."""

    def __init__(self, modes: tuple[bool, ...]) -> None:
        super().__init__()
        self.table, self.w = nn.Embedding(9, 5), nn.Parameter(torch.randn(7, 5))
        self.bias = nn.Parameter(torch.randn(7))
        self.modes = modes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.table(ids), 0.5, self.training)
        y = torch.addmm(self.bias, x, self.w.t())
        return torch.mm(x, self.w.t()) + y if self.training in self.modes else y


@functools.cache
def _wrong_branch(modes: tuple[bool, ...]) -> fxlora.CapturedModule:
    return fxlora.capture(BranchIsWrong(modes), torch.randint(9, (4,)))


@pytest.mark.parametrize("modes", [(True,), (True, False)])
@pytest.mark.parametrize(
    ("start", "dropout"),
    [
        *((0.0, 0.0), (0.0, 0.5), (1e-7, 0.0), (1.0, 0.0)),
        *(pytest.param(start, 0.5, marks=pytest.mark.slow) for start in (1e-7, 1.0)),
    ],
)
def test_a_wrong_branch_is_noticed_beside_others_and_in_either_mode(
    monkeypatch: pytest.MonkeyPatch, start: float, modes: tuple[bool, ...], dropout: float
) -> None:
    key = torch.ops.aten.mm.default, 1
    row, ids = OPS[key], torch.randint(9, (4,))
    gm = _wrong_branch(modes)
    rules = [
        Rule("w", lora=LoraConfig(r=2, lora_dropout=dropout)),
        Rule("table", lora=LoraConfig(r=2)),  # its B does not start from zero
    ]

    def adapted() -> fxlora.CapturedModule:
        lora = fxlora.inject(gm, fxlora.match(gm, rules))
        with torch.no_grad():
            b = lora.get_parameter(lora.plan.entries[1].name_b)  # pyright: ignore
            b.normal_(std=start) if start else b.zero_()
        return lora

    fxlora.verify(adapted(), ids)
    doubled = dataclasses.replace(
        row, branch=lambda read, a, b: torch.ops.aten.mul.Tensor(row.branch(read, a, b), 2)
    )
    monkeypatch.setitem(OPS, key, doubled)
    with pytest.raises(VerificationError, match=r"outputs differ by .* in (train|eval) mode"):
        fxlora.verify(adapted(), ids)


def test_a_tensor_that_is_passed_twice_stays_one_and_views_stay_views() -> None:
    x, views = torch.randn(3, 5), torch.randn(6, 5)
    for given in ((x, x), (views[:4], views[2:])):
        copied = copied_values(given)
        before = [tensor.clone() for tensor in given]
        copied[0].mul_(2)
        assert not torch.equal(copied[1], before[1])
        assert all(map(torch.equal, given, before))
        given[0].mul_(2)
        assert all(map(torch.equal, given, copied))


def test_autocast_that_is_disabled_rounds_nothing() -> None:
    class InFloat32(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.fc(x)
            with torch.autocast("cpu", enabled=False):
                return y.float() * 2

    x = torch.randn(4, 5)
    lora = fxlora.adapt(InFloat32(), x, rules=fxlora.LoraConfig(r=2, target_modules=["fc"]))
    assert fxlora.verify(lora, x).tolerance == 1e-4
