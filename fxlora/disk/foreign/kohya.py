"""The files of kohya's sd-scripts and of LyCORIS: LoRA, LoCon, LoHa and LoKr, also with DoRA.

Sources: sd-scripts networks/lora.py; LyCORIS (Yeh et al. 2024), §3.1 and lycoris/modules. Their
DoRA normalizes the weights of each output (`dora_scale` (out, 1, …), `wd_on_output`), as the paper
does, or those of each input (1, in, 1, …), which no adapter of low rank can do: then the update is
computed from the base weight, and becomes a pair of full rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from ...errors import AdapterError
from ...tables import some
from .format import Format, Target, low_rank, scaling_of
from .layers import Layer
from .updates import (
    Pair,
    Update,
    hadamard,
    kronecker,
    matrix_of,
    matrix_pair,
    shortened,
    tucker,
)

Made = tuple[Pair, int]  # the pair of a layer, and the rank that its alpha is divided by


def _locon(layer: Layer) -> Made:
    if not layer.has("lora_mid"):
        pair = low_rank(layer, "lora_down", "lora_up")
        return pair, pair[0].shape[0]
    # up (1x1) after mid (kernel) after down (1x1): mid and down together are one A with the kernel
    core, down, up = layer.take("lora_mid"), layer.matrix("lora_down"), layer.matrix("lora_up")
    same = torch.eye(core.shape[0], dtype=core.dtype)
    return (tucker(core, same, down), up), down.shape[0]


def _loha(layer: Layer) -> Made:
    rank = layer.take("hada_w1_b").shape[0]
    if layer.has("hada_t1"):
        whole = _tucker(layer, "hada_t1", "hada_w1") * _tucker(layer, "hada_t2", "hada_w2")
        return matrix_pair(whole), rank
    first = low_rank(layer, "hada_w1_b", "hada_w1_a")
    second = low_rank(layer, "hada_w2_b", "hada_w2_a")
    return shortened(hadamard(first, second)), rank


def _tucker(layer: Layer, core: str, sides: str) -> torch.Tensor:
    """Return the matrix of a Tucker decomposition with the sides (r, out) and (r, in)."""
    return tucker(layer.take(core), layer.matrix(f"{sides}_a").mT, layer.matrix(f"{sides}_b"))


def lokr(layer: Layer) -> Made:
    """Return the pair of LoKr's tensors, and the rank that alpha is divided by; 0 for none."""
    first, rank = _lokr_factor(layer, "lokr_w1", "lokr_t1")
    second, other = _lokr_factor(layer, "lokr_w2", "lokr_t2")
    return shortened(kronecker(first, second)), rank or other


def _lokr_factor(layer: Layer, name: str, core: str) -> Made:
    """Return one factor of the Kronecker product, and its rank; 0 for a factor of full rank."""
    if layer.has(name):
        return matrix_pair(layer.matrix(name)), 0
    rank = layer.take(f"{name}_b").shape[0]
    if layer.has(core):
        return matrix_pair(_tucker(layer, core, name)), rank
    return low_rank(layer, f"{name}_b", f"{name}_a"), rank


KINDS: dict[str, Callable[[Layer], Made]] = {
    "lora_down": _locon,
    "hada_w1_b": _loha,
    "lokr_w1": lokr,
    "lokr_w1_b": lokr,
}


def _update(layer: Layer, target: Target) -> Update:
    kinds = [made for sign, made in KINDS.items() if layer.has(sign)]
    if len(kinds) != 1:
        raise AdapterError(
            f"'{layer.name}' is not one of LoRA, LoCon, LoHa and LoKr: it has "
            f"{some(sorted(layer.tensors))}."
        )
    pair, rank = kinds[0](layer)
    alpha = layer.number("alpha")
    if alpha and rank and _says_rslora(target):
        raise AdapterError(
            "the file says rs_lora, and versions of LyCORIS differ in the alpha that they store "
            "then. If s is alpha / √r, as in the first ones, give use_rslora=True, else "
            "use_rslora=False."
        )
    # Two factors of full rank have no scaling, whatever the alpha is.
    scaling = scaling_of(alpha, rank, target.options) if rank else 1.0
    note = "" if kinds[0] is _locon else f"a product as a pair of rank {pair[0].shape[0]}"
    if not layer.has("dora_scale"):
        return Update((pair,), scaling, note=note)
    scale = layer.take("dora_scale")
    if scale.numel() == scale.shape[0] == pair[1].shape[0]:
        return Update((pair,), scaling, scale.flatten(), note=note)
    if scale.dim() > 1 and scale.numel() == scale.shape[1]:
        return _on_inputs(layer, target, scaling * matrix_of(pair), scale.flatten())
    raise AdapterError(
        f"'{layer.name}': dora_scale is {tuple(scale.shape)}, neither one for each of "
        f"{pair[1].shape[0]} outputs nor one for each input."
    )


def _says_rslora(target: Target) -> bool:
    """Whether the metadata has LyCORIS's rs_lora, and the user does not say what it means."""
    if target.options.take("use_rslora") is not None:
        return False
    try:
        arguments = json.loads(target.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        return False  # information by the trainer, of any form
    said = arguments.get("rs_lora") if isinstance(arguments, dict) else None
    return str(said).lower() == "true"


def _on_inputs(
    layer: Layer, target: Target, change: torch.Tensor, magnitude: torch.Tensor
) -> Update:
    """Return m·V/‖V‖ - W0, with V = W0 + ΔW normalized over the outputs of each input."""
    if not bool((magnitude > 0).all()):
        raise AdapterError(
            f"'{layer.name}': dora_scale has numbers ≤ 0, as in the first LyCORIS with DoRA, which "
            "divided by means: that is not read."
        )
    site = target.site
    if site.layout.in_first or site.layout.stacked:
        raise AdapterError(f"'{layer.name}': dora_scale of each input needs a weight (out, in, …).")
    base = target.weight().double()
    if base.numel() != change.numel() or base.shape[1] != magnitude.numel():
        raise AdapterError(
            f"'{layer.name}' is for a weight of {change.shape[0]} outputs and {magnitude.numel()} "
            f"inputs, not for {tuple(base.shape)}."
        )
    moved = base + change.reshape(base.shape)
    dims = [d for d in range(base.dim()) if d != 1]
    norms = torch.linalg.vector_norm(moved, 2, dims, keepdim=True)
    scaled = moved * (magnitude.reshape([1, -1, *[1] * (base.dim() - 2)]) / norms)
    pair = matrix_pair((scaled - base).flatten(1))
    return Update((pair,), 1.0, note="DoRA of each input, over this base, as a pair of full rank")


_NAMES = {
    **{f"lora_{name}.weight": f"lora_{name}" for name in ("down", "up", "mid")},
    **{f"hada_{n}": f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{n}": f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    **{name: name for name in ("alpha", "dora_scale")},
}

KOHYA = Format(
    title="kohya and LyCORIS",
    ends={f".{end}": name for end, name in _NAMES.items()},
    signs=frozenset(_NAMES.values()) - {"alpha", "dora_scale"},
    update=_update,
    prefixes=(
        *("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_prior_unet_"),
        *("lora_transformer_", "lycoris_", "diffusion_model.", "transformer.", "text_encoder."),
    ),
    flat=True,
)
