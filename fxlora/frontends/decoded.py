"""Make the weights that a captured graph decodes from constants parameters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..fx.calls import call_site, example_value
from ..module import CapturedModule
from ..module.decoded import DecodedTensor, Decoder
from .rounded import dequantises, round_straight_through
from .subgraphs import as_module, computed_from

_MOST_BITS = 8


def decode_weights(module: CapturedModule) -> None:
    """Replace each chain of ops from constants to a weight, in all graphs, by a parameter.

    The constants are the module's buffers, of which one holds codes of 8 bits or fewer that only an
    op which dequantises by definition reads: other buffers of few bits are masks, adjacencies or
    tables, whatever they are multiplied with. The weight is read by an op that is not pointwise.
    The parameter is the `weight` of the module whose forward reads it, or else has the name of the
    codes. Activations that the same graphs quantise and dequantise are then rounded
    straight-through, so that what is in front of them can train.
    """
    buffers = dict(module.named_buffers(remove_duplicate=False))
    if not any(map(_is_code, buffers.values())):
        return
    chains = _chains(module, buffers)
    for chain in chains:
        chain.replace(module, buffers)
    graphs = module.distinct_graphs()
    read = {str(node.target) for graph in graphs for node in graph.find_nodes(op="get_attr")}
    for name in {name for chain in chains for name in chain.names} - read:
        _remove_buffer(module, name)
    if chains:
        for graph in graphs:
            round_straight_through(graph)
        module.refresh()


def _chains(module: CapturedModule, buffers: dict[str, torch.Tensor]) -> list[_Chain]:
    """Return the chains to replace: those that every graph which reads their codes has, alike."""
    graphs = module.distinct_graphs()
    found = (_Chain.of(node, buffers) for graph in graphs for node in graph.nodes)
    by_codes: dict[str, list[_Chain]] = {}
    for chain in found:
        if chain is not None and chain.names[0] not in module.known.written:
            by_codes.setdefault(chain.names[0], []).append(chain)
    return [
        chain
        for name, chains in by_codes.items()
        if len({chain.key for chain in chains}) == 1
        if [chain.last.graph for chain in chains] == list(_reading(module, name))
        for chain in chains
    ]


def _reading(module: CapturedModule, name: str) -> Iterator[fx.Graph]:
    """Yield the graphs that read a tensor, once for each read."""
    for graph in module.distinct_graphs():
        for node in graph.find_nodes(op="get_attr", target=name):
            if node.users:
                yield graph


@dataclass(frozen=True, eq=False)
class _Chain:
    """The ops of a graph that compute a weight from constants.

    Attributes:
        last: the node of the weight.
        nodes: the nodes of the chain, in graph order.
        names: the names of the constants, that of the codes first.
        decoder: the chain as a graph of its own.
    """

    last: fx.Node
    nodes: Sequence[fx.Node]
    names: tuple[str, ...]
    decoder: Decoder

    @property
    def key(self) -> Any:
        return self.names, self.decoder, self.site

    @property
    def site(self) -> str:
        """Path of the module whose forward reads the weight, or "" for none or several."""
        sites = {call_site(user) for user in self.last.users}
        return sites.pop() if len(sites) == 1 else ""

    @classmethod
    def of(cls, last: fx.Node, buffers: dict[str, torch.Tensor]) -> _Chain | None:
        value = example_value(last)
        if last.op != "call_function" or value is None or value.ndim < 2:
            return None
        nodes = computed_from(last) if value.is_floating_point() and _is_weight(last) else None
        if nodes is None or any(set(n.users) - {*nodes} for n in nodes if n is not last):
            return None
        sources = [node for node in nodes if node.op == "get_attr"]
        names = [str(node.target) for node in sources]
        if len(set(names)) < len(names) or not buffers.keys() >= set(names):
            return None
        codes = [node for node in sources if _is_code(buffers[str(node.target)])]
        if len(codes) != 1 or not all(map(dequantises, codes[0].users)):
            return None
        sources.sort(key=lambda node: node is not codes[0])
        decoder = Decoder(as_module(sources, nodes), tuple(value.shape), value.dtype)
        return cls(last, nodes, tuple(str(node.target) for node in sources), decoder)

    def replace(self, module: CapturedModule, buffers: dict[str, torch.Tensor]) -> None:
        """Put the parameter in the chain's place."""
        name = self._name(module)
        if not isinstance(_parameter(module, name), DecodedTensor):
            parts = {f"part_{n}": buffers[source] for n, source in enumerate(self.names)}
            _remove_buffer(module, self.names[0])
            weight = DecodedTensor(parts, self.decoder)
            module.set_parameter(name, nn.Parameter(weight, requires_grad=False))
        graph = self.last.graph
        with graph.inserting_before(self.last):
            fetched = graph.create_node("get_attr", name)
        fetched.meta = dict(self.last.meta)
        self.last.replace_all_uses_with(fetched)
        for node in reversed(self.nodes):
            graph.erase_node(node)

    def _name(self, module: CapturedModule) -> str:
        """Return the name for the parameter: free, or that of a parameter that nothing reads.

        PT2E leaves the parameter in the module that it made codes of.
        """
        name = f"{self.site}.weight"
        held = _parameter(module, name)
        if not self.site or (held is None and _has(module, name)):
            return self.names[0]
        if held is None:
            return name
        ours = isinstance(held, DecodedTensor) and held.decoder == self.decoder
        unread = held.shape == self.decoder.shape and not any(_reading(module, name))
        return name if ours or unread else self.names[0]


def _parameter(module: CapturedModule, name: str) -> torch.Tensor | None:
    return dict(module.named_parameters(remove_duplicate=False)).get(name)


def _has(module: CapturedModule, name: str) -> bool:
    """Whether a module has anything under a name."""
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value is not None


def _is_code(tensor: torch.Tensor) -> bool:
    few = tensor.dtype.itemsize * 8 <= _MOST_BITS and tensor.dtype != torch.bool
    return few and tensor.ndim > 1


def _is_weight(node: fx.Node) -> bool:
    """Whether ops read a value together with data, and none of them is pointwise."""
    return bool(node.users) and all(
        user.op == "call_function"
        and torch.Tag.pointwise not in getattr(user.target, "tags", ())
        and computed_from(user) is None
        for user in node.users
    )


def _remove_buffer(module: CapturedModule, name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    container = module.get_submodule(owner)
    container._buffers.pop(attribute, None)
    container._non_persistent_buffers_set.discard(attribute)
