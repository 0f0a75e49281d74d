"""LoraConfig: how weights are adapted, with the fields of PEFT's LoraConfig."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import ConfigError
from ..lora.dtypes import DtypeRule, dtype_rule
from ..lora.inits import INITS
from ..lora.variants import VARIANTS
from ..names import shown
from .checks import (
    MAX_SIZE,
    check_alpha,
    check_one_of,
    check_rank,
    check_regex,
    is_finite,
    is_whole,
    names_in,
    tokens_in,
)
from .keywords import known_keywords
from .peft_fields import (
    DESCRIPTIONS,
    REFUSED,
    REFUSED_INITS,
    TASKS,
    check_description,
    check_refused,
    plain_task,
    plain_text,
)

Names = str | Sequence[str] | None
ALL_LINEAR = "all-linear"
ARCHITECTURE = "auto"  # target_modules that stand for those of the model's architecture


@known_keywords
@dataclass(frozen=True, repr=False)
class LoraConfig:
    """Configuration of LoRA, with the field names, defaults and name matching of PEFT's LoraConfig.

    The adapted weight is W0 + s·BA (Hu et al. 2021, LoRA, eq. 3) with the scaling factor
    s = lora_alpha / r (§4.1). For a linear layer, A is (r, in_features) and B is
    (out_features, r). The fields `variant`, `tied`, `autocast_adapter_dtype` and `expert_rank` are
    fxlora's own; all others are PEFT's, at their defaults. Names match what they match in PEFT. A
    name that matches nothing there may also be a parameter's, or that of a module around one.

    Attributes:
        r: the rank, from 1 to 2**20. "16/topk" is r=16 with `expert_rank="r/topk"`, and "r/topk"
            the same with the default r.
        target_modules: the modules or parameters to adapt. A list of names, each of which matches
            a whole name or a dotted suffix of one; or one string, a regular expression for the
            whole name; or "all-linear": every nn.Linear and Conv1D of transformers, except output
            embeddings (in a model that has none: every weight that matrix products read, except
            those that are also looked up as embeddings). None, in a configuration on its own: the
            names that PEFT has for the `config.model_type` of the model. An empty list adapts
            only the `target_parameters`.
        exclude_modules: modules not to adapt, written like `target_modules`.
        lora_alpha: numerator of the scaling factor s, a finite number > 0.
        lora_dropout: probability, in [0, 1), of zeroing an element of the branch's input in train
            mode. The indices of an embedding take no dropout, and for a site that cannot take a
            branch, dropout is an error in `match`. With DoRA, the output of the base weight is
            scaled without dropout (PEFT recomputes it from the dropped input, so that its dropout
            also affects the frozen layer).
        bias: biases that train too: "none", "all", or those of adapted layers ("lora_only").
        use_rslora: whether s is lora_alpha / √r (Kalajdzievski 2023, eq. 4).
        use_dora: PEFT's name for `variant="dora"`.
        modules_to_save: modules (whole names or dotted suffixes) to train in full, as copies. PEFT
            takes a name also as the last letters of another ("head" of "lm_head"): where that
            would train more modules, the name is refused.
        init_lora_weights: how A and B are initialized:

            - "kaiming_uniform": A Kaiming uniform with a=√5, B zero.
            - True: the same, but for an embedding A is zero and B normal, as in loralib.
            - "kaiming_normal": A Kaiming normal with a=√5, B zero.
            - "gaussian": A normal with standard deviation 1/r, B zero.
            - "orthogonal": both random with BA = 0; r must be even.
            - "pissa" (Meng et al. 2024, eq. 2-3), "olora" (Büyükakyüz 2024): both computed from
              the weight W0. The initial s·BA is subtracted from W0, so that the outputs start
              unchanged. "pissa_niter_4" and others, PEFT's approximations of "pissa", become it.
            - False: both Kaiming uniform. The outputs change as soon as the adapter is injected.
        layers_to_transform: numbers of the layers to adapt; None adapts all. A layer's number is
            the first in a name (not that of an expert in it). Names in `target_modules` that are
            whole ones are adapted anyway, as in PEFT.
        layers_pattern: regular expressions, without groups, for the part of a name before the
            layer number ("h" in "h.3.attn"); needs `layers_to_transform`. None allows any part.
        rank_pattern: ranks that differ from `r`, as `{regular expression: rank}`. The expression
            must match the whole name of the module (of the parameter, for `target_parameters`), or
            a dotted suffix of it; the first match counts.
        alpha_pattern: values that differ from `lora_alpha`, in the form of `rank_pattern`.
        target_parameters: names (whole or dotted suffixes) of parameters to adapt, whatever
            `exclude_modules` and `layers_to_transform` say.
        variant: a row of the table `fxlora.lora.variants.VARIANTS`, or None for plain LoRA. "dora"
            rescales each output of the adapted weight to a trained magnitude (Liu et al. 2024,
            DoRA, eq. 5). "fa" freezes A as it is drawn, so that the backward keeps A·x (…, r) and
            not x (Zhang et al. 2023, LoRA-FA, §3). "from_weight" subtracts the initial s·BA from
            W0; the inits "pissa" and "olora" select it by themselves.
        tied: how a rule adapts a weight that has several names: by one adapter where it is read
            under the names that the rule matches ("rule"), by an adapter for each of these names
            ("each", as PEFT does), or by one adapter wherever it is read ("share").
        autocast_adapter_dtype: the dtype of A, B, a variant's tensors, and the parameters that
            `bias` and `modules_to_save` train in full. True: float32, or the weight's dtype if
            that is wider. False: the weight's dtype. Or a dtype, as a torch.dtype or a name
            ("float32"), which the field then holds as its name. The graph casts them to the
            weight's dtype where they are used. (PEFT has this as an argument of `get_peft_model`.)
        expert_rank: the rank of experts: "r", or r divided by the number of experts that a token
            reaches ("r/topk"), so that the adapters that act on a token are as large as elsewhere.
        task_type: the task, one of PEFT's. "SEQ_CLS" and "TOKEN_CLS" also train every module in
            full whose name ends in "classifier" or "score", "QUESTION_ANS" those in "qa_outputs".
        inference_mode: whether A, B and the parameters trained in full start frozen.
        ensure_weight_tying: PEFT's name for `tied="share"` of a weight that is also looked up as
            an embedding.
        trainable_token_indices: rows of the input embedding that train alone, such as those of new
            tokens; or rows by the name of a module, as `{"embed_tokens": [5, 6]}`. Where a model
            of transformers ties its head to the embedding, the head's rows are the same. No other
            field but `autocast_adapter_dtype` applies to them. (See `Rule.tokens`.)
        fan_in_fan_out: accepted; the layout of a weight is always taken from the graph.
        peft_type: "LORA".
        peft_version, auto_mapping, base_model_name_or_path, revision: descriptions of the adapter
            and of its base model, which are kept and written to adapter folders.
        lora_bias, megatron_config, megatron_core, loftq_config,
            eva_config, corda_config, lora_ga_config, velora_config, alora_invocation_tokens,
            use_qalora, qalora_group_size, monteclora_config, layer_replication, runtime_config,
            use_bdlora, arrow_config, kasa_config: only at their defaults. The error for another
            value says why, and what to do instead.

    Raises:
        ConfigError: a field is unknown or has a wrong type or value, or asks for something that
            fxlora does not do; or two fields contradict each other.

    Warns:
        FxLoraWarning: an alpha is not a whole number, although PEFT declares an integer.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        >>> module = fxlora.capture(model, torch.randn(2, 6))
        >>> config = fxlora.LoraConfig(r=2, lora_alpha=8, target_modules=["0"])
        >>> [(entry.site, entry.r, entry.scaling) for entry in fxlora.match(module, config)]
        [('0', 2, 4.0)]
    """

    r: int | str = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: Names = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    target_parameters: Sequence[str] | None = None
    variant: str | None = None
    tied: Literal["rule", "each", "share"] = "rule"
    autocast_adapter_dtype: bool | str | torch.dtype = True
    expert_rank: Literal["r", "r/topk"] = "r"
    task_type: str | None = None
    fan_in_fan_out: bool = False
    inference_mode: bool = False
    ensure_weight_tying: bool = False
    peft_type: str | None = "LORA"
    peft_version: str | None = None
    auto_mapping: Mapping[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    # Only accepted at their defaults (see `peft_fields.REFUSED`).
    lora_bias: bool = False
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    loftq_config: Any = None
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    runtime_config: Any = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None

    def __post_init__(self) -> None:
        self._normalise_rank()
        check_alpha("lora_alpha", self.lora_alpha)
        if not is_finite(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {shown(self.lora_dropout)}.")
        for name in _FLAGS:
            check_one_of(name, getattr(self, name), (True, False))
        check_one_of("bias", self.bias, ("none", "all", "lora_only"))
        check_one_of("tied", self.tied, ("rule", "each", "share"))
        check_one_of("variant", self.variant, (*sorted(VARIANTS), None))
        if self.use_dora and self.variant not in (None, "dora"):
            raise ConfigError(f"use_dora=True and variant={self.variant!r} contradict each other.")
        rule = dtype_rule(self.autocast_adapter_dtype, "autocast_adapter_dtype")
        object.__setattr__(self, "autocast_adapter_dtype", rule)
        self._normalise_init()
        self._normalise_descriptions()
        self._refuse()
        self._normalise_names()
        self._normalise_layers()
        self._normalise_patterns()
        self._normalise_tokens()

    def __repr__(self) -> str:
        plain = LoraConfig()
        names = [f.name for f in dataclasses.fields(self)]
        changed = [n for n in names if getattr(self, n) != getattr(plain, n)]
        return f"LoraConfig({', '.join(f'{n}={getattr(self, n)!r}' for n in changed)})"

    def _normalise_rank(self) -> None:
        given: Any = self.r
        check_one_of("expert_rank", self.expert_rank, ("r", "r/topk"))
        if isinstance(given, str):
            found = re.fullmatch(r"(r|\d{1,7})/topk", given.replace(" ", ""), re.ASCII)
            if found is None:
                raise ConfigError(f'r must be a whole number or "r/topk", not {shown(given)}.')
            number = found[1]
            object.__setattr__(self, "r", LoraConfig.r if number == "r" else int(number))
            object.__setattr__(self, "expert_rank", "r/topk")
        check_rank("r", self.r)

    def _normalise_init(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init):
            object.__setattr__(self, "init_lora_weights", "pissa")  # what PEFT approximates
        elif isinstance(init, str) and init in REFUSED_INITS:
            raise ConfigError(
                f"init_lora_weights={init!r} is not supported: {REFUSED_INITS[init]}."
            )
        else:
            check_one_of("init_lora_weights", init, INITS)

    def _normalise_descriptions(self) -> None:
        """Check the fields that describe the adapter and its base, and make them plain data."""
        object.__setattr__(self, "task_type", plain_task(self.task_type))
        for name in ("peft_type", "peft_version", "base_model_name_or_path", "revision"):
            object.__setattr__(self, name, plain_text(name, getattr(self, name)))
        if self.peft_type not in ("LORA", None):
            raise ConfigError(f"peft_type must be LORA, not {shown(self.peft_type)}.")
        object.__setattr__(self, "peft_type", "LORA")
        check_description(self.auto_mapping)

    def _refuse(self) -> None:
        """Raise for a field that fxlora does not have, unless it says nothing."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in REFUSED:
            check_refused(name, getattr(self, name), defaults[name])
            object.__setattr__(self, name, defaults[name])

    def _normalise_names(self) -> None:
        """Check the fields that hold names; make lists tuples, so that configs compare by value."""
        for name in ("exclude_modules", "modules_to_save", "target_parameters", "layers_pattern"):
            if _is_empty(getattr(self, name)):
                object.__setattr__(self, name, None)  # says nothing, as in PEFT
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_regex(name, value)
            elif name == "target_modules" and _is_empty(value) and self.target_parameters:
                object.__setattr__(self, name, ())
            else:
                object.__setattr__(self, name, names_in(name, value))
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name} must be a list of names, not the string {value!r}.")
            object.__setattr__(self, name, names_in(name, value))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            object.__setattr__(self, "target_modules", ALL_LINEAR)
        if ALL_LINEAR in (self.exclude_modules, *(self.exclude_modules or ())):
            raise ConfigError('exclude_modules takes names, not "all-linear" (nothing, in PEFT).')

    def _normalise_layers(self) -> None:
        patterns = self.layers_pattern or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            # match takes the layer number from group 1, so a pattern must have no groups.
            check_regex("layers_pattern", pattern, r"(?:.*\.)?{}\.(\d+)\.", groups=1)
        layers = self.layers_to_transform
        if layers is None or (isinstance(layers, Sequence) and not layers):
            object.__setattr__(self, "layers_to_transform", None)
            if self.layers_pattern is not None:
                raise ConfigError("layers_pattern needs layers_to_transform.")
            return
        numbers = tuple(layers) if isinstance(layers, Sequence) else (layers,)
        if not all(is_whole(n, 0, MAX_SIZE) for n in numbers):
            raise ConfigError(f"layers_to_transform must be layer numbers, not {shown(layers)}.")
        object.__setattr__(self, "layers_to_transform", numbers)
        if isinstance(self.target_modules, str) and self.target_modules != ARCHITECTURE:
            raise ConfigError(
                "layers_to_transform needs a list of names in target_modules: with a regular "
                'expression, write the layers in it; with "all-linear", name the modules.'
            )

    def _normalise_patterns(self) -> None:
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            pattern = {} if getattr(self, name) is None else getattr(self, name)
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"{name} must be a mapping of names to numbers.")
            for key, value in pattern.items():
                check_regex(f"{name}[{shown(key)}]", key, r"(.*\.)?({})$")
                check(f"{name}[{shown(key)}]", value)
            object.__setattr__(self, name, dict(pattern))

    def _normalise_tokens(self) -> None:
        name, given = "trainable_token_indices", self.trainable_token_indices
        if given is None or (isinstance(given, Sequence | Mapping) and not given):
            object.__setattr__(self, name, None)
        elif isinstance(given, Mapping):
            names_in(name, list(given))
            tokens = {key: tokens_in(f"{name}[{shown(key)}]", given[key]) for key in given}
            object.__setattr__(self, name, tokens)
        else:
            object.__setattr__(self, name, tokens_in(name, given))

    @property
    def rank(self) -> int:
        """The field `r` as the number that it stands for."""
        return int(self.r)

    @property
    def row(self) -> str | None:
        """The row of `VARIANTS` that `variant` or `use_dora` selects, or None for plain LoRA."""
        return "dora" if self.use_dora else self.variant

    @property
    def dtype_rule(self) -> DtypeRule:
        """`autocast_adapter_dtype` as plain data: True, False or the name of a dtype."""
        return dtype_rule(self.autocast_adapter_dtype, "autocast_adapter_dtype")

    @property
    def heads(self) -> tuple[str, ...]:
        """The last letters of the names of the modules that `task_type` trains in full."""
        return TASKS[self.task_type] if self.task_type else ()

    @property
    def descriptions(self) -> dict[str, Any]:
        """The fields that describe the adapter and its base model, as far as they say anything."""
        found = {name: getattr(self, name) for name in DESCRIPTIONS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def has_targets(self) -> bool:
        """Whether the configuration itself says which sites to adapt."""
        return self.target_modules is not None or self.target_parameters is not None

    def scaling(self, r: int, alpha: float) -> float:
        """Return the scaling factor s of BA.

        Args:
            r: the rank of a site.
            alpha: its `lora_alpha`.

        Returns:
            alpha / r (Hu et al. 2021, §4.1), or alpha / √r with rsLoRA (Kalajdzievski 2023, eq. 4).
        """
        return alpha / (math.sqrt(r) if self.use_rslora else r)


_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "ensure_weight_tying")


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | tuple | set) and not value
