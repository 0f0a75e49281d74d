"""Sites: the weights of a captured module, each with the nodes that read it in every graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..fx.calls import named_argument
from ..lora.layout import Layout, Shape, standard_layout
from ..lora.ops import layout_given
from ..module import CapturedModule
from ..module.memory import overlaps_of
from ..module.quantised import is_quantised
from .facts import padding_row
from .readers import Reader, readers_and_writers


@dataclass(frozen=True)
class Site:
    """A weight of two or more dimensions, and the reads of it under its names.

    A tied weight is one tensor under several names. If every read is made in a call of a module
    that owns one of these names, the names of each module are a separate site. Otherwise all names
    are one site.

    Attributes:
        name: path of the module that owns the parameter as `weight`, else the parameter's name.
        parameter: the parameter's (first) name in `state_dict()`.
        names: all names of the parameter in `state_dict()` that belong to this site.
        tied: names of the same tensor that belong to other sites.
        aliases: every name by which a rule may refer to the site: the parameter's names, also
            without `_weight` (`in_proj`); the modules that own them; the module around these
            whose forward reads the weight instead (MultiheadAttention reads its out_proj's
            weight); and the names that the weight has without torch's parametrization.
        modules: those of the aliases that are modules, the owner first.
        op: kind of the op that reads the weight, or that reads a tensor computed from it and other
            weights only (W * mask, a parametrization). If there are several, the first op with a
            row in the table, and with data as its other operand if there is one. "python" if no
            graph reads the weight.
        shape: shape of the weight.
        layout: the roles of the weight's dimensions.
        layout_known: whether all reads determine the layout; if not, it may be a convention
            (outputs first).
        groups: groups of a convolution, else 1.
        padding_idx: row of an embedding that never trains, or None.
        dtype: dtype of the weight.
        readers: the nodes that read it, in all graphs.
        writer: a node that writes to it, or None.
        merged: whether it was merged from several sites, which one rule adapts.
        overlaps: names of other parameters, buffers and constants that share its memory.
        quantised: whether it is a tensor subclass that stores it in another form.
        outside: where Python reads it outside of every captured region ("" if nothing was seen
            to read it), or None if only graphs read it.
    """

    name: str
    parameter: str
    names: tuple[str, ...]
    tied: tuple[str, ...]
    aliases: tuple[str, ...]
    modules: tuple[str, ...]
    op: str
    shape: Shape
    layout: Layout
    layout_known: bool
    groups: int
    padding_idx: int | None
    dtype: torch.dtype
    readers: tuple[Reader, ...] = field(repr=False)
    writer: Reader | None = field(repr=False)
    merged: bool = False
    overlaps: tuple[str, ...] = ()
    quantised: bool = False
    outside: str | None = None

    def as_in(self, layout: Layout) -> Site:
        """Return the site as an adapter with this layout has it, if inputs and outputs differ.

        The rows of a table that is looked up are its inputs. An adapter of some of them takes them
        for outputs.
        """
        return dataclasses.replace(self, layout=layout) if layout == self.layout.swapped else self

    @property
    def inseparable(self) -> bool:
        """Whether the reads of a tied weight cannot be assigned to its names by their modules."""
        return len(self.names) > 1 and not self.tied and not self.merged

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def in_features(self) -> int:
        """Input features of the layer (channels of a convolution)."""
        transposed = self.layout.in_first
        return self.layout.features(self.shape)[0] * (1 if transposed else self.groups)

    @property
    def out_features(self) -> int:
        """Output features of the layer (channels of a convolution)."""
        transposed = self.layout.in_first
        return self.layout.features(self.shape)[1] * (self.groups if transposed else 1)

    @property
    def kernel_size(self) -> Shape:
        """Kernel size of a convolution, else ()."""
        return self.layout.kernel(self.shape)

    @property
    def in_first(self) -> bool:
        """Whether the weight is stored (in, out)."""
        return self.layout.in_first

    @property
    def why_outside(self) -> str:
        """Why no graph contains its reads, for messages."""
        if self.outside:
            return f"is read by the model's Python at {self.outside}, outside of captured regions"
        return "is in no captured region: the example ran nothing that reads it"

    @property
    def max_rank(self) -> int:
        """The largest rank that ΔW can have: min(d0, d1)."""
        return self.layout.max_rank(self.shape)


def find_sites(module: CapturedModule) -> list[Site]:
    """Return the sites of a module without injected adapters, in the order of its parameters."""
    readers, writers = readers_and_writers(module)
    overlaps, uncovered = overlaps_of(module), module.uncovered
    sites: list[Site] = []
    for first, every_name in module.aliases().items():
        weight = module.get_parameter(first)
        read = any(readers.get(name) for name in every_name)
        if weight.ndim < 2 or not weight.numel() or not weight.is_floating_point():
            continue
        if not (read or first in uncovered):
            continue
        writer = next((writers[name] for name in every_name if name in writers), None)
        for names in by_call_site(module, every_name, readers):
            found = tuple(reader for name in names for reader in readers.get(name, ()))
            site = _site(names, weight, found, writer)
            parametrized = _parametrized(module, names)
            sites.append(
                dataclasses.replace(
                    site,
                    tied=tuple(name for name in every_name if name not in names),
                    aliases=(*site.aliases, *parametrized),
                    modules=(*parametrized[:1], *site.modules),
                    overlaps=tuple(
                        dict.fromkeys(
                            (*overlaps.get(first, ()), *module.known.mirrors.get(first, ()))
                        )
                    ),
                    outside=uncovered.get(first),
                )
            )
    every = module.named_parameters(remove_duplicate=False)
    order = {name: number for number, (name, _) in enumerate(every)}
    return sorted(sites, key=lambda site: order[site.parameter])


def by_call_site(
    module: CapturedModule, names: list[str], readers: dict[str, list[Reader]]
) -> list[list[str]]:
    """Group the names of a weight by the module whose call reads it.

    All names are one group if some read belongs to none of these modules. Names that nothing reads
    are added to the first group. The names of one module are one group.
    """
    modules: dict[int, list[str]] = {}
    for name in names:
        owner = module.get_submodule(name.rpartition(".")[0])
        modules.setdefault(id(owner), []).append(name)
    read = [group for group in modules.values() if any(readers.get(name) for name in group)]
    owned = [_owns(group, readers.get(name, ())) for group in read for name in group]
    if len(read) < 2 or not all(owned):
        return [names]
    unread = [name for group in modules.values() if group not in read for name in group]
    return [[*read[0], *unread], *read[1:]]


def _owns(names: Iterable[str], readers: Iterable[Reader]) -> bool:
    """Whether every read is made in a call of a module that owns one of these names."""
    return all(any(_is_owner(reader.call_site, name) for name in names) for reader in readers)


def _is_owner(call_site: str, parameter: str) -> bool:
    owner = parameter.rpartition(".")[0]
    return bool(owner) and (call_site == owner or call_site.startswith(f"{owner}."))


def merged(sites: Sequence[Site]) -> Site:
    """Merge sites of one tied weight into one site."""
    first, *rest = sites
    if not rest:
        return first
    names = tuple(name for site in sites for name in site.names)
    readers = tuple(reader for site in sites for reader in site.readers)
    aliases = tuple(dict.fromkeys(alias for site in sites for alias in site.aliases))
    modules = tuple(dict.fromkeys(path for site in sites for path in site.modules))
    described = _described(readers, first.shape)
    return dataclasses.replace(
        first,
        names=names,
        tied=tuple(name for name in first.tied if name not in names),
        aliases=aliases,
        modules=modules,
        readers=readers,
        merged=True,
        **described,
    )


def _parametrized(module: CapturedModule, names: list[str]) -> list[str]:
    """Return the names that parametrized weights have without torch's parametrization.

    These are the module's path and the name of its parameter. If a weight has several originals
    (weight_norm has a magnitude and a direction), the names belong to the largest.
    """
    found: list[str] = []
    for name in names:
        owner, _, path = name.rpartition(".parametrizations.")
        tensor, _, original = path.partition(".")
        if original.startswith("original"):
            container = module.get_submodule(name.rpartition(".")[0])
            sizes = {n: p.numel() for n, p in container.named_parameters(recurse=False)}
            if sizes[original] == max(sizes.values()):
                found += [owner, f"{owner}.{tensor}"]
    return found


def _site(
    names: list[str],
    weight: torch.Tensor,
    readers: tuple[Reader, ...],
    writer: Reader | None,
) -> Site:
    modules = _modules(names, readers)
    short = [name.removesuffix("_weight") for name in names]  # MultiheadAttention's in_proj
    return Site(
        name=_owner(names[0]),
        parameter=names[0],
        names=tuple(names),
        tied=(),
        aliases=tuple(dict.fromkeys([*map(_owner, names), *names, *short, *modules])),
        modules=modules,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        readers=readers,
        writer=writer,
        quantised=is_quantised(weight),
        **_described(readers, tuple(weight.shape)),
    )


def _described(readers: tuple[Reader, ...], shape: Shape) -> dict[str, Any]:
    """Return the fields of `Site` that follow from a weight's reads."""
    main = _main_reader(readers)
    kind = main.kind if main else "python"
    layout = main.layout if main and main.layout else _convention(main, shape)
    groups = named_argument(main.node, "groups", "n_weight_grps") if main else None
    return {
        "op": kind,
        "layout": layout,
        "layout_known": bool(readers) and all(reader.layout for reader in readers),
        "groups": groups if layout.kernel(shape) and isinstance(groups, int) else 1,
        "padding_idx": _padding_idx(readers, shape[0]),
    }


def _convention(main: Reader | None, shape: Shape) -> Layout:
    """Return the layout for a weight whose layout is unknown: its op's, else outputs first."""
    declared = main and layout_given(main.node, main.weight, main.op, len(shape))
    return declared or standard_layout(len(shape), False)


def _padding_idx(readers: tuple[Reader, ...], rows: int) -> int | None:
    """Return the row that no read trains: the padding row of every read, or None."""
    found = {padding_row(reader.node, rows) for reader in readers}
    return found.pop() if len(found) == 1 else None


def _main_reader(readers: tuple[Reader, ...]) -> Reader | None:
    """Return the read that determines the site's op: a product with data if there is one."""
    known = [reader for reader in readers if reader.op]
    with_data = [reader for reader in known if not reader.weights_only]
    return next(iter((*with_data, *known, *readers)), None)


def _owner(parameter: str) -> str:
    module, _, name = parameter.rpartition(".")
    return module if module and name == "weight" else parameter


def _modules(names: list[str], readers: tuple[Reader, ...]) -> tuple[str, ...]:
    """Return the modules that own a weight, and those around them whose forward reads it."""
    owners = [name.rpartition(".")[0] for name in names]
    around = [
        reader.call_site
        for reader in readers
        if not reader.through and any(owner.startswith(f"{reader.call_site}.") for owner in owners)
    ]
    return tuple(dict.fromkeys(filter(None, [*owners, *around])))
