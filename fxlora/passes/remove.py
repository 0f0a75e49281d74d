"""Remove: undo an injection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ..errors import InjectError
from ..fx.compare import alike_graphs
from ..fx.nested import nested_graph
from ..module import CapturedModule
from ..module.casts import base_dtype, unmark
from ..module.state import State
from .base import Pass
from .structure import insertions, remove_insertion


@dataclass(frozen=True)
class Remove(Pass):
    """Take the adapters out of the graphs, and delete their parameters.

    Attributes:
        restore: whether to also restore buffers and the parameters trained in full to their values
            before injection.
    """

    restore: bool = True

    def check(self, module: CapturedModule) -> None:
        if module.plan is None:
            raise InjectError("nothing to remove: the module has no adapters.")

    def rewrite(self, module: CapturedModule) -> State:
        for graph in module.distinct_graphs():
            for insertion in reversed(insertions(module, graph)):
                remove_insertion(insertion)
        if self.restore:
            _restore(module)
        return drop_adapters(module)


def _restore(module: CapturedModule) -> None:
    """Restore buffers and the parameters trained in full to their values before injection."""
    aliases, held = module.aliases(), module.state_tensors()
    apart = module.plan.untied if module.plan else {}
    for name, original in module.known.originals.items():
        if name in module.trained:
            restored = nn.Parameter(original)
            for alias in (*aliases[name], *apart.get(name, ())):  # tied again
                module.set_parameter(alias, restored)
        else:
            with torch.no_grad():
                held[name].copy_(original)


def drop_adapters(module: CapturedModule) -> State:
    """Delete the plan's parameters, and require gradients where the source model did.

    Returns:
        The module's state without adapters.
    """
    for name in module.adapter_parameters():
        module.remove_parameter(name)
    _round_trained(module)
    unmark(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in module.known.grads)
    merge_modes(module)
    return module.known.without_adapters()


def _round_trained(module: CapturedModule) -> None:
    """Round the parameters trained in full to the model's dtype, as their casts in graphs do."""
    aliases = module.aliases() if module.trained else {}
    for name in module.trained:
        parameter, dtype = module.get_parameter(name), base_dtype(module, name)
        if parameter.dtype != dtype:
            rounded = nn.Parameter(parameter.detach().to(dtype))
            for alias in aliases[name]:
                module.set_parameter(alias, rounded)


def merge_modes(module: CapturedModule) -> None:
    """Share one graph between the modes again where only dropout on branches made them differ."""
    for program in module.programs:
        train, evaluation = program.graphs["train"], program.graphs["eval"]
        if train is not evaluation and alike_graphs(train, evaluation):
            program.graphs["train"] = evaluation
            for path in _nested_paths(module, train) - _nested_paths(module, evaluation):
                module.delete_submodule(path)


def _nested_paths(module: CapturedModule, graph: fx.Graph) -> set[str]:
    """Return the paths of the nested graphs that a graph fetches."""
    return {str(node.target) for node in graph.nodes if nested_graph(node, module)}
