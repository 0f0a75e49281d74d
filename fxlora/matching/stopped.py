"""Quantised layers that pass no gradient to their input: what is adapted in front of them.

A layer that quantises its activations may have no derivative with respect to them, which only a
trial of the layer itself can tell. The branch of an adapter on such a layer passes one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedOpError, warn
from ..fx.calls import example_value
from ..fx.trials import concrete_sizes
from ..module import CapturedModule
from ..module.ambient import no_ambient_modes
from ..module.quantised import is_quantised
from ..plan import Plan
from ..reads.gradient_flow import Flow
from ..reads.readers import Reader
from ..reads.sites import Site, find_sites
from ..tables import some

ADVICE = (
    "Train over a base with quantised weights only, or over the plain one, and load the adapter "
    "here."
)


@dataclass(frozen=True)
class _Stop:
    """A read of a quantised weight that passes no gradient to an input."""

    site: Site
    reader: Reader
    source: fx.Node


@no_ambient_modes()
def check_gradients(module: CapturedModule, plan: Plan) -> None:
    """Warn if a quantised layer stops gradients of adapters in front of it.

    Args:
        module: the captured module.
        plan: the plan of its adapters.

    Raises:
        UnsupportedOpError: an adapter would get no gradient at all.
    """
    if not any(map(is_quantised, module.parameters())):
        return
    sites = find_sites(module)
    by_name = {name: site for site in sites for name in site.names}
    adapted = {entry.site: by_name[entry.parameter] for entry in plan if entry.parameter in by_name}
    nodes = {id(_outermost(r)) for site in adapted.values() for r in site.readers}
    stops = [stop for site in sites for stop in _stops(module, site) if _behind(stop, nodes)]
    if not stops:
        return
    ours = {id(site) for site in adapted.values()}
    alone = {(s.reader.node, s.source) for s in stops if id(s.site) not in ours}
    flow = Flow.of(module.distinct_graphs(), module, alone)
    names = some(dict.fromkeys(stop.site.name for stop in stops))
    for name, site in adapted.items():
        if not any(reader.node in flow.trained for reader in site.readers):
            raise UnsupportedOpError(
                f"'{name}' would never train: no gradient of the outputs arrives, because layers "
                f"that quantise their inputs pass none on: {names}. {ADVICE}"
            )
    warn(
        f"layers that quantise their inputs pass no gradient on: {names}. Adapters in front of "
        f"them train by the paths around them only. {ADVICE}"
    )


def _stops(module: CapturedModule, site: Site) -> Iterator[_Stop]:
    """Yield the reads of a site's weight that pass no gradient to one of their inputs."""
    weight = module.get_parameter(site.parameter)
    if not is_quantised(weight) or weight.is_meta:
        return
    for reader in site.readers:
        for source in _stopped(reader, weight):
            yield _Stop(site, reader, source)


def _stopped(reader: Reader, weight: torch.Tensor) -> list[fx.Node]:
    """Return the inputs of a read that get no gradient in a call with random numbers."""
    node = reader.node
    values: dict[fx.Node, torch.Tensor] = {reader.weight: weight.detach()}
    generator = torch.Generator().manual_seed(0)
    for given in node.all_input_nodes:
        example = example_value(given)
        if given is reader.weight:
            continue
        if example is None or not example.is_floating_point():
            return []  # unknown
        drawn = torch.randn(concrete_sizes(example.shape), generator=generator)
        values[given] = drawn.to(weight.device, example.dtype).requires_grad_()
    inputs = [given for given in values if given is not reader.weight]
    function: Any = node.target
    try:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        with torch.enable_grad():
            output = function(*args, **kwargs).sum()
            wanted = [values[given] for given in inputs]
            found = torch.autograd.grad(output, wanted, materialize_grads=True)
    except Exception:  # noqa: BLE001 - a call raises anything for inputs that it does not support
        return []
    return [given for given, gradient in zip(inputs, found, strict=True) if not gradient.any()]


def _behind(stop: _Stop, nodes: Collection[int]) -> bool:
    """Whether an input that gets no gradient depends on one of these nodes of whole graphs."""
    waiting, seen = [stop.reader.path[0].node if stop.reader.path else stop.source], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(node) in nodes and node is not _outermost(stop.reader):
            return True
        waiting += node.all_input_nodes
    return False


def _outermost(reader: Reader) -> fx.Node:
    """Return the node of the whole graph that a read is in."""
    return reader.path[0].node if reader.path else reader.node
