"""fxlora.peft: the fields of PEFT's configuration, and scripts written for PEFT."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft.tuners.lora.config import CordaConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_TARGETS
from torch import nn

import fxlora
from fxlora import (
    AdapterError,
    CaptureError,
    ConfigError,
    FxLoraWarning,
    InjectError,
    LoraConfig,
    NoMatchError,
    QuantisedError,
    Rule,
)
from fxlora.config import REFUSED, TASKS
from fxlora.matching.architectures import TARGETS
from fxlora.peft import PeftModel, TaskType, get_peft_model
from fxlora.peft.making import as_config

from .models import Tied
from .typed import untyped

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

PEFTS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
SOME: dict[str, Any] = {"target_modules": ["lin"]}


def default_of(field: Any) -> Any:
    missing = field.default is dataclasses.MISSING
    return field.default_factory() if missing else field.default


# ---- fields -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEFTS)
def test_every_field_of_pefts_is_known_and_taken_at_its_default(name: str) -> None:
    default = default_of(PEFTS[name])
    config = LoraConfig(**{**SOME, name: default})
    assert config in (LoraConfig(**SOME), LoraConfig())
    ours = {field.name: default_of(field) for field in dataclasses.fields(LoraConfig)}
    if name not in ("peft_type", "loftq_config", "runtime_config"):
        assert ours[name] == default


@pytest.mark.parametrize("name", PEFTS)
def test_no_field_is_ignored(name: str) -> None:
    plain = LoraConfig(**SOME)
    values: list[Any] = [True, 3, "text", ["text"], [1], {"a": 1}, object()]
    for value in values:
        said, config = "", plain
        try:
            config = LoraConfig(**{**SOME, name: value})
        except ConfigError as error:
            said = str(error)
        assert name in said or config != plain or value == getattr(plain, name), value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eva_config", peft.EvaConfig()),
        ("corda_config", CordaConfig()),
        ("loftq_config", peft.LoftQConfig()),
        ("runtime_config", peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)),
        ("layer_replication", [(0, 1)]),
        ("lora_bias", True),
        ("qalora_group_size", 32),
    ],
)
def test_what_is_refused_says_what_to_do(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        LoraConfig(**{name: value})
    assert str(error.value).startswith(f"{name}=") and REFUSED[name] in str(error.value)
    assert set(REFUSED) <= set(PEFTS)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "loftq", "mica"])
def test_an_init_of_pefts_that_is_refused_says_what_to_do(init: str) -> None:
    with pytest.raises(ConfigError, match=f"init_lora_weights='{init}' is not supported: .* "):
        LoraConfig(init_lora_weights=init)


def test_the_advice_for_eva_works() -> None:
    with pytest.raises(ConfigError, match=r"inject, and call fxlora\.initialize_from"):
        LoraConfig(init_lora_weights="eva")
    x, config = torch.randn(40, 6), LoraConfig(r=2, target_modules=["0"])
    lora = fxlora.adapt(nn.Sequential(nn.Linear(6, 4)), x, rules=config)
    before = lora.get_parameter("0.lora_A.default.weight").clone()
    fxlora.initialize_from(lora, [x])
    assert not torch.equal(lora.get_parameter("0.lora_A.default.weight"), before)


@dataclasses.dataclass
class Newer(peft.LoraConfig):
    """The configuration of a PEFT to come."""

    quantum_config: int = dataclasses.field(default=0)


def test_a_field_of_a_newer_peft_is_refused_by_name_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no field 'quantum_config'"):
        LoraConfig(**untyped({"quantum_config": 3}))
    with pytest.raises(ConfigError, match="no field 'quantum_config'"):
        as_config(Newer(**SOME, quantum_config=3))
    with pytest.raises(ConfigError, match=r"Rule has no field 'naem'.*Did you mean 'name'"):
        Rule(**untyped({"naem": "lin"}))
    (tmp_path / "lora.json").write_text(json.dumps({"lora": {**SOME, "quantum_config": 3}}))
    with pytest.raises(ConfigError, match="unknown key 'quantum_config'"):
        fxlora.load_rules(tmp_path / "lora.json")
    base, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    config = peft.LoraConfig(target_modules=["0"])
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in ("quantum_config", "layer_replication"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**said, name: [[0, 1]]}))
        with pytest.raises(AdapterError, match=name):
            fxlora.load_adapter(fxlora.capture(base, x), tmp_path)


def test_pefts_own_configuration_is_taken() -> None:
    theirs = peft.LoraConfig(r=3, target_modules=["b", "a"], task_type=peft.TaskType.CAUSAL_LM)
    ours = as_config(theirs)
    assert (ours.r, set(ours.target_modules or ()), ours.task_type) == (3, {"a", "b"}, "CAUSAL_LM")
    with pytest.raises(ConfigError, match="must be a LoraConfig"):
        as_config({"r": 3})


@pytest.mark.parametrize("kind", [peft.TaskType, TaskType])
def test_tasks_are_pefts(kind: Any) -> None:
    assert {task.value for task in kind} == set(TASKS)
    for task in kind:
        assert LoraConfig(task_type=task) == LoraConfig(task_type=task.value)
    with pytest.raises(ConfigError, match="task_type must be one of SEQ_CLS, "):
        LoraConfig(task_type="FLY")


def test_empty_lists_say_nothing_as_in_peft() -> None:
    empty: dict[str, Any] = {"exclude_modules": [], "modules_to_save": []}
    empty |= {"layers_to_transform": [], "layers_pattern": [], "rank_pattern": None}
    assert LoraConfig(**SOME, **empty) == LoraConfig(**SOME)
    only = LoraConfig(target_modules=[], target_parameters=["lin.weight"])
    assert only.target_modules == ()
    with pytest.raises(ConfigError, match="layers_to_transform needs a list of names"):
        LoraConfig(target_modules=".*lin", layers_to_transform=[1])


def test_pissa_niter_is_exact_pissa() -> None:
    assert LoraConfig(init_lora_weights="pissa_niter_4").init_lora_weights == "pissa"


# ---- inference_mode, descriptions ---------------------------------------------------------------


def test_inference_mode_freezes_what_would_train() -> None:
    base, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), torch.randn(2, 6)
    options: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["1"]}
    for frozen in (False, True):
        config = LoraConfig(r=2, **options, inference_mode=frozen)
        lora = fxlora.adapt(base, x, rules=config)
        assert any(p.requires_grad for p in lora.parameters()) is not frozen
        assert any(p.requires_grad for p in copy.deepcopy(lora).parameters()) is not frozen
    with pytest.raises(InjectError, match="inference_mode=True"):
        fxlora.lora_parameters(lora)
    rules = [config, LoraConfig(target_modules=["1"])]
    with pytest.raises(ConfigError, match="same in all rules"):
        fxlora.match(fxlora.capture(base, x), rules)


def test_descriptions_go_with_the_folder_and_back(tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(2, 6)
    said: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "revision": "main",
        "auto_mapping": {"base_model_class": "Sequential"},
        "peft_version": "0.21.2",
    }
    gm = fxlora.capture(base, x)
    lora = fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2, target_modules=["0"], **said)))
    for folder in ("one", "two"):
        fxlora.save_adapter(lora, tmp_path / folder)
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert {name: config.get(name) for name in said} == said
        assert peft.PeftConfig.from_pretrained(str(tmp_path / folder)).revision == "main"
        lora = fxlora.load_adapter(gm, tmp_path / folder)
    assert dict(lora.plan.descriptions if lora.plan else {}) == said


# ---- heads by task ------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
LABELS: dict[str, Any] = {"num_labels": 3}
WIDTHS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
BERT = tf.BertConfig(**SIZES, **WIDTHS, **LABELS)
QA = tf.BertConfig(**SIZES, **WIDTHS, **{**LABELS, "num_labels": 2})
DISTIL = tf.DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
LLAMA = tf.LlamaConfig(**SIZES, hidden_size=16, intermediate_size=24, pad_token_id=0)
HEADS = {
    "bert": (tf.BertForSequenceClassification, BERT, "SEQ_CLS"),
    "tokens": (tf.BertForTokenClassification, BERT, "TOKEN_CLS"),
    "answers": (tf.BertForQuestionAnswering, QA, "QUESTION_ANS"),
    "two heads": (tf.DistilBertForSequenceClassification, DISTIL, "SEQ_CLS"),
    "llama": (tf.LlamaForSequenceClassification, LLAMA, "SEQ_CLS"),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_of_a_task_train_as_in_peft(name: str, tmp_path: Path) -> None:
    kind, config, task = HEADS[name]
    model = kind(config).double().eval()
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    targets = ["q_lin", "q_proj", "query"]
    options = {"target_modules": r".*\.(q_lin|q_proj|query)", "task_type": task, "r": 2}
    gm = fxlora.capture(model, kwargs=ids)
    plan = fxlora.match(gm, LoraConfig(**options))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)).eval()
    held = (
        n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad
    )
    saved = {n.replace(".modules_to_save.default", "") for n in held if "lora_" not in n}
    assert set(plan.trained) == saved and saved and targets

    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    ours = fxlora.load_adapter(gm, tmp_path).eval()
    found, expected = ours(**ids)[0], theirs(**ids)[0]
    assert (expected - model(**ids)[0]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_task_without_its_head_is_warned_about() -> None:
    gm = fxlora.capture(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), torch.randn(2, 6))
    config = LoraConfig(r=2, target_modules=["0"], task_type="SEQ_CLS")
    with pytest.warns(fxlora.FxLoraWarning, match="ends in classifier or score: the head stays"):
        fxlora.match(gm, config)
    fxlora.match(gm, dataclasses.replace(config, modules_to_save=["1"]))


def test_a_name_that_peft_would_also_find_in_other_names_is_refused() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.lm_head = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(3, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.head(self.body(x)))

    gm = fxlora.capture(Heads(), torch.randn(2, 6))
    with pytest.raises(ConfigError, match=r"'head', and for PEFT also 'lm_head'.* Add that name"):
        fxlora.match(gm, LoraConfig(target_modules=["body"], modules_to_save=["head"]))
    both = LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "lm_head"])
    assert fxlora.match(gm, both).modules_to_save == ("head", "lm_head")
    one = [Rule("head", train=True), LoraConfig(r=2, target_modules=["body"])]
    assert fxlora.match(gm, one).modules_to_save == ("head",)


# ---- the defaults of an architecture ------------------------------------------------------------


def test_the_targets_of_architectures_are_pefts() -> None:
    theirs = {k: v if isinstance(v, str) else tuple(v) for k, v in PEFTS_TARGETS.items()}
    assert theirs == TARGETS


def test_a_configuration_without_targets_takes_those_of_the_architecture() -> None:
    model = tf.LlamaForCausalLM(LLAMA).eval()
    gm = fxlora.capture(model, kwargs={"input_ids": torch.tensor([[5, 6]]), "use_cache": False})
    for module in (
        gm,
        copy.deepcopy(gm),
        fxlora.remove(fxlora.inject(gm, fxlora.match(gm, LoraConfig(r=2)))),
    ):
        plan = fxlora.match(module, LoraConfig(r=2))
        assert {e.site.rpartition(".")[2] for e in plan} == {"q_proj", "v_proj"}
        lora = plan.rules[0].lora
        assert lora is not None and lora.target_modules == ("q_proj", "v_proj")
    assert fxlora.match(gm, Rule(lora=LoraConfig(r=2, target_modules="auto"))) == plan
    # As in PEFT, target_parameters come on top, unless target_modules is an empty list.
    options: dict[str, Any] = {"r": 2, "target_parameters": ["up_proj.weight"]}
    assert len(fxlora.match(gm, LoraConfig(**options))) == 3
    assert len(fxlora.match(gm, LoraConfig(**options, target_modules=[]))) == 1


def test_no_defaults_for_an_unknown_architecture() -> None:
    class Configured(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config
            self.blocks = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[0](x)

    for config, said in (({"model_type": "strange"}, "architecture 'strange'"), (3, "without")):
        gm = fxlora.capture(Configured(config), torch.randn(2, 6))
        with pytest.raises(
            ConfigError, match=f"{said}.*all-linear.*names such as blocks.0"
        ) as error:
            fxlora.match(gm, LoraConfig(r=2))
        assert "target_modules" in str(error.value)
        assert len(fxlora.match(gm, LoraConfig(r=2, target_modules="all-linear"))) == 1
    gm = fxlora.capture(Configured({"model_type": "llama"}), torch.randn(2, 6))
    with pytest.raises(NoMatchError, match="defaults of llama, q_proj, v_proj, match none of 1"):
        fxlora.match(gm, LoraConfig(r=2))


# ---- scripts ------------------------------------------------------------------------------------

X = torch.randn(3, 6, dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def script(model: Any, steps: int = 4) -> list[float]:
    """Train as a PEFT script does."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses: list[float] = []
    for _ in range(steps):
        loss = model(X).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alike(ours: Any, theirs: Any) -> None:
    """Give PEFT's model our initial A and B."""
    held = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(held[name.removeprefix("base_model.model.")])


def test_a_script_gives_what_it_gives_with_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = net()
    options: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["0", "2"]}
    ours = get_peft_model(base, LoraConfig(**options), X)
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**options))
    alike(ours, theirs)
    printed: list[str] = []
    for model in (ours, theirs):
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    losses = script(ours)
    assert losses == pytest.approx(script(theirs), rel=1e-10) and losses[0] != losses[-1]

    expected = theirs.eval()(X)
    torch.testing.assert_close(ours.eval()(X), expected, rtol=1e-10, atol=1e-10)
    for model in (ours, theirs):
        with model.disable_adapter():
            assert torch.equal(model(X), base(X))
    merged = ours.merge_and_unload()
    assert type(merged) is nn.Sequential
    torch.testing.assert_close(merged(X), expected, rtol=1e-10, atol=1e-10)
    assert ours.unload() is base and torch.equal(base(X), net()(X))

    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    torch.testing.assert_close(again(X), expected, rtol=1e-10, atol=1e-10)
    loaded = PeftModel.from_pretrained(base, tmp_path, X)
    assert torch.equal(loaded(X), ours(X)) and not loaded.training
    assert loaded.active_peft_config.inference_mode
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(
        p.requires_grad
        for p in PeftModel.from_pretrained(base, tmp_path, X, is_trainable=True).parameters()
    )


def test_it_is_the_users_class_and_a_module() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]), X)
    assert isinstance(model, PeftModel) and isinstance(model, nn.Sequential)
    assert type(model).__name__ == "Sequential" and model.get_base_model() is model
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    state = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(state)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X)) and isinstance(copied, PeftModel)
    assert model.float()(X.float()).dtype == torch.float32 and len(seen) >= 2
    with model.disable_adapter():
        model(X.float())
    assert len(seen) >= 3  # the hook is of this object, whatever runs


def test_several_adapters_take_turns(tmp_path: Path) -> None:
    base = net()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]), X)
    script(model)
    first = model.eval()(X)
    model.add_adapter("other", LoraConfig(r=1, target_modules=["2"], init_lora_weights=False))
    assert model.active_adapters == ["default"] and torch.equal(model(X), first)
    model.set_adapter("other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "2.lora_A.other.weight",
        "2.lora_B.other.weight",
    }
    second = model(X)
    assert not torch.allclose(first, second)
    script(model)
    assert not torch.allclose(model.eval()(X), second)
    model.set_adapter("default")
    assert torch.equal(model(X), first) and model.active_adapter == "default"

    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "other", "again")
    assert not model.training
    states = {status.name: status for status in model.get_layer_status()}
    assert states["model.2"].available_adapters == ["again", "other"]
    assert states["model.0"].active_adapters == ["default"] and states["model.0"].enabled
    assert states["model.0"].requires_grad == {"default": True}
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.trainable_params) == (2, 2 * (6 + 8))
    assert list(model.peft_config) == ["default", "other", "again"]
    assert model.peft_config["other"].target_modules == ("2",)

    model.to(torch.float32)  # the weights stay shared among the adapters
    held = {p.data_ptr() for p in model._peft.base.parameters()}
    assert held <= {p.data_ptr() for p in model.parameters()}
    model.set_adapter("other", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.warns(fxlora.FxLoraWarning, match="'other' was active; now 'default' is"):
        model.delete_adapter("other")
    torch.testing.assert_close(model(X.float()), first.float())


def test_several_adapters_at_once_are_those_of_peft() -> None:
    base = net()
    kinds: list[dict[str, Any]] = [
        {"target_modules": ["0"], "lora_alpha": 3},
        {"target_modules": ["0", "2"]},
    ]
    ours = get_peft_model(base, LoraConfig(r=2, **kinds[0]), X, adapter_name="a")
    theirs: Any = peft.get_peft_model(
        untyped(copy.deepcopy(base)), peft.LoraConfig(r=2, **kinds[0]), "a"
    )
    ours.add_adapter("b", LoraConfig(r=3, **kinds[1]))
    theirs.add_adapter("b", peft.LoraConfig(r=3, **kinds[1]))
    optimizer = torch.optim.SGD(ours.parameters(), 0.01)  # made before both train
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
            theirs.get_parameter(f"base_model.model.{name}").data.copy_(parameter.data)

    def gap(found: Any, expected: Any) -> float:
        return float((found - expected).detach().abs().max())

    alone = ours(X)
    ours.set_adapter(["a", "b"])
    theirs.base_model.set_adapter(["a", "b"])
    assert gap(ours(X), alone) > 1e-3 and gap(ours(X), theirs(X)) < 1e-10
    assert ours.active_adapter == ["a", "b"] and ours.get_layer_status()[0].active_adapters == [
        "a",
        "b",
    ]
    for model in (ours, theirs):
        model(X).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.01)
    assert gap(ours(X), theirs(X)) < 1e-10
    copied = copy.deepcopy(ours)
    both, merged = ours(X), ours.merge_and_unload(adapter_names=["a", "b"])
    assert gap(merged(X), both) < 1e-10
    for name in ("a", "b"):  # what both trained together
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert gap(ours(X), theirs(X)) < 1e-10
    ours.merge_adapter(["a", "b"])
    assert gap(ours(X), both) < 1e-10 and ours.get_model_status().merged_adapters == ["a", "b"]
    ours.unmerge_adapter()
    assert gap(copied(X), both) == 0
    assert gap(copied.to(torch.float32)(X.float()), both) < 1e-4
    copied.delete_adapter("a")
    assert copied.active_adapter == "b" and gap(copied(X.float()), ours(X)) < 1e-4


def test_adapters_without_a_sum_are_not_active_together() -> None:
    head = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = get_peft_model(net(), head, X)
    model.add_adapter("b", head)
    with pytest.raises(InjectError, match="trained in full by one, and changed by the other"):
        model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default"]


def test_merge_adapter_and_back() -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]), X)
    script(model)
    expected = model.eval()(X)
    model.merge_adapter()
    held = model.captured_module.named_parameters()
    assert not [name for name, _ in held if "lora_" in name]
    assert model.get_layer_status()[0].merged_adapters == ["default"]
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    model.disable_adapter_layers()
    assert not model.get_model_status().enabled
    model.enable_adapter_layers()
    assert torch.equal(model(X), expected)


def test_a_merge_into_quantised_weights_says_what_to_choose() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base, x = (
        nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).eval(),
        torch.randn(3, 64),
    )
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config, x).eval()
    expected = model(x)
    assert float((expected - base(x)).detach().abs().max()) > 0.1
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(QuantisedError, match=r'"dequantise".*"requantise"'):
            merge()
        assert torch.equal(model(x), expected)  # it still runs the branch
    with pytest.raises(ConfigError, match='take "dequantise" or "requantise"'):
        model.merge_and_unload(quantised="keep")
    for how, kind in {"dequantise": nn.Parameter, "requantise": type(base[0].weight)}.items():
        plain = model.merge_and_unload(quantised=how)
        assert type(plain[0].weight) is kind
        assert torch.allclose(plain(x), expected, atol=1e-4 if how == "dequantise" else 0.5)
        model.merge_adapter(quantised=how)
        assert torch.equal(model(x), plain(x))
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)


def test_what_is_not_supported_says_so(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(net(), config, X)
    refused = [
        lambda: get_peft_model(net(), config, X, mixed=True),
        lambda: get_peft_model(net(), config, "default"),
        lambda: get_peft_model(model, config, X),
        lambda: PeftModel(net(), config),
        lambda: PeftModel.from_pretrained(net(), tmp_path, X, config={}),
        lambda: PeftModel.from_pretrained(net(), tmp_path, X, torch_device="cpu"),
        lambda: model.load_adapter(tmp_path, "b", torch_device="cpu"),
        lambda: model.load_adapter(tmp_path, "b", revision="main"),
        lambda: model.add_adapter("default", config),
        lambda: model.set_adapter(["default", "other"]),
        lambda: model.set_adapter("other"),
        lambda: model.set_adapter(None),
        lambda: model.set_adapter([None]),
        lambda: model.delete_adapter("default"),
        lambda: model.add_weighted_adapter(["default"], [1.0], "new", svd_driver="gesvd"),
        lambda: model.add_weighted_adapter(["default"], [1.0], "default"),
        lambda: model.add_weighted_adapter(["other"], [1.0], "new"),
        lambda: model.merge_and_unload(adapter_names=["other"]),
        lambda: model.save_pretrained(tmp_path, safe_serialization=False),
        lambda: model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x"),
        lambda: model.save_pretrained(tmp_path, selected_adapters=["other"]),
    ]
    for call in refused:
        with pytest.raises(ConfigError):
            call()
    assert not list(tmp_path.iterdir())


def test_a_model_that_needs_an_example_says_how_to_give_one(tmp_path: Path) -> None:
    base = tf.LlamaForCausalLM(LLAMA).eval()
    batch = {"input_ids": torch.randint(1, 40, (2, 6))}
    calls: list[tuple[Any, Any]] = [
        (get_peft_model, LoraConfig(r=2)),
        (PeftModel.from_pretrained, tmp_path),
    ]
    for call, second in calls:
        with pytest.raises(CaptureError, match=r"here: .*, input_ids=….*, \*\*batch\)"):
            call(base, second)
        model = call(base, second, **batch)
        assert torch.equal(model.eval()(**batch).logits, base(**batch).logits)
        model.save_pretrained(tmp_path)


def test_statuses_are_pefts_and_names_are_mapped(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 4, 2)
            self.last, self.w = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 3))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.conv(self.emb(ids).mT).mT
            return self.last(x) @ self.w

    base, ids = Mixed().eval(), torch.tensor([[1, 2, 8]])
    options: dict[str, Any] = {
        "r": 2,
        "target_modules": ["emb", "conv"],
        "modules_to_save": ["last"],
    }
    ours = get_peft_model(base, LoraConfig(**options, init_lora_weights=False), ids).eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))

    def said(model: Any) -> Any:
        found = [dataclasses.asdict(status) for status in model.get_layer_status()]
        return sorted(found, key=lambda status: status["name"])

    assert said(ours) == said(theirs)
    assert [status["module_type"] for status in said(ours)] == [
        "lora.Conv1d",
        "lora.Embedding",
        "ModulesToSaveWrapper",
    ]
    assert ours.get_model_status().num_adapter_layers == 3
    assert torch.equal(ours.unload().last.weight, ours.get_parameter("last.weight"))
    with pytest.warns(FxLoraWarning, match=r"'mixed' has the trained values of last"):
        ours.add_weighted_adapter(["default"], [0.5], "mixed", "linear")
    ours.delete_adapter("mixed")
    ours.save_pretrained(tmp_path)
    other = nn.Sequential(Mixed()).eval()
    other[0].load_state_dict(base.state_dict())
    loaded = PeftModel.from_pretrained(other, tmp_path, ids, key_mapping={"^": "0."})
    loaded.load_adapter(tmp_path, "again", key_mapping={"^": "0."})
    assert torch.equal(loaded(ids), ours(ids)) and not torch.equal(ours(ids), base(ids))
    loaded.set_adapter("again")
    assert torch.equal(loaded(ids), ours(ids))


def test_another_method_of_pefts_is_named() -> None:
    with pytest.raises(ConfigError, match="IA3Config, of the method IA3"):
        as_config(peft.IA3Config(target_modules=["lin"], feedforward_modules=["lin"]))


def test_the_state_of_all_adapters_and_the_functions_on_a_peft_model() -> None:
    x = torch.randn(4, 6)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False)
    model, other = (get_peft_model(base, config, x) for _ in range(2))
    for each in (model, other):
        each.add_adapter("b", config)
    state = model.state_dict()
    assert {"0.lora_A.default.weight", "0.lora_B.b.weight", "2.modules_to_save.b.weight"} <= set(
        state
    )
    other.load_state_dict(state)
    assert {name: t.tolist() for name, t in other.state_dict().items()} == {
        name: t.tolist() for name, t in state.items()
    }
    other.set_adapter("b")
    model.set_adapter("b")
    assert torch.equal(other(x), model(x)) and not torch.equal(model(x), base(x))
    with pytest.raises(AdapterError, match=r"lora_B\.default.*\(5, 2\) here"):
        other.load_state_dict({**other.state_dict(), "0.lora_B.default.weight": torch.ones(5, 1)})
    with pytest.raises(fxlora.NotCapturedError, match=r"pass model\.captured_module"):
        fxlora.report(model)
    assert "0" in fxlora.report(model.captured_module)
    model.merge_adapter("b")
    assert torch.allclose(model(x), other(x), atol=1e-6)


def test_generate_and_the_names_of_a_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: Any = tf.LlamaForCausalLM(LLAMA).eval()
    ids = torch.randint(1, 40, (2, 6))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with fxlora.recorded_calls(base) as calls:
        for length in (5, 7):
            base.generate(torch.randint(1, 40, (2, length)), max_new_tokens=2)
    config = LoraConfig(r=4, task_type=TaskType.CAUSAL_LM, inference_mode=False)
    model = get_peft_model(base, config, calls=calls, revision="main")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.eval()
    expected = model.generate(ids, **options)
    assert not torch.equal(expected, base.generate(ids, **options))
    with model.disable_adapter():
        assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
        assert type(theirs) is peft.PeftModelForCausalLM
        assert torch.equal(theirs.generate(input_ids=ids, **options), expected)
    assert torch.equal(model.merge_and_unload().generate(ids, **options), expected)
    assert model.config.model_type == "llama" and model.active_peft_config.revision == "main"


def test_the_example_in_the_docstring() -> None:
    assert fxlora.peft.get_peft_model is get_peft_model
    (test,) = doctest.DocTestFinder(recurse=False).find(get_peft_model, "get_peft_model")
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_one_optimizer_trains_adapters_in_turns() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(4, 6)
    target, x = torch.randn(4, 3).double(), x.double()
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    model = get_peft_model(base, config, x)
    model.add_adapter("b", config)
    names = dict(model.named_parameters())
    assert {"0.lora_B.b.weight", "2.modules_to_save.b.weight", "2.weight"} <= names.keys()
    assert model.get_nb_trainable_parameters()[1] == sum(p.numel() for p in names.values())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    start = {name: p.detach().clone() for name, p in names.items()}
    for step in range(4):
        model.set_adapter(("default", "b")[step % 2])
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in names.items() if not torch.equal(p, start[name])}
    trained = [n for n in names if "lora_" in n or n.startswith("2.")]
    assert moved == set(trained)
    model.merge_adapter()
    model.set_adapter("default")
    assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert model.get_nb_trainable_parameters()[0] < 100 and not model(x).requires_grad


def test_each_name_of_a_tie_has_an_adapter_as_in_peft(tmp_path: Path) -> None:
    """Unless `tied` says otherwise; a step of SGD is PEFT's, and a merge splits the tie."""
    torch.manual_seed(0)
    base, ids = Tied().double().eval(), torch.tensor([[1, 2, 5], [3, 3, 0]])
    targets: dict[str, Any] = {
        "r": 2,
        "target_modules": ["emb", "head"],
        "init_lora_weights": False,
    }
    ours = untyped(get_peft_model(base, LoraConfig(**targets), ids).eval())
    ours.save_pretrained(tmp_path)
    pefts = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), is_trainable=True)
    assert [entry.site for entry in ours.captured_module.plan] == ["emb", "head"]
    for model in (ours, pefts.eval()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        before = model(ids)
        before.square().sum().backward()
        optimizer.step()
        assert (model(ids) - before).abs().max() > 1e-2
    torch.testing.assert_close(ours(ids), pefts(ids), rtol=1e-10, atol=1e-10)
    with pytest.warns(FxLoraWarning, match="splits a tie"):
        merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(ids), pefts(ids), rtol=1e-10, atol=1e-10)
    assert merged.emb.weight is not merged.head.weight
    gm = fxlora.capture(base, ids)
    how: Any
    for how, sites in (("rule", ["emb"]), ("share", ["emb"]), ("each", ["emb", "head"])):
        plan = fxlora.match(gm, LoraConfig(**targets, tied=how))
        assert [entry.site for entry in plan] == sites
        assert fxlora.match(gm, plan.rules) == plan
    assert as_config(LoraConfig(**targets, tied="share")).tied == "share"
