"""The table of formats, and the one that a file's keys fit."""

from __future__ import annotations

from ...errors import AdapterError
from ...tables import some
from .bare_peft import BARE_PEFT
from .diffusers import DIFFUSERS
from .format import Format
from .kohya import KOHYA
from .layers import Layer
from .loralib import LORALIB
from .tensors import TensorFile
from .torchtune import TORCHTUNE

FORMATS = (KOHYA, DIFFUSERS, BARE_PEFT, LORALIB, TORCHTUNE)


def format_of(file: TensorFile) -> tuple[Format, dict[str, Layer], list[str]]:
    """Return the format of a file, its layers by name, and the keys that may be of biases.

    Raises:
        AdapterError: no format fits the keys, or more than one, or a key is of no tensor that the
            format has; names the keys.
    """
    split = [(form, *form.layers(file.tensors)) for form in FORMATS]
    fits = [(form, layers, rest) for form, layers, rest in split if form.is_of(layers)]
    if not fits:
        raise AdapterError(
            f"{file.path} has keys of no known adapter, such as {some(file.tensors, 3)}. Formats "
            f"that are read: {', '.join(form.title for form in FORMATS)}."
        )
    if len(fits) > 1:
        raise AdapterError(
            f"{file.path} has keys of several libraries: {' and '.join(f.title for f, *_ in fits)}."
        )
    form, layers, rest = fits[0]
    strange = [key for key in rest if not (form.biases and key.endswith(".bias"))]
    alone = [name for name, layer in layers.items() if form.signs.isdisjoint(layer.tensors)]
    strange += [f"{name} ({some(layers[name].tensors)} alone)" for name in alone]
    if strange:
        raise AdapterError(
            f"{file.path} is an adapter of {form.title}, and has keys that these do not have: "
            f"{some(strange)}."
        )
    return form, layers, rest
