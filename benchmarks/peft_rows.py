"""Models and configurations as in PEFT's own LoRA tests: equal to PEFT, refused, or different.

The rows have the kinds of models and the arguments of PEFT's tests (test_custom_models.py,
test_decoder_models.py, test_seq_classifier.py, …, PEFT 0.21); the models are our own, in float64.
In each row PEFT adapts the model, takes a step of SGD on all that trains, and saves. Then

* the configuration must mean the same weights and ranks to fxlora, or be refused;
* PEFT's folder must give its outputs, and so must fxlora's folder of it in PEFT;
* the next step of SGD must give equal outputs in both.

    python benchmarks/peft_rows.py --only 'MLP|decoder'
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import Report, start, untimed_parser
from torch import nn
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

import fxlora
from fxlora.peft.model import as_config

LIMIT, SINGLE = 1e-10, 1e-4  # in float64, and for inits of PEFT's that have float32 only
Row = tuple[str, str, dict[str, Any]]  # what it is, the model, the arguments of LoraConfig


# ---- models -------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, first: nn.Module | None = None, width: int = 10) -> None:
        super().__init__()
        self.first = first or nn.Identity()
        self.lin0, self.lin1 = nn.Linear(width, 20), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).flatten(1)
        return self.lin1(torch.tanh(self.lin0(x))).log_softmax(-1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d = nn.Embedding(100, 5), Conv1D(1, 5)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin0(torch.tanh(self.conv1d(self.emb(ids))).flatten(1)).log_softmax(-1)


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(torch.tanh(self.mha(x, x, x)[0])).log_softmax(-1)


class Parameters(nn.Module):
    """Layers whose weights are parameters of modules without a class of PEFT's."""

    class Layer(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = self.Layer(10, 20), self.Layer(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.tanh(self.lin0(x))).log_softmax(-1)


class One(nn.Module):
    """A convolution under PEFT's name for it, and a linear layer on its output."""

    def __init__(self, name: str, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)
        self.lin0 = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin0(torch.tanh(getattr(self, self.name)(x)).flatten(1)).log_softmax(-1)


def _tiny(kind: str, **more: Any) -> nn.Module:
    """Return a small random model of transformers, by the name of its class."""
    model_class = getattr(transformers, kind)
    widths: dict[str, Any] = {
        "vocab_size": 37,
        **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 16),
        **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner"), 24),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2),
        **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
        **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 2),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("num_key_value_heads", "n_positions", "max_position_embeddings"), 2),
        "d_kv": 8,
        "use_cache": False,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "bos_token_id": 0,
        "decoder_start_token_id": 1,
    }
    widths |= {"n_positions": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 16}
    config = model_class.config_class(**{**widths, **more})
    model = model_class(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return model


MODELS: dict[str, Any] = {
    "MLP": Mlp,
    "embedding and Conv1D": Tokens,
    "Conv1d": lambda: One("conv1d", nn.Conv1d(1, 3, 2), 27),
    "Conv2d": lambda: One("conv2d", nn.Conv2d(5, 7, 3), 7 * 3 * 4),
    "Conv2d, groups": lambda: One("conv2d", nn.Conv2d(8, 8, 3, groups=2), 8 * 3 * 4),
    "Conv2d, depthwise": lambda: One("conv2d", nn.Conv2d(8, 16, 3, groups=8), 16 * 3 * 4),
    "Conv3d": lambda: One("conv3d", nn.Conv3d(5, 7, 2), 7 * 2 * 3 * 4),
    "Conv3d, 1x1": lambda: One("conv3d", nn.Conv3d(5, 7, 1), 7 * 3 * 4 * 5),
    "MHA": Attended,
    "parameters": Parameters,
    "decoder GPT-2": lambda: _tiny("GPT2LMHeadModel"),
    "decoder OPT": lambda: _tiny("OPTForCausalLM"),
    "decoder GPT-NeoX": lambda: _tiny("GPTNeoXForCausalLM"),
    "decoder Bloom": lambda: _tiny("BloomForCausalLM"),
    "decoder Llama": lambda: _tiny("LlamaForCausalLM", num_key_value_heads=1),
    "decoder Llama, tied": lambda: _tiny("LlamaForCausalLM", tie_word_embeddings=True),
    "decoder Qwen3": lambda: _tiny("Qwen3ForCausalLM", head_dim=8),
    "decoder Gemma 2": lambda: _tiny("Gemma2ForCausalLM", head_dim=8),
    "encoder-decoder T5": lambda: _tiny("T5ForConditionalGeneration"),
    "encoder-decoder BART": lambda: _tiny("BartForConditionalGeneration"),
    "encoder BERT": lambda: _tiny("BertModel"),
    "encoder RoBERTa": lambda: _tiny("RobertaModel"),
    "encoder DeBERTa-v2": lambda: _tiny("DebertaV2Model"),
    "classifier BERT": lambda: _tiny("BertForSequenceClassification", num_labels=3),
    "classifier Llama": lambda: _tiny("LlamaForSequenceClassification", num_labels=3),
    "tokens RoBERTa": lambda: _tiny("RobertaForTokenClassification", num_labels=3),
    "experts Mixtral": lambda: _tiny("MixtralForCausalLM", num_local_experts=3),
    "experts gpt-oss": lambda: _tiny(
        "GptOssForCausalLM", num_local_experts=3, num_experts_per_tok=2, head_dim=8
    ),
}
_INPUTS = {
    "MLP": (9, 10),
    "parameters": (9, 10),
    "MHA": (4, 9, 10),
    "Conv1d": (9, 1, 10),
    "Conv2d": (9, 5, 5, 6),
    "Conv2d, groups": (9, 8, 5, 6),
    "Conv2d, depthwise": (9, 8, 5, 6),
    "Conv3d": (3, 5, 3, 4, 5),
    "Conv3d, 1x1": (3, 5, 3, 4, 5),
}


def inputs_of(model: str) -> dict[str, Any]:
    torch.manual_seed(3)
    if model in _INPUTS:
        return {"x": torch.randn(_INPUTS[model]).double()}
    if model == "embedding and Conv1D":
        return {"ids": torch.arange(90).view(9, 10)}
    ids = torch.randint(3, 37, (2, 6))
    return {"input_ids": ids} | ({"decoder_input_ids": ids + 0} if "-decoder" in model else {})


# ---- rows ---------------------------------------------------------------------------------------

_BASE = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}
_LM = {**_BASE, "task_type": "CAUSAL_LM", "target_modules": None}


def rows() -> list[Row]:
    found: list[Row] = []

    def add(model: str, *configs: dict[str, Any]) -> None:
        found.extend((_said(config), model, config) for config in configs)

    for targets in ("lin0", ["lin0"], ["lin1"], ["lin0", "lin1"]):
        add("MLP", {"target_modules": targets})
    lin0, both = {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}
    add("MLP", {**lin0, "modules_to_save": ["lin1"]})
    add("MLP", {**lin0, "lora_alpha": 4, "lora_dropout": 0.1})
    add("MLP", {**lin0, "use_dora": True}, {**both, "use_dora": True})
    add("MLP", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32})
    add("MLP", {**both, "lora_bias": True, "lora_alpha": 32})
    add("MLP", {**lin0, "use_rslora": True}, {**both, "bias": "all"}, {**lin0, "bias": "lora_only"})
    for init in ("gaussian", "pissa", "olora", "orthogonal", "mica", False):
        add("MLP", {**lin0, "r": 4, "init_lora_weights": init})
    add("MLP", {**lin0, "velora_config": peft.VeloraConfig(num_groups=2, init_type="random")})
    add("MLP", {**lin0, "kasa_config": peft.KasaConfig(), "r": 4})
    add("MLP", {**lin0, "monteclora_config": peft.MontecloraConfig(num_samples=2)})
    add("MLP", {**both, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 3}})
    add("MLP", {**lin0, "target_parameters": ["lin1.weight"]})
    add("MLP", {"target_modules": "all-linear"}, {**both, "exclude_modules": ["lin1"]})
    add(
        "MLP",
        {"target_modules": r".*0"},
        {"target_modules": "all-linear", "exclude_modules": ".*0"},
    )
    for targets in (["conv1d"], ["emb"], ["emb", "conv1d"]):
        add("embedding and Conv1D", {"target_modules": targets})
        add("embedding and Conv1D", {"target_modules": targets, "use_dora": True})
    tokens = {"trainable_token_indices": {"emb": [0, 10]}}
    add("embedding and Conv1D", {"target_modules": ["conv1d"], **tokens})
    for model in MODELS:
        if model.startswith("Conv"):
            name = model[:6].lower()
            add(model, {"target_modules": [name]}, {"target_modules": [name], "use_dora": True})
            add(model, {"target_modules": [name, "lin0"]})
            add(model, {"target_modules": [name], "lora_bias": True, "lora_alpha": 32})
    add("MHA", {"target_modules": ["mha"]}, {"target_modules": ["mha", "lin0"]})
    add("parameters", {"target_parameters": ["lin0.weight"]})
    add("parameters", {"target_parameters": ["lin0.weight", "lin1.weight"], "target_modules": []})
    for model in MODELS:
        if model.startswith("decoder"):
            add(model, _LM, {**_LM, "use_dora": True, "lora_dropout": 0.0})
            add(model, {**_LM, "trainable_token_indices": [3, 4, 9]})
            add(model, {**_LM, "target_modules": "all-linear", "lora_dropout": 0.0})
            add(model, {**_LM, "init_lora_weights": "pissa", "lora_dropout": 0.0})
    llama = {**_LM, "target_modules": ["q_proj", "v_proj"]}
    for more in (
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "lora_dropout": 0.0},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_dropout": 0.0},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": {"embed_tokens": [3, 4]}},
        {"trainable_token_indices": {"lm_head": [3, 4]}},
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3, 4]}},
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [4]}},
        {"target_parameters": ["q_proj.weight"], "target_modules": [], "lora_dropout": 0.0},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [3]},
        {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2)},
    ):
        for model in ("decoder Llama", "decoder Llama, tied"):
            add(model, {**llama, **more})
    for model in ("encoder-decoder T5", "encoder-decoder BART"):
        seq = {**_BASE, "target_modules": None, "task_type": "SEQ_2_SEQ_LM"}
        add(model, seq, {**seq, "use_dora": True}, {**seq, "target_modules": "all-linear"})
    for model in MODELS:
        if model.startswith(("encoder B", "encoder R", "encoder De")):
            seq = {**_BASE, "target_modules": None, "task_type": "FEATURE_EXTRACTION"}
            add(model, seq, {**seq, "use_dora": True}, {**seq, "bias": "all"})
    for model, task in (
        ("classifier BERT", "SEQ_CLS"),
        ("classifier Llama", "SEQ_CLS"),
        ("tokens RoBERTa", "TOKEN_CLS"),
    ):
        head = {**_BASE, "target_modules": None, "task_type": task}
        add(model, head, {**head, "use_dora": True}, {**head, "modules_to_save": ["classifier"]})
    experts = {"target_modules": [], "lora_dropout": 0.0}
    for model in ("experts Mixtral", "experts gpt-oss"):
        add(model, {**_LM, "lora_dropout": 0.0}, {**_LM, "target_modules": ["q_proj"]})
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        add(model, {**experts, "target_parameters": stacks})
        add(model, {**experts, "target_parameters": stacks[1:], "target_modules": ["q_proj"]})
    return found


def _said(config: dict[str, Any]) -> str:
    defaults = {**_BASE, "target_modules": None}
    shown = {k: v for k, v in config.items() if defaults.get(k, ...) != v and k != "task_type"}
    return (
        ", ".join(f"{k}={re.sub(r'Config.*', 'Config', repr(v))}" for k, v in shown.items())
        or "defaults"
    )


# ---- one row ------------------------------------------------------------------------------------


def outputs(module: nn.Module, given: dict[str, Any]) -> torch.Tensor:
    """Return the main output in one vector."""
    output = module(**given)
    main = (
        next((output[k] for k in ("logits", "last_hidden_state") if k in output), output)
        if isinstance(output, dict)
        else output
    )
    found = pytree.tree_leaves(main)
    floats = [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.cat([t.flatten() for t in floats])


def step(module: nn.Module, given: dict[str, Any]) -> None:
    """Take a step of SGD on all that trains."""
    held = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(held, lr=0.1)
    out = outputs(module, given)
    (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@functools.cache
def captured(model: str, dtype: torch.dtype) -> tuple[nn.Module, fxlora.CapturedModule, Any]:
    """Return a model, its capture, and its inputs."""
    torch.manual_seed(0)
    source, given = MODELS[model]().to(dtype).eval(), inputs_of(model)
    given = {k: t.to(dtype) if t.is_floating_point() else t for k, t in given.items()}
    return source, fxlora.capture(source, kwargs=given).eval(), given


def result(model: str, config: dict[str, Any]) -> dict[str, str]:
    # PEFT has no float64 for these
    single = config.get("init_lora_weights") in ("pissa", "olora", "mica")
    source, gm, given = captured(model, torch.float32 if single else torch.float64)
    torch.manual_seed(1)
    try:
        theirs = peft.LoraConfig(**config)
        made = peft.get_peft_model(copy.deepcopy(source), theirs).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        step(made, given)
    except Exception as error:  # noqa: BLE001 - PEFT refuses some of its arguments, too
        return {"result": "PEFT refuses", "reason": f"{type(error).__name__}: {error}"[:120]}
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        found = compared(source, gm, given, theirs, made, Path(folder))
    errors = [float(found[k]) for k in ("PEFT to fxlora", "fxlora to PEFT", "a step") if k in found]
    if errors:
        equal = max(errors) < (SINGLE if single else LIMIT) and found["weights"] == "same"
        found["result"] = "equal" if equal else "different"
    return found


def compared(
    source: nn.Module,
    gm: fxlora.CapturedModule,
    given: dict[str, Any],
    theirs: Any,
    made: nn.Module,
    folder: Path,
) -> dict[str, str]:
    found = {"effect": f"{apart(outputs(source, given), outputs(made, given)):.0e}"}
    try:
        plan = fxlora.match(gm, as_config(theirs))
    except (fxlora.ConfigError, fxlora.NoMatchError, fxlora.UnsupportedOpError) as error:
        return {"result": "refused", "reason": f"configuration: {error}"}
    try:
        lora = fxlora.load_adapter(gm, folder).eval()
    except fxlora.AdapterError as error:
        said = str(error).replace(str(folder), "…").replace(str(folder.resolve()), "…")
        return {"result": "refused", "reason": f"folder: {said}"}
    places = (sorted((e.names, e.r, e.tokens) for e in p) for p in (plan, lora.plan or ()))
    found["weights"] = "same" if len({repr(place) for place in places}) == 1 else "other"
    found["PEFT to fxlora"] = f"{apart(outputs(lora, given), outputs(made, given)):.0e}"
    fxlora.save_adapter(lora, folder / "ours")
    if "FXLORA" not in (folder / "ours/adapter_config.json").read_text():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(source), str(folder / "ours")).eval()
        found["fxlora to PEFT"] = f"{apart(outputs(again, given), outputs(made, given)):.0e}"
    trainable = peft.PeftModel.from_pretrained(
        copy.deepcopy(source), str(folder), is_trainable=True
    ).eval()
    for module in (trainable, lora):
        step(module, given)
    found["a step"] = f"{apart(outputs(lora, given), outputs(trainable, given)):.0e}"
    return found


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    parser = untimed_parser(__doc__)
    parser.add_argument("--only", default="", help="a regular expression for the model")
    options = start(parser)
    report = Report(options)
    torch.backends.mha.get_fastpath_enabled = lambda: False
    warnings.simplefilter("ignore")
    found: list[tuple[Row, dict[str, str]]] = []
    for row in rows():
        if re.search(options.only, row[1]):
            found.append((row, result(row[1], row[2])))
            print(f"{row[1]}: {row[0]}: {found[-1][1]}", flush=True)
    kinds = ("equal", "refused", "different", "PEFT refuses")
    families: dict[str, Counter[str]] = {}
    for (_, model, _), record in found:
        family = model.split()[0].rstrip(",")
        families.setdefault(family, Counter())[record["result"]] += 1
    total = sum(families.values(), Counter[str]())
    table = [
        {"models": name, "rows": str(counts.total()), **{kind: str(counts[kind]) for kind in kinds}}
        for name, counts in [*families.items(), ("all", total)]
    ]
    report.add("Rows of PEFT's LoRA tests", table)
    for kind in kinds[1:]:
        listed = [
            {
                "model": model,
                "arguments": said,
                **{k: v for k, v in record.items() if k != "result"},
            }
            for (said, model, _), record in found
            if record["result"] == kind
        ]
        if listed:
            report.add(f"{kind[0].upper()}{kind[1:]}", listed)


if __name__ == "__main__":
    main()
