"""Rule: which sites to match, and how to adapt or train them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..lora.parts import Parts, check_parts
from ..names import shown
from .checks import MAX_SIZE, check_one_of, check_regex, is_whole, names_in, tokens_in
from .keywords import known_keywords
from .lora_config import LoraConfig, Names


@known_keywords
@dataclass(frozen=True)
class Rule:
    """Which sites to match, and how to adapt or train them.

    A site matches if all given keys match. If several rules match a site, the first one applies.

    Attributes:
        name: a glob (`*.attn.*`); `re:` and a regular expression for the whole name; or a name,
            which matches a whole name or a dotted suffix of one. A list matches if one of its
            items does. None matches every name.
        op: kind of the op that reads the weight ("linear", "conv2d", "embedding", "addmm", …), a
            glob (`conv*`), or a list of these. None matches every op.
        min_features: lower bound on the numbers of both input and output features.
        max_features: upper bound on both.
        min_in_features: lower bound on the number of input features.
        max_in_features: upper bound on it.
        min_out_features: lower bound on the number of output features.
        max_out_features: upper bound on it.
        kernel_size: kernel size of a convolution; one number means that size in all dimensions.
        where: a function that takes a `Site` and returns whether the rule matches it. It is called
            last, and a rule that has one cannot be written to a file.
        lora: the configuration of the adapters, or None to leave the sites as they are.
        train: whether to train in full, as a copy, instead: the weight's module if the weight is
            its `weight` or the rule names the module, else only the weight. A rule with no key but
            `name` also trains modules and parameters that cannot take adapters (norms, biases) if
            their names match.
        parts: the parts of a packed weight, each of which gets its own adapter. A number of equal
            parts along the output dimension; or, by name, their sizes (`{"q": 64, "k": 16,
            "v": 16}`, all parts in order) or ranges (`{"q": (0, 64), "v": (80, 96)}`, from and to).
            Of an embedding, rows too, those of tokens: ranges or sizes that its outputs, the
            features, cannot have are of its rows.
        part_dim: the dimension of the weight that `parts` cuts, where an embedding has both: 0 for
            its rows. None takes the outputs if the parts fit them.
        enable: the parts to adapt, as one flag for each part or as names; None adapts all.
        tokens: rows of the weight, in its first dimension, that train alone, in full: those of new
            tokens in an embedding (`range(32000, 32004)`), or of outputs of a linear layer. What
            is added to each row trains, from zero; of `lora`, only `tied`, `inference_mode` and
            `autocast_adapter_dtype` apply.

    Raises:
        ConfigError: a key has a wrong type or value, or two keys contradict each other.

    Example:
        >>> import torch, fxlora
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
        >>> module = fxlora.capture(model, torch.randn(2, 6))
        >>> rules = [
        ...     fxlora.Rule("0", lora=fxlora.LoraConfig(r=2)),
        ...     fxlora.Rule(op="linear", max_features=8, lora=fxlora.LoraConfig(r=1)),
        ... ]
        >>> [(entry.site, entry.r, entry.rule) for entry in fxlora.match(module, rules)]
        [('0', 2, 1), ('1', 1, 2)]
    """

    name: Names = None
    _: dataclasses.KW_ONLY
    op: Names = None
    min_features: int | None = None
    max_features: int | None = None
    min_in_features: int | None = None
    max_in_features: int | None = None
    min_out_features: int | None = None
    max_out_features: int | None = None
    kernel_size: int | Sequence[int] | None = None
    where: Callable[[Any], bool] | None = None
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    train: bool = False
    parts: Parts = None
    part_dim: int | None = None
    enable: Sequence[bool] | Sequence[str] | None = None
    tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "op"):
            value = getattr(self, name)
            names = (value,) if isinstance(value, str) else names_in(name, value)
            object.__setattr__(self, name, names)
        for pattern in self.name or ():
            if pattern.startswith("re:"):
                check_regex("name", pattern[3:])
        for name in BOUNDS:
            value = getattr(self, name)
            if value is not None and not is_whole(value, 0, MAX_SIZE):
                raise ConfigError(f"{name} must be a number of features, not {shown(value)}.")
        self._check_kernel_size()
        check_one_of("train", self.train, (True, False))
        check_parts(self.parts, self.enable)
        if self.part_dim is not None and not (
            self.parts is not None and is_whole(self.part_dim, 0, MAX_SIZE)
        ):
            raise ConfigError(
                f"part_dim is the dimension that parts= cuts, from 0: {shown(self.part_dim)}."
            )
        self._check_tokens()
        if self.lora is not None and not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora must be a LoraConfig or None, not {shown(self.lora)}.")
        if self.train and (self.parts is not None or self.lora != LoraConfig()):
            raise ConfigError("train=True trains in full: lora= and parts= say another thing.")
        if self.where is not None and not callable(self.where):
            raise ConfigError(f"where must be a function of a Site, not {shown(self.where)}.")
        if self.lora is not None and self.lora.has_targets and self.name is not None:
            raise ConfigError(
                "a rule with a name and a LoraConfig with target_modules say which sites "
                "twice. Keep one of the two."
            )

    @property
    def bounds(self) -> tuple[int | None, ...]:
        """The values of the bounds on features, in the order of `BOUNDS`."""
        return tuple(getattr(self, name) for name in BOUNDS)

    def _check_tokens(self) -> None:
        if self.tokens is None:
            return
        object.__setattr__(self, "tokens", tokens_in("tokens", self.tokens))
        lora = self.lora or LoraConfig(r=1)
        plain = LoraConfig()
        fields = [f.name for f in dataclasses.fields(LoraConfig)]
        differ = [n for n in fields if getattr(lora, n) != getattr(plain, n)]
        if others := [n for n in differ if n not in _OF_TOKENS]:
            raise ConfigError(
                f"tokens= trains rows in full: {', '.join(others)} of lora= has no effect on them. "
                f"Leave it out; only {', '.join(_OF_TOKENS)} apply."
            )
        if self.train or self.parts is not None:
            raise ConfigError("tokens= trains rows alone: train= and parts= say another thing.")

    def _check_kernel_size(self) -> None:
        size = self.kernel_size
        if size is None:
            return
        sizes = tuple(size) if isinstance(size, Sequence) else (size,)
        if not sizes or not all(is_whole(n, 1, MAX_SIZE) for n in sizes):
            raise ConfigError(
                f"kernel_size must be a number or a tuple of them, not {shown(size)}."
            )
        if not isinstance(size, int):
            object.__setattr__(self, "kernel_size", sizes)

    def describe(self) -> str:
        """Return the rule's names, targets or other keys in one line, for messages."""
        if self.name is not None:
            return ", ".join(f"'{name}'" for name in self.name)
        target = self.lora.target_modules if self.lora else None
        if target is not None:
            return repr(target) if isinstance(target, str) else ", ".join(map(repr, target))
        keys = [f"{k}={getattr(self, k)!r}" for k in ("op", *BOUNDS, "kernel_size", "where")]
        return ", ".join(k for k in keys if not k.endswith("=None")) or "every site"


# The fields of a LoraConfig that apply to rows that train alone.
_OF_TOKENS = ("tied", "inference_mode", "autocast_adapter_dtype")

BOUNDS = tuple(f"{end}_{side}features" for side in ("", "in_", "out_") for end in ("min", "max"))

Rules = LoraConfig | Rule | Sequence[Rule | LoraConfig]
