"""The dimension of a weight that `parts=` cuts: its outputs or, of a table, also its rows.

The rows of a table that is looked up are the inputs of the look-up. An adapter of some of them has
inputs and outputs exchanged: A (r, features), and B (rows, r) for the rows of its part.
"""

from __future__ import annotations

import dataclasses

from ..config import Rule
from ..errors import ConfigError, UnsupportedOpError
from ..lora.ops import is_lookup
from ..lora.parts import Rows, may_be_of, rows_of
from ..lora.variants import VARIANTS, variants_of
from ..reads.sites import Site


def cut_along(site: Site, number: int, rule: Rule) -> Site:
    """Return the site with the layout in which the parts of a rule are slices of its outputs.

    Raises:
        ConfigError: the rule cuts it along another dimension, or through a row that never trains.
        UnsupportedOpError: a variant scales the features of a table, of which the part has some.
    """
    outputs, inputs = site.layout.part_dim, site.layout.swapped.part_dim
    looked_up = any(is_lookup(reader.kind) for reader in site.readers)
    if rule.part_dim not in {None, outputs, *((inputs,) if looked_up else ())}:
        raise ConfigError(
            f"part_dim={rule.part_dim} of rule {number}: the parts of '{site.name}' are of its "
            f"outputs, in dimension {outputs}{f', or rows, in {inputs}' if looked_up else ''}."
        )
    if not looked_up:
        return site
    dim = _dim_of_table(site, number, rule) if rule.part_dim is None else rule.part_dim
    if dim == outputs:
        return dataclasses.replace(site, layout_known=True)
    _check_turned(site, number, rule, inputs)
    layout = site.layout.swapped
    return dataclasses.replace(site, layout=layout, layout_known=True, padding_idx=None)


def _dim_of_table(site: Site, number: int, rule: Rule) -> int:
    """Return the dimension of a table that parts fit: the outputs, if they fit both."""
    dims = (site.layout.part_dim, site.layout.swapped.part_dim)
    fitting = [dim for dim in dims if may_be_of(rule.parts, site.shape[dim])]
    if not fitting:
        raise ConfigError(
            f"the parts of '{site.name}' (rule {number}) fit neither dimension of {site.shape}."
        )
    if len(fitting) > 1 and not site.layout_known:
        raise ConfigError(
            f"the parts of '{site.name}' (rule {number}) fit both of its dimensions: say which by "
            "part_dim=0, its rows, or part_dim=1."
        )
    return fitting[0]


def _check_turned(site: Site, number: int, rule: Rule, dim: int) -> None:
    for name, rows in rows_of(rule.parts, rule.enable, site.shape[dim], site.name).items():
        if site.padding_idx is not None and rows[0] <= site.padding_idx < rows[1]:
            raise ConfigError(
                f"part '{name}' of '{site.name}' (rule {number}) has row {site.padding_idx}, its "
                "padding_idx, which no gradient reaches. Leave it out: give ranges (from, to)."
            )
    lora = rule.lora
    asked = variants_of(lora.init_lora_weights, lora.row) if lora else ()
    if scaling := [variant for variant in asked if VARIANTS[variant].gain]:
        raise UnsupportedOpError(
            f"'{site.name}' (rule {number}): {', '.join(scaling)} scales the features of a table, "
            "and a part of its rows has only some entries of each. Use plain LoRA for it."
        )


def cut_note(site: Site, rows: Rows | None) -> str:
    """Return what of a table a part has, for the plan."""
    if rows is None or not any(is_lookup(reader.kind) for reader in site.readers):
        return ""
    layout = next(r.layout for r in site.readers if is_lookup(r.kind))
    what = "features" if layout == site.layout else "rows"
    return f"{what} {rows[0]} to {rows[1] - 1}"
