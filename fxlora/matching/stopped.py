"""Quantised layers that pass no gradient to their input: what is adapted in front of them.

A layer that quantises its activations may have no derivative with respect to them, which only a
trial of the layer itself can tell. The branch of an adapter on such a layer passes one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ..errors import UnsupportedOpError, warn
from ..fx.calls import example_value
from ..fx.nested import operand_of
from ..fx.trials import concrete_sizes
from ..module import CapturedModule
from ..module.quantised import is_quantised
from ..plan import Plan
from ..reads.gradient_flow import Flow
from ..reads.readers import Reader
from ..reads.sites import Site
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


def check_gradients(module: CapturedModule, plan: Plan, sites: Collection[Site]) -> None:
    """Warn if a quantised layer stops gradients of adapters in front of it.

    Args:
        module: the captured module.
        plan: the plan of its adapters.
        sites: its sites.

    Raises:
        UnsupportedOpError: an adapter would get no gradient at all.
    """
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
                f"'{name}' would never train: no gradient of the outputs arrives, because "
                f"{names} quantised with activations, and passes none to its input. {ADVICE}"
            )
    warn(
        f"{names}: quantised with activations, and no gradient passes to the input. Adapters in "
        f"front train by the paths around it only. {ADVICE}"
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
    function, args, kwargs = node.target, *_with(node, values)
    try:
        with torch.enable_grad():
            output = function(*args, **kwargs)
            found = torch.autograd.grad(
                output.sum(), [values[given] for given in inputs], allow_unused=True
            )
    except Exception:  # noqa: BLE001 - a call raises anything for inputs that it does not support
        return []
    return [given for given, gradient in zip(inputs, found, strict=True) if gradient is None]
