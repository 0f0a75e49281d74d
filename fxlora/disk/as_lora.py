"""PEFT's folders of VeRA and LoKr, read as folders of LoRA: what they add to a weight is a product.

    VeRA  ΔW = diag(b)·B·diag(d)·A, where all layers share A and B (Kopiczko et al. 2024, eq. 2)
    LoKr  ΔW = alpha/r · W1 ⊗ W2 (Yeh et al. 2024, §3.1)

The product becomes a pair with s = 1, which trains on as a pair of LoRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import is_finite
from ..errors import AdapterError, warn
from ..matching.choice import by_pattern
from ..module import CapturedModule
from ..names import shown
from ..tables import some
from .folder import Folder
from .foreign.format import low_rank
from .foreign.kohya import lokr
from .foreign.layers import Layer
from .foreign.updates import Pair, matrix_of, matrix_pair
from .fused import A, B
from .keys import CONFIG
from .peft import ROOT
from .peft_config import exactly
from .peft_tensors import PeftTensors

# Function (layer, folder, the layer's name for PEFT's patterns, weight) → down (r, in), up (out, r)
Product = Callable[[Layer, Folder, str, torch.Tensor], Pair]


@dataclass(frozen=True)
class _Method:
    """A method of PEFT's whose folders are read.

    Attributes:
        ends: the last words of the keys of a layer's tensors.
        shared: those of the keys of tensors that all layers share.
        fields: fields of its configuration that LoRA's does not have, or that mean another thing.
        training: those of them that act in training alone.
        product: makes the pair of a layer.
    """

    ends: frozenset[str]
    shared: frozenset[str]
    fields: frozenset[str]
    training: tuple[str, ...]
    product: Product


def _vera(layer: Layer, content: Folder, target: str, weight: torch.Tensor) -> Pair:
    of_outputs, of_ranks = layer.vector("vera_lambda_b"), layer.vector("vera_lambda_d")
    shared = Layer("base_model", _shared(content, VERA))
    down, up = shared.matrix("vera_A"), shared.matrix("vera_B")
    rank, outputs = of_ranks.numel(), of_outputs.numel()
    inputs = weight.numel() // max(outputs, 1)  # of a weight (out, in) or (in, out)
    sizes = (down.shape[0], up.shape[1]) == (rank, rank)
    if not sizes or down.shape[1] < inputs or up.shape[0] < outputs:
        raise AdapterError(
            f"'{target}' is of rank {rank}, with {outputs} outputs and {inputs} inputs, and vera_A "
            f"is {tuple(down.shape)}, vera_B {tuple(up.shape)}."
        )
    return of_ranks[:, None] * down[:, :inputs], of_outputs[:, None] * up[:outputs]


def _lokr(layer: Layer, content: Folder, target: str, weight: torch.Tensor) -> Pair:
    alpha = _number(content, "alpha", target)
    r = _number(content, "r", target)
    (down, up), _ = lokr(layer)
    layer.check_used()
    if layer.has("lokr_w2") and layer.tensors["lokr_w2"].dim() == 3:
        down, up = matrix_pair(_kron_of_conv1d(layer, (down, up), weight))
    return down, up * (alpha / r)  # PEFT scales products of full rank, too, and LyCORIS does not


def _kron_of_conv1d(layer: Layer, formula: Pair, weight: torch.Tensor) -> torch.Tensor:
    """Return PEFT 0.21's product for an nn.Conv1d with a whole W2 (out, in, kernel), as a matrix.

    It has no dimension for the kernel in W1, which `torch.kron` then gives one before the others.
    The entries are those of W1 ⊗ W2 in another order, in which PEFT trains them.
    """
    whole = layer.has("lokr_w1")
    first = layer.take("lokr_w1") if whole else matrix_of(low_rank(layer, "lokr_w1_b", "lokr_w1_a"))
    product = torch.kron(first, layer.take("lokr_w2"))
    if (formula[1].shape[0], formula[0].shape[1]) != (weight.shape[0], weight[0].numel()):
        raise AdapterError(f"'{layer.name}' is not for a weight {tuple(weight.shape)}.")
    return product.reshape(weight.shape).flatten(1)


def _number(content: Folder, field: str, target: str) -> float:
    """Return PEFT's number > 0 for a target, by the patterns or by the field itself."""
    patterns = content.config.get("rank_pattern" if field == "r" else "alpha_pattern") or {}
    found = by_pattern(patterns, target, content.config.get(field, 8))
    if not is_finite(found) or found <= 0:
        raise AdapterError(f"{field} of '{target}' must be a number > 0, not {shown(found)}.")
    return float(found)


VERA = _Method(
    ends=frozenset(["vera_lambda_b", "vera_lambda_d"]),
    shared=frozenset(["vera_A", "vera_B"]),
    fields=frozenset(
        ["d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"]
    ),
    training=(),
    product=_vera,
)
LOKR = _Method(
    ends=frozenset(f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    shared=frozenset(),
    fields=frozenset(
        [
            *("alpha", "decompose_both", "decompose_factor", "init_weights"),
            *("module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"),
        ]
    ),
    training=("module_dropout", "rank_dropout"),
    product=_lokr,
)
METHODS: Mapping[str, _Method] = {"VERA": VERA, "LOKR": LOKR}


def check_method(content: Folder) -> None:
    """Check what a folder of VeRA or LoKr must hold; others pass.

    Warns:
        FxLoraWarning: a field that acts in training has no effect here.

    Raises:
        AdapterError: the folder leaves out the projections of VeRA.
    """
    method = _method(content)
    if method is None:
        return
    if missing := method.shared - _shared(content, method).keys():
        raise AdapterError(
            f"{content.path} has no {some(sorted(missing))}: it was saved without VeRA's "
            "projections, which PEFT draws again from projection_prng_key, by a random generator "
            "that is not the same everywhere. Save it with them: in PEFT, load the folder as old, "
            "set save_projection=True in a copy of its configuration, new = get_peft_model(base, "
            "configuration), new.load_state_dict(old.state_dict(), strict=False), "
            "new.save_pretrained(…)."
        )
    if said := [f"{n}={content.config[n]}" for n in method.training if content.config.get(n)]:
        warn(
            f"{content.path / CONFIG}: {some(said)} acts on LoKr's products in training, and has "
            "no effect here."
        )


def as_lora(module: CapturedModule, content: Folder) -> Folder:
    """Return a folder of VeRA or LoKr as one of LoRA for a module; others as they are.

    Layers that the module does not have keep a mark in the place of A.

    Raises:
        AdapterError: the tensors of a layer make no product.
    """
    method = _method(content)
    if method is None:
        return content
    layers: dict[str, Layer] = {}
    rest: dict[str, torch.Tensor] = {}
    for key, tensor in content.tensors.items():
        name, _, end = key.rpartition(".")
        if end in method.ends:
            layers.setdefault(name, Layer(name.removeprefix(ROOT))).tensors[end] = tensor
        elif end not in method.shared:
            rest[key] = tensor
    marks = {name: torch.empty(0) for name in layers}  # the layers' places in the module
    keys = {f"{name}.{A}": mark for name, mark in marks.items()}
    config = _config(content.config, method)
    marked = dataclasses.replace(content, config=config, tensors={**rest, **keys})
    names = {id(mark): name for name, mark in marks.items()}
    weights = dict(module.named_parameters(remove_duplicate=False))
    ranks: dict[str, int] = {}
    for pair in PeftTensors.of(module, marked).pairs:
        name = names.get(id(pair.tensors.get(A)))
        if name is None:
            continue
        layer, weight = layers[name], weights[pair.parameter]
        try:
            down, up = _fitted(method.product(layer, content, pair.target, weight), layer, weight)
        except AdapterError as error:
            kind = content.config["peft_type"]
            raise AdapterError(f"{content.path}, an adapter of {kind}: {error}") from error
        del keys[f"{name}.{A}"]
        rest |= {f"{pair.prefix}.{A}": down, f"{pair.prefix}.{B}": up}
        ranks[exactly(pair.target)] = down.shape[0]
    config |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    return dataclasses.replace(marked, config=config, tensors={**rest, **keys})


def _method(content: Folder) -> _Method | None:
    kind = content.config.get("peft_type")
    return METHODS.get(kind) if content.header is None and isinstance(kind, str) else None


def _shared(content: Folder, method: _Method) -> dict[str, torch.Tensor]:
    """Return the tensors that all layers share, by the last word of their key."""
    ends = ((key.rpartition(".")[2], tensor) for key, tensor in content.tensors.items())
    return {end: tensor for end, tensor in ends if end in method.shared}


def _config(config: Mapping[str, Any], method: _Method) -> dict[str, Any]:
    """Return a method's configuration in LoRA's fields, except for the ranks."""
    own = method.fields.union(["r", "rank_pattern", "alpha_pattern"])
    bias = {"vera_only": "lora_only"}.get(str(config.get("bias")), config.get("bias"))
    return {
        **{name: value for name, value in config.items() if name not in own},
        "peft_type": "LORA",
        "bias": bias or "none",
        "lora_dropout": config.get("vera_dropout") or 0.0,
    }


def _fitted(pair: Pair, layer: Layer, weight: torch.Tensor) -> Pair:
    """Return A and B in LoRA's shapes, in the wider of the dtypes of the file and of the weight.

    For a convolution, A has its kernel, and B one of ones.
    """
    dtype = torch.promote_types(layer.dtype, weight.dtype)
    down, up = (side.to(dtype) for side in pair)
    if weight.dim() > 2 and down.shape[1] == weight[0].numel():
        down = down.reshape(-1, *weight.shape[1:])
        up = up.reshape(*up.shape, *[1] * (weight.dim() - 2))
    return down, up
