"""From a file of another library to a plan for a module, and the values of its adapters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ...config import LoraConfig, Rule
from ...errors import AdapterError, ConfigError, NoMatchError, UnsupportedOpError
from ...matching import matched
from ...module import CapturedModule
from ...module.sharded import whole
from ...names import printable
from ...plan import Entry, Plan
from ...reads.sites import Site, find_sites
from ...tables import some
from .format import Format, Options, Target
from .formats import format_of
from .layers import Layer
from .names import SiteNames, Way, in_component, ways
from .tensors import TensorFile, read_tensors
from .updates import Update


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a file of another library says about a module.

    Attributes:
        plan: the plan of its adapters; it trains the biases that the file holds.
        starts: the adapters' tensors, by their names in the adapted module.
        stored: the biases, by name.
        notes: warnings for the user.
    """

    plan: Plan
    starts: dict[str, torch.Tensor]
    stored: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Found:
    """A layer of a file, the site that it is for, and what it says of it."""

    site: Site
    update: Update
    dtype: torch.dtype


def read_foreign(
    module: CapturedModule, path: Path, adapter_name: str, options: Options
) -> Foreign:
    """Read a file of another library.

    Raises:
        AdapterError: the file is damaged, of no known format or of several, does not fit the
            module in exactly one way, or does not hold what its library keeps elsewhere.
        ConfigError: an option was given that has no effect on this file.
    """
    file = read_tensors(path)
    form, layers, biases = format_of(file)
    try:
        found, way = _found(module, file, form, layers, options)
        biased = _biases(module, file, biases, way.prefix)
        if unused := options.unused:
            raise ConfigError(
                f"{some(unused)} has no effect on this file of {form.title}: leave it out."
            )
        plan = _plan(module, found, list(biased), adapter_name)
    except (AdapterError, NoMatchError, UnsupportedOpError) as error:
        raise AdapterError(f"{path}, an adapter of {form.title}: {error}") from error
    starts: dict[str, torch.Tensor] = {}
    for entry, (one, pair) in zip(plan, _pairs(found), strict=True):
        starts |= _values(module, entry, one, pair)
    stored = {name: file.tensors[key] for name, key in biased.items()}
    return Foreign(plan, starts, stored, tuple(filter(None, (way.note, _note_on_sizes(plan)))))


def _note_on_sizes(plan: Plan) -> str:
    """Return a note on adapters that are larger than their weights, or ""."""
    large = [e.site for e in plan if e.adapter_parameters > e.weight_parameters]
    if not large:
        return ""
    return (
        "adapters that have more parameters than their weights, as products of full rank do: "
        f"{some(large)}. To run the model without training it further, fold it (fxlora.fold)."
    )


def _found(
    module: CapturedModule,
    file: TensorFile,
    form: Format,
    layers: dict[str, Layer],
    options: Options,
) -> tuple[list[_Found], Way]:
    """Return what each layer says of its site, in the order of the module's parameters.

    Raises:
        AdapterError: not exactly one way of reading the names fits all layers, in name and shape.
    """
    sites = find_sites(module)
    names = in_component(layers, form, options.take("component"))
    fits: list[tuple[list[_Found], Way]] = []
    why: list[str] = []
    for way in ways(names, SiteNames(sites, form), form, options.component):
        try:
            found = [_of_layer(module, file, form, layers[n], way, options) for n in names]
            fits.append((_in_order(found, sites), way))
        except AdapterError as error:
            why.append(str(error))
    if len(fits) > 1:
        raise AdapterError(
            "its layers fit the module in several ways, by name and by shape. Give component=, the "
            'model in front of the names, or component="" for the names as they are.'
        )
    if not fits:
        raise AdapterError(why[0])
    return fits[0]


def _in_order(found: list[_Found], sites: Sequence[Site]) -> list[_Found]:
    """Return what layers say in the order of the module's sites.

    Raises:
        AdapterError: two of them are for one site.
    """
    held = [one.site.name for one in found]
    if twice := sorted({name for name in held if held.count(name) > 1}):
        raise AdapterError(f"it has more than one layer for {some(twice)}.")
    order = {id(site): number for number, site in enumerate(sites)}
    return sorted(found, key=lambda one: order[id(one.site)])


def _of_layer(
    module: CapturedModule,
    file: TensorFile,
    form: Format,
    layer: Layer,
    way: Way,
    options: Options,
) -> _Found:
    """Return what a layer says of the one site, among those that its name fits, whose shape fits.

    Raises:
        AdapterError: no site fits, or several do.
    """
    fits: list[_Found] = []
    why: list[str] = []
    for site in way.sites[layer.name]:

        def weight(name: str = site.parameter) -> torch.Tensor:
            return whole(module.get_parameter(name).detach()).cpu()

        target = Target(site, weight, file.metadata, way.prefix, options)
        layer.used.clear()
        try:
            update = form.update(layer, target)
            layer.check_used()
            _check_shapes(layer, site, update)
            fits.append(_Found(site, update, layer.dtype))
        except AdapterError as error:
            why.append(str(error))
    if len(fits) > 1:
        raise AdapterError(
            f"'{layer.name}' may be any of {some(found.site.name for found in fits)}: their names "
            "and shapes both fit."
        )
    if not fits:
        raise AdapterError(" ".join(dict.fromkeys(why)))
    return fits[0]


def _check_shapes(layer: Layer, site: Site, update: Update) -> None:
    """Raise AdapterError unless the update is one of the site's weight."""
    layout = site.layout
    if layout.stacked or (layout.in_first and layout.kernel(site.shape)):
        kind = "a stack of matrices" if layout.stacked else "a transposed convolution"
        raise AdapterError(f"'{layer.name}': '{site.name}' is {kind}, for which no such file is.")
    _, rows, columns = layout.sizes(site.shape)
    size_i, size_o = (rows, columns) if layout.in_first else (columns, rows)
    outputs = size_o // len(update.enable) if update.enable else size_o
    for down, up in update.pairs:
        if (down.shape[1], up.shape[0]) != (size_i, outputs):
            raise AdapterError(
                f"'{layer.name}' is for {up.shape[0]} outputs and {down.shape[1]} inputs (with its "
                f"kernel), and '{site.name}' has {outputs} and {size_i}."
            )
    if update.magnitude is not None and update.magnitude.numel() != size_o:
        raise AdapterError(
            f"'{layer.name}' has {update.magnitude.numel()} magnitudes, and '{site.name}' has "
            f"{size_o} outputs."
        )


def _biases(
    module: CapturedModule, file: TensorFile, keys: Sequence[str], prefix: str
) -> dict[str, str]:
    """Return the keys of the biases in a file, by their names in the module.

    Raises:
        AdapterError: the module does not have one, in its shape.
    """
    held = dict(module.named_parameters())
    found = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    missing = [
        key
        for name, key in found.items()
        if name not in held or held[name].shape != file.tensors[key].shape
    ]
    if missing:
        raise AdapterError(f"the module has no {some(missing)} of this shape.")
    return found


def _plan(
    module: CapturedModule, found: Sequence[_Found], biases: Sequence[str], adapter_name: str
) -> Plan:
    """Return the plan of a file's updates, one rule for each."""
    rules = [_rule(one) for one in found]
    rules += [Rule(f"re:{re.escape(name)}", train=True) for name in biases]
    try:
        plan = matched(module, rules, adapter_name=adapter_name)
    except ConfigError as error:
        raise AdapterError(str(error)) from error
    parts = [one for one, _ in _pairs(found)]
    order = {one.site.name: number for number, one in reversed([*enumerate(parts)])}
    entries = sorted(plan, key=lambda entry: order.get(_site_name(entry), 0))
    if [_site_name(entry) for entry in entries] != [one.site.name for one in parts]:
        raise AdapterError("several of its layers are for one tied weight: that is not read.")
    made = tuple(_entry(e, one.update) for e, one in zip(entries, parts, strict=True))
    return dataclasses.replace(plan, entries=made, rules=())


def _rule(one: _Found) -> Rule:
    """Return a rule for the place of an update; `_entry` gives it the rank."""
    config = LoraConfig(r=1, variant=None if one.update.magnitude is None else "dora")
    enable = one.update.enable
    return Rule(
        f"re:{re.escape(one.site.name)}",
        lora=config,
        parts=None if enable is None else len(enable),
        enable=enable,
    )


def _site_name(entry: Entry) -> str:
    return entry.site.removesuffix(f".{entry.part}") if entry.part else entry.site


def _pairs(found: Sequence[_Found]) -> list[tuple[_Found, int]]:
    """Return each pair as what it is part of, and its number there."""
    return [(one, number) for one in found for number in range(len(one.update.pairs))]


def _entry(entry: Entry, update: Update) -> Entry:
    """Return an entry with the rank and scaling of an update, and the alpha that gives it."""
    r = update.pairs[0][0].shape[0]
    return dataclasses.replace(
        entry,
        r=r,
        alpha=update.scaling * r,
        scaling=update.scaling,
        reason="; ".join(filter(None, (entry.reason, printable(update.note)))),
    )


def _values(
    module: CapturedModule, entry: Entry, one: _Found, number: int
) -> dict[str, torch.Tensor]:
    """Return an entry's tensors, by name, in the widest of the file's dtype and the module's."""
    held = entry.dtype_over(module.get_parameter(entry.parameter).dtype)
    dtype = one.dtype if not one.update.note else torch.promote_types(one.dtype, held)
    a, b = entry.layout.with_kernels(*one.update.pairs[number], entry.adapted_shape)
    found = {entry.name_a: a, entry.name_b: b}
    if one.update.magnitude is not None:
        found[entry.name_of("lora_magnitude_vector")] = one.update.magnitude
    return {name: tensor.to(dtype) for name, tensor in found.items()}
