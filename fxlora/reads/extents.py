"""Extents: which outputs of a weight its reads reach, where they slice it first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from .facts import moves_data
from .readers import Reader
from .sites import Site


def reads_any(site: Site, rows: tuple[int, int]) -> bool:
    """Whether some read of a weight reaches some of these outputs, as far as can be told."""
    size = site.shape[site.layout.part_dim]
    view = [size if dim == site.layout.part_dim else 1 for dim in range(len(site.shape))]
    numbered = torch.arange(size, dtype=torch.int32).reshape(view).expand(site.shape).contiguous()
    return any(_reaches(reader, numbered, range(*rows)) for reader in site.readers)


def _reaches(reader: Reader, numbered: torch.Tensor, rows: range) -> bool:
    """Move the numbers of the outputs as the weight is moved on its way to a read."""
    way = list(_way(reader.weight))
    if not way or reader.path or not all(moves_data(node) for node in way[1:]):
        return True  # everything, as far as is known
    values: dict[fx.Node, Any] = {way[0]: numbered}
    for node in way[1:]:
        assert callable(node.target)
        values[node] = node.target(*fx.map_arg(node.args, values.__getitem__))
    found = values[way[-1]]
    return bool(((found >= rows.start) & (found < rows.stop)).any())


def _way(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes from a weight to what a read is given, if there is one way."""
    if node.op == "get_attr":
        yield node
    elif len(node.all_input_nodes) == 1:
        yield from _way(node.all_input_nodes[0])
        yield node
