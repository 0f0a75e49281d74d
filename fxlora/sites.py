"""Sites: every weight of a captured module with every node that reads it, in every graph."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .module import CapturedModule
from .ops import FLATTENED
from .readers import Reader, readers_and_writers


@dataclass(frozen=True)
class Site:
    """A weight of two or more dimensions, by tensor identity, and all its readers.

    Attributes:
        name: the owner: a module's path for its `weight`, else the parameter's name.
        parameter: the parameter's (first) name in `state_dict()`.
        names: all its names in `state_dict()`: a tied weight has several.
        aliases: every name that a rule may call it by: those, the modules that own them, and
            the module around them whose forward reads the weight instead (MultiheadAttention
            reads its out_proj's).
        op: kind of the op that reads it, or that reads what is computed from it and other
            weights alone (W * mask, a parametrization); of the first with a row in the table.
            "python" where no graph reads it.
        shape: of the weight.
        in_features, out_features: of the layer (channels, for a convolution).
        kernel_size: of a convolution, else ().
        groups: of a convolution, else 1.
        in_first: whether the weight is stored (in, out).
        padding_idx: row of an embedding that never trains, or None.
        dtype: of the weight.
        readers: the nodes that read it, over all graphs.
        writer: a node that writes to it, or None.
        overlaps: other parameters in the same memory.
        outside: where Python reads it outside of every captured region ("" where nothing was seen
            to read it), or None where graphs alone read it.
    """

    name: str
    parameter: str
    names: tuple[str, ...]
    aliases: tuple[str, ...]
    op: str
    shape: tuple[int, ...]
    in_features: int
    out_features: int
    kernel_size: tuple[int, ...]
    groups: int
    in_first: bool
    padding_idx: int | None
    dtype: torch.dtype
    readers: tuple[Reader, ...] = field(repr=False)
    writer: Reader | None = field(repr=False)
    overlaps: tuple[str, ...] = ()
    outside: str | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def why_outside(self) -> str:
        """Why no graph stands for its reads."""
        if self.outside:
            return f"is read by the model's Python at {self.outside}, outside of captured regions"
        return "is in no captured region: the example ran nothing that reads it"

    @property
    def convolution(self) -> bool:
        return self.op.startswith("conv") and "transpose" not in self.op

    @property
    def max_rank(self) -> int:
        """The rank beyond which a low-rank pair says nothing more: min(d0, d1)."""
        return min(self.shape[0], math.prod(self.shape[1:]))


def find_sites(module: CapturedModule) -> list[Site]:
    """The sites of a module that no adapter has been injected into, in the model's order."""
    readers, writers = readers_and_writers(module)
    overlaps, uncovered = _overlaps(module), module.uncovered
    sites: list[Site] = []
    for first, names in module.aliases().items():
        weight = module.get_parameter(first)
        found = tuple(reader for name in names for reader in readers.get(name, ()))
        if weight.ndim < 2 or not weight.is_floating_point() or not (found or first in uncovered):
            continue
        writer = next((writers[name] for name in names if name in writers), None)
        site = _site(first, names, weight, found, writer)
        sites.append(
            dataclasses.replace(
                site,
                aliases=(*site.aliases, *_parametrized(module, names)),
                overlaps=tuple(overlaps.get(first, ())),
                outside=uncovered.get(first),
            )
        )
    return sites


def _parametrized(module: CapturedModule, names: list[str]) -> list[str]:
    """The names that weights behind torch's parametrizations have for the user: the module's.

    Of several originals (weight_norm has a magnitude and a direction) the largest has them.
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


def _overlaps(module: CapturedModule) -> dict[str, list[str]]:
    """Parameters that are different tensors over the same memory, by name."""
    spans: list[tuple[int, int, str]] = []
    for name, parameter in module.named_parameters():
        start = 0 if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
        if start:
            last = sum(
                (n - 1) * s for n, s in zip(parameter.shape, parameter.stride(), strict=True)
            )
            spans.append((start, start + (last + 1) * parameter.element_size(), name))
    found: dict[str, list[str]] = {}
    spans.sort()
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            found.setdefault(name, []).append(other)
            found.setdefault(other, []).append(name)
    return found


def _site(
    first: str,
    names: list[str],
    weight: torch.Tensor,
    readers: tuple[Reader, ...],
    writer: Reader | None,
) -> Site:
    main = _main_reader(readers)
    kind = main.kind if main else "python"
    shape = tuple(weight.shape)
    in_first = main.op.in_first if main and main.op else False
    flattened = FLATTENED.get(kind) == len(shape)
    groups = _groups(main.node) if main and flattened else 1
    inputs, outputs = (shape[0], shape[1]) if in_first else (shape[1], shape[0])
    if "transpose" in kind:
        inputs, outputs = shape[0], shape[1] * groups
    elif flattened:
        inputs = shape[1] * groups
    return Site(
        name=_owner(first),
        parameter=first,
        names=tuple(names),
        aliases=_aliases(names, readers),
        op=kind,
        shape=shape,
        in_features=inputs,
        out_features=outputs,
        kernel_size=shape[2:] if flattened else (),
        groups=groups,
        in_first=in_first,
        padding_idx=_padding_idx(main.node) if main and kind == "embedding" else None,
        dtype=weight.dtype,
        readers=readers,
        writer=writer,
    )


def _main_reader(readers: tuple[Reader, ...]) -> Reader | None:
    """The read that names the site's op: a product with data if there is one."""
    known = [reader for reader in readers if reader.op]
    with_data = [reader for reader in known if not reader.alone]
    return next(iter((*with_data, *known, *readers)), None)


def _owner(parameter: str) -> str:
    module, _, name = parameter.rpartition(".")
    return module if module and name == "weight" else parameter


def _aliases(names: list[str], readers: tuple[Reader, ...]) -> tuple[str, ...]:
    modules = [name.rpartition(".")[0] for name in names]
    around = [
        reader.call_site
        for reader in readers
        if not reader.through
        and any(module.startswith(f"{reader.call_site}.") for module in modules)
    ]
    return tuple(dict.fromkeys([*map(_owner, names), *names, *filter(None, modules), *around]))


def _groups(node: fx.Node) -> int:
    names = [argument.name for argument in _schema(node)]
    position = next(i for i, name in enumerate(names) if name in ("groups", "n_weight_grps"))
    given = position < len(node.args)
    groups: Any = node.args[position] if given else node.kwargs.get(names[position], 1)
    return int(groups)


def _schema(node: fx.Node) -> Any:
    schema: Any = getattr(node.target, "_schema", None)
    return schema.arguments


def _padding_idx(node: fx.Node) -> int | None:
    index: Any = node.args[2] if len(node.args) > 2 else -1
    return index if index >= 0 else None
