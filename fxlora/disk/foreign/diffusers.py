"""The files of diffusers: `lora.down` and `lora.up`, in the spellings of all its versions.

Sources: diffusers src/diffusers/loaders and utils/state_dict_utils.py. A layer without an alpha has
s = 1. Attention processors were named by what they project (`attn1.processor.to_q_lora`), in text
encoders too.
"""

from __future__ import annotations

import re

from .format import Format, Target, low_rank, scaling_of
from .layers import Layer
from .updates import Update

COMPONENTS = (
    *("unet.", "transformer.", "transformer_2.", "prior.", "decoder.", "controlnet."),
    *("text_encoder.", "text_encoder_2.", "text_encoder_3."),
)


def _update(layer: Layer, target: Target) -> Update:
    pair = low_rank(layer, "down", "up")
    scaling = scaling_of(layer.number("alpha"), pair[0].shape[0], target.options)
    magnitude = layer.take("magnitude").flatten() if layer.has("magnitude") else None
    return Update((pair,), scaling, magnitude)


def _spellings(name: str) -> list[str]:
    """Return the names of the layer that a processor's projection may mean."""
    bare = name.replace(".processor.", ".")
    match = re.fullmatch(r"(.*\.)to_(q|k|v|out)", bare)
    if match is None:
        return [bare]
    owner, kind = match.groups()
    return [bare, f"{owner}{kind}_proj", *([f"{bare}.0"] if kind == "out" else [])]


DIFFUSERS = Format(
    title="diffusers",
    ends={
        f"{start}{end}": name
        for start in (".lora", "_lora", ".lora_linear_layer")
        for end, name in {
            ".down.weight": "down",
            ".up.weight": "up",
            ".alpha": "alpha",
        }.items()
    }
    | {
        ".alpha": "alpha",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
    },
    signs=frozenset({"down", "up"}),
    update=_update,
    prefixes=COMPONENTS,
    spellings=_spellings,
)
