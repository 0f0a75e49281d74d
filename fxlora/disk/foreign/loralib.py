"""The files of loralib (Hu et al. 2021): `lora_A` and `lora_B` on the layer itself.

Source: loralib/layers.py. Its convolutions have A (r·k, in·k) and B (out·k, r·k), whose product is
only reshaped to the weight; its MergedLinear has one pair for each enabled part of the outputs, A
(r·n, in) and B (out·n/parts, r).
"""

from __future__ import annotations

from ...errors import AdapterError
from .format import Format, Target
from .layers import Layer
from .updates import Pair, Update, matrix_pair


def _update(layer: Layer, target: Target) -> Update:
    alpha = target.options.take("lora_alpha")
    if alpha is None:
        raise AdapterError(
            "loralib's files do not hold lora_alpha: give the one that the layers were made with, "
            "load_adapter(…, lora_alpha=…). loralib's own default is 1."
        )
    a, b = layer.matrix("lora_A"), layer.matrix("lora_B")
    site = target.site
    if kernel := site.layout.kernel(site.shape):
        r, rest = divmod(a.shape[0], kernel[0])
        out = site.layout.features(site.shape)[1]
        if rest or a.shape[0] != b.shape[1] or (b.shape[0] * a.shape[1]) % out:
            raise _misfit(layer, target)
        change = (b @ a).reshape(out, -1)
        return Update((matrix_pair(change),), alpha / r, note="loralib's convolution at full rank")
    out = site.layout.features(site.shape)[1]
    r = b.shape[1]
    if a.shape[0] == r and b.shape[0] == out:
        return Update(((a, b),), alpha / r)
    return _merged_linear(layer, target, (a, b), out, alpha / r)


def _merged_linear(layer: Layer, target: Target, both: Pair, out: int, scaling: float) -> Update:
    """Return the update of a MergedLinear, which has a pair for each of its enabled parts."""
    a, b = both
    number, rest = divmod(a.shape[0], b.shape[1])
    if rest or not number or b.shape[0] % number or out % (b.shape[0] // number):
        raise _misfit(layer, target)
    count = out // (b.shape[0] // number)
    given = target.options.take("enable_lora")
    enable = (True,) * count if given is None and number == count else given
    if enable is None or len(enable) != count or sum(enable) != number:
        raise AdapterError(
            f"'{layer.name}' is a MergedLinear with adapters for {number} of {count} parts, and "
            "does not say which: give enable_lora=, one flag for each part, such as enable_lora="
            f"{[True] * number + [False] * (count - number)}."
        )
    pairs = tuple(zip(a.chunk(number), b.chunk(number), strict=True))
    return Update(pairs, scaling, enable=tuple(enable))


def _misfit(layer: Layer, target: Target) -> AdapterError:
    shapes = [tuple(layer.tensors[end].shape) for end in ("lora_A", "lora_B")]
    return AdapterError(
        f"'{layer.name}' has lora_A {shapes[0]} and lora_B {shapes[1]}, which fit no layer of "
        f"loralib with the weight {target.site.shape} of '{target.site.name}'."
    )


LORALIB = Format(
    title="loralib",
    ends={".lora_A": "lora_A", ".lora_B": "lora_B"},
    signs=frozenset({"lora_A", "lora_B"}),
    update=_update,
    biases=True,
)
