"""The oracle: W0 + s·BA once more, from the papers, in the source model.

It runs no code of fxlora and reads no layout, form, scaling or range from a plan. The meaning of a
weight's dimensions comes from the source itself: from the type of the module that owns it, or from
`subscripts` of a test's model. The rank, s and the rows of a part come from the user's rule. From
a plan come only names (of A and B, of the weight, of the part) and the number of that rule.

Subscripts have a letter for each dimension of a weight: i (input features), o (output features), e
(index of a matrix in a stack) and k (kernel). A and B have the shapes that PEFT gives them.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from fxlora import CapturedModule, LoraConfig, Rule
    from fxlora.plan import Entry

Tensors = Mapping[str, torch.Tensor]

# The subscripts of weights of torch, torchvision and transformers, by class and name (globs).
SUBSCRIPTS = {
    "Linear.weight": "oi",
    "Bilinear.weight": "eoi",  # a matrix for each output
    "RNN*Base.weight_*": "oi",
    "MultiheadAttention.*_proj_weight": "oi",
    "Embedding.weight": "io",
    "EmbeddingBag.weight": "io",
    **{f"Conv{n}d.weight": "oi" + "k" * n for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d.weight": "io" + "k" * n for n in (1, 2, 3)},
    "DeformConv2d.weight": "oikk",
    "Conv1D.weight": "io",  # GPT-2's linear layer
    "*TopKRouter.weight": "oi",
    "GptOssExperts.*_proj": "eio",
    "*Experts.*_proj": "eoi",
}


def subscripts(model: nn.Module, name: str) -> str:
    """Return the subscripts of a parameter: declared by a module above it, or known by its type.

    A parametrized weight has those of the weight that is computed from it.
    """
    name = re.sub(r"parametrizations\.(\w+)\..*", r"\1", name)
    path = re.sub(r"weight_(orig|v)$", "weight", name).split(".")  # torch's older hooks
    above = [model.get_submodule(".".join(path[:n])) for n in range(len(path))]
    tables = [getattr(module, "subscripts", {}) for module in above]
    for n, table in reversed([*enumerate(tables)]):
        for pattern, found in table.items():
            if fnmatch.fnmatchcase(".".join(path[n:]), pattern):
                return found
    for kind in type(above[-1]).__mro__:
        for pattern, found in SUBSCRIPTS.items():
            if fnmatch.fnmatchcase(f"{kind.__name__}.{path[-1]}", pattern):
                return found
    raise LookupError(f"{name}: no module says what its dimensions are (`subscripts`)")


def declare(model: nn.Module, table: Mapping[str, str]) -> None:
    """Set the subscripts of a model's parameters, if its class has none."""
    vars(model)["subscripts"] = dict(table)


def product(dims: str, shape: torch.Size, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return BA in a weight's shape, from A (e, r, i, k) and B (e, o, r, k).

    The kernel belongs to the features before it: to B if the inputs come first, else to A. The
    other factor has a kernel of ones. Several dimensions of inputs or outputs are one in A and B.
    """
    named = dict(zip("abcdefgh", dims, strict=False))

    def of(kind: str) -> str:
        return "".join(letter for letter, dim in named.items() if dim == kind)

    of_a, of_b = f"{of('e')}r{of('i')}", f"{of('e')}{of('o')}r"
    if dims.index("i") < dims.index("o"):
        of_b += of("k")
    else:
        of_a += of("k")
    size = dict(zip(named, shape, strict=True), r=a.shape[dims.count("e")])
    a, b = (m.reshape([size[n] for n in names]) for m, names in ((a, of_a), (b, of_b)))
    return torch.einsum(f"{of_a},{of_b}->{''.join(named)}", a, b)


def scaling(rule: Rule, site: str) -> float:
    """Return s = alpha / r (Hu et al. 2021, §4.1), or alpha / √r (Kalajdzievski 2023, eq. 4)."""
    config = rule.lora
    assert config is not None

    def given(patterns: Any, default: float) -> float:
        fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", site))
        return next(fits, default)

    r = given(config.rank_pattern, config.rank)
    alpha = given(config.alpha_pattern, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def rows(rule: Rule, part: str | None, size: int) -> tuple[int, int]:
    """Return the first row of a part of a weight's outputs, and the one behind its last row."""
    if part is None:
        return 0, size
    parts: Any = rule.parts
    if isinstance(parts, int):
        parts = {str(number): size // parts for number in range(parts)}
    start = 0
    for name, given in parts.items():
        if isinstance(given, int):
            given, start = (start, start + given), start + given
        if name == part:
            whole = isinstance(given, slice | range)
            return (given.start or 0, given.stop) if whole else (given[0], given[1])
    raise LookupError(f"the rule has no part {part}")


def adapted(
    model: nn.Module, lora: CapturedModule, entry: Entry, weight: torch.Tensor, tensors: Tensors
) -> torch.Tensor:
    """Return the weight with the adapter's formula in the rows of its part."""
    assert lora.plan
    rule, dims = lora.plan.rules[entry.rule - 1], subscripts(model, entry.parameter)
    if rule.tokens is not None:  # the rows of the first dimension, each with what is added to it
        more = tensors[entry.name_of("lora_B")].mT if dims[0] == "i" else None
        more = tensors[entry.name_of("lora_A")] if more is None else more
        return weight.index_add(0, torch.tensor(rule.tokens), more)
    if rule.part_dim is not None and rule.part_dim == dims.index("i"):
        dims = dims.translate(str.maketrans("io", "oi"))  # a pair of its own for these inputs
    dim = dims.index("o")
    start, stop = rows(rule, entry.part, weight.shape[dim])
    before, part, behind = weight.tensor_split((start, stop), dim)
    s = scaling(rule, entry.site.removesuffix(f".{entry.part}"))

    def of_kind(kind: str) -> torch.Tensor:
        return tensors[entry.name_of(kind)]

    return torch.cat([before, formula(rule.lora, dims, s, part, of_kind), behind], dim)


def formula(
    config: LoraConfig | None,
    dims: str,
    s: float,
    weight: torch.Tensor,
    tensor: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    """Return V = W0 + s·BA, or DoRA's m·V/‖V‖.

    With an init from the weight, V is W0 + s·(BA - B'A'), where A' and -B' are the initial pair.
    A test of another variant replaces this function.
    """
    assert config
    v = weight + s * product(dims, weight.shape, tensor("lora_A"), tensor("lora_B"))
    if config.init_lora_weights in ("pissa", "olora"):
        pair = tensor("lora_start_A"), tensor("lora_start_B")
        v = v + s * product(dims, weight.shape, *pair)
    if not config.use_dora and config.variant != "dora":
        return v
    # A norm for each output (Liu et al. 2024, eq. 5), constant for autograd (§4.3).
    others = [n for n, d in enumerate(dims) if d not in "eo"]
    norm = v.detach().square().sum(others, keepdim=True).sqrt()
    return tensor("lora_magnitude_vector").reshape(norm.shape) * v / norm


def merged_weights(
    model: nn.Module, lora: CapturedModule, factors: Tensors
) -> dict[str, torch.Tensor]:
    """Return the source's adapted weights, merged, under each name that an entry adapts."""
    source = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, torch.Tensor] = {}
    for entry in lora.plan or ():
        before = weights.get(entry.parameter, source[entry.parameter].detach())
        weights |= dict.fromkeys(entry.names, adapted(model, lora, entry, before, factors))
    return weights


def floats(outputs: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def called_with(
    model: nn.Module,
    weights: Tensors,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> list[torch.Tensor]:
    """Return the source's outputs with other weights, given under all of their names."""
    given = dict(weights)  # torch writes to it: the old weight, for a module with two names
    return floats(torch.func.functional_call(model, given, args, kwargs, tie_weights=False))
