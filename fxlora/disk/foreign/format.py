"""A format: how the keys of a library's files are read, and what its tensors mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...config import is_finite
from ...errors import AdapterError, ConfigError
from ...names import shown
from ...reads.sites import Site
from ...tables import some
from .layers import Layer
from .updates import Update


@dataclass(frozen=True)
class Options:
    """What the user says about a file: what it does not hold itself.

    Attributes:
        lora_alpha: the alpha of all layers.
        use_rslora: whether s is alpha / √r.
        enable_lora: the parts of loralib's MergedLinear layers that have adapters.
        component: the model of the file, of several, that the module is.
        asked: names of the options that a format used.
    """

    lora_alpha: float | None = None
    use_rslora: bool | None = None
    enable_lora: tuple[bool, ...] | None = None
    component: str | None = None
    asked: set[str] = field(default_factory=set[str], compare=False)

    def take(self, name: str) -> Any:
        """Return an option, which is then known to have had an effect."""
        self.asked.add(name)
        return getattr(self, name)

    @property
    def unused(self) -> list[str]:
        """Names of options that were given, and had no effect."""
        options = ("lora_alpha", "use_rslora", "enable_lora", "component")
        return [n for n in options if getattr(self, n) is not None and n not in self.asked]


def checked_options(
    lora_alpha: object, use_rslora: object, enable_lora: object, component: object
) -> Options:
    """Return the options that a user gave.

    Raises:
        ConfigError: one has a wrong type or value.
    """
    if lora_alpha is not None and not is_finite(lora_alpha):
        raise ConfigError(f"lora_alpha must be a finite number, not {shown(lora_alpha)}.")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        raise ConfigError(f"use_rslora must be True or False, not {shown(use_rslora)}.")
    if component is not None and not isinstance(component, str):
        raise ConfigError(f"component must be a name in the file, not {shown(component)}.")
    flags: Any = enable_lora
    if flags is not None:
        listed = isinstance(flags, Sequence) and not isinstance(flags, str)
        if not listed or not flags or not all(isinstance(flag, bool) for flag in flags):
            raise ConfigError(f"enable_lora must be flags, one a part, not {shown(flags)}.")
        flags = tuple(flags)
    alpha: Any = lora_alpha
    return Options(alpha, use_rslora, flags, component)


def check_no_effect(options: Options) -> None:
    """Raise ConfigError if an option was given for a folder, which says all of them itself."""
    if options.unused:
        raise ConfigError(
            f"{some(options.unused)} has no effect on an adapter folder, whose configuration says "
            "it: leave it out."
        )


@dataclass(frozen=True)
class Target:
    """The weight that a layer is for.

    Attributes:
        site: the site.
        weight: returns the weight's values, whole, on the CPU, in its shape.
        metadata: the metadata of the file.
        prefix: the prefix of the layer's name that names a model ("unet."), or "".
        options: what the user says about the file.
    """

    site: Site
    weight: Callable[[], torch.Tensor]
    metadata: Mapping[str, str]
    prefix: str
    options: Options


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes:
        title: the library's name.
        ends: the ends of its keys, each with the name under which a layer holds the tensor. The
            longest that fits a key counts.
        signs: names of tensors of which every layer has one; other formats have none of them.
        prefixes: the names that a file may put before the layers of each of several models.
        update: function (layer, target) → what the layer's tensors mean.
        flat: whether names have "_" for ".".
        spellings: function (name in the file) → the names that the layer may have in a model.
        biases: whether a file may hold biases, under their own names.
    """

    title: str
    ends: Mapping[str, str]
    signs: frozenset[str]
    update: Callable[[Layer, Target], Update]
    prefixes: tuple[str, ...] = ()
    flat: bool = False
    spellings: Callable[[str], list[str]] = lambda name: [name]
    biases: bool = False

    def split(self, key: str) -> tuple[str, str] | None:
        """Return the name of the layer and of its tensor that a key stands for, or None."""
        fits = [end for end in self.ends if key.endswith(end) and len(key) > len(end)]
        if not fits:
            return None
        end = max(fits, key=len)
        return key.removesuffix(end), self.ends[end]

    def layers(self, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Layer], list[str]]:
        """Return the layers of a file by name, and the keys that are of none."""
        found: dict[str, Layer] = {}
        strange: list[str] = []
        for key, tensor in tensors.items():
            parts = self.split(key)
            if parts is None:
                strange.append(key)
                continue
            name, end = parts
            layer = found.setdefault(name, Layer(name))
            if end in layer.tensors:
                raise AdapterError(f"the file has '{end}' of '{name}' twice.")
            layer.tensors[end] = tensor
        return found, strange

    def is_of(self, layers: Mapping[str, Layer]) -> bool:
        """Whether some layer has a tensor that only this format has."""
        return any(not self.signs.isdisjoint(layer.tensors) for layer in layers.values())


def low_rank(layer: Layer, down: str, up: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pair of a layer's tensors, as matrices.

    Raises:
        AdapterError: one is missing, or their ranks differ.
    """
    a, b = layer.matrix(down), layer.matrix(up)
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"'{layer.name}' has the rank {a.shape[0]} in '{down}' and {b.shape[1]} in '{up}'."
        )
    return a, b


def scaling_of(alpha: float | None, r: int, options: Options) -> float:
    """Return alpha / r, or alpha / √r if the user says rsLoRA; 1 without an alpha, or for 0.

    That is the rule of sd-scripts, LyCORIS and diffusers.
    """
    if not alpha:
        return 1.0
    return alpha / (r**0.5 if options.take("use_rslora") else r)
