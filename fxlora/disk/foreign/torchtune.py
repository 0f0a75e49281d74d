"""The adapter files of torchtune: `lora_a.weight`, `lora_b.weight` and DoRA's `magnitude`.

Source: torchtune/modules/peft. The alpha is in torchtune's recipe, not in the file.
"""

from __future__ import annotations

from ...errors import AdapterError
from .format import Format, Target, low_rank
from .layers import Layer
from .updates import Update


def _update(layer: Layer, target: Target) -> Update:
    alpha = target.options.take("lora_alpha")
    if alpha is None:
        raise AdapterError(
            "torchtune's files do not hold the alpha: give lora_alpha= as the recipe has it "
            "(model.lora_alpha), load_adapter(…, lora_alpha=…)."
        )
    pair = low_rank(layer, "lora_a", "lora_b")
    magnitude = layer.take("magnitude").flatten() if layer.has("magnitude") else None
    return Update((pair,), alpha / pair[0].shape[0], magnitude)


TORCHTUNE = Format(
    title="torchtune",
    ends={
        ".lora_a.weight": "lora_a",
        ".lora_b.weight": "lora_b",
        ".magnitude": "magnitude",
    },
    signs=frozenset({"lora_a", "lora_b"}),
    update=_update,
)
