"""PEFT's keys in a file without adapter_config.json, as diffusers writes them today.

The alpha is in the metadata of a file by diffusers (`lora_adapter_metadata`), or the user gives it.
A file whose names begin with a model of a pipeline ("unet.", "transformer.") is diffusers', where a
layer without an alpha has s = 1. Otherwise the file is part of a PEFT folder, and the alpha is
missing.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ...errors import AdapterError
from ...matching.choice import pattern_holds
from ...names import shown
from .diffusers import COMPONENTS
from .format import Format, Options, Target, low_rank, scaling_of
from .layers import Layer
from .updates import Update


def _update(layer: Layer, target: Target) -> Update:
    if layer.has("embedding_A"):
        pair = layer.matrix("embedding_A"), layer.matrix("embedding_B")
    else:
        pair = low_rank(layer, "A", "B")
    magnitude = layer.take("magnitude").flatten() if layer.has("magnitude") else None
    scaling = _scaling(layer, target, pair[0].shape[0])
    return Update((pair,), scaling, magnitude)


def _scaling(layer: Layer, target: Target, r: int) -> float:
    options = target.options
    said = _metadata(target)
    if said is not None:
        return _scaling_by(said, layer, target, r)
    own = layer.number("alpha")
    if own is not None:
        return scaling_of(own, r, options)
    given = options.take("lora_alpha")
    if given is not None:
        return scaling_of(given, r, options)
    if target.prefix in COMPONENTS:
        return 1.0
    raise AdapterError(
        "the file has PEFT's keys and no alpha. Load the folder that has its adapter_config.json, "
        "or give lora_alpha= (and use_rslora=True if it is rsLoRA)."
    )


def _metadata(target: Target) -> dict[str, Any] | None:
    """Return the configuration of the layer's model in diffusers' metadata, or None."""
    text = target.metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        every = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"the file's lora_adapter_metadata is not JSON: {error}.") from error
    if not isinstance(every, dict):
        raise AdapterError("the file's lora_adapter_metadata is not an object.")
    start = target.prefix
    found = {k.removeprefix(start): v for k, v in every.items() if k.startswith(start)}
    return found or None


def _scaling_by(config: dict[str, Any], layer: Layer, target: Target, r: int) -> float:
    """Return s of a layer by the configuration that a file of diffusers holds."""
    own = layer.number("alpha")
    by_name = config.get("alpha_pattern") or {}
    name = layer.name.removeprefix(target.prefix)
    alpha = config.get("lora_alpha") if own is None else own
    if own is None and isinstance(by_name, dict):
        alpha = next((v for key, v in by_name.items() if _holds(key, name)), alpha)
    numbers = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not numbers or not math.isfinite(float(alpha or 0)):
        raise AdapterError(f"the file's metadata has lora_alpha={shown(alpha)}, not a number.")
    rslora = config.get("use_rslora") or False
    if config.get("use_dora") and not layer.has("magnitude"):
        raise AdapterError(f"the file's metadata says DoRA, and '{layer.name}' has no magnitude.")
    return scaling_of(float(alpha or 0), r, Options(use_rslora=bool(rslora)))


def _holds(pattern: str, name: str) -> bool:
    """Whether a key of alpha_pattern is that of a layer."""
    try:
        return pattern_holds(pattern, name)
    except re.error as error:
        raise AdapterError(
            f"the file's metadata has the alpha_pattern {shown(pattern)}: {error}."
        ) from error


_ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".alpha": "alpha",
}

BARE_PEFT = Format(
    title="PEFT's keys without a configuration",
    ends=_ENDS,
    signs=frozenset({"A", "B", "embedding_A", "embedding_B"}),
    update=_update,
    prefixes=(*COMPONENTS, "base_model.model.", "diffusion_model."),
)
